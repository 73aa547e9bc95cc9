"""The table of routes: which expression leads to which state functions. Made whole, then never changed."""

from __future__ import annotations

import inspect
import logging
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from lamsonq.errors import RouteError
from lamsonq.expressions import Index, Reading, read
from lamsonq.marks import MODULES, Marks, ModuleMarks, StateKeyGenerator, marks_of

LOG = logging.getLogger("routing")

_CAPTURE = re.compile(r"(?<!\\)\(([A-Za-z_]\w*)\)")
"""A capture: a bare word in parentheses. `(?:a|b)`, `(.+)` and `\\(x\\)` stay what they are."""


@dataclass(frozen=True, slots=True)
class Handler:
    """A state function in a table."""

    function: Callable[..., Any]
    module: str
    marks: Marks

    @property
    def name(self) -> str:
        return f"{self.module}.{self.function.__name__}"

    @property
    def state(self) -> str:
        return self.function.__name__


@dataclass(frozen=True, slots=True)
class Route:
    """One expression with the handlers that it leads to, in order of definition."""

    expression: str
    compiled: re.Pattern[str]
    reading: Reading
    handlers: list[Handler]


@dataclass(frozen=True, slots=True)
class Table:
    """All routes in order, with what is known of each module: its state key generator and its states."""

    routes: dict[str, Route] = field(default_factory=dict)
    modules: dict[str, StateKeyGenerator | None] = field(default_factory=dict)
    states: dict[str, set[str]] = field(default_factory=dict)
    handlers: dict[str, Handler] = field(default_factory=dict)
    _order: list[Route] = field(default_factory=list)
    _index: Index = field(default_factory=Index)

    def matches(self, address: str) -> Iterator[tuple[Route, dict[str, str]]]:
        """The routes that match the whole address, in order, with their captures."""
        for number in self._index.candidates(address):
            route = self._order[number]
            found = route.compiled.fullmatch(address)
            if found is not None:
                yield route, {name: value for name, value in found.groupdict().items() if value is not None}

    def steps(self, address: str) -> float:
        """The steps that `matches` takes at most, some of them several of the processor's; infinite where there is no
        saying."""
        size = len(address)
        return sum(self._order[number].reading.steps(size) for number in self._index.candidates(address))

    def register(self, expression: str, handler: Handler, where: str) -> None:
        """Add a handler under a resolved expression; only while the table is being made."""
        found = self.routes.get(expression)
        if found is None:
            try:
                compiled = re.compile(expression, re.IGNORECASE)
            except re.error as error:
                raise RouteError(f"{where}: {expression!r} is not a regular expression: {error}") from error
            found = self.routes[expression] = Route(expression, compiled, read(expression), [])
            self._index.add(len(self._order), found.reading.shapes)
            self._order.append(found)
        _check_call(handler, found.compiled, where)
        if handler not in found.handlers:
            found.handlers.append(handler)
        self.handlers[handler.name] = handler
        if not handler.marks.stateless:  # a conversation that was in a function which is stateless now begins anew
            self.states.setdefault(handler.module, set()).add(handler.state)


def build_table(modules: Iterable[str], captures: Mapping[str, str]) -> Table:
    """The table of these imported modules. Raises RouteError, with file and line of the decorator."""
    table = Table()
    named: dict[str, Callable[..., Any]] = {}
    for name in modules:
        marked = MODULES.get(name) or ModuleMarks()
        table.modules[name] = marked.state_key
        for function in marked.functions:
            _add(table, name, function, captures)
            _check_name(named, function)
    return table


def _check_name(named: dict[str, Callable[..., Any]], function: Callable[..., Any]) -> None:
    """A request type means one function. Raises RouteError."""
    name = marks_of(function).name
    if name is not None and named.setdefault(name, function) is not function:
        both = " and ".join(f"{f.__module__}.{f.__name__}" for f in (named[name], function))
        raise RouteError(f"@deferrable(name={name!r}) is said of both {both}: a request type means one function")


def _add(table: Table, module: str, function: Callable[..., Any], captures: Mapping[str, str]) -> None:
    marks = marks_of(function)
    if not marks.routes and (marks.policy is None or marks.stateless or marks.nolocking):
        raise RouteError(f"{module}.{function.__name__} has a decorator of lamsonq.routing but no @route")
    _check_policy(module, function, marks)
    held = _held(sys.modules[module], function)
    if held is None:
        where = marks.routes[0].where if marks.routes else "@deferrable"
        raise RouteError(
            f"{where}: {module}.{function.__name__} is marked, but the module holds another"
            f" {function.__name__}; give the two functions different names"
        )
    if not marks.routes:
        return  # a deferred call: lamsonq.deferred finds it by its name
    if inspect.isgeneratorfunction(held) or inspect.isasyncgenfunction(held):
        raise RouteError(f"{marks.routes[0].where}: {module}.{function.__name__} is a generator: nobody would run it")
    handler = Handler(held, module, marks_of(held))
    for mark in marks.routes:
        where = f"{mark.where}: @route({mark.format!r})"
        table.register(_resolved(mark.format, {**captures, **mark.captures}, where), handler, where)


def _check_call(handler: Handler, compiled: re.Pattern[str], where: str) -> None:
    """A function is called with the message and what its route captures. Raises RouteError where it cannot be.

    One with *args is only warned of: some of Lamson's users write (message, *kw), also where nothing ever calls it.
    """
    try:
        # As it is called: a decorator that takes anything may fill in what the function below it needs.
        signature = inspect.signature(handler.function, follow_wrapped=False)
    except (TypeError, ValueError):
        return  # nobody knows what it takes
    try:
        signature.bind(None, **dict.fromkeys(compiled.groupindex, ""))
    except TypeError as error:
        called = ", ".join(["message", *(f"{name}=..." for name in compiled.groupindex)])
        trouble = f"{where}: {handler.name} is called as {handler.state}({called}): {error}"
        if not any(taken.kind is taken.VAR_POSITIONAL for taken in signature.parameters.values()):
            raise RouteError(trouble) from error
        LOG.warning("%s; it will fail: write **captures, not *captures", trouble)


def _check_policy(module: str, function: Callable[..., Any], marks: Marks) -> None:
    """What decides when a job is put cannot be kept by a state function: messages are put by whoever pushes them."""
    if marks.routes and marks.policy is not None and (at_put := marks.policy.at_put):
        raise RouteError(
            f"{marks.routes[0].where}: {module}.{function.__name__} has a route, so {at_put[0]} is not for its"
            " @deferrable: give it where the message is pushed, push(message, delay=..., expires=..., priority=...)"
        )
    if marks.routes and (marks.schedule is not None or marks.name is not None):
        word = "@periodic" if marks.schedule is not None else "name=..."
        raise RouteError(
            f"{marks.routes[0].where}: {word} is for plain functions, and {module}.{function.__name__} has a route"
        )


def _resolved(format: str, captures: Mapping[str, str], where: str) -> str:
    def expand(found: re.Match[str]) -> str:
        name = found[1]
        if name not in captures:
            raise RouteError(f"{where} uses ({name}), which neither the route nor Router.defaults defines")
        return f"(?P<{name}>{captures[name]})"

    return _CAPTURE.sub(expand, format)


def _held(module: ModuleType, function: Callable[..., Any]) -> Callable[..., Any] | None:
    """What the module calls by this function's name, if that is the function, perhaps under other decorators."""
    named: Callable[..., Any] | None = module.__dict__.get(function.__name__)
    layer = named
    while layer is not None:
        if layer is function:
            return named
        layer = getattr(layer, "__wrapped__", None)
    return None
