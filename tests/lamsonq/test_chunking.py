"""BDAT (RFC 3030), which brings a message in pieces, and the parameters of DSN (RFC 3461)."""

from __future__ import annotations

import tracemalloc
from typing import Any

import pytest

from lamsonq.lmtp import LMTPReceiver
from lamsonq.queue import Queue

from .clients import Client
from .waiting import until

Serve = Any
BEGIN = b"MAIL FROM:<a@x.test>\r\nRCPT TO:<desk@y.test>\r\n"


def bdat(octets: bytes, last: bool = False) -> bytes:
    return b"BDAT %d%s\r\n%s" % (len(octets), b" LAST" if last else b"", octets)


# -- BDAT ---------------------------------------------------------------------------------------------------------


def test_it_is_offered(serve: Serve) -> None:
    with Client(serve(), greet=False) as client:
        assert "250-CHUNKING" in client.say("EHLO a").replace("|", " ")
        assert "BINARYMIME" not in client.say("EHLO a")


@pytest.mark.parametrize(
    "pieces",
    [
        [b"hello\r\n"],
        [b"hel", b"lo\r\n"],
        [b"hello\r\n", b""],
        [b"", b"hello\r\n", b""],
        [bytes([octet]) for octet in b"hello\r\n"],
    ],
)
def test_the_pieces_are_one_message(serve: Serve, pieces: list[bytes]) -> None:
    with Client(serve()) as client:
        client.begin("desk@y.test")
        *first, last = pieces
        for piece in first:
            client.send(bdat(piece))
            assert client.reply() == f"250 2.0.0 {len(piece)} octets received"
        client.send(bdat(last, last=True))
        assert client.reply().startswith("250")
        assert client.say("RCPT TO:<b@y.test>").startswith("503")  # the transaction is over
    assert [message.Data for message in serve.taken] == [b"hello\r\n"]


def test_the_octets_are_taken_as_they_are(serve: Serve) -> None:
    content = b"..dots\r\n.\r\nMAIL FROM:<evil@x.test>\r\n\r\n.\r\nbare \r and \n, \0 and \xff, without an end"
    with Client(serve()) as client:
        client.send(BEGIN + bdat(content, last=True) + b"NOOP\r\n")
        assert client.replies(4) == ["250"] * 4
    assert [message.Data for message in serve.taken] == [content]


def test_everything_may_be_pipelined_and_cut_anywhere(serve: Serve) -> None:
    octets = BEGIN + bdat(b"one\r\n") + bdat(b"QUIT\r\n") + bdat(b"two\r\n", last=True) + BEGIN + bdat(b"x", last=True)
    for size in (1, 3, len(octets)):
        with Client(serve()) as client:
            for start in range(0, len(octets), size):
                client.send(octets[start : start + size])
            assert client.replies(8) == ["250"] * 8
    assert [message.Data for message in serve.taken] == [b"one\r\nQUIT\r\ntwo\r\n", b"x"] * 3


@pytest.mark.parametrize("case", ["bdat", "Bdat"])
def test_case_does_not_matter(serve: Serve, case: str) -> None:
    with Client(serve()) as client:
        client.begin("desk@y.test")
        client.send(f"{case} 3 last\r\nabc".encode())
        assert client.reply().startswith("250")


@pytest.mark.parametrize("before", [b"", b"MAIL FROM:<a@x.test>\r\n"])
def test_without_a_recipient_the_octets_are_still_read_and_are_no_commands(serve: Serve, before: bytes) -> None:
    with Client(serve()) as client:
        client.send(before + bdat(b"RCPT TO:<evil@y.test>\r\n", last=True) + b"NOOP\r\n")
        assert client.replies(before.count(b"\n")) == ["250"] * before.count(b"\n")
        assert client.reply() == "503 5.5.1 Need RCPT command"
        assert client.reply() == "250 2.0.0 OK"
    assert serve.taken == []


def test_before_a_greeting_too(serve: Serve) -> None:
    with Client(serve(), greet=False) as client:
        client.send(bdat(b"QUIT\r\n") + b"NOOP\r\n")
        assert client.replies(2) == ["503", "250"]


def test_data_does_not_follow_it(serve: Serve) -> None:
    with Client(serve()) as client:
        client.send(BEGIN + bdat(b"one\r\n") + b"DATA\r\n")
        assert client.replies(3) == ["250"] * 3
        assert client.reply() == "503 5.5.1 DATA cannot follow BDAT"
        client.send(bdat(b"two\r\n", last=True))
        assert client.reply().startswith("250")
    assert [message.Data for message in serve.taken] == [b"one\r\ntwo\r\n"]


def test_no_recipient_comes_behind_it_and_no_other_sender(serve: Serve) -> None:
    with Client(serve()) as client:
        client.send(BEGIN + bdat(b"one\r\n") + b"RCPT TO:<late@y.test>\r\nMAIL FROM:<b@x.test>\r\n")
        assert client.replies(5) == ["250", "250", "250", "503", "503"]
        client.send(bdat(b"", last=True))
        assert client.reply().startswith("250")
    assert serve.taken[0].envelope.rcpt_tos == ("desk@y.test",)


@pytest.mark.parametrize("command", ["RSET", "EHLO again"])
def test_what_has_come_is_forgotten_with_its_transaction(serve: Serve, command: str) -> None:
    receiver = serve()
    with Client(receiver) as client:
        client.send(BEGIN + bdat(b"one\r\n"))
        assert client.replies(3) == ["250"] * 3
        assert receiver.traffic.memory == 5
        assert client.say(command).startswith("250")
        assert receiver.traffic.memory == 0
        client.send(BEGIN + bdat(b"two\r\n", last=True))
        assert client.replies(3) == ["250"] * 3
    assert [message.Data for message in serve.taken] == [b"two\r\n"]


@pytest.mark.parametrize("size", [1001, 300_000])
def test_a_piece_that_is_too_large_is_read_and_refused_and_so_are_those_behind_it(serve: Serve, size: int) -> None:
    with Client(serve(size_limit=1000)) as client:
        client.send(BEGIN + bdat(b"x" * size) + bdat(b"y" * 10) + bdat(b"", last=True) + b"NOOP\r\n")
        assert client.replies(2) == ["250", "250"]
        assert client.reply() == "552 5.3.4 Message size exceeds the limit of 1000 octets"
        assert client.replies(3) == ["503", "503", "250"]
        assert client.mail().startswith("250")
    assert len(serve.taken) == 1


def test_the_limit_is_for_all_pieces_together_and_exact(serve: Serve) -> None:
    with Client(serve(size_limit=1000)) as client:
        for more, reply in ((500, "250"), (501, "552")):
            client.send(BEGIN + bdat(b"x" * 500) + bdat(b"x" * more, last=True))
            assert client.replies(4) == ["250", "250", "250", reply]
    assert [len(message.Data) for message in serve.taken] == [1000]


@pytest.mark.parametrize(
    "argument", ["", " ", " x", " -1", " 1.0", " 0x10", " 1 LAS", " 1 LAST x", " LAST", " " + "9" * 21, " \u0661"]
)
def test_a_size_that_is_none_ends_the_connection_since_nobody_knows_what_is_a_command(
    serve: Serve, argument: str
) -> None:
    with Client(serve()) as client:
        client.begin("desk@y.test")
        client.send(f"BDAT{argument}\r\nMAIL FROM:<evil@x.test>\r\n".encode())
        assert client.rest() == "501 5.5.4 Syntax: BDAT size [LAST]\r\n"


@pytest.mark.parametrize("size", ["9" * 20, str(2**63), str(2**31)])
def test_a_size_beyond_everything_takes_no_memory(serve: Serve, size: str) -> None:
    receiver = serve(size_limit=1000)
    with Client(receiver) as client:
        client.begin("desk@y.test")
        client.send(b"BDAT %s\r\n" % size.encode() + b"x" * 500_000)
        until(lambda: any(session._received >= 400_000 for session in receiver._sessions))
        assert receiver.traffic.memory == 0


@pytest.mark.parametrize(("before", "size"), [(0, 1_000_001), (600_000, 400_001)])
def test_of_a_piece_that_is_announced_too_large_nothing_is_kept(serve: Serve, before: int, size: int) -> None:
    receiver = serve(size_limit=1_000_000)
    with Client(receiver) as client:
        client.send(BEGIN + bdat(b"x" * before))
        assert client.replies(3) == ["250", "250", "250"]
        client.send(b"BDAT %d LAST\r\n" % size + b"y" * (size - 1))
        [session] = receiver._sessions
        until(lambda: session._received == size - 1)
        assert (receiver.traffic.memory, len(session._held), len(session._chunks or b"")) == (0, 0, 0)
        client.send(b"yNOOP\r\n")  # in step again behind the last octet
        assert client.replies(2) == ["552", "250"]
    assert serve.taken == []


@pytest.mark.parametrize("content", [b"a\rb\r\n", b"a\nb\r\n", b"a\r\n.\n", b"\r", b"a\r\r\n", b"a\0b\r\n"])
def test_bare_line_ends_and_nul_are_refused_where_they_are_to_be(serve: Serve, content: bytes) -> None:
    for refuse, reply in ((True, "550"), (False, "250")):
        with Client(serve(refuse_bare=refuse)) as client:
            client.send(BEGIN + bdat(content[:1]) + bdat(content[1:], last=True))
            assert client.replies(4) == ["250", "250", "250", reply]
    assert [message.Data for message in serve.taken] == [content]


def test_a_pair_that_is_cut_between_pieces_is_no_bare_line_end(serve: Serve) -> None:
    with Client(serve(refuse_bare=True)) as client:
        client.send(BEGIN + bdat(b"a\r") + bdat(b"\nb\r\n", last=True))
        assert client.replies(4) == ["250"] * 4


def test_over_lmtp_the_last_piece_is_answered_for_each_recipient(serve: Serve) -> None:
    with Client(serve(LMTPReceiver, size_limit=1000), greet=False) as client:
        client.say("LHLO a")
        client.begin("a@y.test", "b@y.test")
        client.send(bdat(b"x\r\n") + bdat(b"", last=True))
        assert client.replies(3) == ["250"] * 3
        client.begin("a@y.test", "b@y.test")
        client.send(bdat(b"x" * 1001, last=True) + b"NOOP\r\n")
        assert client.replies(3) == ["552", "552", "250"]
        client.begin("a@y.test", "b@y.test")
        client.send(bdat(b"x" * 1001) + b"NOOP\r\n")  # one piece of several: one reply (RFC 3030 section 3)
        assert client.replies(2) == ["552", "250"]
    assert len(serve.taken) == 1


def test_many_small_pieces_cost_what_they_hold(serve: Serve) -> None:
    count = 20_000
    octets = b"BDAT 1\r\nx" * count
    receiver = serve()
    with Client(receiver) as client:
        client.begin("desk@y.test")
        tracemalloc.start()
        try:
            for start in range(0, count, 500):
                client.send(octets[start * 9 : (start + 500) * 9])
                assert set(client.replies(500)) == {"250"}
            [session] = receiver._sessions
            assert session._reserved == count
            assert tracemalloc.get_traced_memory()[0] < 2_000_000
        finally:
            tracemalloc.stop()
        client.send(bdat(b"", last=True))
        assert client.reply().startswith("250")
    assert len(serve.taken[0].Data) == count


# -- DSN ----------------------------------------------------------------------------------------------------------


def test_what_the_sender_wants_to_be_told_reaches_the_message(serve: Serve) -> None:
    with Client(serve()) as client:
        assert client.say("MAIL FROM:<a@x.test> RET=hdrs ENVID=QQ+2B314 BODY=8BITMIME").startswith("250")
        assert client.say("RCPT TO:<One@y.test> NOTIFY=success,Failure ORCPT=rfc822;Eins@z.test").startswith("250")
        assert client.say("RCPT TO:<two@y.test> notify=NEVER").startswith("250")
        assert client.say("RCPT TO:<three@y.test>").startswith("250")
        client.say("DATA")
        assert client.say(b"x\r\n.").startswith("250")
        assert client.mail().startswith("250")
    first, second = (message.envelope.notify for message in serve.taken)
    assert (first.ret, first.envid) == ("HDRS", "QQ+2B314")
    assert first.notify == {"One@y.test": "SUCCESS,FAILURE", "two@y.test": "NEVER"}
    assert first.orcpt == {"One@y.test": "rfc822;Eins@z.test"}
    assert (second.ret, second.envid, second.notify, second.orcpt) == ("", "", {}, {})


def test_it_outlives_a_queue(serve: Serve, here: Any) -> None:
    incoming = Queue("run/incoming")
    with Client(serve(deliver=incoming.push)) as client:
        client.say("MAIL FROM:<a@x.test> ENVID=one")
        client.say("RCPT TO:<b@y.test> NOTIFY=DELAY ORCPT=utf-8;z\u00e9@y.test")
        client.say("DATA")
        assert client.say(b"x\r\n.").startswith("250")
    _, message = incoming.pop()
    assert message is not None
    notify = message.envelope.notify
    assert (notify.envid, notify.notify, notify.orcpt) == (
        "one",
        {"b@y.test": "DELAY"},
        {"b@y.test": "utf-8;z\u00e9@y.test"},
    )


@pytest.mark.parametrize(
    ("parameters", "reply"),
    [
        ("RET=FULL", "250"),
        ("RET=ALL", "501 5.5.4 RET"),
        ("RET=", "501 5.5.4 RET"),
        ("RET", "501 5.5.4 RET"),
        ("ENVID=" + "x" * 100, "250"),
        ("ENVID=" + "x" * 101, "501 5.5.4 ENVID"),
        ("ENVID=", "501 5.5.4 ENVID"),
        ("ENVID=a+b", "501 5.5.4 ENVID"),
        ("ENVID=a+2b", "501 5.5.4 ENVID"),
        ("ENVID=a=b", "501 5.5.4 ENVID"),
        (b"ENVID=\xff", "501 5.5.4 ENVID"),
        ("NOTIFY=NEVER", "555"),
    ],
)
def test_parameters_of_mail(serve: Serve, parameters: str | bytes, reply: str) -> None:
    octets = parameters if isinstance(parameters, bytes) else parameters.encode()
    with Client(serve()) as client:
        assert client.say(b"MAIL FROM:<a@x.test> " + octets).startswith(reply)


@pytest.mark.parametrize(
    ("parameters", "reply"),
    [
        ("NOTIFY=SUCCESS,FAILURE,DELAY", "250"),
        ("NOTIFY=NEVER,SUCCESS", "501 5.5.4 NOTIFY"),
        ("NOTIFY=", "501 5.5.4 NOTIFY"),
        ("NOTIFY", "501 5.5.4 NOTIFY"),
        ("NOTIFY=SUCCESS,", "501 5.5.4 NOTIFY"),
        ("NOTIFY=SOMETIMES", "501 5.5.4 NOTIFY"),
        ("ORCPT=rfc822;a+40b@y.test", "250"),
        ("ORCPT=x-own;anything", "250"),
        ("ORCPT=rfc822", "501 5.5.4 ORCPT"),
        ("ORCPT=;a@y.test", "501 5.5.4 ORCPT"),
        ("ORCPT=rfc822;", "501 5.5.4 ORCPT"),
        ("ORCPT=rfc(822;a@y.test", "501 5.5.4 ORCPT"),
        ("ORCPT=rfc822;a=b", "501 5.5.4 ORCPT"),
        ("ORCPT=rfc822;" + "a" * 500, "501 5.5.4 ORCPT"),
        (b"ORCPT=\xff;a@y.test", "501 5.5.4 ORCPT"),
        (b"ORCPT=utf-8;\xff@y.test", "501 5.5.4 ORCPT"),
        ("RET=FULL", "555"),
        ("SIZE=1", "555"),
        ("X", "555"),
    ],
)
def test_parameters_of_rcpt(serve: Serve, parameters: str | bytes, reply: str) -> None:
    octets = parameters if isinstance(parameters, bytes) else parameters.encode()
    with Client(serve()) as client:
        client.say("MAIL FROM:<a@x.test>")
        assert client.say(b"RCPT TO:<b@y.test> " + octets).startswith(reply)
