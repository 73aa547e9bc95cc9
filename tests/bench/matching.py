"""How long it takes to find the routes of an address among many, and to deliver a message by them.

    python tests/bench/matching.py [messages]

The tables are those of a manager of mailing lists and of a host of blogs. The loop is `fullmatch` of one expression
after the other. A delivery makes the message of its bytes, finds its route among 100, and runs a function that does
nothing; where `salmon-mail` can be imported, its Router does the same with the same message.
"""

import importlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from typing import Any

from lamsonq.mail import MailRequest
from lamsonq.marks import Marks
from lamsonq.routing import RoutingBase
from lamsonq.table import Handler, Table

TABLES = {
    "a list each": (r"list{}-(?P<action>[a-z]+)@(?P<host>blog\.com|blog\.org)", "list{}-subscribe@blog.org"),
    "a host each": (r"(?P<post_name>[a-z.]+)@blog{}\.com", "my.first.post@blog{}.com"),
    "no text at either end": (r"(?P<name>[a-z.]+)-x{}x-(?P<host>.+)", "joe-x{}x-h@example.com"),
}
"""An expression and an address that it matches, each with a place for the number of the route."""

ROUNDS = 15
"""Each figure is the median of so many, which are taken in turns."""

DATA = b"From: joe@example.com\r\nTo: desk@example.com\r\nSubject: hello\r\n\r\n" + b"A line of text.\r\n" * 300


def nothing(message: object, **captures: str) -> None:
    """A state function that does nothing."""


def main(messages: int) -> None:
    print(f"{'routes':34} {'address':8} {'ours':>10} {'loop':>10}   loop / ours")
    for name, (expression, address) in TABLES.items():
        for size in (1, 10, 100, 1000):
            expressions = [expression.format(number) for number in range(size)]
            for kind, asked in (("hit", address.format(size // 2)), ("miss", "nobody@example.com")):
                _compare_matching(f"{size:5}, {name}", kind, expressions, asked)
    _compare_deliveries(messages)


def table_of(expressions: list[str]) -> Table:
    table = Table()
    for expression in expressions:
        table.register(expression, Handler(nothing, __name__, Marks(stateless=True)), "bench")
    return table


def _compare_matching(title: str, kind: str, expressions: list[str], address: str) -> None:
    table = table_of(expressions)
    compiled = [route.compiled for route in table.routes.values()]

    def ours() -> list[dict[str, str]]:
        return [captures for _, captures in table.matches(address)]

    def loop() -> list[dict[str, str | Any]]:
        return [found.groupdict() for each in compiled if (found := each.fullmatch(address))]

    assert ours() == loop()
    first, second = _by_turns([ours, loop], max(20, 5000 // len(expressions)))
    print(f"{title:34} {kind:8} {first * 1e6:7.2f} us {second * 1e6:7.2f} us {second / first:8.2f}")


def _compare_deliveries(messages: int) -> None:
    expression, address = TABLES["a list each"]
    expressions = [expression.format(number) for number in range(100)]
    addresses = [address.format(number) for number in range(100)]
    router = RoutingBase()
    router.table = table_of(expressions)
    makers: dict[str, tuple[Callable[..., Any], Callable[[Any], object]]] = {"ours": (MailRequest, router.deliver)}
    try:
        theirs = importlib.import_module("salmon.routing").Router
        theirs.clear_routes()
        for each in expressions:
            theirs.register_route(each, importlib.import_module("salmon.routing").stateless(nothing))
        makers["salmon"] = (importlib.import_module("salmon.mail").MailRequest, theirs.deliver)
    except ImportError as error:
        print(f"(without Salmon: {error})")
    works: list[Callable[[], object]] = []
    for build, deliver in makers.values():
        made = partial(_made, build, cycle(addresses))
        works += [made, partial(_delivered, made, deliver)]
    figures = _by_turns(works, messages)
    for number, name in enumerate(makers):
        build_time, whole = figures[2 * number : 2 * number + 2]
        print(f"{name}: {1 / build_time:.0f} messages made per second, {1 / whole:.0f} made and delivered", end="")
        print(f" ({figures[-1] / whole:.2f} x Salmon's)" if name == "ours" and "salmon" in makers else "")


def _made(build: Callable[..., Any], addresses: Iterator[str]) -> Any:
    return build("peer", "joe@example.com", next(addresses), DATA)


def _delivered(make: Callable[[], Any], deliver: Callable[[Any], object]) -> object:
    return deliver(make())


def _by_turns(works: list[Callable[[], object]], times: int) -> list[float]:
    """Seconds of the processor that each of these takes: what else the machine does is left out."""
    taken: list[list[float]] = [[] for _ in works]
    for _ in range(ROUNDS):
        for work, figures in zip(works, taken, strict=True):
            start = time.process_time()
            for _ in range(times):
                work()
            figures.append((time.process_time() - start) / times)
    return [statistics.median(figures) for figures in taken]


if __name__ == "__main__":
    main(*map(int, sys.argv[1:] or ["300"]))
