"""Mail without a smarthost: which servers a domain has, and which of them gets the message."""

from __future__ import annotations

import ssl
import sys
import time
from collections.abc import Callable, Iterator

import dns.resolver
import pytest
import trustme

from lamsonq import mx
from lamsonq.connection import POOL_MAX
from lamsonq.connection import Server as Place
from lamsonq.errors import Later, SettingsError, SMTPError, Undelivered
from lamsonq.mail import MailRequest
from lamsonq.mx import MailServers
from lamsonq.relay import Relay

from .ports import free_port
from .servers import HANG_UP, Dns, Server
from .waiting import PATIENCE

ZONE = """
y.test.        60 IN MX 20 mx2.y.test.
y.test.        60 IN MX 10 mx1.y.test.
mx1.y.test.    60 IN A 127.0.0.2
mx2.y.test.    60 IN A 127.0.0.3
z.test.        60 IN MX 10 mx1.z.test.
mx1.z.test.    60 IN A 127.0.0.4
plain.test.    60 IN A 127.0.0.2
plain.test.    60 IN AAAA ::1
alias.test.    60 IN CNAME y.test.
null.test.     60 IN MX 0 .
same.test.     60 IN MX 5 a.same.test.
same.test.     60 IN MX 5 b.same.test.
same.test.     60 IN MX 9 c.same.test.
gone.test.     60 IN MX 10 nowhere.test.
half.test.     60 IN MX 10 nowhere.test.
half.test.     60 IN MX 20 mx1.y.test.
unsure.test.   60 IN MX 10 broken.test.
six.test.      60 IN AAAA ::1
both.test.     60 IN MX 10 mx.both.test.
mx.both.test.  60 IN A 127.0.0.2
mx.both.test.  60 IN A 127.0.0.3
text.test.     60 IN TXT "neither MX nor address"
xn--mnchen-3ya.test. 60 IN MX 10 mx1.y.test.
loop.test.     60 IN MX 10 one.loop.test.
loop.test.     60 IN MX 20 us.loop.test.
loop.test.     60 IN MX 20 two.loop.test.
loop.test.     60 IN MX 30 three.loop.test.
us.loop.test.  60 IN A 192.0.2.1
inside.test.   60 IN MX 10 localhost.inside.test.
localhost.inside.test. 60 IN A 127.0.0.1
localhost.inside.test. 60 IN AAAA ::1
localhost.inside.test. 60 IN AAAA ::ffff:7f00:1
localhost.inside.test. 60 IN A 0.0.0.0
localhost.inside.test. 60 IN A 169.254.169.254
"""


@pytest.fixture(scope="module")
def dns_server() -> Iterator[Dns]:
    server = Dns(ZONE, broken=["broken.test"], silent=["silent.test"])
    yield server
    server.close()


@pytest.fixture
def finder(dns_server: Dns) -> MailServers:
    return MailServers(2525, dns_server.resolver)


def refusal(finder: MailServers, domain: str) -> str:
    with pytest.raises(SMTPError) as raised:
        list(finder.servers(domain))
    return str(raised.value)


# -- the servers of a domain --------------------------------------------------------------------------------------


def test_mail_servers_come_by_preference(finder: MailServers) -> None:
    assert list(finder.servers("y.test")) == [
        Place("mx1.y.test", 2525, "127.0.0.2"),
        Place("mx2.y.test", 2525, "127.0.0.3"),
    ]


def test_equal_preferences_are_shuffled_and_never_overtake_better_ones(finder: MailServers) -> None:
    orders = {tuple(finder.names("same.test")) for _ in range(60)}
    assert orders == {(f"{a}.same.test", f"{b}.same.test", "c.same.test") for a, b in ("ab", "ba")}


def test_a_domain_without_mx_is_its_own_mail_server_ipv4_first(finder: MailServers) -> None:
    assert [place.address for place in finder.servers("plain.test")] == ["127.0.0.2", "::1"]


def test_a_cname_is_followed(finder: MailServers) -> None:
    assert finder.names("alias.test") == ["mx1.y.test", "mx2.y.test"]


def test_the_case_of_a_domain_changes_nothing(finder: MailServers) -> None:
    assert finder.names("Y.TEST") == ["mx1.y.test", "mx2.y.test"]


def test_a_null_mx_means_never(finder: MailServers) -> None:
    assert refusal(finder, "null.test") == "556 5.1.10 null.test takes no mail"


def test_a_domain_that_does_not_exist_means_never(finder: MailServers) -> None:
    assert refusal(finder, "nosuch.test") == "550 5.1.2 there is no domain nosuch.test"


@pytest.mark.parametrize("domain", ["gone.test", "text.test"])
def test_a_domain_none_of_whose_servers_has_an_address_means_never(finder: MailServers, domain: str) -> None:
    assert refusal(finder, domain) == f"550 5.4.4 no mail server of {domain} has an address"


def test_a_server_without_an_address_is_passed_over(finder: MailServers) -> None:
    assert [place.name for place in finder.servers("half.test")] == ["mx1.y.test"]


@pytest.mark.parametrize("domain", ["broken.test", "unsure.test"])
def test_a_dns_server_that_fails_means_later(finder: MailServers, domain: str) -> None:
    with pytest.raises(Later, match=r"the DNS does not tell .* record of broken\.test"):
        list(finder.servers(domain))


def test_a_dns_server_that_says_nothing_means_later(finder: MailServers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx, "DNS_SECONDS", 0.2)
    began = time.monotonic()
    with pytest.raises(Later, match=r"silent\.test"):
        list(finder.servers("silent.test"))
    assert time.monotonic() - began < PATIENCE / 2


@pytest.mark.parametrize(
    ("literal", "address"), [("[127.0.0.1]", "127.0.0.1"), ("[IPv6:::1]", "::1"), ("[ipv6:2001:DB8::1]", "2001:db8::1")]
)
def test_an_address_literal_is_the_server(finder: MailServers, literal: str, address: str) -> None:
    assert list(finder.servers(literal)) == [Place(address, 2525, address)]
    assert finder.names(literal) == [address]


def test_an_international_domain_is_looked_up_by_idna_2008(finder: MailServers, dns_server: Dns) -> None:
    assert finder.names("münchen.test") == ["mx1.y.test"]
    assert refusal(finder, "straße.test").startswith("550 5.1.2")
    assert ("xn--strae-oqa.test", "MX") in dns_server.questions


@pytest.mark.parametrize("domain", ["ü" * 31 + ".test", "a..test", "-ü.test", "\U0001f600\u200d.test"])
def test_what_cannot_be_a_domain_means_never(finder: MailServers, domain: str) -> None:
    assert refusal(finder, domain).startswith("550 5.1.2")


def test_only_servers_better_than_ourselves_are_used(finder: MailServers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "US.loop.test")
    assert finder.names("loop.test") == ["one.loop.test"]
    assert refusal(finder, "us.loop.test").startswith("554 5.4.6")


def test_on_port_25_nobody_leads_us_to_our_own_loopback(dns_server: Dns) -> None:
    finder = MailServers(25, dns_server.resolver)
    assert refusal(finder, "inside.test").startswith("550 5.4.4")
    for literal in ("[127.0.0.1]", "[IPv6:::1]", "[IPv6:::ffff:127.0.0.1]", "[0.0.0.0]"):
        assert refusal(finder, literal).startswith("554 5.4.6")


def test_a_hostile_domain_costs_a_bounded_number_of_questions() -> None:
    hosts = [f"h{n}.many.test." for n in range(50)]
    addresses = [f"{host} 60 IN A 127.0.1.{n}" for host in hosts for n in range(20)]
    server = Dns("\n".join([f"many.test. 60 IN MX 10 {host}" for host in hosts] + addresses))
    try:
        assert len(list(MailServers(2525, server.resolver).servers("many.test"))) == mx.HOSTS_MAX * mx.ADDRESSES_MAX
        assert len(server.questions) <= 2 * (1 + 2 * mx.HOSTS_MAX)  # twice: what is too long for UDP is asked again
    finally:
        server.close()


def test_without_dnspython_the_relay_is_refused_when_it_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dns.resolver", None)
    with pytest.raises(SettingsError, match=r"pip install 'lamsonq\[mx\]'"):
        Relay(host=None)


def test_without_a_dns_server_the_relay_is_refused_when_it_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise dns.resolver.NoResolverConfiguration

    monkeypatch.setattr(dns.resolver, "Resolver", missing)
    with pytest.raises(SettingsError, match="needs a DNS server"):
        Relay(host="")


# -- the relay without a host -------------------------------------------------------------------------------------


Hosts = Callable[..., list[Server]]


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    """`hosts(two={...}, three={...})` runs servers at 127.0.0.2 and so on, with these answers, on one port. Nobody else
    has it at any address."""
    running: list[Server] = []

    def start(**answers: dict[str, str | list[str]]) -> list[Server]:
        port = free_port()
        for name, given in answers.items():
            number = ["one", "two", "three", "four"].index(name) + 1
            running.append(Server(given, address=f"127.0.0.{number}", port=port))
        return running

    yield start
    for server in running:
        server.close()


@pytest.fixture
def relays(dns_server: Dns) -> Iterator[Callable[..., Relay]]:
    made: list[Relay] = []

    def make(port: int, **options: object) -> Relay:
        made.append(Relay(None, port, timeout=PATIENCE, resolver=dns_server.resolver, **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for relay in made:
        relay.close()


Relays = Callable[..., Relay]


def message(*recipients: str) -> MailRequest:
    return MailRequest("peer", "a@x.test", recipients, b"Subject: hi\r\n\r\nbody\r\n")


def failures_of(relay: Relay, *recipients: str) -> dict[str, str]:
    with pytest.raises(Undelivered) as raised:
        relay.deliver(message(*recipients))
    return {failure.recipient: str(failure.error) for failure in raised.value.failures}


def test_each_domain_gets_one_transaction_at_its_own_server(hosts: Hosts, relays: Relays) -> None:
    y, z = hosts(two={}, four={})
    relays(y.port).deliver(message("b@y.test", "c@z.test", "d@y.test"))
    assert y.said("RCPT") == ["RCPT TO:<b@y.test>", "RCPT TO:<d@y.test>"]
    assert z.said("RCPT") == ["RCPT TO:<c@z.test>"]
    assert len(y.messages) == len(z.messages) == 1


def test_what_fails_for_one_domain_leaves_the_others_alone(hosts: Hosts, relays: Relays) -> None:
    y, _ = hosts(two={}, four={"RCPT": "550 5.1.1 who?"})
    failures = failures_of(
        relays(y.port), "b@y.test", "c@z.test", "d@null.test", "e@nosuch.test", "f@broken.test", "bad"
    )
    assert {to: reason[:10] for to, reason in failures.items()} == {
        "c@z.test": "550 5.1.1 ",
        "d@null.test": "556 5.1.10",
        "e@nosuch.test": "550 5.1.2 ",
        "f@broken.test": "the DNS do",
        "bad": "not an add",
    }
    assert len(y.messages) == 1


@pytest.mark.parametrize(
    "first",
    [
        {"GREETING": "421 4.3.2 busy"},
        {"GREETING": "554 5.3.2 no service"},
        {"GREETING": HANG_UP},
        {"EHLO": HANG_UP},
        {"EHLO": "421 4.3.2 busy", "HELO": "421 4.3.2 busy"},
        {"MAIL": "451 4.3.0 try another"},
        {"MAIL": HANG_UP},
        {"RCPT": "450 4.7.1 greylisted"},
        {"RCPT": HANG_UP},
        {"DATA": "451 4.3.0 try another"},
        {"DATA": HANG_UP},
    ],
    ids=str,
)
def test_the_next_server_is_asked_before_anything_was_handed_over(
    hosts: Hosts, relays: Relays, first: dict[str, str | list[str]]
) -> None:
    worse, good = hosts(two=first, three={})
    relays(worse.port).deliver(message("b@y.test", "c@y.test"))
    assert good.said("RCPT") == ["RCPT TO:<b@y.test>", "RCPT TO:<c@y.test>"]
    assert (len(worse.messages), len(good.messages)) == (0, 1)


def test_the_next_server_is_asked_when_nobody_listens_at_the_first(hosts: Hosts, relays: Relays) -> None:
    (second,) = hosts(three={})
    relays(second.port).deliver(message("b@y.test"))
    assert len(second.messages) == 1


def test_every_address_of_a_server_is_tried(hosts: Hosts, relays: Relays) -> None:
    (second,) = hosts(three={})
    relays(second.port).deliver(message("b@both.test"))
    assert len(second.messages) == 1


@pytest.mark.parametrize("verb", ["MAIL", "RCPT", "DATA"])
def test_a_permanent_refusal_is_final(hosts: Hosts, relays: Relays, verb: str) -> None:
    first, second = hosts(two={verb: "550 5.7.1 never"}, three={})
    assert failures_of(relays(first.port), "b@y.test") == {"b@y.test": "550 5.7.1 never"}
    assert second.commands == []


@pytest.mark.parametrize("end", [HANG_UP, "451 4.3.0 disk full", "554 5.7.1 spam"])
def test_after_the_final_dot_nobody_else_is_asked(hosts: Hosts, relays: Relays, end: str) -> None:
    first, second = hosts(two={".": end}, three={})
    assert set(failures_of(relays(first.port), "b@y.test")) == {"b@y.test"}
    assert len(first.messages) == 1
    assert second.commands == []


def test_who_was_put_off_waits_when_others_got_the_message(hosts: Hosts, relays: Relays) -> None:
    first, second = hosts(two={"RCPT TO:<C@": "450 4.2.1 later"}, three={})
    assert failures_of(relays(first.port), "b@y.test", "c@y.test") == {"c@y.test": "450 4.2.1 later"}
    assert second.commands == []


def test_only_who_was_put_off_goes_to_the_next_server(hosts: Hosts, relays: Relays) -> None:
    first, second = hosts(two={"RCPT TO:<B@": "550 5.1.1 who?", "RCPT TO:<C@": "450 4.2.1 later"}, three={})
    assert failures_of(relays(first.port), "b@y.test", "c@y.test") == {"b@y.test": "550 5.1.1 who?"}
    assert second.said("RCPT") == ["RCPT TO:<c@y.test>"]


def test_an_address_literal_gets_its_mail(hosts: Hosts, relays: Relays) -> None:
    (server,) = hosts(two={})
    relays(server.port).deliver(message("b@[127.0.0.2]"))
    assert server.said("RCPT") == ["RCPT TO:<b@[127.0.0.2]>"]


def test_when_no_server_is_left_the_last_reason_stands(relays: Relays) -> None:
    port = free_port()
    errors = failures_of(relays(port), "b@y.test")
    assert errors == {"b@y.test": f"relay mx2.y.test[127.0.0.3]:{port}: connection refused"}


def test_no_new_server_is_tried_when_the_time_is_up(
    hosts: Hosts, relays: Relays, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lamsonq.relay.OPENING_FACTOR", 0.02)
    first, second = hosts(two={"GREETING": ""}, three={})
    assert failures_of(relays(first.port), "b@y.test")["b@y.test"].endswith("timed out")
    assert second.commands == []


def test_a_server_that_is_this_host_ends_the_way(hosts: Hosts, relays: Relays, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "fake.test")
    first, second = hosts(two={}, three={})
    assert failures_of(relays(first.port), "b@y.test")["b@y.test"].startswith("554 5.4.6")
    assert (first.messages, second.commands) == ([], [])


def test_an_international_domain_goes_to_a_server_without_smtputf8(hosts: Hosts, relays: Relays) -> None:
    (server,) = hosts(two={})
    server.offers = ["fake.test"]
    assert failures_of(relays(server.port), "b@münchen.test", "jö@münchen.test")["jö@münchen.test"].startswith("553")
    assert server.said("RCPT") == ["RCPT TO:<b@xn--mnchen-3ya.test>"]


def test_the_hosts_of_an_address_are_told_in_order(relays: Relays) -> None:
    relay = relays(2525)
    assert relay.resolve_relay_host("Joe <b@y.test>") == ["mx1.y.test", "mx2.y.test"]
    assert repr(relay) == "<Relay to (the mail servers of each domain:2525)>"
    assert Relay("mail.test").resolve_relay_host("b@y.test") == ["mail.test"]


@pytest.mark.parametrize("option", [{"ssl": True}, {"lmtp": True}, {"username": "joe", "password": "secret"}])
def test_what_is_for_one_server_needs_a_host(option: dict[str, object]) -> None:
    with pytest.raises(SettingsError, match="no host"):
        Relay(None, **option)  # type: ignore[arg-type]


def test_an_unusual_port_is_warned_of(relays: Relays, caplog: pytest.LogCaptureFixture) -> None:
    relays(8825)
    assert "mail servers listen on port 25" in caplog.text


# -- kept connections ---------------------------------------------------------------------------------------------


def test_each_server_has_its_own_kept_connection(hosts: Hosts, relays: Relays) -> None:
    y, z = hosts(two={}, four={})
    relay = relays(y.port)
    for _ in range(3):
        relay.deliver(message("b@y.test", "c@z.test"))
    assert (len(y.messages), len(z.messages)) == (3, 3)
    assert (len(y.connections), len(z.connections)) == (1, 1)


def test_all_kept_connections_together_are_bounded(hosts: Hosts, relays: Relays) -> None:
    many = POOL_MAX + 3
    zone = [f"d{n}.test. 60 IN A 127.0.0.{n + 10}" for n in range(many)]
    server = Dns("\n".join(zone))
    relay = Relay(None, hosts(one={})[0].port, resolver=server.resolver, timeout=PATIENCE)
    port = relay.port
    running = [Server(address=f"127.0.0.{n + 10}", port=port) for n in range(many)]
    try:
        for n in range(many):
            relay.deliver(message(f"b@d{n}.test"))
        relay.deliver(message(f"b@d{many - 1}.test"))  # the one that was used last is kept
        assert len(running[-1].connections) == 1
        relay.deliver(message("b@d0.test"))  # the oldest was given up
        assert len(running[0].connections) == 2
        assert running[0].said("QUIT") == ["QUIT"]
    finally:
        relay.close()
        for host in running:
            host.close()
        server.close()


# -- TLS with everybody -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def tls_server(authority: trustme.CA, name: str, port: int, address: str = "127.0.0.2") -> Server:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(name).configure_cert(context)
    server = Server({"STARTTLS": "220 go"}, tls=context, address=address, port=port)
    server.offers.append("STARTTLS")
    return server


def trusting(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


def test_tls_is_used_where_it_is_offered_whatever_the_certificate(authority: trustme.CA, relays: Relays) -> None:
    server = tls_server(authority, "another.name.test", free_port())
    relays(server.port).deliver(message("b@y.test"))
    assert [command.split()[0].upper() for command in server.commands[:4]] == ["EHLO", "STARTTLS", "EHLO", "MAIL"]
    assert isinstance(server.connections[-1], ssl.SSLSocket)
    server.close()


def test_a_server_whose_handshake_fails_gets_the_mail_without_tls(
    relays: Relays, caplog: pytest.LogCaptureFixture
) -> None:
    server = Server({"STARTTLS": "220 go\r\nthis is no TLS"}, address="127.0.0.2")
    server.offers.append("STARTTLS")
    with caplog.at_level("INFO"):
        relays(server.port).deliver(message("b@y.test"))
    assert len(server.messages) == 1
    assert len(server.connections) == 2
    assert "sending without TLS" in caplog.text
    server.close()


def test_a_server_that_has_no_tls_today_gets_the_mail_without(relays: Relays) -> None:
    server = Server({"STARTTLS": "454 4.7.0 not now"}, address="127.0.0.2")
    server.offers.append("STARTTLS")
    relays(server.port).deliver(message("b@y.test"))
    assert (len(server.messages), len(server.connections)) == (1, 1)
    server.close()


def test_starttls_goes_only_to_the_server_whose_certificate_has_its_name(authority: trustme.CA, relays: Relays) -> None:
    port = free_port()
    wrong = tls_server(authority, "another.name.test", port)
    right = tls_server(authority, "mx2.y.test", port, "127.0.0.3")
    relays(port, starttls=trusting(authority)).deliver(message("b@y.test"))
    assert (len(wrong.messages), len(right.messages)) == (0, 1)
    wrong.close()
    right.close()


def test_starttls_sends_nothing_to_servers_without_it(authority: trustme.CA, hosts: Hosts, relays: Relays) -> None:
    first, second = hosts(two={}, three={})
    error = failures_of(relays(first.port, starttls=trusting(authority)), "b@y.test")["b@y.test"]
    assert "STARTTLS" in error
    assert first.said("MAIL") == second.said("MAIL") == []
