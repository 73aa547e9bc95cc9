"""Where jobs are kept: the module that a queue's URL names.

A plain path is a maildir. `scheme:...` is the module `lamsonq.backends.<scheme>`, or what somebody else has
registered under that name in the entry point group `lamsonq.backends`. Either has a function
`open_queue(url, *, pop_limit, oversize_dir) -> Backend`.
"""

from __future__ import annotations

import functools
import importlib
import os
import pkgutil
import re
from collections.abc import Callable

from lamsonq.errors import BrokerError
from lamsonq.jobs import Backend

GROUP = "lamsonq.backends"
_PATHS = ("maildir", "sqlite")
"""The schemes whose queues are named by a path."""

_SCHEME = re.compile(r"\A([A-Za-z][A-Za-z0-9+.-]*):")


def open_backend(url: str, *, pop_limit: int = 0, oversize_dir: str | None = None) -> Backend:
    """The store that this URL or path names; the same object as long as it is in use, so that asking again is cheap.

    Raises BrokerError for a scheme that nothing serves, and for what is no name of a queue.
    """
    # A scheme may be written in capitals (RFC 3986 section 3.1).
    url = _SCHEME.sub(lambda found: found[0].lower(), url).removeprefix("maildir:")
    if not url or "\0" in url:
        raise BrokerError(
            "a queue without a name: give a directory, as in run/posts, or a URL, as in sqlite:run/q.db?queue=posts;"
            f" not {url!r}"
        )
    match = _SCHEME.match(url)
    scheme = match[1] if match else "maildir"
    if not match and "?queue=" in url and not url.startswith(("/", "./")):
        raise BrokerError(f"{url!r} is no URL: put sqlite: in front. A directory of that name is written ./{url}")
    # A path means another directory or file after a chdir, so where we are is part of the question.
    place = os.path.abspath(url) if scheme in _PATHS else ""
    return _open(scheme, url, place, pop_limit, oversize_dir and os.path.abspath(oversize_dir))


def address_of(store: Backend) -> str:
    """What opens this store in another process, wherever that runs: its `address`, where it has one beside its name."""
    return str(getattr(store, "address", store.name))


@functools.lru_cache(maxsize=128)
def _open(scheme: str, url: str, _place: str, pop_limit: int, oversize_dir: str | None) -> Backend:
    backend: Backend = _opener(scheme, url)(url, pop_limit=pop_limit, oversize_dir=oversize_dir)
    return backend


def _opener(scheme: str, url: str) -> Callable[..., Backend]:
    own = _own(scheme)
    if own is not None:
        return own
    from importlib.metadata import entry_points  # when it is used: it brings twenty modules

    for entry in entry_points(group=GROUP, name=scheme):
        opener: Callable[..., Backend] = entry.load()
        return opener
    names = (module.name for module in pkgutil.iter_modules(__path__))
    known = sorted({name for name in names if _own(name)} | {entry.name for entry in entry_points(group=GROUP)})
    raise BrokerError(
        f"no queue backend serves {scheme}: (asked for {url!r}); installed are {', '.join(known)}. "
        f"A directory of that name is written ./{url}"
    )


def _own(scheme: str) -> Callable[..., Backend] | None:
    """The backend that comes with lamsonq; None where there is none, or its library is not installed."""
    try:
        module = importlib.import_module(f"{__name__}.{scheme}") if scheme.isidentifier() else None
    except ImportError:  # an extra that is not installed
        return None
    return getattr(module, "open_queue", None)
