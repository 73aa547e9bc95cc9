"""What an expression says about the addresses that it matches, before it is asked: how they begin and end, and how long
matching may take.

Rules:

1. `read` understands what routes are mostly made of: text, classes, groups, alternatives, repeats. Of anything else
   (lookarounds, backreferences, inline flags) it says that it may match every address and take any time.
2. It never promises too much. An address that an expression matches begins and ends as one of its shapes does, and
   matching takes at most as many steps as `Reading.steps` says. Others may do so, too.
3. Only ASCII is compared, in lower case. The four other characters that `re.IGNORECASE` takes for an ASCII letter (the
   dotted and the dotless i, the Kelvin sign, the long s) are that letter.
"""

from __future__ import annotations

import math
import re
from bisect import insort
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

SHAPES_MAX = 64
"""An expression with more alternatives than these is taken for one that may match everything there."""

LONGEST_KEY = 64
"""Characters of a beginning or an end that are looked at: so many dictionaries are asked at most."""

DEGREE_MAX = 6
"""Repeats behind each other from which on nobody waits for the answer, however short the address."""

STEPS_MAX = 10**9
"""Steps from which on it does not matter how many more they are."""

_TOKEN = re.compile(
    r"(?P<class>\[\^?+\]?+(?:[^\]\\]|\\.)*+\])"
    r"|(?P<open>\((?:\?:|\?P<\w+>|(?!\?)))"
    r"|(?P<close>\))"
    r"|(?P<bar>\|)"
    r"|(?P<edge>[\^$]|\\[AbBZ])"
    r"|(?P<any>\.|\\[dDsSwW])"
    r"|(?P<text>\\[^0-9A-Za-z]|[^\\\[()|^$.*+?])",
    re.DOTALL,
)
_REPEAT = re.compile(r"(?P<times>[*+?]|\{(?:[0-9]+(?:,[0-9]*)?|,[0-9]*)\})[?+]?")

_ASCII_OF = str.maketrans({chr(c): chr(c).lower() for c in range(128)} | {"İ": "i", "ı": "i", "\u212a": "k", "ſ": "s"})


@dataclass(frozen=True, slots=True)
class Shape:
    """Texts that begin with `head` and end with `tail`, in lower case; `whole`: the one text that is both."""

    head: str
    tail: str
    whole: bool = False


@dataclass(frozen=True, slots=True)
class Reading:
    """What is known of an expression, or of a part of one.

    Matching it, and then a rest that takes r steps, takes at most (ways * r + work) * (n + 1) ** degree steps, where n
    is the length of the address. `single` is what matches exactly one character.
    """

    shapes: tuple[Shape, ...]
    ways: int = 1
    work: int = 0
    degree: float = 0
    single: bool = False

    def steps(self, length: int) -> float:
        """The steps that matching an address of this length takes at most; infinite where there is no saying."""
        if self.degree > DEGREE_MAX or self.ways + self.work > STEPS_MAX:
            return math.inf
        return (self.ways + self.work) * math.pow(length + 1, self.degree)


ANY = Shape("", "")
NOTHING = Shape("", "", whole=True)
UNKNOWN = Reading((ANY,), degree=math.inf)
_EMPTY = Reading((NOTHING,))


def folded(address: str) -> str:
    """The address as shapes are compared with it (rule 3)."""
    return address.lower() if address.isascii() else address.translate(_ASCII_OF)


def read(expression: str) -> Reading:
    """What a regular expression that `re.compile` has accepted says, compiled with IGNORECASE."""
    outer: list[tuple[list[Reading], Reading]] = []
    branches: list[Reading] = []
    sequence = _EMPTY
    position = 0
    while position < len(expression):
        token = _TOKEN.match(expression, position)
        if token is None:
            return UNKNOWN
        position = token.end()
        match token.lastgroup:
            case "open":
                outer.append((branches, sequence))
                branches, sequence = [], _EMPTY
                continue
            case "bar":
                branches.append(sequence)
                sequence = _EMPTY
                continue
            case "close":
                part = _either([*branches, sequence])
                branches, sequence = outer.pop()
            case kind:
                part = _atom(kind, token[0])
        if repeat := _REPEAT.match(expression, position):
            position = repeat.end()
            part = _repeated(part, repeat["times"])
        sequence = _then(sequence, part)
    return _either([*branches, sequence])


def _atom(kind: str | None, text: str) -> Reading:
    if kind == "edge":  # it only forbids: `$` also matches in front of a line end, and that is text of its own
        return Reading((NOTHING,), work=1)
    if kind == "text" and text.isascii():
        character = text[-1].lower()
        return Reading((Shape(character, character, whole=True),), work=1, single=True)
    return Reading((ANY,), work=len(text), single=True)  # `re` may compare with each element of a class


def _then(first: Reading, second: Reading) -> Reading:
    """The one, and behind it the other."""
    behind = second.shapes if len(first.shapes) * len(second.shapes) <= SHAPES_MAX else (ANY,)
    return Reading(
        tuple(dict.fromkeys(_joined(one, other) for one in first.shapes for other in behind)),
        first.ways * second.ways,
        first.ways * second.work + first.work,
        first.degree + second.degree,
    )


def _joined(one: Shape, other: Shape) -> Shape:
    head = one.head + other.head if one.whole else one.head
    tail = one.tail + other.tail if other.whole else other.tail
    return Shape(head, tail, one.whole and other.whole)


def _either(branches: Sequence[Reading]) -> Reading:
    if len(branches) == 1:
        return replace(branches[0], single=False)
    shapes = tuple(dict.fromkeys(shape for branch in branches for shape in branch.shapes))
    return Reading(
        shapes if len(shapes) <= SHAPES_MAX else (ANY,),
        sum(branch.ways for branch in branches),
        sum(branch.work + 1 for branch in branches),
        max(branch.degree for branch in branches),
    )


def _repeated(part: Reading, times: str) -> Reading:
    if times == "?":
        return replace(_either([part, _EMPTY]), single=False)
    if part.single:  # each character that it can take or leave is one way to go on
        return Reading((ANY,), work=part.work, degree=1)
    return UNKNOWN


class Index:
    """Which of many expressions may match an address: the few whose shapes it has, and those that fit all addresses."""

    def __init__(self) -> None:
        self._heads: defaultdict[str, list[int]] = defaultdict(list)
        self._tails: defaultdict[str, list[int]] = defaultdict(list)
        self._head_lengths: list[int] = []
        self._tail_lengths: list[int] = []
        self._always: list[int] = []

    def add(self, number: int, shapes: Iterable[Shape]) -> None:
        """Add an expression: under that end of each shape that fewer others have."""
        for head, tail in {(shape.head[:LONGEST_KEY], shape.tail[-LONGEST_KEY:]) for shape in shapes}:
            if not head and not tail:
                self._always.append(number)
            elif not tail or (head and self._rank(self._heads, head) < self._rank(self._tails, tail)):
                _put(self._heads, self._head_lengths, head, number)
            else:
                _put(self._tails, self._tail_lengths, tail, number)

    @staticmethod
    def _rank(numbers: dict[str, list[int]], key: str) -> tuple[int, int]:
        return len(numbers.get(key, ())), -len(key)

    def candidates(self, address: str) -> list[int]:
        """The numbers of the expressions that may match, in order."""
        key = folded(address)
        size = len(key)
        found = [*self._always]
        for length in self._head_lengths:
            if length > size:
                break
            if numbers := self._heads.get(key[:length]):
                found += numbers
        for length in self._tail_lengths:
            if length > size:
                break
            if numbers := self._tails.get(key[size - length :]):
                found += numbers
        in_order = len(found) == 1 or len(found) == len(self._always)
        return found if in_order else sorted(set(found))


def _put(numbers: defaultdict[str, list[int]], lengths: list[int], key: str, number: int) -> None:
    numbers[key].append(number)
    if len(key) not in lengths:
        insort(lengths, len(key))
