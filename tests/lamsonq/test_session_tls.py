"""TLS in a session, and who may log in through it: nothing counts that came before, and no password goes in clear."""

from __future__ import annotations

import asyncio
import base64
import logging
import os
import smtplib
import socket
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trustme

from lamsonq import session, wire
from lamsonq.errors import SettingsError
from lamsonq.limits import Limits
from lamsonq.lmtp import LMTPReceiver
from lamsonq.logins import Logins, add
from lamsonq.smtp import SMTPReceiver
from lamsonq.tls import TLS

from .clients import Client
from .waiting import until

Serve = Any
Certificate = Callable[..., str]


def plain(name: str, password: str) -> str:
    return base64.b64encode(f"\0{name}\0{password}".encode()).decode()


def coded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


@pytest.fixture
def secure(serve: Serve, certificate: Certificate) -> Callable[..., SMTPReceiver]:
    """`secure(...)` is a receiver that offers STARTTLS."""

    def begin(*, required: bool = False, implicit: bool = False, **options: Any) -> SMTPReceiver:
        receiver: SMTPReceiver = serve(tls=TLS(certificate(), required=required, implicit=implicit), **options)
        return receiver

    return begin


@pytest.fixture
def asking(secure: Callable[..., SMTPReceiver], monkeypatch: pytest.MonkeyPatch) -> Callable[..., SMTPReceiver]:
    """`asking(...)` lets joe in, with the password "secret", and answers a wrong one without delay."""
    monkeypatch.setattr(session, "LOGIN_DELAY", 0.0)

    def begin(**options: Any) -> SMTPReceiver:
        options.setdefault("logins", lambda name, password: (name, password) == ("joe", "secret"))
        return secure(**options)

    return begin


# -- STARTTLS -----------------------------------------------------------------------------------------------------


def test_starttls_is_offered_once_and_the_message_tells_of_it(
    secure: Callable[..., SMTPReceiver], serve: Serve, trusting: ssl.SSLContext
) -> None:
    with Client(secure(), greet=False) as client:
        assert "250-STARTTLS" in client.say("EHLO a").replace("250 STARTTLS", "250-STARTTLS")
        assert "STARTTLS" not in client.starttls(trusting)
        assert client.mail().startswith("250")
    [message] = serve.taken
    assert message.envelope.tls == "TLSv1.3"
    assert message.envelope.helo == "client.test"


def test_without_a_certificate_it_is_not_offered(serve: Serve) -> None:
    with Client(serve(), greet=False) as client:
        assert "STARTTLS" not in client.say("EHLO a")
        assert client.say("STARTTLS") == "502 5.5.1 STARTTLS is not offered"
        assert client.mail().startswith("250")
    assert serve.taken[0].envelope.tls == ""


def test_a_second_starttls_is_refused(secure: Callable[..., SMTPReceiver], trusting: ssl.SSLContext) -> None:
    with Client(secure()) as client:
        client.starttls(trusting)
        assert client.say("STARTTLS") == "503 5.5.1 TLS is spoken already"
        assert client.mail().startswith("250")


def test_starttls_takes_no_argument(secure: Callable[..., SMTPReceiver]) -> None:
    with Client(secure()) as client:
        assert client.say("STARTTLS now") == "501 5.5.4 Syntax: STARTTLS"


@pytest.mark.parametrize("size", [0, 100, wire.AHEAD_MAX * 2])
def test_what_is_sent_ahead_of_the_handshake_is_never_a_command(
    secure: Callable[..., SMTPReceiver], serve: Serve, trusting: ssl.SSLContext, size: int
) -> None:
    injected = b"RSET\r\nMAIL FROM:<evil@x.test>\r\nRCPT TO:<v@y.test>\r\n" + b"NOOP\r\n" * (size // 6)
    with Client(secure()) as client:
        client.begin("before@y.test")
        client.send(b"STARTTLS\r\n" + injected)
        assert client.reply().startswith("220")
        if size > wire.AHEAD_MAX:  # more than is dropped at once: the rest is no handshake
            with pytest.raises(OSError, match=r"."):
                client._wrap(trusting)
            return
        client._wrap(trusting)
        assert client.say("RCPT TO:<late@y.test>").startswith("503 5.5.1 Send EHLO first")
        client.say("EHLO b")
        assert client.say("RCPT TO:<late@y.test>") == "503 5.5.1 Need MAIL command"
        assert client.mail("mine@y.test").startswith("250")
    [message] = serve.taken
    assert message.envelope.mail_from == "a@x.test"
    assert message.envelope.rcpt_tos == ("mine@y.test",)


def test_what_is_sent_behind_the_handshake_in_one_go_is_worked_off(
    secure: Callable[..., SMTPReceiver], trusting: ssl.SSLContext
) -> None:
    with Client(secure()) as client:
        client.starttls(trusting, greet=False)
        client.send(b"EHLO b\r\nNOOP\r\nMAIL FROM:<a@x.test>\r\nQUIT\r\n")
        assert client.replies(4) == ["250", "250", "250", "221"]
        assert client.rest() == ""


def test_no_mail_goes_before_tls_where_it_is_required(
    secure: Callable[..., SMTPReceiver], trusting: ssl.SSLContext
) -> None:
    with Client(secure(required=True)) as client:
        for command in (
            "MAIL FROM:<a@x.test>",
            "RCPT TO:<b@y.test>",
            "DATA",
            "BDAT 3",
            "VRFY joe",
            "AUTH PLAIN",
            "HELO me",
        ):
            assert client.say(command) == "530 5.7.0 Must issue a STARTTLS command first"
        assert client.say("NOOP").startswith("250")
        client.starttls(trusting)
        assert client.mail().startswith("250")


def test_lmtp_speaks_it_too(serve: Serve, certificate: Certificate, trusting: ssl.SSLContext) -> None:
    with Client(serve(LMTPReceiver, tls=TLS(certificate())), greet=False) as client:
        assert "STARTTLS" in client.say("LHLO a")
        client.starttls(trusting, greet=False)
        assert client.say("MAIL FROM:<a@x.test>") == "503 5.5.1 Send LHLO first"
        client.say("LHLO a")
        client.begin("a@y.test", "b@y.test")
        client.say("DATA")
        client.send(b"x\r\n.\r\n")
        assert client.replies(2) == ["250", "250"]


@pytest.mark.parametrize("noise", [b"NOOP\r\n", b"\x16\x03\x01\xff\xff" + b"x" * 500, b"", b"\x00" * 70_000])
def test_what_is_no_handshake_ends_the_connection_and_frees_its_place(
    secure: Callable[..., SMTPReceiver], noise: bytes
) -> None:
    receiver = secure()
    with Client(receiver) as client:
        client.say("STARTTLS")
        try:
            client.send(noise)
            client.socket.shutdown(socket.SHUT_WR)
        except OSError:
            pass
        client.lines.close()
        until(lambda: receiver.traffic.open == 0)


@pytest.mark.parametrize("implicit", [True, False])
def test_a_client_that_hangs_in_the_handshake_is_dropped(
    secure: Callable[..., SMTPReceiver], monkeypatch: pytest.MonkeyPatch, implicit: bool
) -> None:
    monkeypatch.setattr(wire, "HANDSHAKE_TIMEOUT", 0.2)
    receiver = secure(implicit=implicit)
    with Client(receiver, greet=not implicit, wait=not implicit) as client:
        if not implicit:
            client.say("STARTTLS")
        client.send(b"\x16\x03\x01")
        assert client.rest() == ""
        until(lambda: receiver.traffic.open == 0)


def test_who_hangs_in_the_handshake_is_sent_away_when_the_server_ends(secure: Callable[..., SMTPReceiver]) -> None:
    receiver = secure()
    with Client(receiver) as client:
        client.say("STARTTLS")
        receiver.stop(10)
        assert client.rest() == ""  # and nothing in clear
    receiver.join()


@pytest.mark.parametrize("implicit", [True, False])
def test_who_goes_with_the_last_word_of_the_handshake_leaves_no_line_in_the_log(
    secure: Callable[..., SMTPReceiver], trusting: ssl.SSLContext, caplog: pytest.LogCaptureFixture, implicit: bool
) -> None:
    receiver = secure(implicit=implicit)
    with Client(receiver, greet=not implicit, wait=not implicit) as client:
        if not implicit:
            client.say("STARTTLS")
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        session = trusting.wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
        with pytest.raises(ssl.SSLWantReadError):
            session.do_handshake()
        client.send(outgoing.read())
        while True:
            incoming.write(client.socket.recv(65536))
            try:
                session.do_handshake()
                break
            except ssl.SSLWantReadError:
                continue
        with pytest.raises(ssl.SSLWantReadError):
            session.unwrap()
        client.send(outgoing.read())  # Finished and close_notify in one piece
        until(lambda: receiver.traffic.open == 0)
    assert "eof_received" not in caplog.text


# -- TLS from the first byte --------------------------------------------------------------------------------------


def test_tls_from_the_first_byte(secure: Callable[..., SMTPReceiver], serve: Serve, trusting: ssl.SSLContext) -> None:
    receiver = secure(implicit=True)
    with smtplib.SMTP_SSL("127.0.0.1", receiver.port, context=trusting) as client:
        client.ehlo()
        assert not client.has_extn("starttls")
        client.sendmail("a@x.test", ["b@y.test"], b"hello")
    assert serve.taken[0].envelope.tls == "TLSv1.3"
    until(lambda: receiver.traffic.open == 0)


def test_who_speaks_in_clear_to_it_gets_no_greeting(secure: Callable[..., SMTPReceiver]) -> None:
    with Client(secure(implicit=True), wait=False) as client:
        client.send(b"EHLO a\r\n")
        assert client.rest() == ""


def test_a_check_at_the_connection_comes_after_the_handshake(
    secure: Callable[..., SMTPReceiver], trusting: ssl.SSLContext
) -> None:
    seen: list[session.Dialogue] = []
    receiver = secure(implicit=True, on_connect=seen.append)
    with Client(receiver, tls=trusting) as client:
        assert client.greeting.startswith("220")
    assert [(one.address, one.tls) for one in seen] == [("127.0.0.1", "TLSv1.3")]


def test_versions_before_1_2_are_not_spoken(secure: Callable[..., SMTPReceiver], trusting: ssl.SSLContext) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1"):
        context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    with pytest.raises(OSError, match=r"(?i)version|protocol|handshake|eof"):
        Client(secure(implicit=True), tls=context)


# -- the certificate ----------------------------------------------------------------------------------------------


def served(port: int, context: ssl.SSLContext) -> bytes:
    """The certificate that a new client is shown."""
    with Client(port, tls=context) as client:
        assert isinstance(client.socket, ssl.SSLSocket)
        return client.socket.getpeercert(binary_form=True) or b""


def test_a_certificate_that_was_replaced_is_used_by_the_next_handshake(
    secure: Callable[..., SMTPReceiver],
    certificate: Certificate,
    trusting: ssl.SSLContext,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lamsonq.tls.LOOK_AGAIN", -1.0)
    port = secure(implicit=True).port
    with Client(port, tls=trusting) as staying:
        before = served(port, trusting)
        assert served(port, trusting) == before
        certificate(file="new.pem")
        os.replace("new.pem", "mx.pem")
        assert served(port, trusting) != before
        assert staying.say("NOOP").startswith("250")


def test_files_are_not_looked_at_for_every_client(certificate: Certificate, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("lamsonq.tls.time.monotonic", lambda: now[0])
    tls = TLS(certificate())
    first = tls.context()
    certificate()
    assert tls.context() is first
    now[0] += 6
    assert tls.context() is not first


def test_a_replacement_that_is_broken_leaves_the_old_one_until_it_is_whole(
    secure: Callable[..., SMTPReceiver],
    certificate: Certificate,
    trusting: ssl.SSLContext,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("lamsonq.tls.LOOK_AGAIN", -1.0)
    port = secure(implicit=True).port
    before = served(port, trusting)
    Path("mx.pem").write_text("half a certific")
    assert served(port, trusting) == before
    assert "cannot use" in caplog.text
    assert "going on with the certificate of before" in caplog.text
    Path("mx.pem").unlink()
    assert served(port, trusting) == before
    certificate()
    with caplog.at_level(logging.INFO):
        assert served(port, trusting) != before
    assert "was loaded again" in caplog.text


@pytest.mark.parametrize(
    ("content", "why"),
    [(None, "No such file"), ("", "it holds no PEM|PEM"), ("-----BEGIN CERTIFICATE-----\nx\n", "PEM")],
)
def test_a_certificate_that_cannot_be_used_ends_the_boot(here: Path, content: str | None, why: str) -> None:
    if content is not None:
        Path("mx.pem").write_text(content)
    with pytest.raises(SettingsError, match=f"receiver: cannot use mx.pem for TLS: .*({why})"):
        TLS("mx.pem")


def test_a_certificate_without_its_key_is_told_in_words(here: Path, authority: trustme.CA) -> None:
    authority.issue_cert("127.0.0.1").cert_chain_pems[0].write_to_path("mx.pem")
    with pytest.raises(SettingsError, match=r"cannot use mx\.pem for TLS: it holds no certificate with its key in PEM"):
        TLS("mx.pem")


def test_a_key_of_another_certificate_ends_the_boot(here: Path, authority: trustme.CA) -> None:
    for name in ("one", "two"):
        issued = authority.issue_cert("127.0.0.1")
        issued.cert_chain_pems[0].write_to_path(f"{name}.crt")
        Path(f"{name}.key").touch(0o600)
        issued.private_key_pem.write_to_path(f"{name}.key")
    assert TLS("one.crt", "one.key").context()
    with pytest.raises(SettingsError, match=r"cannot use one.crt and two.key for TLS: the key is not this certificate"):
        TLS("one.crt", "two.key")


@pytest.mark.parametrize("apart", [False, True])
def test_a_key_that_others_can_use_ends_the_boot(here: Path, authority: trustme.CA, *, apart: bool) -> None:
    issued = authority.issue_cert("127.0.0.1")
    issued.private_key_and_cert_chain_pem.write_to_path("mx.pem")
    issued.cert_chain_pems[0].write_to_path("mx.crt")  # what everybody may read
    files = ("mx.crt", "mx.pem") if apart else ("mx.pem",)
    Path("mx.crt").chmod(0o644)
    for mode in (0o644, 0o604, 0o660):
        Path("mx.pem").chmod(mode)
        with pytest.raises(
            SettingsError,
            match=rf"receiver: others than its owner can use the key mx\.pem \(mode {mode:o}\): chmod 600",
        ):
            TLS(*files)
    Path("mx.pem").chmod(0o640)  # readable by a group that is its own
    assert TLS(*files).context()


def test_a_renewed_key_that_others_can_use_leaves_the_old_one(
    certificate: Certificate, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("lamsonq.tls.LOOK_AGAIN", -1.0)
    path = Path(certificate())
    tls = TLS(str(path))
    before = tls.context()
    certificate()
    path.chmod(0o644)
    assert tls.context() is before
    assert "chmod 600 it; going on with the certificate of before" in caplog.text
    path.chmod(0o600)
    assert tls.context() is not before


# -- logins -------------------------------------------------------------------------------------------------------


def test_no_password_is_taken_in_clear(asking: Callable[..., SMTPReceiver], trusting: ssl.SSLContext) -> None:
    asked: list[str] = []

    def note(name: str, _password: str) -> bool:
        asked.append(name)
        return True

    with Client(asking(logins=note), greet=False) as client:
        assert "AUTH" not in client.say("EHLO a")
        assert client.say(f"AUTH PLAIN {plain('joe', 'secret')}").startswith("538 5.7.11")
        assert client.say("AUTH LOGIN").startswith("538 5.7.11")
        assert "AUTH LOGIN PLAIN" in client.starttls(trusting)
    assert asked == []


def test_without_logins_nobody_is_asked(secure: Callable[..., SMTPReceiver], trusting: ssl.SSLContext) -> None:
    with Client(secure()) as client:
        assert "AUTH" not in client.starttls(trusting)
        assert client.say("AUTH PLAIN").startswith("502")


@pytest.mark.parametrize(
    "lines",
    [
        [f"AUTH PLAIN {plain('joe', 'secret')}"],
        [f"auth plain {plain('joe', 'secret')}"],
        ["AUTH PLAIN", plain("joe", "secret")],
        ["AUTH LOGIN", coded("joe"), coded("secret")],
        [f"Auth Login {coded('joe')}", coded("secret")],
    ],
)
def test_the_ways_to_log_in(
    asking: Callable[..., SMTPReceiver], serve: Serve, trusting: ssl.SSLContext, lines: list[str]
) -> None:
    with Client(asking(login_required=True)) as client:
        client.starttls(trusting)
        assert client.say("MAIL FROM:<a@x.test>") == "530 5.7.0 Authentication required"
        *first, last = lines
        for line in first:
            assert client.say(line).startswith("334 ")
        assert client.say(last) == "235 2.7.0 Authentication successful"
        assert client.say("AUTH PLAIN") == "503 5.5.1 Already logged in"
        assert client.mail().startswith("250")
    assert serve.taken[0].envelope.login == "joe"


def test_the_lines_of_a_login_may_come_in_one_go_and_byte_by_byte(
    asking: Callable[..., SMTPReceiver], trusting: ssl.SSLContext
) -> None:
    octets = f"AUTH LOGIN\r\n{coded('joe')}\r\n{coded('secret')}\r\nMAIL FROM:<a@x.test>\r\n".encode()
    for size in (len(octets), 1):
        with Client(asking()) as client:
            client.starttls(trusting)
            for start in range(0, len(octets), size):
                client.send(octets[start : start + size])
            assert client.replies(4) == ["334", "334", "235", "250"]


@pytest.mark.parametrize(
    ("lines", "reply"),
    [
        (["AUTH"], "501 5.5.4 Syntax: AUTH mechanism"),
        (["AUTH PLAIN a b"], "501 5.5.4 Syntax: AUTH mechanism"),
        (["AUTH CRAM-MD5"], "504 5.5.4 Unrecognized authentication type"),
        (["AUTH PLAIN", "*"], "501 5.7.0 Auth aborted"),
        (["AUTH LOGIN", coded("joe"), "*"], "501 5.7.0 Auth aborted"),
        (["AUTH PLAIN !!!"], "501 5.5.2 Can't decode base64"),
        (["AUTH PLAIN", "!!!"], "501 5.5.2 Can't decode base64"),
        (["AUTH LOGIN", "abc"], "501 5.5.2 Can't decode base64"),
        (["AUTH PLAIN \u00fc"], "501 5.5.2 Can't decode base64"),
        ([f"AUTH PLAIN {coded('joe')}"], "501 5.5.2 Can't split auth value"),
        (["AUTH PLAIN ="], "501 5.5.2 Can't split auth value"),
        (["AUTH LOGIN =", ""], "535 5.7.8 Authentication credentials invalid"),
        ([f"AUTH PLAIN {plain('joe', 'wrong')}"], "535 5.7.8 Authentication credentials invalid"),
        (["AUTH PLAIN " + base64.b64encode(b"\0\xff\0\xfe").decode()], "535 5.7.8 Authentication credentials invalid"),
    ],
)
def test_a_login_that_is_none_changes_nothing_and_the_session_goes_on(
    asking: Callable[..., SMTPReceiver], trusting: ssl.SSLContext, lines: list[str], reply: str
) -> None:
    with Client(asking()) as client:
        client.starttls(trusting)
        for line in lines[:-1]:
            assert client.say(line).startswith("334 ")
        assert client.say(lines[-1]) == reply
        assert client.say("NOOP") == "250 2.0.0 OK"
        assert client.say(f"AUTH PLAIN {plain('joe', 'secret')}").startswith("235")


@pytest.mark.parametrize("end", [b"\r\n", b""])
def test_a_line_that_is_too_long_for_a_login_ends_the_connection(
    asking: Callable[..., SMTPReceiver], trusting: ssl.SSLContext, end: bytes
) -> None:
    receiver = asking()
    with Client(receiver) as client:
        client.starttls(trusting)
        client.say("AUTH PLAIN")
        client.send(b"A" * (wire.AUTH_LINE_MAX + 4) + end)
        assert client.rest() == "500 5.5.6 Line too long\r\n"
    until(lambda: receiver.traffic.open == 0)


def test_a_long_answer_is_taken_up_to_the_limit_of_the_rfc(
    asking: Callable[..., SMTPReceiver], trusting: ssl.SSLContext
) -> None:
    password = "p" * (wire.AUTH_LINE_MAX * 3 // 4 - 50)
    with Client(asking(logins=lambda _, given: given == password)) as client:
        client.starttls(trusting)
        client.say("AUTH PLAIN")
        assert client.say(plain("joe", password)).startswith("235")


def test_a_wrong_password_is_answered_after_a_delay_and_logged_without_it(
    asking: Callable[..., SMTPReceiver],
    trusting: ssl.SSLContext,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    waited: list[float] = []
    sleep = asyncio.sleep

    async def note(seconds: float) -> None:
        waited.append(seconds)
        await sleep(0)

    receiver = asking()
    monkeypatch.setattr(session, "LOGIN_DELAY", 77.0)
    monkeypatch.setattr(asyncio, "sleep", note)
    caplog.set_level(logging.DEBUG)
    with Client(receiver) as client:
        client.starttls(trusting)
        assert client.say(f"AUTH PLAIN {plain('joe', 'canary-password')}").startswith("535")
        client.say("AUTH LOGIN")
        client.say(coded("joe"))
        assert client.say(coded("canary-password")).startswith("535")
    assert waited.count(77.0) == 2
    assert "Login failed from Peer" in caplog.text
    for secret in ("canary-password", coded("canary-password"), plain("joe", "canary-password")):
        assert secret not in caplog.text


def test_the_third_wrong_password_ends_the_connection(
    asking: Callable[..., SMTPReceiver], trusting: ssl.SSLContext
) -> None:
    with Client(asking()) as client:
        client.starttls(trusting)
        said = [client.say(f"AUTH PLAIN {plain('joe', 'wrong')}")[:3] for _ in range(3)]
        assert said == ["535", "535", "421"]
        assert client.rest() == ""


def test_no_login_in_the_middle_of_a_transaction(asking: Callable[..., SMTPReceiver], trusting: ssl.SSLContext) -> None:
    with Client(asking()) as client:
        client.starttls(trusting)
        client.begin("b@y.test")
        assert client.say("AUTH PLAIN") == "503 5.5.1 Not in the middle of a transaction"


def test_a_login_is_over_with_its_connection_and_outlives_a_new_greeting(
    asking: Callable[..., SMTPReceiver], trusting: ssl.SSLContext
) -> None:
    receiver = asking(login_required=True)
    with Client(receiver) as client:
        client.starttls(trusting)
        client.say(f"AUTH PLAIN {plain('joe', 'secret')}")
        client.say("EHLO again")
        assert client.mail().startswith("250")
    with Client(receiver) as client:
        client.starttls(trusting)
        assert client.mail().startswith("530")


def test_logins_that_cannot_be_asked_are_a_temporary_failure(
    asking: Callable[..., SMTPReceiver], trusting: ssl.SSLContext, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_name: str, _password: str) -> bool:
        raise ConnectionError("the directory is away")

    with Client(asking(logins=broken)) as client:
        client.starttls(trusting)
        assert client.say(f"AUTH PLAIN {plain('joe', 'secret')}") == "454 4.7.0 Temporary authentication failure"
    assert "Nobody can log in" in caplog.text


def test_smtplib_logs_in(asking: Callable[..., SMTPReceiver], serve: Serve, trusting: ssl.SSLContext) -> None:
    with smtplib.SMTP("127.0.0.1", asking(required=True, login_required=True).port) as client:
        client.starttls(context=trusting)
        with pytest.raises(smtplib.SMTPAuthenticationError):
            client.login("joe", "wrong")
    with smtplib.SMTP("127.0.0.1", asking(required=True, login_required=True).port) as client:
        client.starttls(context=trusting)
        client.login("joe", "secret")
        client.sendmail("a@x.test", ["b@y.test"], b"hello")
    assert [message.envelope.login for message in serve.taken] == ["joe"]


def test_a_client_that_goes_or_falls_silent_in_a_login_leaves_nothing(
    asking: Callable[..., SMTPReceiver], trusting: ssl.SSLContext
) -> None:
    receiver = asking(limits=Limits(command_timeout=0.3))
    with Client(receiver) as client:
        client.starttls(trusting)
        client.say("AUTH LOGIN")
    with Client(receiver) as client:
        client.starttls(trusting)
        client.say("AUTH LOGIN")
        assert client.reply() == "421 4.4.2 Timeout, closing connection"
    until(lambda: receiver.traffic.open == 0)


def test_names_in_a_file_log_in_and_a_change_counts_at_once(
    asking: Callable[..., SMTPReceiver], trusting: ssl.SSLContext
) -> None:
    add("logins", "joe", "first")
    with Client(asking(logins=Logins("logins"))) as client:
        client.starttls(trusting)
        assert client.say(f"AUTH PLAIN {plain('joe', 'second')}").startswith("535")
        add("logins", "joe", "second")
        assert client.say(f"AUTH PLAIN {plain('joe', 'second')}").startswith("235")


def test_passwords_without_tls_and_logins_that_are_missing_are_refused_at_boot(
    serve: Serve, certificate: Certificate
) -> None:
    with pytest.raises(SettingsError, match=r"passwords go through TLS only .* receiver.certificate_file"):
        serve(logins=lambda _name, _password: True)
    with pytest.raises(SettingsError, match=r"login_required, and nobody can log in"):
        serve(login_required=True, tls=TLS(certificate()))
