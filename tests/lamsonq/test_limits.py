"""How much a client may ask: the counting by itself, and every limit with its reply over a real socket."""

from __future__ import annotations

import ipaddress
import itertools
import socket
import threading
from collections.abc import Callable
from typing import Any

import pytest

from lamsonq import limits, settings, smtp
from lamsonq.errors import SettingsError
from lamsonq.limits import STRANGERS, Client, Limits, Refused, Traffic, within
from lamsonq.lmtp import LMTPReceiver
from lamsonq.smtp import SMTPReceiver

from .clients import MESSAGE
from .clients import Client as Wire
from .waiting import until

Serve = Any


def networks(*texts: str) -> list[limits.Network]:
    return [ipaddress.ip_network(text) for text in texts]


# -- counting -----------------------------------------------------------------------------------------------------


def test_a_minute_begins_with_the_first_act_and_ends_sixty_seconds_later() -> None:
    traffic = Traffic(Limits(messages_per_minute=2))
    client = traffic.enter("192.0.2.1", 1000.0)
    assert [client.message(now) for now in (1000.0, 1059.9, 1059.9)] == [True, True, False]
    assert [client.message(now) for now in (1060.0, 1060.0, 1119.9)] == [True, True, False]


@pytest.mark.parametrize(
    ("name", "act"),
    [("messages_per_minute", Client.message), ("recipients_per_minute", Client.recipient)],
)
def test_acts_of_all_connections_of_a_client_count_together(name: str, act: Callable[[Client, float], bool]) -> None:
    traffic = Traffic(Limits(**{name: 3}))
    first, second = (traffic.enter("192.0.2.1", 0.0) for _ in range(2))
    assert [act(each, 1.0) for each in (first, second, first, second)] == [True, True, True, False]
    assert act(traffic.enter("192.0.2.2", 0.0), 1.0)


def test_connections_in_a_minute_are_counted_also_when_they_are_closed() -> None:
    traffic = Traffic(Limits(connections_per_minute=2))
    for _ in range(2):
        traffic.leave(traffic.enter("192.0.2.1", 0.0))
    with pytest.raises(Refused, match="in this minute"):
        traffic.enter("192.0.2.1", 59.0)
    assert traffic.open == 0
    assert traffic.enter("192.0.2.1", 60.0).open == 1


def test_a_place_is_free_again_when_its_client_leaves() -> None:
    traffic = Traffic(Limits(connections=2, connections_per_address=1))
    first = traffic.enter("192.0.2.1", 0.0)
    with pytest.raises(Refused, match="from your address"):
        traffic.enter("192.0.2.1", 0.0)
    traffic.enter("192.0.2.2", 0.0)
    with pytest.raises(Refused, match=r"^too many connections$"):
        traffic.enter("192.0.2.3", 0.0)
    traffic.leave(first)
    assert traffic.enter("192.0.2.1", 0.0).open == 1


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("2001:db8:0:1::1", "2001:db8:0:1:ffff::2", True),
        ("2001:db8:0:1::1", "2001:db8:0:2::1", False),
        ("fe80::1%eth0", "fe80::2%eth1", True),
        ("192.0.2.1", "192.0.2.2", False),
        ("::ffff:192.0.2.1", "192.0.2.1", True),
        ("::ffff:192.0.2.1", "::ffff:192.0.2.2", False),
        ("::ffff:192.0.2.1", "::1", False),
        ("::2", "::1", False),
    ],
)
def test_who_is_one_client(one: str, other: str, same: bool) -> None:
    traffic = Traffic(Limits())
    assert (traffic.enter(one, 0.0) is traffic.enter(other, 0.0)) is same


def test_a_trusted_address_lends_its_freedom_to_no_neighbour() -> None:
    traffic = Traffic(Limits(), networks("2001:db8::5/128"))
    assert traffic.enter("2001:db8::5", 0.0).may.messages_per_minute == 0
    assert traffic.enter("2001:db8::6", 0.0).may.messages_per_minute == STRANGERS.messages_per_minute
    assert traffic.enter("2001:db8::5", 0.0).may.messages_per_minute == 0


@pytest.mark.parametrize("address", ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1", ""])
def test_this_machine_has_no_limit_that_nobody_chose(address: str) -> None:
    client = Traffic(Limits()).enter(address, 0.0)
    assert all(client.message(0.0) and client.recipient(0.0) for _ in range(20_000))
    assert client.may.connections_per_address == 0


def test_a_number_that_somebody_chose_holds_for_this_machine_but_not_for_a_unix_socket() -> None:
    traffic = Traffic(Limits(messages_per_minute=1))
    chosen, free = traffic.enter("127.0.0.1", 0.0), traffic.enter("", 0.0)
    assert [chosen.message(0.0), chosen.message(0.0)] == [True, False]
    assert [free.message(0.0), free.message(0.0)] == [True, True]


def test_strangers_have_our_defaults_where_nobody_chose_and_none_where_0_was_chosen() -> None:
    stranger = Traffic(Limits(messages_per_minute=0)).enter("192.0.2.1", 0.0)
    assert stranger.may.messages_per_minute == 0
    assert stranger.may.connections_per_address == STRANGERS.connections_per_address


def test_the_trusted_have_no_limits_of_their_own_but_the_one_for_all() -> None:
    traffic = Traffic(Limits(connections=3, connections_per_address=1), networks("10.0.0.0/8"))
    for _ in range(3):
        traffic.enter("10.1.2.3", 0.0)
    with pytest.raises(Refused):
        traffic.enter("10.1.2.3", 0.0)


def test_what_is_shared_by_processes_is_divided_and_rounded_up() -> None:
    shared = Limits(connections=10, messages_per_minute=5, recipients=7, memory=0).shared_by(4)
    assert (shared.connections, shared.messages_per_minute, shared.recipients, shared.memory) == (3, 2, 7, 0)
    assert shared.connections_per_address is None
    assert Limits().shared_by(1) == Limits()


def test_defaults_for_strangers_are_shared_by_processes_too() -> None:
    client = Traffic(Limits(), processes=4).enter("192.0.2.1", 0.0)
    assert client.may.messages_per_minute == 250
    assert client.may.messages_per_connection == STRANGERS.messages_per_connection


def test_no_more_clients_are_remembered_than_CLIENTS_MAX(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "CLIENTS_MAX", 100)
    traffic = Traffic(Limits(messages_per_minute=1, connections=0))
    staying = [traffic.enter(f"10.0.0.{number}", 0.0) for number in range(5)]
    assert staying[0].message(0.0)
    for number in range(1000):
        traffic.leave(traffic.enter(f"10.1.{number // 250}.{number % 250}", 0.0))
    assert len(traffic._clients) <= 106
    assert traffic.enter("10.0.0.0", 0.0) is staying[0]  # who is connected is not forgotten
    assert not staying[0].message(1.0)


def test_a_negative_limit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"memory=-1: a limit is not negative; 0 is none"):
        Limits(memory=-1)


def test_within_is_false_for_what_is_no_address() -> None:
    assert within("10.1.2.3", networks("10.0.0.0/8"))
    assert within("::ffff:10.1.2.3", networks("10.0.0.0/8"))
    assert not within("somewhere", networks("10.0.0.0/8"))
    assert not within("2001:db8::1", networks("10.0.0.0/8"))


# -- over a socket ------------------------------------------------------------------------------------------------


def test_connections_of_one_address(serve: Serve) -> None:
    receiver = serve(limits=Limits(connections_per_address=2))
    with Wire(receiver), Wire(receiver), Wire(receiver, greet=False) as third:
        assert third.greeting == "421 4.7.0 too many connections from your address, try again later"
        assert third.rest() == ""
    until(lambda: receiver.traffic.open == 0)
    with Wire(receiver) as again:
        assert again.mail().startswith("250")


def test_connections_in_a_minute(serve: Serve) -> None:
    receiver = serve(limits=Limits(connections_per_minute=2))
    for _ in range(2):
        with Wire(receiver) as client:
            assert client.greeting.startswith("220")
    with Wire(receiver, greet=False) as client:
        assert client.greeting == "421 4.7.0 too many connections from your address in this minute, try again later"


def test_connections_of_everybody(serve: Serve) -> None:
    receiver = serve(limits=Limits(connections=2))
    with Wire(receiver), Wire(receiver), Wire(receiver, greet=False) as third:
        assert third.greeting == "421 4.7.0 too many connections, try again later"


def test_messages_in_a_minute(serve: Serve) -> None:
    receiver = serve(limits=Limits(messages_per_minute=2))
    with Wire(receiver) as client:
        assert [client.mail()[:3] for _ in range(2)] == ["250", "250"]
        assert client.mail() == "450 4.7.1 Too many messages from your address in this minute, try again later"
    with Wire(receiver) as another:
        assert another.mail().startswith("450 4.7.1")
    assert len(serve.taken) == 2


def test_recipients_in_a_minute(serve: Serve) -> None:
    with Wire(serve(limits=Limits(recipients_per_minute=2))) as client:
        said = client.begin("a@y.test", "b@y.test", "c@y.test")
        assert [reply[:3] for reply in said] == ["250", "250", "250", "450"]
        assert said[3] == "450 4.7.1 Too many recipients from your address in this minute, try again later"
        client.say("DATA")
        assert client.say(MESSAGE + b".").startswith("250")  # for those who were taken
    assert serve.taken[0].envelope.rcpt_tos == ("a@y.test", "b@y.test")


def test_messages_of_one_connection(serve: Serve) -> None:
    receiver = serve(limits=Limits(messages_per_connection=1))
    with Wire(receiver) as client:
        assert client.mail().startswith("250")
        assert client.mail() == "452 4.7.0 Too many messages on this connection, open another one"
    with Wire(receiver) as another:
        assert another.mail().startswith("250")


def test_recipients_of_one_message(serve: Serve) -> None:
    with Wire(serve(limits=Limits(recipients=2))) as client:
        said = client.begin("a@y.test", "b@y.test", "c@y.test")
        assert said[3] == "452 4.5.3 Too many recipients"
        client.say("RSET")
        assert client.begin("a@y.test")[1].startswith("250")


def test_bad_commands(serve: Serve) -> None:
    with Wire(serve(limits=Limits(bad_commands=3))) as client:
        said = [client.say(line)[:3] for line in ("NONSENSE", "N\0OP")]
        assert said == ["500", "500"]
        client.send(b"BOGUS\r\n")
        assert client.rest().splitlines() == [
            "500 5.5.1 Command not recognized",
            "421 4.7.0 Too many errors, closing connection",
        ]


def test_the_time_for_a_command_and_for_a_piece_of_a_message(serve: Serve) -> None:
    receiver = serve(limits=Limits(command_timeout=0.2))
    with Wire(receiver) as client:
        client.send(b"NOO")
        assert client.reply() == "421 4.4.2 Timeout, closing connection"
    receiver = serve(limits=Limits(data_timeout=0.2))
    with Wire(receiver) as client:
        client.begin("a@y.test")
        client.say("DATA")
        client.send(b"x\r\n")
        assert client.reply() == "421 4.4.2 Timeout, closing connection"
    with Wire(receiver) as client:
        client.begin("a@y.test")
        client.send(b"BDAT 10\r\nabc")
        assert client.reply() == "421 4.4.2 Timeout, closing connection"
    assert serve.taken == []


def test_with_0_a_client_may_be_silent_for_ever(serve: Serve) -> None:
    with Wire(serve(limits=Limits(command_timeout=0, data_timeout=0))) as client:
        assert client.mail().startswith("250")


def test_memory_for_messages_that_come_and_that_are_handled(serve: Serve) -> None:
    gate = threading.Event()
    receiver = serve(deliver=lambda _: gate.wait(10), limits=Limits(memory=5000))
    large = b"x" * 998 + b"\r\n"
    with Wire(receiver) as first, Wire(receiver) as second:
        first.begin("a@y.test")
        first.say("DATA")
        first.send(large * 3 + b".\r\n")  # it is being handled now
        until(lambda: receiver.traffic.memory >= 3000)
        assert second.say("MAIL FROM:<a@x.test> SIZE=3000").startswith("452 4.3.1 Insufficient system storage")
        second.begin("a@y.test")
        second.say("DATA")
        assert second.say(large * 3 + b".") == "452 4.3.1 Too many messages at the moment, try again later"
        gate.set()
        assert first.reply().startswith("250")
        assert second.mail(data=large * 3).startswith("250")
        until(lambda: receiver.traffic.memory == 0)


def test_a_message_that_lies_in_a_file_is_not_let_in_by_an_empty_last_chunk(serve: Serve) -> None:
    gate = threading.Event()
    receiver = serve(deliver=lambda _: gate.wait(10), limits=Limits(memory=3 << 20))
    large = (b"x" * 998 + b"\r\n") * 4000
    with Wire(receiver) as first, Wire(receiver) as second:
        for client in (first, second):
            client.begin("a@y.test")
            client.send(b"BDAT %d\r\n" % len(large) + large)
            assert client.reply().startswith("250")  # each is in a file now
        first.send(b"BDAT 0 LAST\r\n")
        until(lambda: receiver.traffic.memory >= len(large))
        assert second.say("BDAT 0 LAST") == "452 4.3.1 Too many messages at the moment, try again later"
        gate.set()
        assert first.reply().startswith("250")
        assert second.mail().startswith("250")
        until(lambda: receiver.traffic.memory == 0)


def test_a_message_whose_client_has_gone_counts_until_it_is_handled(serve: Serve) -> None:
    gate = threading.Event()
    receiver = serve(deliver=lambda _: gate.wait(10))
    with Wire(receiver) as client:
        client.begin("a@y.test")
        client.say("DATA")
        client.send(b"x" * 3000 + b"\r\n.\r\n")
        until(lambda: receiver._committer.running)
        client.reset()
    until(lambda: receiver.traffic.open == 0)
    assert receiver.traffic.memory == 3002
    gate.set()
    until(lambda: receiver.traffic.memory == 0)


def test_lmtp_has_the_same_limits(serve: Serve) -> None:
    with Wire(serve(LMTPReceiver, limits=Limits(recipients=1)), greet=False) as client:
        client.say("LHLO a")
        assert [reply[:3] for reply in client.begin("a@y.test", "b@y.test")] == ["250", "250", "452"]


def test_by_default_this_machine_is_not_limited(serve: Serve) -> None:
    receiver = serve()
    clients = [Wire(receiver) for _ in range((STRANGERS.connections_per_address or 0) + 10)]
    assert all(client.greeting.startswith("220") for client in clients)
    for client in clients:
        client.close()


@pytest.mark.parametrize("trusted", [["127.0.0.0/8"], ["127.0.0.1"]])
def test_the_trusted_are_not_limited(serve: Serve, trusted: list[str]) -> None:
    receiver = serve(limits=Limits(connections_per_address=1, messages_per_minute=1), trusted=trusted)
    with Wire(receiver) as one, Wire(receiver) as other:
        assert [client.mail()[:3] for client in (one, other, one)] == ["250"] * 3


def test_a_boot_of_several_processes_shares_its_limits(router: Any, here: Any) -> None:
    receiver = SMTPReceiver("127.0.0.1", 0, deliver=print, limits=Limits(connections=4))
    receiver.processes = 2
    receiver.start()
    assert receiver.traffic.limits.connections == 2
    receiver.stop(0)
    receiver.join()


# -- making room --------------------------------------------------------------------------------------------------


def test_who_has_been_silent_the_longest_makes_room(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smtp, "GIVE_WAY_AFTER", 0.0)
    receiver = serve(limits=Limits(connections=3))
    with Wire(receiver) as sending, Wire(receiver) as silent, Wire(receiver) as talking:
        sending.begin("a@y.test")
        talking.say("NOOP")
        with Wire(receiver) as new:
            assert new.greeting.startswith("220")
            assert silent.reply() == "421 4.7.0 Too many connections, and you have been silent the longest"
            assert silent.rest() == ""
            assert talking.say("NOOP").startswith("250")
            assert sending.say("RCPT TO:<b@y.test>").startswith("250")
            assert receiver.traffic.open == 3


def test_nobody_who_has_just_spoken_makes_room(serve: Serve) -> None:
    receiver = serve(limits=Limits(connections=1))
    with Wire(receiver) as client, Wire(receiver, greet=False) as new:
        assert new.greeting.startswith("421")
        assert client.say("NOOP").startswith("250")


def test_who_was_sent_away_and_lingers_is_not_sent_away_again(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that is closed may take its time to end: then it is the next one's turn."""
    monkeypatch.setattr(smtp, "GIVE_WAY_AFTER", 0.0)
    receiver = serve(limits=Limits(connections=2))
    monkeypatch.setattr("lamsonq.session.Session._close", lambda _: None)  # it stays
    with Wire(receiver), Wire(receiver), Wire(receiver) as third, Wire(receiver) as fourth:
        assert third.greeting.startswith("220")
        assert fourth.greeting.startswith("220")
        assert receiver.traffic.open == 2


# -- every end frees what was taken -------------------------------------------------------------------------------


def quits(client: Wire) -> None:
    assert client.say("QUIT").startswith("221")


def resets(client: Wire) -> None:
    client.begin("a@y.test")
    client.send(b"DATA\r\n" + b"x" * 5000)
    client.reset()


def closes_in_a_message(client: Wire) -> None:
    client.begin("a@y.test")
    client.send(b"BDAT 9000\r\n" + b"x" * 5000)


def goes_while_it_is_handled(client: Wire) -> None:
    client.begin("a@y.test")
    client.send(b"DATA\r\nslow\r\n.\r\n")


def talks_nonsense(client: Wire) -> None:
    client.send(b"\0\xff\r\n" * 20)
    client.rest()


def speaks_http(client: Wire) -> None:
    assert client.say("GET / HTTP/1.1").startswith("421")


def times_out(client: Wire) -> None:
    assert client.reply().startswith("421")


@pytest.mark.parametrize(
    "end", [quits, resets, closes_in_a_message, goes_while_it_is_handled, talks_nonsense, speaks_http, times_out]
)
def test_after_every_kind_of_end_nothing_is_counted(serve: Serve, end: Callable[[Wire], None]) -> None:
    timeout = 0.1 if end is times_out else 20.0
    receiver = serve(limits=Limits(command_timeout=timeout, connections_per_address=2))
    with Wire(receiver) as staying:
        for _ in range(3):
            with Wire(receiver) as client:
                end(client)
            until(lambda: receiver.traffic.open <= 1)
        staying.say("QUIT")
    until(lambda: (receiver.traffic.open, receiver.traffic.memory, receiver._sessions) == (0, 0, set()))
    assert {client.open for client in receiver.traffic._clients.values()} == {0}


def test_a_refused_connection_is_not_counted(serve: Serve) -> None:
    receiver = serve(limits=Limits(connections_per_address=1))
    with Wire(receiver):
        for _ in range(3):
            with Wire(receiver, greet=False) as refused:
                assert refused.greeting.startswith("421")
        assert receiver.traffic.open == 1
    until(lambda: receiver.traffic.open == 0)


def test_after_the_end_of_the_server_nothing_is_counted(serve: Serve) -> None:
    receiver = serve()
    with Wire(receiver), Wire(receiver) as other:
        other.begin("a@y.test")
        receiver.stop(0.0)
        assert other.reply() == "421 4.3.2 Service shutting down"
    receiver.join()


def test_a_client_that_reads_nothing_is_gone_soon_after_the_connection_is_closed(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lamsonq.wire.CLOSE_TIMEOUT", 0.2)
    receiver = serve()
    with socket.create_connection(("127.0.0.1", receiver.port)) as stubborn:
        stubborn.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stubborn.setblocking(False)
        chunk = b"NOOP\r\n" * 10_000
        try:
            for _ in itertools.repeat(None, 2000):
                stubborn.send(chunk)
        except BlockingIOError:
            pass
        until(lambda: any(session._blocked for session in receiver._sessions))
        [session] = receiver._sessions
        receiver._loop.call_soon_threadsafe(session._close)
        until(lambda: receiver.traffic.open == 0)


# -- settings -----------------------------------------------------------------------------------------------------


def test_every_limit_is_a_setting_with_the_same_default(here: Any) -> None:
    (here / "config").mkdir()
    (here / "config" / "settings.toml").write_text("")
    assert settings.machine(environ={}).receiver.config()["limits"] == Limits()
    for name in Limits.__dataclass_fields__:
        environ = {f"LAMSONQ_RECEIVER__LIMITS__{name.upper()}": "7"}
        chosen = settings.machine(environ=environ).receiver.config()["limits"]
        assert getattr(chosen, name) == 7
        environ = {f"LAMSONQ_RECEIVER__LIMITS__{name.upper()}": "0"}
        assert getattr(settings.machine(environ=environ).receiver.config()["limits"], name) == 0


def test_a_setting_that_cannot_be_is_named(here: Any) -> None:
    (here / "config").mkdir()
    path = here / "config" / "settings.toml"
    for text, why in {
        '[receiver]\nproxies = ["10.0.0.1/8"]\n': "receiver.proxies: expected networks, as 10.0.0.0/8, found .*10.0.0",
        '[receiver]\ntls = "required"\n': "receiver.tls: expected receiver.certificate_file, too",
        "[receiver.limits]\nmemory = -1\n": "receiver.limits.memory: expected an int >= 0",
        "[receiver.limits]\nconections = 1\n": "did you mean connections",
    }.items():
        path.write_text(text)
        with pytest.raises(SettingsError, match=why):
            settings.machine(environ={}).receiver.config()
