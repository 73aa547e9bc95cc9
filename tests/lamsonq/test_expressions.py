"""What an expression says of the addresses that it matches: no match is lost by it, and no step is left out."""

import math
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lamsonq.expressions import LONGEST_KEY, SHAPES_MAX, Index, Shape, folded, read
from lamsonq.marks import Marks
from lamsonq.routing import RoutingBase
from lamsonq.table import Handler, Table

ALPHABET = "aAbkKsSiI\u212aſıİé@.-_0\n"
TEXTS = st.text(ALPHABET, max_size=8)
FRAGMENTS = [
    *("a", "b", "K", "s", "i", "ſ", "é", "\u212a", "İ", "@", r"\.", r"\-", "-", "_", "{", "}", "]", "0", "\n", r"\@"),
    *(".", "[ab]", "[^a]", "[]a]", "[^]a]", r"[\]a]", "[a-z]", "[)(|]", r"\w", r"\d", r"\S", "^", "$", r"\b", r"\Z"),
    *("*", "+", "?", "{2}", "{,2}", "{1,}", "{1,2}", "*?", "+?", "??", "*+", "?+", "|", "|", "{,}", "{}", "{a}", "#"),
    *("(", "(", "(?:", "(?P<x>", ")", ")", ")", "(?=", "(?!", "(?<=", "(?i:", "(?-i:", "(?s:", "(?>", "(?#", r"\1"),
    *("(?P=x)", "(?x)", "(?a)", "(?(1)a|b)", r"\x41", r"\101", r"\u0041", r"\n", r"\A", r"\B", r"\ ", " "),
]


def compiled(expression: str) -> re.Pattern[str] | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return re.compile(expression, re.IGNORECASE)
        except (re.error, OverflowError):
            return None


def _grouped(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    many = st.lists(inner, min_size=1, max_size=4)
    opening = st.sampled_from(["(", "(?:", "(?i:", "(?=", "(?!"])
    return st.one_of(
        many.map("".join),
        st.builds(lambda start, parts: f"{start}{'|'.join(parts)})", opening, many),
        st.builds(
            lambda part, times: f"(?:{part}){times}", inner, st.sampled_from(["*", "+", "?", "{0,2}", "??", "*?"])
        ),
    )


ATOMS = st.sampled_from([fragment for fragment in FRAGMENTS if compiled(fragment)])
EXPRESSIONS = st.one_of(
    st.recursive(ATOMS, _grouped, max_leaves=8),
    st.lists(st.sampled_from(FRAGMENTS), max_size=10).map("".join),
).filter(lambda expression: compiled(expression) is not None)


def table_of(expressions: Sequence[str]) -> Table:
    table = Table()
    for expression in expressions:
        table.register(expression, Handler(lambda message, **_: None, "app", Marks(stateless=True)), "here")  # noqa: ARG005
    return table


def one_after_the_other(table: Table, address: str) -> list[tuple[str, dict[str, str]]]:
    """What the index must not change."""
    return [
        (route.expression, {name: value for name, value in found.groupdict().items() if value is not None})
        for route in table.routes.values()
        if (found := route.compiled.fullmatch(address))
    ]


def by_the_index(table: Table, address: str) -> list[tuple[str, dict[str, str]]]:
    return [(route.expression, captures) for route, captures in table.matches(address)]


@settings(max_examples=150, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
@given(st.lists(EXPRESSIONS, min_size=1, max_size=8), st.data())
def test_the_index_finds_what_asking_every_route_finds(expressions: list[str], data: st.DataObject) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = table_of(expressions)
        for _ in range(4):
            near = data.draw(st.sampled_from(expressions))
            address = data.draw(st.one_of(TEXTS, st.from_regex(near, fullmatch=True) if "(?" not in near else TEXTS))
            for asked in (address, address.swapcase(), address.replace("k", "\u212a").replace("s", "ſ")):
                assert by_the_index(table, asked) == one_after_the_other(table, asked)


ROUTES = [
    r"(?P<list>[a-z]+)-(?P<action>subscribe|leave)@(?P<host>blog\.com|[a-z]+\.org)",
    r"(?P<list>[a-z]+)@(?P<host>blog\.com|[a-z]+\.org)",
    r"list-(?P<list>.+)@blog.com",
    r"postmaster@(?P<host>.+)",
    r"desk@blog\.com",
    r"(?!desk)(?P<any>.+)@blog\.com",
    r"(desk|info)(\+.*)?@blog\.com",
    r"(?P<any>.*)",
    r"K(?P<i>i+)s@blog\.com",
]


@pytest.mark.parametrize(
    "address",
    [
        *(
            "news-leave@blog.com",
            "News@Perl.ORG",
            "list-x@blogxcom",
            "desk@blog.com",
            "info+x@blog.com",
            "postmaster@é",
        ),
        *("kis@blog.com", "\u212aiſ@blog.com", "KİıS@BLOG.COM", "desk@blog.com\n", ""),
    ],
)
def test_routes_as_they_are_written_lead_where_they_did(address: str) -> None:
    table = table_of(ROUTES)
    assert by_the_index(table, address) == one_after_the_other(table, address)


def test_no_character_but_these_four_is_an_ascii_letter_to_re() -> None:
    every = "".join(map(chr, range(sys.maxunicode + 1)))
    known = folded(every)
    assert len(known) == len(every)
    assert folded(every[:128]) == known[:128]
    for number in (*b"abcdefghijklmnopqrstuvwxyz", *b"0-._@[`{~"):
        alike = [found.start() for found in re.finditer(re.escape(chr(number)), every, re.IGNORECASE)]
        assert alike == [found.start() for found in re.finditer(re.escape(chr(number)), known)]


@pytest.mark.parametrize("size", [1, 10, 100, 1000])
@pytest.mark.parametrize("form", [r"list{}-(?P<x>.+)@blog\.(com|org)", r"(?P<x>.+)@blog{}\.com", r"desk{}@blog\.com"])
def test_of_a_thousand_routes_only_the_few_that_can_match_are_asked(size: int, form: str) -> None:
    index = Index()
    for number in range(size):
        index.add(number, read(form.format(number)).shapes)
    address = re.sub(r"\(\?P.*?\)|\\", "", form).replace("(com|org)", "org").format(size // 2).replace("@", "joe@")
    assert size // 2 in index.candidates(address.replace("joe@", "@") if form.startswith("desk") else address)
    assert len(index.candidates(address)) <= 4
    assert len(index.candidates("nobody@example.com")) <= 1


def test_an_expression_says_how_its_addresses_begin_and_end() -> None:
    assert read(r"List-(?P<x>[a-z]+)@(?:a|b)\.com").shapes == (Shape("list-", "@a.com"), Shape("list-", "@b.com"))
    assert read(r"a?b").shapes == (Shape("ab", "ab", whole=True), Shape("b", "b", whole=True))
    assert read(r"(?x) a b").shapes == read("(?=a)b").shapes == read(".*").shapes == (Shape("", ""),)


def test_more_alternatives_than_are_worth_it_are_any_text() -> None:
    many = "|".join(f"a{number}" for number in range(SHAPES_MAX + 1))
    assert read(f"x-(?:{many})@h").shapes == (Shape("x-", "@h"),)
    assert len(read("(a|b)" * 30).shapes) <= SHAPES_MAX


def test_a_long_text_is_one_key() -> None:
    index = Index()
    index.add(0, read("a" * 2 * LONGEST_KEY + ".*").shapes)
    assert index.candidates("A" * 3 * LONGEST_KEY) == [0]
    assert index.candidates("a" * (LONGEST_KEY - 1)) == []


# -- how long it may take ------------------------------------------------------------------------------------------

Node = tuple[Any, ...]
"""("text", c), ("class",), ("many", node), ("maybe", node), ("either", nodes) or ("row", nodes)."""

NODES = st.recursive(
    st.sampled_from([("text", "a"), ("text", "b"), ("class",), ("many", ("class",)), ("many", ("text", "a"))]),
    lambda inner: st.one_of(
        st.builds(lambda nodes: ("row", nodes), st.lists(inner, min_size=1, max_size=4)),
        st.builds(lambda nodes: ("either", nodes), st.lists(inner, min_size=2, max_size=3)),
        st.builds(lambda node: ("maybe", node), inner),
    ),
    max_leaves=6,
)


def written(node: Node) -> str:
    match node:
        case ("text", character):
            return str(character)
        case ("class",):
            return "[ab]"
        case ("many", one):
            return f"{written(one)}*"
        case ("maybe", one):
            return f"(?:{written(one)})?"
        case ("either", several):
            return f"(?:{'|'.join(map(written, several))})"
    return "".join(map(written, node[1]))


def steps_of(node: Node, address: str) -> int:
    """The characters and ends that plain backtracking looks at until it has tried all ways."""
    steps = 0

    def looks(one: Node, at: int) -> bool:
        nonlocal steps
        steps += 1
        return at < len(address) and (one[0] == "class" or one[1] == address[at])

    def go(one: Node, at: int, behind: Callable[[int], None]) -> None:
        match one:
            case ("many", single):
                ends = [at]
                while looks(single, ends[-1]):
                    ends.append(ends[-1] + 1)
                for end in reversed(ends):
                    behind(end)
            case ("maybe", inner):
                go(inner, at, behind)
                behind(at)
            case ("either", several):
                for each in several:
                    go(each, at, behind)
            case ("row", several):
                first, *rest = several
                go(first, at, (lambda end: go(("row", rest), end, behind)) if rest else behind)
            case _:
                if looks(one, at):
                    behind(at + 1)

    def at_the_end(_at: int) -> None:
        nonlocal steps
        steps += 1

    go(node, 0, at_the_end)
    return steps


@settings(max_examples=300)
@given(NODES, st.text("ab", max_size=8))
@example(("row", [("many", ("class",)), ("many", ("class",)), ("text", "b")]), "aaaaaaaa")
def test_matching_takes_no_more_steps_than_an_expression_says(node: Node, address: str) -> None:
    assert steps_of(node, address) <= read(written(node)).steps(len(address))


@pytest.mark.parametrize(
    "expression", ["(a+)+@b", "(?:a|ab)*@b", r"(.)\1@b", "(?=a*)b", "(?>a*)b", "a?" * 2000, "a*" * 9]
)
def test_of_what_can_blow_up_no_end_is_promised(expression: str) -> None:
    assert read(expression).steps(20) == math.inf


# -- what the router makes of it -----------------------------------------------------------------------------------


def router_of(*expressions: str) -> RoutingBase:
    router = RoutingBase()
    router.table = table_of(expressions)
    return router


def test_a_router_says_at_once_what_it_can_say_in_a_moment() -> None:
    router = router_of(r"(?P<list>[a-z]+)-(?P<action>[a-z]+)@(?P<host>blog\.com|blog\.org)", r"(a+)+@slow\.com")
    assert router.takes_at_once("News-Leave@Blog.com") is True
    assert router.takes_at_once("nobody@example.com") is False
    assert router.takes_at_once("a@slow.com") is None


def test_an_address_that_is_made_to_take_long_is_not_answered_at_once() -> None:
    router = router_of(r"(?P<a>.+)-(?P<b>.+)-(?P<c>.+)@blog\.com")
    assert router.takes_at_once("-" * 64 + "@blog.com") is None


def test_a_router_that_looks_for_changed_files_says_nothing_at_once() -> None:
    router = router_of("desk@blog.com")
    router.RELOAD = True
    assert router.takes_at_once("desk@blog.com") is None
