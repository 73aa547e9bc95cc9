"""Other people's clients with TLS, logins and the PROXY protocol: swaks, msmtp, curl."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from lamsonq.limits import Limits
from lamsonq.logins import Logins
from lamsonq.mail import MailRequest
from lamsonq.routing import RoutingBase
from lamsonq.server import LMTPReceiver, Receiver, SMTPReceiver

from .conftest import NAME, PASSWORD, Handled, Papers, mail_named
from .programs import run

Open = Callable[..., SMTPReceiver]
LOGIN = ("--auth-user", NAME, "--auth-password", PASSWORD)


@pytest.fixture
def opened(handled: Handled, serve: Callable[[Receiver], None]) -> Open:
    """`opened(tls=...)` is a receiver that gives everything to `handled`."""

    def start(kind: type[SMTPReceiver] = SMTPReceiver, **options: Any) -> SMTPReceiver:
        receiver = kind("127.0.0.1", 0, deliver=handled, router=RoutingBase(), **options)
        serve(receiver)
        return receiver

    return start


def swaks(to: SMTPReceiver, name: str, *more: str, code: int | None = 0) -> str:
    command = ["swaks", "--protocol", "LMTP" if isinstance(to, LMTPReceiver) else "ESMTP", "--data", "-"]
    command += ["--server", f"127.0.0.1:{to.port}", "--from", "ann@x.test", "--to", "bob@y.test", *more]
    # It ends the last line itself, whether that has an end or not.
    return run(command, mail_named(name).removesuffix(b"\r\n"), code=code)


def curl(to: SMTPReceiver, name: str, scheme: str, *more: str, code: int = 0) -> str:
    command = ["curl", "--silent", "--show-error", "--url", f"{scheme}://127.0.0.1:{to.port}/x.test"]
    command += ["--mail-from", "ann@x.test", "--mail-rcpt", "bob@y.test", "--upload-file", "-", *more]
    return run(command, mail_named(name), code=code)


def msmtp(to: SMTPReceiver, name: str, *more: str, passwordeval: str = "", code: int = 0) -> str:
    command = ["msmtp", "--host=127.0.0.1", f"--port={to.port}", "--from=ann@x.test", "--file=/dev/null", *more]
    if passwordeval:
        command += [f"--user={NAME}", f"--passwordeval={passwordeval}"]
    if isinstance(to, LMTPReceiver):
        command.append("--protocol=lmtp")
    return run([*command, "bob@y.test"], mail_named(name).replace(b"\r\n", b"\n"), code=code)


def only(handled: Handled, name: str) -> MailRequest:
    """The one message that has come, byte for byte."""
    (message,) = handled.messages
    assert message.Data == mail_named(name)
    assert (message.envelope.mail_from, message.envelope.rcpt_tos) == ("ann@x.test", ("bob@y.test",))
    return message


def safe(message: MailRequest) -> bool:
    return message.envelope.tls in ("TLSv1.2", "TLSv1.3")


# -- swaks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [SMTPReceiver, LMTPReceiver])
@pytest.mark.parametrize("version", ["tlsv1_2", "tlsv1_3"])
def test_swaks_upgrades_to_tls(
    version: str, kind: type[SMTPReceiver], opened: Open, papers: Papers, handled: Handled
) -> None:
    receiver = opened(kind, tls=papers.tls(required=True))
    verified = ["--tls", "--tls-verify", "--tls-ca-path", papers.authority, "--tls-protocol", version]
    swaks(receiver, "starttls", *verified)
    assert only(handled, "starttls").envelope.tls == {"tlsv1_2": "TLSv1.2", "tlsv1_3": "TLSv1.3"}[version]


def test_swaks_is_kept_out_by_an_old_version_of_tls(opened: Open, papers: Papers, handled: Handled) -> None:
    receiver = opened(tls=papers.tls())
    swaks(receiver, "old", "--tls", "--tls-protocol", "tlsv1_1", code=29)  # its code for: no TLS
    assert not handled.messages
    swaks(receiver, "new", "--tls")
    only(handled, "new")


@pytest.mark.parametrize("more", [(), ("--pipeline",)])
def test_swaks_speaks_tls_from_the_start(more: tuple[str, ...], opened: Open, papers: Papers, handled: Handled) -> None:
    receiver = opened(tls=papers.tls(implicit=True))
    swaks(receiver, "implicit", "--tls-on-connect", *more)
    assert safe(only(handled, "implicit"))


def test_swaks_without_tls_is_told_that_it_is_needed(opened: Open, papers: Papers, handled: Handled) -> None:
    receiver = opened(tls=papers.tls(required=True))
    assert "<** 530 5.7.0" in swaks(receiver, "plain", code=23)  # its code for: MAIL refused
    assert not handled.messages


@pytest.mark.parametrize("mechanism", ["PLAIN", "LOGIN"])
@pytest.mark.parametrize("when", ["--tls", "--tls-on-connect"])
def test_swaks_logs_in(mechanism: str, when: str, opened: Open, papers: Papers, handled: Handled) -> None:
    tls = papers.tls(implicit=when == "--tls-on-connect")
    receiver = opened(tls=tls, logins=Logins(papers.logins), login_required=True, hosts=["elsewhere.test"])
    swaks(receiver, "login", when, "--auth", mechanism, *LOGIN)
    assert only(handled, "login").envelope.login == NAME


def test_swaks_may_not_log_in_without_tls_or_with_a_wrong_password(
    opened: Open, papers: Papers, handled: Handled
) -> None:
    receiver = opened(tls=papers.tls(), logins=Logins(papers.logins), login_required=True)
    assert "530 5.7.0" in swaks(receiver, "stranger", code=23)
    swaks(receiver, "unsafe", "--auth", "PLAIN", *LOGIN, code=28)  # its code for: no login; it is not even offered
    said = swaks(receiver, "wrong", "--tls", "--auth", "PLAIN", "-au", NAME, "-ap", "guessed", code=28)
    assert "535 5.7.8" in said
    assert not handled.messages


@pytest.mark.parametrize("version", ["1", "2"])
@pytest.mark.parametrize("when", [None, "--tls", "--tls-on-connect"])
def test_swaks_tells_by_the_proxy_protocol_whom_it_connects_for(
    version: str, when: str | None, opened: Open, papers: Papers, handled: Handled
) -> None:
    tls = papers.tls(implicit=when == "--tls-on-connect")
    receiver = opened(tls=tls if when else None, proxies=["127.0.0.1"], limits=Limits(connections_per_address=1))
    origin = ["--proxy-source", "192.0.2.7", "--proxy-source-port", "4711", "--proxy-dest", "192.0.2.1"]
    origin += ["--proxy-dest-port", "25", "--proxy-version", version, "--proxy-family"]
    origin += ["TCP4"] if version == "1" else ["AF_INET", "--proxy-protocol", "STREAM", "--proxy-command", "PROXY"]
    swaks(receiver, "proxied", *origin, *([when] if when else []))
    assert only(handled, "proxied").envelope.peer == ("192.0.2.7", 4711)


# -- msmtp ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [SMTPReceiver, LMTPReceiver])
def test_msmtp_upgrades_to_tls_and_logs_in(
    kind: type[SMTPReceiver], opened: Open, papers: Papers, handled: Handled
) -> None:
    receiver = opened(kind, tls=papers.tls(required=True), logins=Logins(papers.logins), login_required=True)
    trusted = ["--tls=on", f"--tls-trust-file={papers.authority}"]
    msmtp(receiver, "msmtp", *trusted, "--auth=on", passwordeval=f"echo '{PASSWORD}'")
    message = only(handled, "msmtp")
    assert message.envelope.login == NAME
    assert safe(message)


@pytest.mark.parametrize("mechanism", ["plain", "login"])
def test_msmtp_speaks_tls_from_the_start_and_logs_in(
    mechanism: str, opened: Open, papers: Papers, handled: Handled
) -> None:
    receiver = opened(tls=papers.tls(implicit=True), logins=Logins(papers.logins), login_required=True)
    trusted = ["--tls=on", "--tls-starttls=off", f"--tls-trust-file={papers.authority}"]
    msmtp(receiver, "msmtps", *trusted, f"--auth={mechanism}", passwordeval=f"echo '{PASSWORD}'")
    assert only(handled, "msmtps").envelope.login == NAME


def test_msmtp_with_a_wrong_password_sends_nothing(opened: Open, papers: Papers, handled: Handled) -> None:
    receiver = opened(tls=papers.tls(), logins=Logins(papers.logins), login_required=True)
    trusted = ["--tls=on", f"--tls-trust-file={papers.authority}"]
    said = msmtp(receiver, "wrong", *trusted, "--auth=on", passwordeval="echo guessed", code=77)
    assert "535 5.7.8" in said
    assert not handled.messages


def test_msmtp_asks_for_delivery_status_notifications(opened: Open, handled: Handled) -> None:
    receiver = opened()
    msmtp(receiver, "dsn", "--dsn-return=hdrs", "--dsn-notify=failure,delay")
    notify = only(handled, "dsn").envelope.notify
    assert notify.ret == "HDRS"
    assert set(notify.notify["bob@y.test"].split(",")) == {"FAILURE", "DELAY"}


# -- curl -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["smtp", "smtps"])
def test_curl_comes_through_tls_and_logs_in(scheme: str, opened: Open, papers: Papers, handled: Handled) -> None:
    tls = papers.tls(implicit=scheme == "smtps", required=True)
    receiver = opened(tls=tls, logins=Logins(papers.logins), login_required=True)
    trusted = ["--cacert", papers.authority, *(["--ssl-reqd"] if scheme == "smtp" else [])]
    curl(receiver, "curl", scheme, *trusted, "--user", f"{NAME}:{PASSWORD}")
    message = only(handled, "curl")
    assert message.envelope.login == NAME
    assert safe(message)


@pytest.mark.parametrize("options", ["AUTH=PLAIN", "AUTH=LOGIN"])
@pytest.mark.parametrize("more", [(), ("--sasl-ir",)])
def test_curl_logs_in_by_each_mechanism_with_and_without_an_initial_response(
    options: str, more: tuple[str, ...], opened: Open, papers: Papers, handled: Handled
) -> None:
    receiver = opened(tls=papers.tls(), logins=Logins(papers.logins), login_required=True)
    login = ["--user", f"{NAME}:{PASSWORD}", "--login-options", options, *more]
    curl(receiver, "curl", "smtp", "--ssl-reqd", "--cacert", papers.authority, *login)
    assert only(handled, "curl").envelope.login == NAME


def test_curl_does_not_trust_a_certificate_of_nobody_and_the_next_client_is_served(
    opened: Open, papers: Papers, handled: Handled
) -> None:
    receiver = opened(tls=papers.tls())
    curl(receiver, "untrusted", "smtp", "--ssl-reqd", code=60)  # its code for: the certificate is not trusted
    assert not handled.messages
    curl(receiver, "trusted", "smtp", "--ssl-reqd", "--cacert", papers.authority)
    only(handled, "trusted")


def test_curl_speaks_of_smtps_to_a_plain_port_and_is_turned_away(opened: Open, papers: Papers) -> None:
    receiver = opened(tls=papers.tls())
    curl(receiver, "wrong", "smtps", code=35)  # its code for: the handshake failed
    curl(receiver, "right", "smtp")


def test_curl_sends_an_address_with_eight_bits(opened: Open, handled: Handled) -> None:
    """It asks for SMTPUTF8 where that is offered and an address needs it."""
    receiver = opened()
    curl(receiver, "utf8", "smtp", "--mail-rcpt", "grüße@y.test")
    (message,) = handled.messages
    assert message.envelope.rcpt_tos == ("bob@y.test", "grüße@y.test")
    assert message.Data == mail_named("utf8")
