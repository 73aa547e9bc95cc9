"""The arguments of a deferred call, as they travel: a JSON object, arguments by name.

    run_some_stats.later(team_id)   ->   {"team_id": "5f8e0a6c..."}

Rules:

1. The annotations of the function say what is what: numbers, texts, bytes, dates, Decimal, UUID, enums, dataclasses,
   lists and tuples and dicts of them, and what `carries` has taught. A parameter without annotation takes what JSON
   itself can tell apart: text, numbers, truth values, None, and lists and dicts of them.
2. What would not arrive as it was given is refused where it is given, with the name of the parameter.
3. `*args` travel as a list under their name, `**kwargs` among the others. So any program that writes JSON can call.

Source: the types are those of msgspec.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import inspect
import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any, TypeVar, get_type_hints

import msgspec

from lamsonq.records import make_ready

T = TypeVar("T")

_carried: dict[type, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {}


def carries(kind: type[T], to_json: Callable[[T], Any], from_json: Callable[[Any], T]) -> None:
    """Teach how values of a type travel: `to_json` makes of one what JSON can tell, `from_json` takes it back.

    A Django model by its key: `carries(Team, lambda team: team.pk, lambda key: Team.objects.get(pk=key))`.
    """
    if not isinstance(kind, type):
        raise TypeError(f"carries takes a class, not {kind!r}")
    _carried[kind] = to_json, from_json


def encode(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> bytes:
    """The body of a job that calls the function so. Raises TypeError for what does not fit or cannot travel."""
    parameters = _parameters(function)
    try:
        bound = inspect.signature(function).bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"{_name(function)}: {error}") from None
    told: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        parameter = parameters[name]
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            told |= {key: _told(function, key, item, parameter) for key, item in value.items()}
        elif parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            told[name] = [_told(function, name, item, parameter) for item in value]
        else:
            told[name] = _told(function, name, value, parameter)
    try:
        return json.dumps(told, separators=(",", ":"), allow_nan=False).encode("ascii")
    except (ValueError, RecursionError) as error:
        raise TypeError(f"{_name(function)}: JSON cannot tell {_shown(told)}: {error}") from error


def decode(function: Callable[..., Any], body: bytes) -> tuple[list[Any], dict[str, Any]]:
    """(args, kwargs) of the call. Raises ValueError, with a reason, for a body that is no call of this function."""
    try:
        told = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the arguments of {_name(function)} are no JSON: {error}") from error
    if not isinstance(told, dict):
        raise ValueError(f"the arguments of {_name(function)} are no JSON object, arguments by name")
    parameters = _parameters(function)
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    rest = dict(told)
    by_position = True
    for name, parameter in parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            continue
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            items = rest.pop(name, [])
            if not isinstance(items, list):
                raise ValueError(f"{_name(function)}: {name} is a list of arguments, not {items!r}")
            if items and not by_position:
                raise ValueError(f"{_name(function)}: arguments before *{name} are missing")
            args += [_value(function, name, item, parameter) for item in items]
        elif name not in rest:
            if parameter.default is inspect.Parameter.empty:
                raise ValueError(f"{_name(function)}: the argument {name!r} is missing; given: {_list(told)}")
            by_position = False
        else:
            value = _value(function, name, rest.pop(name), parameter)
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY or not by_position:
                kwargs[name] = value
            else:
                args.append(value)
    others = next((p for p in parameters.values() if p.kind is inspect.Parameter.VAR_KEYWORD), None)
    if rest and others is None:
        raise ValueError(f"{_name(function)} has no parameter {_list(rest)}; it takes {_list(parameters)}")
    if others is not None:
        kwargs |= {name: _value(function, name, item, others) for name, item in rest.items()}
    return args, kwargs


def by_name(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by the names of the parameters, those of `**kwargs` among them."""
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    found = dict(bound.arguments)
    for name, parameter in _parameters(function).items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            found |= found.pop(name)
    return found


def _told(function: Callable[..., Any], name: str, value: Any, parameter: inspect.Parameter) -> Any:
    """What JSON tells of a value; tried out, so that it arrives as it was given."""
    if parameter.annotation in (inspect.Parameter.empty, Any):
        try:
            plain = _is_plain(value)
        except RecursionError as error:
            raise TypeError(f"{_where(function, name, value)} cannot travel: {error}") from error
        if not plain:
            raise TypeError(
                f"{_where(function, name, value)} cannot travel: annotate {name} with its type,"
                f" {type(value).__qualname__}; without annotation only text, numbers, truth values, None, lists and"
                " dicts of them can"
            )
        return value
    try:
        told = _told_by(value, parameter.annotation)
        again = _from_told(told, parameter.annotation)
        same = _told_by(again, parameter.annotation) == told and _has_arrived(value, again)
    except (TypeError, ValueError, msgspec.ValidationError, NotImplementedError, RecursionError) as error:
        where = _where(function, name, value)
        meant = inspect.formatannotation(parameter.annotation)
        raise TypeError(f"{where} cannot travel as {meant}: {error}") from error
    if not same:
        raise TypeError(f"{_where(function, name, value)} would not arrive as it is, but as {_shown(again)}")
    return told


def _has_arrived(value: Any, again: Any) -> bool:
    """Whether this is what was given, where msgspec would tell a date or bytes as a text and say nothing. What
    `carries` has taught need not be equal to what it was; a text may stand for a date, as other programs give it."""
    if type(value) in _PLAIN:
        return True
    if not _carried.keys().isdisjoint(type(value).__mro__):
        return True
    if isinstance(value, set | frozenset):
        return isinstance(again, set | frozenset) and all(item in again for item in value if isinstance(item, _EQUALS))
    if isinstance(value, Mapping):
        if not isinstance(again, Mapping):
            return True  # a mapping for a dataclass
        return value.keys() == again.keys() and all(_has_arrived(value[key], again[key]) for key in value)
    if isinstance(value, list | tuple):
        return isinstance(again, list | tuple) and all(map(_has_arrived, value, again))
    if isinstance(value, datetime | time):
        return isinstance(again, type(value)) and _moment(value) == _moment(again)
    if isinstance(value, Decimal):
        return isinstance(again, Decimal) and str(again) == str(value)
    if dataclasses.is_dataclass(value):
        parts = [(getattr(value, field.name), getattr(again, field.name, None)) for field in dataclasses.fields(value)]
        return type(again) is type(value) and all(_has_arrived(*part) for part in parts)
    return not isinstance(value, _EQUALS) or bool(again == value)


_PLAIN = (str, int, float, bool, type(None))
_EQUALS = (bytes, bytearray, memoryview, date, timedelta, uuid.UUID, enum.Enum)


def _moment(value: datetime | time) -> tuple[Any, ...]:
    """All that says which moment is meant: two are equal to Python that differ in `fold`."""
    offset = value.utcoffset()
    return value.replace(tzinfo=None, fold=0), offset, value.fold if offset is None else 0


def _where(function: Callable[..., Any], name: str, value: Any) -> str:
    return f"{_name(function)}({name}={_shown(value)})"


def _shown(value: Any) -> str:
    try:
        return f"{value!r:.80}"
    except Exception:  # a number of very many digits, or a type that cannot show itself
        return f"<{type(value).__qualname__}>"


def _value(function: Callable[..., Any], name: str, told: Any, parameter: inspect.Parameter) -> Any:
    if parameter.annotation is inspect.Parameter.empty:
        return told
    try:
        return _from_told(told, parameter.annotation)
    except (TypeError, ValueError, msgspec.ValidationError, NotImplementedError, RecursionError) as error:
        raise ValueError(f"{_name(function)}: the argument {name!r} cannot be read: {error}") from error


def _told_by(value: Any, kind: Any) -> Any:
    if isinstance(kind, type) and kind in _carried:
        return _carried[kind][0](value)
    return msgspec.to_builtins(value, str_keys=True, enc_hook=_to_json)


def _from_told(told: Any, kind: Any) -> Any:
    if isinstance(kind, type) and kind in _carried:
        return _carried[kind][1](told)
    make_ready(kind)
    return msgspec.convert(told, kind, str_keys=True, dec_hook=_from_json)


def _to_json(value: Any) -> Any:
    for kind in type(value).__mro__:
        if kind in _carried:
            return _carried[kind][0](value)
    raise NotImplementedError(
        f"nobody has said how a {type(value).__qualname__} travels: carries({type(value).__qualname__}, ...) does"
    )


def _from_json(kind: type, told: Any) -> Any:
    if kind in _carried:
        return _carried[kind][1](told)
    raise NotImplementedError(f"nobody has said how a {kind.__qualname__} travels: carries({kind.__qualname__}, ...)")


def _is_plain(value: Any) -> bool:
    if type(value) is list:
        return all(map(_is_plain, value))
    if type(value) is dict:
        return all(type(key) is str and _is_plain(item) for key, item in value.items())
    return value is None or type(value) in (str, bool, int) or (type(value) is float and value == value)


@functools.lru_cache(maxsize=4096)
def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The parameters with their annotations as types, not as text."""
    parameters = inspect.signature(function).parameters
    try:
        kinds = get_type_hints(function, include_extras=True)
    except NameError as error:
        raise TypeError(f"{_name(function)}: an annotation names what its module does not have: {error}") from error
    return {name: p.replace(annotation=kinds.get(name, p.empty)) for name, p in parameters.items()}


def _name(function: Callable[..., Any]) -> str:
    return f"{function.__module__}.{function.__qualname__}"


def _list(names: Mapping[str, Any]) -> str:
    return ", ".join(names) or "nothing"
