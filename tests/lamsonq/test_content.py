"""Large messages on their way in: they go on in a file, arrive octet for octet, and leave nothing behind."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamsonq import wire
from lamsonq.content import Spilled, has_bare_line_end
from lamsonq.limits import Limits
from lamsonq.lmtp import LMTPReceiver
from lamsonq.mail import MailRequest
from lamsonq.queue import Queue
from lamsonq.routing import RoutingBase
from lamsonq.session import Session
from lamsonq.smtp import SMTPReceiver
from lamsonq.trace import HOPS_MAX
from lamsonq.wire import Wire

from .clients import Client
from .offline import Taker, cut, ours, talk
from .waiting import until

Serve = Any
AFTER = 32
"""Octets after which a message spills in these tests."""

BEGIN = b"MAIL FROM:<a@x.test>\r\nRCPT TO:<desk@y.test>\r\n"
LINE = b"x" * 70 + b"\r\n"
LARGE = LINE * 100


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Wire, "spill_after", AFTER)
    monkeypatch.setattr(wire, "CHUNK", 64)  # what comes whole in one of these does not spill


@pytest.fixture
def spilled(monkeypatch: pytest.MonkeyPatch) -> list[Spilled]:
    """All that have been made."""
    made: list[Spilled] = []

    class Noted(Spilled):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            made.append(self)

    monkeypatch.setattr("lamsonq.session.Spilled", Noted)
    return made


@pytest.fixture(autouse=True)
def leaves_no_file(here: Path) -> Iterator[None]:
    before = nameless()
    yield
    until(lambda: nameless() == before)


def nameless() -> int:
    """Files of this process that have no name (any more)."""
    count = 0
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            count += os.readlink(f"/proc/self/fd/{descriptor}").endswith(" (deleted)")
        except FileNotFoundError:
            pass
    return count


def closed(spilled: list[Spilled]) -> bool:
    return bool(spilled) and all(each._file.closed for each in spilled)


def bdat(octets: bytes, last: bool = False) -> bytes:
    return b"BDAT %d%s\r\n%s" % (len(octets), b" LAST" if last else b"", octets)


def stuffed(content: bytes) -> bytes:
    """As DATA carries it (RFC 5321 section 4.5.2), with its end."""
    return (b"\r\n" + content).replace(b"\r\n.", b"\r\n..")[2:] + b".\r\n"


def sent(octets: bytes, places: list[int], taker: Taker, session: type[Session] | None = None) -> list[bytes]:
    """What was taken, when a client sends this in pieces."""

    async def run() -> None:
        client = ours(taker) if session is None else session(taker, asyncio.get_running_loop())
        transport = await talk(client, cut(octets, places), turns=1)
        assert transport.codes[:2] == [b"220", b"250"], transport.written
        assert client._spilled is None
        client.connection_lost(None)

    asyncio.run(run())
    assert taker.traffic.memory == 0
    return [content for _, _, content in taker.taken]


def by_data(content: bytes) -> bytes:
    return b"EHLO me\r\n" + BEGIN + b"DATA\r\n" + stuffed(content) + b"NOOP\r\n"


# -- octet for octet ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [AFTER - 8, *range(AFTER - 3, AFTER + 9), 2 * AFTER - 1, 2 * AFTER, 2 * AFTER + 1])
@pytest.mark.parametrize("line", [b"..\r\n", b".\r\n", b"ab.\r\n", b"\r\n", b"\r", b"\r\n.\r", b"x"])
def test_around_the_border_every_octet_arrives_however_it_is_cut(size: int, line: bytes) -> None:
    content = (line * size)[: size - 2] + b"\r\n"
    octets = by_data(content)
    begin = octets.index(b"DATA\r\n") + 6
    every = list(range(begin, len(octets)))
    for places in [[], every, every[::2], *([place] for place in every)]:
        assert sent(octets, places, Taker()) == [content], places


@pytest.mark.parametrize("pause", range(1, 7))
def test_the_end_is_found_and_no_other_wherever_a_piece_ends(pause: int) -> None:
    for before in range(AFTER, AFTER + 12):
        content = b"x" * before + b"\r\n.\r.\r\n..\r\n\r\n\n.\n\r\n"
        octets = by_data(content)
        end = len(octets) - len(b"NOOP\r\n")
        assert sent(octets, [end - pause], Taker()) == [content]
        assert sent(octets, list(range(end - pause, len(octets))), Taker()) == [content]


FRAGMENTS = [b"\r\n", b"\r", b"\n", b".", b"..", b"\r\n.\r", b"\n.\n", b"\r\n..", b"a", b"text", b"\r\n.", b"x" * 20]


@settings(max_examples=150, database=None)
@given(
    st.lists(st.sampled_from(FRAGMENTS), max_size=30).map(b"".join),
    st.lists(st.integers(0, 400), max_size=12),
    st.booleans(),
    st.booleans(),
)
def test_a_session_that_spills_says_and_takes_what_one_does_that_does_not(
    body: bytes, places: list[int], bare: bool, chunking: bool
) -> None:
    if chunking:
        middle = places[0] % (len(body) + 1) if places else 0
        octets = b"EHLO me\r\n" + BEGIN + bdat(body[:middle]) + bdat(body[middle:], last=True) + b"NOOP\r\n"
    else:
        octets = b"EHLO me\r\n" + BEGIN + b"DATA\r\n" + body + b"\r\n.\r\nNOOP\r\n"  # as it is: it may end before

    class InMemory(Session):
        spill_after = 1 << 20

    found = []
    for kind in (Session, InMemory):
        taker = Taker(carries_bare=bare)
        said: list[bytes] = []

        async def run(kind: type[Session] = kind, taker: Taker = taker, said: list[bytes] = said) -> None:
            session = kind(taker, asyncio.get_running_loop())
            transport = await talk(session, cut(octets, [place % len(octets) for place in places]), turns=1)
            said.append(transport.written)
            session.connection_lost(None)

        asyncio.run(run())
        assert taker.traffic.memory == 0
        found.append((said, taker.taken))
    assert found[0] == found[1]


def test_a_large_message_arrives_by_data_and_by_bdat(serve: Serve, spilled: list[Spilled]) -> None:
    content = b"".join(b".%d\r\n" % number for number in range(10_000))
    with Client(serve()) as client:
        client.begin("desk@y.test")
        client.say("DATA")
        client.send(stuffed(content))
        assert client.reply().startswith("250")
        client.send(BEGIN + bdat(content[:30_000]) + bdat(content[30_000:30_001]) + bdat(content[30_001:], True))
        assert client.reply().startswith("250")
        replies = [client.reply() for _ in range(4)]
        assert [reply[:3] for reply in replies] == ["250"] * 4
        assert replies[1] == "250 2.0.0 30000 octets received"
    assert [message.Data == content for message in serve.taken] == [True, True]
    assert len(spilled) == 2
    assert closed(spilled)


def test_many_small_pieces_spill_together(serve: Serve, spilled: list[Spilled]) -> None:
    receiver = serve()
    with Client(receiver) as client:
        client.begin("desk@y.test")
        client.send(bdat(b"abc") * 100)
        assert client.replies(100) == ["250"] * 100
        [session] = receiver._sessions
        assert receiver.traffic.memory == len(session._chunks or b"") <= AFTER
        client.send(bdat(b"", last=True))
        assert client.reply().startswith("250")
    assert serve.taken[0].Data == b"abc" * 100
    assert len(spilled) == 1


def test_over_lmtp_each_recipient_is_answered(serve: Serve, spilled: list[Spilled]) -> None:
    with Client(serve(LMTPReceiver), greet=False) as client:
        client.say("LHLO a")
        client.begin("a@y.test", "b@y.test")
        client.say("DATA")
        client.send(stuffed(LARGE))
        assert client.replies(2) == ["250", "250"]
    assert [message.Data for message in serve.taken] == [LARGE]
    assert closed(spilled)


def test_a_spool_keeps_it_and_a_handler_gets_it(serve: Serve, router: RoutingBase, spilled: list[Spilled]) -> None:
    spool = Queue("run/posts")
    with Client(serve(deliver=spool.push)) as client:
        assert client.mail(data=LARGE).startswith("250")
    _, message = spool.pop()
    assert message is not None
    assert message.Data == LARGE
    assert closed(spilled)


# -- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("over", [0, 1])
@pytest.mark.parametrize("content", [LARGE, b".a\r\n" * 500, b"..\r\n" * 500, b"x" * 2000 + b"\r\n"])
def test_the_size_limit_is_exact(content: bytes, over: int) -> None:
    for places in ([], list(range(0, 9000, 50))):
        taker = Taker()
        taker.size_limit = len(content) - over
        octets = by_data(content)
        assert sent(octets, [place for place in places if place < len(octets)], taker) == [content] * (not over)


def test_what_grows_too_large_while_it_spills_is_read_to_its_end_and_dropped(
    serve: Serve, spilled: list[Spilled]
) -> None:
    receiver = serve(size_limit=5000)
    with Client(receiver) as client:
        client.begin("desk@y.test")
        client.say("DATA")
        client.send(LARGE[:4000])
        until(lambda: bool(spilled) and len(spilled[0]) > 3900)
        assert not closed(spilled)
        client.send(LARGE[4000:])
        until(lambda: closed(spilled))
        assert receiver.traffic.memory == 0
        assert client.say(b".").startswith("552 5.3.4")
        client.send(BEGIN + bdat(b"x" * 4000) + bdat(b"x" * 1001) + b"NOOP\r\n")
        assert client.replies(5) == ["250", "250", "250", "552", "250"]
        assert closed(spilled)
    assert serve.taken == []


@pytest.mark.parametrize(
    ("fault", "code"), [(b"a\rb", "550"), (b"a\nb", "550"), (b"a\r\r\nb", "550"), (b"a\0b", "550"), (b"a\r\nb", "250")]
)
def test_bare_line_ends_and_nul_are_refused_wherever_they_lie(serve: Serve, fault: bytes, code: str) -> None:
    receiver = serve(refuse_bare=True)
    with Client(receiver) as client:
        for before in range(AFTER - 6, AFTER + 6):
            content = b"x" * before + fault + LARGE
            client.begin("desk@y.test")
            client.say("DATA")
            client.send(stuffed(content)[: before + 2])
            client.send(stuffed(content)[before + 2 :])
            assert client.reply().startswith(code)
            client.send(BEGIN + bdat(content[: before + 2]) + bdat(content[before + 2 :], last=True))
            assert client.replies(4) == ["250", "250", "250", code]
        client.send(BEGIN + bdat(LARGE + b"\r", last=True))
        assert client.replies(3) == ["250", "250", "550"]


def test_a_message_that_goes_round_is_refused(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Wire, "spill_after", 4096)
    with Client(serve()) as client:
        received = b"Received: x\r\n"
        assert client.mail(data=received * HOPS_MAX + b"\r\n" + LARGE * 3).startswith("250")
        assert client.mail(data=received * (HOPS_MAX + 1) + b"\r\n" + LARGE * 3).startswith("554 5.4.6")


REFUSED = "452 4.3.1 Insufficient system storage, try again later"


def test_without_room_on_the_disk_it_is_put_off_and_the_session_goes_on(
    serve: Serve, spilled: list[Spilled], monkeypatch: pytest.MonkeyPatch
) -> None:
    receiver = serve()
    monkeypatch.setattr(receiver.space, "lacks", lambda size=0: size > 0 and sum(map(len, spilled)) > 3000)
    with Client(receiver) as client:
        client.begin("desk@y.test")
        client.say("DATA")
        client.send(LARGE)
        assert client.say(b".") == REFUSED
        assert closed(spilled)
        client.send(BEGIN + bdat(LARGE) + b"NOOP\r\n")
        assert client.replies(2) == ["250", "250"]
        assert client.reply() == REFUSED
        assert client.reply().startswith("250")
        assert receiver.traffic.memory == 0
    assert serve.taken == []


@pytest.mark.parametrize("chunking", [False, True])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_whichever_write_fails_it_is_put_off_and_nothing_is_left(
    spilled: list[Spilled], monkeypatch: pytest.MonkeyPatch, code: int, chunking: bool
) -> None:
    content = b"".join(b"%d\r\n" % number for number in range(40))
    body = bdat(content[:99]) + bdat(content[99:], last=True) if chunking else b"DATA\r\n" + stuffed(content)
    octets = b"EHLO me\r\n" + BEGIN + body + b"QUIT\r\n"
    real = Spilled.write
    writes = fails = 0

    def write(self: Spilled, piece: bytes) -> None:
        nonlocal writes
        writes += 1
        if writes == fails:
            real(self, piece[: len(piece) // 2])
            raise OSError(code, os.strerror(code))
        real(self, piece)

    monkeypatch.setattr(Spilled, "write", write)
    said = []

    class Telling(Session):
        def say(self, reply: str) -> None:
            said.append(reply)
            super().say(reply)

    for fails in range(1, 100):
        writes = 0
        said.clear()
        taken = sent(octets, list(range(60, len(octets), 10)), Taker(), Telling)
        assert closed(spilled)
        assert said[-1] == "221 2.0.0 Bye"
        if writes < fails:
            break
        assert taken == []
        assert said.count(REFUSED) == 1
    assert taken == [content]
    assert fails > 4


def test_without_a_descriptor_it_is_put_off(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(**_: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    receiver = serve()
    with Client(receiver) as client:
        with monkeypatch.context() as patch:
            patch.setattr(tempfile, "TemporaryFile", none)
            assert client.mail(data=LARGE) == REFUSED
        assert client.mail(data=LARGE).startswith("250")


def test_on_a_disk_that_is_full_it_is_put_off_and_when_there_is_room_it_is_taken(serve: Serve) -> None:
    if os.getuid():
        pytest.skip("only root can mount a small disk")
    Path("run").mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "lamsonq", "run"], check=False).returncode:
        pytest.skip("this machine lets nobody mount")
    try:
        with Client(serve(min_free=0)) as client:
            assert client.mail(data=LINE * 30_000) == REFUSED
            assert client.mail(data=LINE * 10_000).startswith("250")
    finally:
        subprocess.run(["umount", "run"], check=True)
    assert [len(message.Data) for message in serve.taken] == [720_000]


def nothing_in_memory(receiver: SMTPReceiver) -> bool:
    return receiver.traffic.memory == 0


def test_what_cannot_be_read_again_is_not_taken(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, spilled: list[Spilled]
) -> None:
    def read(self: Spilled) -> bytes:
        self.close()
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    spool = Queue("run/posts")
    for deliver in (spool.push, serve.taken.append):
        receiver = serve(deliver=deliver)
        with Client(receiver) as client:
            with monkeypatch.context() as patch:
                patch.setattr(Spilled, "read", read)
                assert client.mail(data=LARGE).startswith("451 4.3.0 Internal error")
            until(partial(nothing_in_memory, receiver))
            assert client.mail(data=LARGE).startswith("250")
    assert (spool.count(), len(serve.taken)) == (1, 1)


# -- who goes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [b"DATA\r\n" + LARGE, b"BDAT 9000\r\n" + LARGE, bdat(LARGE)])
@pytest.mark.parametrize("end", ["reset", "close"])
def test_a_client_that_goes_leaves_nothing(serve: Serve, spilled: list[Spilled], body: bytes, end: str) -> None:
    receiver = serve()
    with Client(receiver) as client:
        client.send(BEGIN + body)
        until(lambda: bool(spilled) and len(spilled[0]) > 7000)
        assert receiver.traffic.memory < 2 * AFTER
        getattr(client, end)()
    until(lambda: closed(spilled))
    until(lambda: (receiver.traffic.memory, receiver.traffic.open) == (0, 0))
    assert serve.taken == []


@pytest.mark.parametrize("command", ["RSET", "EHLO again"])
def test_what_has_spilled_is_forgotten_with_its_transaction(serve: Serve, spilled: list[Spilled], command: str) -> None:
    with Client(serve()) as client:
        client.send(BEGIN + bdat(LARGE))
        assert client.replies(3) == ["250"] * 3
        assert not closed(spilled)
        assert client.say(command).startswith("250")
        assert closed(spilled)
        client.send(BEGIN + bdat(b"two\r\n", last=True))
        assert client.replies(3) == ["250"] * 3
    assert [message.Data for message in serve.taken] == [b"two\r\n"]


def test_a_client_that_sends_nothing_more_leaves_nothing(serve: Serve, spilled: list[Spilled]) -> None:
    with Client(serve(limits=Limits(data_timeout=0.2))) as client:
        client.send(BEGIN + b"DATA\r\n" + LARGE)
        assert client.replies(3) == ["250", "250", "354"]
        assert client.reply().startswith("421")
        until(lambda: closed(spilled))


def test_only_what_is_in_memory_counts(serve: Serve) -> None:
    receiver = serve(limits=Limits(memory=4 * AFTER))
    with Client(receiver) as first, Client(receiver) as second:
        for client in (first, second):
            client.begin("desk@y.test")
            client.say("DATA")
            client.send(LARGE)
        sessions = receiver._sessions
        until(lambda: all(len(session._spilled or b"") > 7000 for session in sessions))
        assert receiver.traffic.memory == sum(session._reserved for session in sessions) < 2 * AFTER
        assert [client.say(b".")[:3] for client in (first, second)] == ["250", "250"]
        until(lambda: receiver.traffic.memory == 0)


# -- the file -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exists", [True, False])
def test_the_file_has_no_name_and_lies_in_run_where_there_is_one(here: Path, exists: bool) -> None:
    if exists:
        Path("run").mkdir()
    spilled = Spilled()
    spilled.write(b"x")
    where = os.readlink(f"/proc/self/fd/{spilled._file.fileno()}")
    assert where.endswith(" (deleted)")
    assert (Path(where).parent == (here / "run").resolve()) is exists
    assert not exists or os.listdir("run") == []
    assert (len(spilled), spilled.read()) == (1, b"x")


@given(st.lists(st.sampled_from([b"\r\n", b"\r", b"\n", b"a", b"", b"\r\na"]), max_size=12))
def test_pieces_have_the_bare_line_ends_of_the_whole(pieces: list[bytes]) -> None:
    spilled = Spilled(checked=True)
    for piece in pieces:
        spilled.write(piece)
    assert spilled.has_bare_line_end is has_bare_line_end(b"".join(pieces))
    spilled.close()


# -- when it is done with -----------------------------------------------------------------------------------------


@pytest.fixture
def no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


HANDLERS = """
import weakref
from lamsonq.routing import route, stateless

made = []

@route("plain@y.test")
@stateless
def PLAIN(message):
    made.append(weakref.ref(message))

@route("awaits@y.test")
@stateless
async def AWAITS(message):
    made.append(weakref.ref(message))
"""


@pytest.mark.parametrize("kind", [SMTPReceiver, LMTPReceiver])
@pytest.mark.parametrize(
    ("recipients", "codes"),
    [
        (("plain@y.test",), ["250"]),
        (("awaits@y.test", "plain@y.test"), ["250", "250"]),
    ],
)
def test_a_message_is_gone_when_its_handlers_are_done(
    serve: Serve,
    router: RoutingBase,
    module: Callable[[str], str],
    no_collection: None,
    kind: type[SMTPReceiver],
    recipients: tuple[str, ...],
    codes: list[str],
) -> None:
    router.UNDELIVERABLE_QUEUE = Queue("run/undeliverable")
    name = module(HANDLERS)
    router.load([name])
    made = sys.modules[name].made
    with Client(serve(kind, deliver=None), greet=False) as client:
        client.say("LHLO a" if kind is LMTPReceiver else "EHLO a")
        client.begin(*recipients)
        client.say("DATA")
        client.send(LARGE + b".\r\n")
        replies = codes if kind is LMTPReceiver else codes[:1]
        assert client.replies(len(replies)) == replies
        assert len(made) == len(recipients)
        until(lambda: not any(reference() for reference in made))


@pytest.mark.parametrize("spooled", [True, False])
def test_a_message_is_gone_when_it_is_kept_or_delivered(serve: Serve, no_collection: None, spooled: bool) -> None:
    made: list[weakref.ref[MailRequest]] = []

    class Noting(Queue):
        def keep(self, jobs: Any) -> None:
            super().keep(jobs)
            made.extend(weakref.ref(commit.message) for commit in receiver._committer.open)

    def deliver(message: MailRequest) -> None:
        made.append(weakref.ref(message))

    receiver = serve(deliver=Noting("run/posts").push if spooled else deliver)
    with Client(receiver) as client:
        assert client.mail(data=LARGE).startswith("250")
        assert len(made) == 1
        until(lambda: made[0]() is None)
