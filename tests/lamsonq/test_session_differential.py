"""A session of ours and one of aiosmtpd, told the same: the codes of the replies and what is taken are the same too.

Left out is what is meant to differ: other line ends than CRLF, control characters and paths that are no addresses (ours
refuses more), HELP, whether a command
out of order is told so before it is told of its syntax, and how many errors a client may make.
"""

from __future__ import annotations

import asyncio
import random

import pytest
from aiosmtpd import smtp

from .offline import Taker, cut, ours, talk, theirs

COMMANDS = [
    b"EHLO me.test",
    b"HELO me.test",
    b"EHLO",
    b"NOOP",
    b"noop with words",
    b"RSET",
    b"RSET now",
    b"MAIL FROM:<a@x.test>",
    b"MAIL FROM:<>",
    b"mail from:<B@x.test>",
    b"MAIL FROM:<a@x.test>",
    b"RCPT TO:<b@y.test>",
    b"RCPT TO:<b@y.test>",
    b"rcpt to:<C@y.test>",
    b"VRFY joe",
    b"FOO",
    b"FOO bar",
    b"QUITE",
    b"x" * 400,
    b"\xc3\xbc",
    b"QUIT now",
]
CONTENTS = [
    b"",
    b"x",
    b".",
    b"..",
    b"\r\n",
    b"a\r\n.b\r\n..\r\n",
    b"\r\n\r\n",
    b"NOOP\r\nRSET",
    b"z" * 390,
    b"z" * 500,
]


def conversation(chance: random.Random) -> bytes:
    lines = [b"EHLO me.test"] if chance.random() < 0.8 else []
    for _ in range(chance.randint(0, 12)):
        if chance.random() < 0.3:
            lines += [b"MAIL FROM:<a@x.test>", b"RCPT TO:<b@y.test>", b"DATA", chance.choice(CONTENTS), b"."]
            if chance.random() < 0.5:
                lines.insert(-5, b"RSET")  # else it may be nested
        else:
            lines.append(chance.choice(COMMANDS))
    if chance.random() < 0.7:
        lines.append(b"QUIT")
    return b"\r\n".join([*lines, b""])


async def both(octets: bytes, places: list[int]) -> list[tuple[list[bytes], object]]:
    found: list[tuple[list[bytes], object]] = []
    for session in (theirs, ours):
        taker = Taker()
        transport = await talk(session(taker), cut(octets, places))
        found.append((transport.codes, taker.taken))
    return found


@pytest.mark.parametrize("seed", range(4))
def test_random_sessions_in_random_pieces(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smtp, "BOGUS_LIMIT", 1000)
    chance = random.Random(seed)
    for _ in range(15):
        octets = conversation(chance)
        if not octets:
            continue
        places = chance.choices(range(len(octets)), k=chance.choice([0, 0, 3, 20]))
        stock, mine = asyncio.run(both(octets, places))
        assert mine == stock, (octets, mine, stock)


def test_a_session_that_is_cut_at_every_byte() -> None:
    octets = b"EHLO a\r\nMAIL FROM:<a@x.test>\r\nRCPT TO:<b@y.test>\r\nDATA\r\n"
    octets += b"x\r\n..\r\n\r\n.\r\nFOO\r\nMAIL FROM:<>\r\nQUIT\r\n"
    whole, _ = asyncio.run(both(octets, []))
    for places in [[place] for place in range(1, len(octets))] + [list(range(1, len(octets)))]:
        stock, mine = asyncio.run(both(octets, places))
        assert mine == stock == whole, places


FRAGMENTS = [b"\r\n", b"\r", b"\n", b".", b"..", b"\r\n.\r", b"\n.\n", b"\r\n..", b"a", b"text", b"\r\n.", b"x" * 90]


def test_content_of_dots_and_line_ends_in_random_pieces() -> None:
    chance = random.Random(7)
    for _ in range(150):
        octets = b"EHLO me\r\n"
        for _ in range(chance.randint(1, 3)):
            body = b"".join(chance.choices(FRAGMENTS, k=chance.randint(0, 25)))
            if b"\r\n.\r\n" in b"\r\n" + body + b"\r\n":
                continue  # it ends there; what follows would be commands
            dots = (b"\r\n" + body).count(b"\r\n.")
            if len(body) + 2 - dots <= Taker.size_limit < len(body) + 2:
                continue  # aiosmtpd counts doubled dots, too: RFC 1870 section 5 does not
            octets += b"MAIL FROM:<a@x.test>\r\nRCPT TO:<b@y.test>\r\nDATA\r\n" + body + b"\r\n.\r\n"
        octets += b"QUIT\r\n"
        stock, mine = asyncio.run(both(octets, chance.choices(range(len(octets)), k=chance.randint(0, 12))))
        assert mine == stock, octets
