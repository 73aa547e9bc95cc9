"""The user's modules: importing them, noticing that they changed, and reading them anew.

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

from lamsonq.errors import Refusal, UsageError, reason_of
from lamsonq.marks import MODULES


def load_handlers(name: str) -> None:
    """Import a handler module, so that `marks.MODULES` tells what it defines. Raises what `load` raises."""
    if name not in sys.modules:
        MODULES.pop(name, None)
    load(name)


def load(module: str) -> ModuleType:
    """Import a module of the user's by its dotted name. Raises UsageError, in one line with file and line."""
    try:
        return importlib.import_module(module)
    except Refusal:
        raise
    except (Exception, SystemExit) as error:  # users' modules may raise anything; the user needs one line
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            dotted = module.removesuffix(".py").replace("/", ".")
            meant = f": did you mean {dotted}?" if dotted != module else f" (no module named {error.name!r})"
            raise UsageError(f"there is no module {module} in {os.getcwd()}{meant}") from error
        reason = f"SyntaxError: {error.msg}" if isinstance(error, SyntaxError) else reason_of(error)
        raise UsageError(f"{_place(error, module)}: {reason}") from error


def _place(error: BaseException, module: str) -> str:
    """`file:line` of the project's own line that an error came out of, seen from the current directory."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{_short(error.filename)}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    package = os.path.dirname(__file__)
    own = [f for f in frames if os.path.isabs(f.filename) and not f.filename.startswith(package)]
    near = [f for f in own if not _short(f.filename).startswith(("/", "."))] or own
    # The last frame inside the project: what it called beyond that is named in the error itself.
    return f"{_short(near[-1].filename)}:{near[-1].lineno}" if near else module


def _short(filename: str) -> str:
    path = os.path.relpath(filename)
    return filename if path.startswith("..") else path


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
