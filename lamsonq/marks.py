"""What the decorators write on a function. Nothing is registered anywhere that matters until a router loads it.

Rules:

1. A decorator returns the function that it was given, so a state function is called, tested and returned as such.
2. The order of decorators on one function does not matter, except that stacked routes are tried bottom up.
3. Importing a handler module needs no router, no settings and no broker.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from lamsonq.policy import Policy

F = TypeVar("F", bound=Callable[..., Any])
StateKeyGenerator = Callable[[str, Any], str]

_ATTRIBUTE = "_lamsonq_marks"


@dataclass(frozen=True, slots=True)
class RouteMark:
    """One `@route`: the expression as it was written, its captures, and where it stands."""

    format: str
    captures: dict[str, str]
    where: str


@dataclass(frozen=True, slots=True)
class Marks:
    """All that the decorators said of one function. `name` is the request type of a deferred call, if it is not the
    function's dotted name; `schedule` is when it is put by itself (crontab(5))."""

    routes: tuple[RouteMark, ...] = ()
    stateless: bool = False
    nolocking: bool = False
    policy: Policy | None = None
    name: str | None = None
    schedule: str | None = None


@dataclass
class ModuleMarks:
    """What one module's decorators marked, in the order in which they ran."""

    functions: list[Callable[..., Any]] = field(default_factory=list)
    state_key: StateKeyGenerator | None = None


MODULES: dict[str, ModuleMarks] = {}


def marks_of(function: Callable[..., Any]) -> Marks:
    """The marks of a function; empty ones for a function that no decorator has touched."""
    return getattr(function, _ATTRIBUTE, None) or Marks()


def mark(function: F, **changes: Any) -> F:
    """Add to the marks of a function, and remember it in its module."""
    setattr(function, _ATTRIBUTE, replace(marks_of(function), **changes))
    marked = MODULES.setdefault(function.__module__, ModuleMarks()).functions
    if function not in marked:
        marked.append(function)
    return function


class route:
    """Decorator: this function takes mail for addresses that the expression matches in whole, in any case.

    Each `(name)` in the expression stands for a capture, given here or by `Router.defaults`, and becomes a keyword
    argument. Raises TypeError on a method: state functions are functions of a module.

    Source: Lamson's `lamson.routing.route`.
    """

    def __init__(self, format: str, **captures: str) -> None:
        caller = sys._getframe(1)
        self.mark = RouteMark(format, captures, f"{caller.f_code.co_filename}:{caller.f_lineno}")

    def __call__(self, function: F) -> F:
        if "." in function.__qualname__.rpartition("<locals>.")[2]:
            raise TypeError(
                f"@route on {function.__qualname__}: state functions are functions of a module, not methods"
            )
        return mark(function, routes=(*marks_of(function).routes, self.mark))


class route_like:
    """Decorator: routed exactly as another state function is. Raises TypeError when that one has no route."""

    def __init__(self, other: Callable[..., Any]) -> None:
        self.routes = marks_of(other).routes
        if not self.routes:
            raise TypeError(f"@route_like: {other.__module__}.{other.__qualname__} has no @route to copy")

    def __call__(self, function: F) -> F:
        return mark(function, routes=(*marks_of(function).routes, *self.routes))


def stateless(function: F) -> F:
    """Decorator: runs for every message that matches, whatever the sender's state; what it returns is ignored."""
    return mark(function, stateless=True)


def nolocking(function: F) -> F:
    """Decorator: runs without the conversation's lock, so two messages of one sender may run at once."""
    return mark(function, nolocking=True)


def state_key_generator(function: Callable[[str, Any], str]) -> Callable[[str, Any], str]:
    """Decorator: `(module_name, message) -> str` says which conversation of this module a message belongs to."""
    MODULES.setdefault(function.__module__, ModuleMarks()).state_key = function
    return function
