"""Handler modules: importing them, noticing that they changed, and reading them anew.

A reload executes modules as objects of their own. The old ones are put back when any of them fails, so a function that
is running, or that an old table still holds, never sees half of a new module.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType

from lamsonq.errors import UsageError, reason_of
from lamsonq.marks import MODULES


def import_handlers(name: str) -> None:
    """Import one handler module. Raises UsageError, in one line that names the place in the user's code."""
    if name not in sys.modules:
        MODULES.pop(name, None)
    try:
        importlib.import_module(name)
    except Exception as error:  # whatever a module's body raises
        raise UsageError(f"cannot load the handlers {name!r}: {reason_of(error)}{place_of(error)}") from error


def place_of(error: BaseException) -> str:
    """` (file:line)` of the user's code in which an error came up; "" when there is none."""
    if isinstance(error, SyntaxError):
        return f" ({error.filename}:{error.lineno})"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "importlib" not in f.filename]
    own = [f for f in frames if os.path.dirname(__file__) != os.path.dirname(f.filename)]
    return f" ({own[-1].filename}:{own[-1].lineno})" if own else ""


def changed_at(name: str) -> float:
    """When the module's file was last changed, in seconds since the epoch; 0.0 when there is no file to ask."""
    try:
        return os.stat(getattr(sys.modules[name], "__file__", None) or "").st_mtime
    except (KeyError, OSError):
        return 0.0


@contextmanager
def reread(names: Sequence[str]) -> Iterator[None]:
    """Execute these modules anew, in order; when that or the block raises, all are what they were."""
    old = {name: (sys.modules[name], MODULES.get(name)) for name in names}
    try:
        for name in names:
            _execute(name, old[name][0])
        yield
    except BaseException:
        for name, (module, marks) in old.items():
            _install(name, module)
            MODULES.pop(name, None)
            if marks is not None:
                MODULES[name] = marks
        raise


def _execute(name: str, old: ModuleType) -> None:
    spec = old.__spec__
    if spec is None or spec.loader is None or not spec.origin:
        return
    importlib.invalidate_caches()
    module = importlib.util.module_from_spec(spec)
    MODULES.pop(name, None)
    _install(name, module)
    # From the source, not by the loader: its cached bytecode is told apart only by whole seconds and the size.
    with open(spec.origin, "rb") as source:
        exec(compile(source.read(), spec.origin, "exec"), module.__dict__)


def _install(name: str, module: ModuleType) -> None:
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent in sys.modules:
        setattr(sys.modules[parent], child, module)
