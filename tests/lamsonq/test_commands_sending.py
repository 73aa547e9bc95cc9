"""send, sendmail and blast against a real server, and sendmail as other programs call it."""

from __future__ import annotations

import email
import mailbox
import os
import pty
import random
import socket
import ssl
import subprocess
import sys
import textwrap
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from email import policy
from pathlib import Path

import pytest
import trustme

from lamsonq.commands import submission
from lamsonq.commands.mailboxes import open_mailbox
from lamsonq.errors import QueueError
from lamsonq.mail import MailRequest
from lamsonq.queue import Queue

from .cli import ENVIRON, lamsonq, launcher, program, refused
from .servers import HANG_UP, Server

HOST = submission.host_name()
ME = f"{submission.user_name()}@{HOST}"
TEXT = "From: a@x.org\nTo: b@y.org\nDate: Mon, 1 Jan 2024 00:00:00 +0000\nMessage-ID: <1@x.org>\nSubject: hi\n\nhello\n"


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


def port_of(server: Server) -> tuple[str, str]:
    return "-port", str(server.port)


def senders(server: Server) -> list[str]:
    return [line.split("<")[1].split(">")[0] for line in server.said("MAIL")]


def envelope(server: Server) -> tuple[str, list[str]]:
    """Who sent it to whom, of all that was sent."""
    (sender,) = set(senders(server))
    return sender, [line.split("<")[1].split(">")[0] for line in server.said("RCPT")]


def message(server: Server) -> email.message.EmailMessage:
    (data,) = server.messages
    return email.message_from_bytes(data, policy=policy.default)


# ---- send ------------------------------------------------------------------------------------------------------


def send(*args: str, code: int = 0) -> str:
    """The error line of `lamsonq send` of a small message."""
    what = ("-sender", "a@example.com", "-subject", "hi", "-body", "hello")
    done = lamsonq("send", *what, *(args if "-to" in args else ("-to", "b@example.com", *args)), code=code)
    assert done.stdout == ""
    return done.stderr


def test_send_sends_and_says_nothing(server: Server) -> None:
    what = ("-sender", "A@example.com", "-to", "b@example.com, c@example.com", "-subject", "yes", "-body", "-To")
    done = lamsonq("send", *what, "-host", "127.0.0.1", "-port", str(server.port))
    assert (done.stdout, done.stderr) == ("", "")
    assert envelope(server) == ("a@example.com", ["b@example.com", "c@example.com"])
    assert message(server)["subject"] == "yes"
    assert message(server).get_content() == "-To\r\n"


def test_send_without_a_server_is_one_line(free_port: Callable[[], int]) -> None:
    line = send("-port", str(free_port()), code=1)
    assert line.startswith("ERROR: b@example.com: ")
    assert "refused" in line


def test_send_wants_sender_recipient_subject_and_body() -> None:
    assert "-body" in refused("send", "-sender", "a@b.c", "-to", "b@b.c", "-subject", "s", code=2)


def test_send_attaches_several_files(server: Server, here: Path) -> None:
    Path("one.txt").write_text("first")
    Path("two.bin").write_bytes(b"\x00\xff")
    lamsonq(
        *("send", "-sender", "a@x.org", "-to", "b@x.org", "-subject", "s", "-body", "t", *port_of(server)),
        *("-attach", "one.txt", "--attach", "two.bin"),
    )
    found = {part.get_filename(): part.get_content() for part in message(server).iter_attachments()}
    assert found == {"one.txt": "first", "two.bin": b"\x00\xff"}
    assert send("-attach", "three.txt", code=1).startswith("ERROR: there is no file 'three.txt' to attach")


def test_send_speaks_lmtp_over_a_unix_socket_too(here: Path, server: Server) -> None:
    lamsonq("send", "-sender", "a@x.org", "-to", "b@x.org", "-subject", "s", "-body", "t", "-lmtp", *port_of(server))
    assert server.said("LHLO")
    assert not server.said("EHLO")
    local = Server(path="lmtp.sock")
    try:
        send("-host", "./lmtp.sock")
        assert local.said("LHLO")
        assert len(local.messages) == 1
    finally:
        local.close()


@pytest.fixture
def certified(here: Path) -> tuple[ssl.SSLContext, dict[str, str]]:
    """A server's TLS for localhost, and the environment in which it is trusted."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path("ca.pem")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    return context, {"SSL_CERT_FILE": str(here / "ca.pem")}


def test_send_speaks_tls_from_the_start(certified: tuple[ssl.SSLContext, dict[str, str]]) -> None:
    tls, trusting = certified
    server = Server(tls=tls, implicit=True)
    try:
        what = ("-sender", "a@x.org", "-to", "b@x.org", "-subject", "s", "-body", "t", *port_of(server))
        assert "certificate" in lamsonq("send", *what, "-ssl", "True", code=1).stderr
        lamsonq("send", *what, "-ssl", "True", env=trusting)
        assert len(server.messages) == 1
    finally:
        server.close()


def test_send_logs_in_after_starttls_with_a_password_that_it_does_not_show(
    certified: tuple[ssl.SSLContext, dict[str, str]],
) -> None:
    tls, trusting = certified
    server = Server({"STARTTLS": "220 go on"}, tls=tls)
    server.offers += ["STARTTLS", "AUTH PLAIN"]
    Path("secret").write_text("s3cret\n")
    what = ("-sender", "a@x.org", "-to", "b@x.org", "-subject", "s", "-body", "t", *port_of(server), "--starttls")
    try:
        lamsonq("send", *what, "-username", "joe", "-password-file", "secret", env=trusting)
        lamsonq("send", *what, "-username", "joe", "-password", "s3cret", env=trusting)
        lamsonq("send", *what, "-username", "joe", env={**trusting, "LAMSONQ_RELAY__PASSWORD": "s3cret"})
        assert server.said("AUTH") == ["AUTH PLAIN AGpvZQBzM2NyZXQ="] * 3
        server.answers["AUTH"] = "535 5.7.8 no"
        done = lamsonq("send", *what, "-username", "joe", "-password-file", "secret", "-debug", env=trusting, code=1)
        assert "535" in done.stderr
        assert "s3cret" not in done.stdout + done.stderr
        assert "AGpvZQBzM2NyZXQ=" not in done.stdout + done.stderr
    finally:
        server.close()


def test_a_login_that_is_not_whole_is_refused(here: Path) -> None:
    assert send("-username", "joe", code=1).startswith("ERROR: -username needs a password: -password-file")
    assert send("-password", "x", code=1) == "ERROR: a password needs -username too\n"
    assert send("-username", "joe", "-password-file", "x", code=1).startswith("ERROR: cannot read the password from x")
    both = send("-username", "joe", "-password", "x", "-password-file", "y", code=1)
    assert both == "ERROR: give -password or -password-file, not both\n"


def test_two_kinds_of_tls_at_once_are_refused() -> None:
    assert "not both" in send("-ssl", "True", "-starttls", code=1)


# ---- sendmail: envelope and message ----------------------------------------------------------------------------


def test_sendmail_takes_a_message_from_standard_input(server: Server) -> None:
    done = lamsonq("sendmail", *port_of(server), "--", "B@y.org", "c@z.org", stdin=TEXT)
    assert (done.stdout, done.stderr) == ("", "")
    assert envelope(server) == (ME, ["B@y.org", "c@z.org"])
    assert server.messages == [TEXT.replace("\n", "\r\n").encode()]


def test_sendmail_takes_recipients_without_dashes_in_front(server: Server) -> None:
    lamsonq("sendmail", "b@y.org", "--host", "127.0.0.1", "--port", str(server.port), stdin=TEXT)
    assert envelope(server)[1] == ["b@y.org"]


def test_with_t_everybody_in_the_header_gets_it_and_bcc_is_not_told(server: Server) -> None:
    header = 'To: root, "B, C" <b@y.org>,\n  Friends: d@y.org;\nCc: e@y.org\nBCC: secret@y.org\nSubject: hi\n'
    lamsonq("sendmail", "-t", *port_of(server), "arg@y.org", stdin=f"{header}\nhello\n")
    recipients = ["arg@y.org", f"root@{HOST}", "b@y.org", "d@y.org", "e@y.org", "secret@y.org"]
    assert envelope(server)[1] == recipients
    assert b"secret" not in server.messages[0]
    assert message(server)["cc"] == "e@y.org"


def test_of_a_message_that_was_sent_on_the_resent_headers_count(server: Server) -> None:
    header = "To: b@y.org\nResent-To: c@y.org\nResent-Bcc: d@y.org\nResent-From: a@y.org\n"
    lamsonq("sendmail", "-ti", *port_of(server), stdin=f"{header}\nhello\n")
    assert envelope(server)[1] == ["c@y.org", "d@y.org"]
    assert b"Resent-Bcc" not in server.messages[0]


@pytest.mark.parametrize("broken", ["Joe <joe@x.org, b@y.org", '"joe@x.org', "joe at x.org", "joe@", "a@b, <@>"])
def test_a_recipient_that_cannot_be_read_stops_the_whole(server: Server, broken: str) -> None:
    line = refused("sendmail", "-t", *port_of(server), stdin=f"To: b@y.org, {broken}\n\nhello\n", code=os.EX_DATAERR)
    assert "is no address" in line
    assert not server.said("MAIL")


@pytest.mark.parametrize("options", [["-i"], ["-oi"], ["-ti"], ["-oem", "-oi"]])
def test_a_dot_ends_the_message_but_not_with_i(server: Server, options: list[str]) -> None:
    text = f"{TEXT}.\nmore\n"
    lamsonq("sendmail", *port_of(server), "b@y.org", stdin=text)
    lamsonq("sendmail", *port_of(server), *options, "b@y.org", stdin=text)
    lamsonq("sendmail", *port_of(server), "-i", "b@y.org", stdin=text)
    assert server.messages[0] == TEXT.replace("\n", "\r\n").encode()
    assert server.messages[1:] == [TEXT.replace("\n", "\r\n").encode() + b"..\r\nmore\r\n"] * 2


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("Joe@x.org", "Joe@x.org"),
        ("root", f"root@{HOST}"),
        ("<>", ""),
        ("Joe <joe@x.org>", "joe@x.org"),
    ],
)
def test_f_is_the_envelopes_sender(server: Server, given: str, expected: str) -> None:
    lamsonq("sendmail", *port_of(server), "-f", given, "b@y.org", stdin=TEXT)
    lamsonq("sendmail", *port_of(server), f"-f{given}", "b@y.org", stdin=TEXT)
    lamsonq("sendmail", *port_of(server), "-r", given, "b@y.org", stdin=TEXT)
    assert senders(server) == [expected] * 3


def test_an_empty_f_is_the_null_sender_and_several_are_refused(server: Server) -> None:
    lamsonq("sendmail", *port_of(server), "-f", "", "b@y.org", stdin=TEXT)
    assert senders(server) == [""]
    assert "one address" in refused("sendmail", "-f", "a@x.org, b@x.org", "b@y.org", code=os.EX_USAGE)


def test_what_a_message_lacks_is_added_and_the_rest_stays(server: Server) -> None:
    lamsonq("sendmail", *port_of(server), "-F", 'Cron "x" Dæmon', "root", stdin="Subject: hi\nX-Odd:  two  \n\nhello\n")
    assert server.messages[0].startswith(b"Subject: hi\r\nX-Odd:  two  \r\n")
    assert server.messages[0].endswith(b"\r\n\r\nhello\r\n")
    assert str(message(server)["from"]) == f'"Cron \\"x\\" Dæmon" <{ME}>'
    assert message(server)["date"].datetime
    assert message(server)["message-id"].endswith(f"@{HOST}>")


@pytest.mark.parametrize(
    ("text", "body"),
    [
        ("hello\n", b"hello\r\n"),
        ("Subject: x\nhello\n", b"hello\r\n"),
        ("From joe Mon Jan  1 00:00:00 2024\nSubject: x\n\nhello\n", b"hello\r\n"),
        ("Subject: x\n\nmixed\r\nends\n", b"mixed\r\nends\r\n"),
        ("Subject: x\r\n\r\nall\r\ncrlf\r\n", b"all\r\ncrlf\r\n"),
        ("Subject: x", b""),
        ("", b""),
    ],
)
def test_a_message_gets_an_empty_line_behind_its_header(server: Server, text: str, body: bytes) -> None:
    lamsonq("sendmail", *port_of(server), "-i", "root", stdin=text)
    header, _, found = server.messages[0].partition(b"\r\n\r\n")
    assert found == body
    assert b"\nFrom: " in b"\n" + header
    assert b"From joe" not in header


# ---- sendmail: options and exit codes --------------------------------------------------------------------------


def test_options_of_a_mail_system_of_its_own_are_taken_and_ignored(server: Server) -> None:
    lamsonq(
        *("sendmail", *port_of(server), "-odi", "-oem", "-om", "-o7", "-bm", "-B8BITMIME", "-B", "7BIT"),
        *("-N", "never", "-R", "hdrs", "-V", "id", "-A", "c", "-C", "x.cf", "-L", "tag", "-O", "a=b"),
        *("-X", "log", "-em", "-h", "3", "-p", "x", "-G", "-U", "-c", "-m", "-n", "-v", "-vv", "--", "b@y.org"),
        stdin=TEXT,
    )
    assert server.messages == [TEXT.replace("\n", "\r\n").encode()]


@pytest.mark.parametrize(
    "args",
    [
        ["-bs"],
        ["-bd", "x@y.z"],
        ["-bp"],
        ["-q"],
        ["-q30m"],
        ["-I"],
        [],
        ["b@"],
        ["-zap", "b@y.org"],
        ["-f"],
        ["-host", "", "b@y.org"],
    ],
)
def test_what_is_not_for_sendmail_is_refused_before_anything_is_read(args: list[str]) -> None:
    assert refused("sendmail", *args, code=os.EX_USAGE).startswith("ERROR: ")


def test_a_message_without_recipients_is_refused() -> None:
    assert "names no recipient" in refused("sendmail", "-t", stdin="Subject: hi\n\nhello\n", code=os.EX_DATAERR)


@pytest.mark.parametrize(
    ("answers", "code"),
    [
        ({"RCPT": "550 5.1.1 no such user"}, os.EX_NOUSER),
        ({"RCPT": "550 no such user"}, os.EX_NOUSER),
        ({"RCPT": "550 5.7.1 not you"}, os.EX_UNAVAILABLE),
        ({"RCPT": "554 no"}, os.EX_UNAVAILABLE),
        ({".": "552 5.3.4 too large"}, os.EX_UNAVAILABLE),
        ({"RCPT": "450 later"}, os.EX_TEMPFAIL),
        ({".": "451 later"}, os.EX_TEMPFAIL),
        ({"MAIL": "421 closing"}, os.EX_TEMPFAIL),
        ({"DATA": HANG_UP}, os.EX_TEMPFAIL),
        ({"GREETING": HANG_UP}, os.EX_TEMPFAIL),
    ],
)
def test_the_exit_code_says_whether_to_try_again(server: Server, answers: dict[str, str], code: int) -> None:
    server.answers |= answers
    line = refused("sendmail", *port_of(server), "b@y.org", stdin=TEXT, code=code)
    assert line.startswith("ERROR: b@y.org: ")


def test_no_server_is_to_be_tried_again(free_port: Callable[[], int]) -> None:
    assert "refused" in refused("sendmail", "-port", str(free_port()), "b@y.org", stdin=TEXT, code=os.EX_TEMPFAIL)


def test_who_did_not_get_it_is_named_and_the_others_have_it(server: Server) -> None:
    server.answers |= {"RCPT TO:<C": "550 5.1.1 no such user", "RCPT TO:<D": "450 4.2.1 full"}
    done = lamsonq("sendmail", *port_of(server), "b@y.org", "c@y.org", "d@y.org", stdin=TEXT, code=os.EX_TEMPFAIL)
    assert sorted(done.stderr.splitlines()) == [
        "ERROR: c@y.org: 550 5.1.1 no such user",
        "ERROR: d@y.org: 450 4.2.1 full",
    ]
    assert len(server.messages) == 1


@pytest.mark.parametrize("where", ["read_message", "request_of", "host_name", "make_complete"])
@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError("no\nluck"), "ERROR: RuntimeError: no luck"),
        (MemoryError(), "ERROR: MemoryError: "),
        (OSError(5, "Input/output error"), "ERROR: OSError: [Errno 5] Input/output error"),
        (KeyboardInterrupt(), "ERROR: KeyboardInterrupt: "),
        (QueueError("no room"), "ERROR: no room"),
        (BrokenPipeError(32, "Broken pipe"), "ERROR: BrokenPipeError: [Errno 32] Broken pipe"),
    ],
)
def test_whatever_nobody_has_thought_of_is_to_be_tried_again(
    monkeypatch: pytest.MonkeyPatch, where: str, error: BaseException, line: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(submission, where, fail)
    assert refused("sendmail", "b@y.org", stdin=TEXT, code=os.EX_TEMPFAIL) == line


@pytest.mark.parametrize("stderr", ["2>/dev/full", "2>&-", ">&- 2>&-"])
def test_a_caller_that_cannot_be_told_why_still_gets_the_code(free_port: Callable[[], int], stderr: str) -> None:
    script = f'exec "$0" -m lamsonq sendmail -port {free_port()} b@y.org {stderr}'
    command = ["sh", "-c", script, sys.executable]
    done = subprocess.run(command, input=TEXT.encode(), capture_output=True, env=ENVIRON, check=False, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (os.EX_TEMPFAIL, b"", b"")


def test_sendmail_speaks_lmtp_and_shows_the_dialogue(server: Server, here: Path) -> None:
    command = [sys.executable, "-m", "lamsonq", "sendmail", "-lmtp", "-debug", "1", *port_of(server), "b@y.org"]
    done = subprocess.run(command, input=TEXT.encode(), capture_output=True, env=ENVIRON, check=True, timeout=30)
    assert server.said("LHLO")
    assert b"RCPT TO:<b@y.org>" in done.stderr
    assert done.stdout == b""


def test_help_for_sendmail_does_not_take_the_hop_count_for_a_question(server: Server) -> None:
    assert lamsonq("sendmail", "--help").stdout.startswith("Usage: lamsonq sendmail")
    lamsonq("sendmail", "-h", "0", *port_of(server), "b@y.org", stdin=TEXT)
    assert len(server.messages) == 1


# ---- sendmail: who calls it ------------------------------------------------------------------------------------


def test_mutt_sends_with_it(server: Server, here: Path) -> None:
    mutt = program("mutt")
    command = f"{launcher(here)} sendmail -port {server.port} -oem -oi"
    Path("muttrc").write_text(
        f'set sendmail="{command}"\nset from="joe@x.org"\nset use_envelope_from\nset copy=no\nset realname="Joe"\n'
    )
    done = subprocess.run(
        [mutt, "-n", "-F", "muttrc", "-s", "Grüße", "-b", "hidden@y.org", "--", "b@y.org"],
        input="hello\n.\nmore\n",
        text=True,
        capture_output=True,
        env={**ENVIRON, "HOME": str(here), "TERM": "dumb"},
        check=False,
        timeout=30,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert envelope(server)[0] == "joe@x.org"
    assert sorted(envelope(server)[1]) == ["b@y.org", "hidden@y.org"]
    assert message(server)["subject"] == "Grüße"
    assert message(server).get_content() == "hello\r\n..\r\nmore\r\n"  # a dot is doubled on the wire
    assert b"hidden" not in server.messages[0]


def test_mutt_is_told_that_a_message_was_not_sent(server: Server, here: Path) -> None:
    server.answers["RCPT"] = "550 5.1.1 no such user"
    Path("muttrc").write_text(f'set sendmail="{launcher(here)} sendmail -port {server.port}"\nset copy=no\n')
    done = subprocess.run(
        [program("mutt"), "-n", "-F", "muttrc", "-s", "hi", "b@y.org"],
        input="hello\n",
        text=True,
        capture_output=True,
        env={**ENVIRON, "HOME": str(here), "TERM": "dumb"},
        check=False,
        timeout=30,
    )
    assert done.returncode != 0
    assert "no such user" in done.stdout + done.stderr


def test_cron_sends_with_it(server: Server, here: Path) -> None:
    line = f"{launcher(here)} sendmail -port {server.port} -i -FCronDaemon -B8BITMIME -odi -oem root"
    header = "From: root (Cron Daemon)\\nTo: root\\nSubject: Cron <root@h> x\\nAuto-Submitted: auto-generated\\n"
    subprocess.run(["sh", "-c", f"printf '{header}\\n.\\nout\\n' | {line}"], check=True, timeout=30)
    assert envelope(server) == (ME, [f"root@{HOST}"])
    assert server.messages[0].startswith(b"From: root (Cron Daemon)\r\nTo: root\r\n")
    assert server.messages[0].endswith(b"\r\n\r\n..\r\nout\r\n")


# ---- blast -----------------------------------------------------------------------------------------------------

MBOX = textwrap.dedent("""\
    From one@x.org Mon Jan  1 00:00:00 2024
    To: b@y.org
    Subject: one

    first

    From is no separator

    From MAILER-DAEMON Mon Jan  1 00:00:01 2024
    To: b@y.org
    Subject: two

    >From the start
    From here on: 12:00

    From two@x.org Mon Jan  1 00:00:02 2024
    Return-Path: <path@x.org>
    To: c@y.org
    Subject: three

    third
    """)


def test_blast_sends_an_mbox_unmodified(server: Server, here: Path) -> None:
    Path("in.mbox").write_text(MBOX)
    done = lamsonq("blast", "in.mbox", "-host", "127.0.0.1", "-port", str(server.port))
    assert (done.stdout, done.stderr) == ("", "")
    assert senders(server) == ["one@x.org", "", "path@x.org"]
    assert [line.split("<")[1].split(">")[0] for line in server.said("RCPT")] == ["b@y.org", "b@y.org", "c@y.org"]
    assert server.messages == [
        b"To: b@y.org\r\nSubject: one\r\n\r\nfirst\r\n\r\nFrom is no separator\r\n",
        b"To: b@y.org\r\nSubject: two\r\n\r\n>From the start\r\nFrom here on: 12:00\r\n",
        b"Return-Path: <path@x.org>\r\nTo: c@y.org\r\nSubject: three\r\n\r\nthird\r\n",
    ]


def test_blast_sends_a_maildir(server: Server, here: Path) -> None:
    folder = mailbox.Maildir("in", create=True)
    for number in range(3):
        folder.add(f"From: a{number}@x.org\nTo: b@y.org\n\n{number}\n".encode())
    Path("in/cur/1.seen:2,S").write_bytes(b"From: seen@x.org\nTo: b@y.org\n\n\xff\n")
    Path("in/cur/2.deleted:2,ST").write_bytes(b"From: deleted@x.org\nTo: b@y.org\n\nhello\n")
    lamsonq("blast", "-input", "in", *port_of(server))
    assert sorted(senders(server)) == ["a0@x.org", "a1@x.org", "a2@x.org", "seen@x.org"]
    assert b"From: seen@x.org\r\nTo: b@y.org\r\n\r\n\xff\r\n" in server.messages


def test_blast_of_a_queue_sends_what_was_received(server: Server, here: Path) -> None:
    Queue("run/posts").push(MailRequest("peer", "real@x.org", ["To@y.org"], b"From: other@x.org\n\nhello\n"))
    lamsonq("blast", "run/posts", *port_of(server), "-lmtp", "True")
    assert envelope(server) == ("real@x.org", ["To@y.org"])
    assert server.said("LHLO")
    assert server.messages == [b"From: other@x.org\r\n\r\nhello\r\n"]


def test_blast_goes_on_after_a_mail_that_is_refused(server: Server, here: Path) -> None:
    server.answers["RCPT TO:<C"] = "550 5.1.1 no such user"
    nobody = "From d@x.org Mon Jan  1 00:00:03 2024\nSubject: to nobody\n\nhello\n\n"
    Path("in.mbox").write_text(nobody + MBOX + "\n" + MBOX)
    done = lamsonq("blast", "in.mbox", *port_of(server), code=1)
    assert done.stderr.splitlines() == [
        "ERROR: in.mbox, mail 1: the message has no recipient: nothing in To, Cc or Bcc is an address",
        "ERROR: in.mbox, mail 4: c@y.org: 550 5.1.1 no such user",
        "ERROR: in.mbox, mail 7: c@y.org: 550 5.1.1 no such user",
    ]
    assert len(server.messages) == 4


def test_blast_names_a_file_that_cannot_be_read_and_goes_on(server: Server, here: Path) -> None:
    folder = mailbox.Maildir("in", create=True)
    folder.add(b"From: a@x.org\nTo: b@y.org\n\nhello\n")
    Path("in/new/1.link").symlink_to("nowhere")
    assert refused("blast", "in", *port_of(server)).startswith("ERROR: in/new/1.link: ")
    assert len(server.messages) == 1


def test_blast_without_a_server_is_one_line(here: Path, free_port: Callable[[], int]) -> None:
    Path("in.mbox").write_text(MBOX)
    assert "refused" in refused("blast", "in.mbox", "-port", str(free_port()))


@pytest.mark.parametrize("what", ["missing", "folder", "text"])
def test_what_is_no_mailbox_is_one_line(here: Path, what: str) -> None:
    Path("folder").mkdir()
    Path("text").write_text("Subject: hi\n\nhello\n")
    assert refused("blast", what) == f"ERROR: {what} does not exist or is not a valid mbox or maildir"
    assert refused("cleanse", what, "out") == f"ERROR: {what} does not exist or is not a valid mbox or maildir"
    assert not Path("out").exists()


def test_blast_wants_one_mailbox(here: Path) -> None:
    assert "Give the mbox or maildir to send once" in refused("blast", code=2)
    assert "once" in refused("blast", "a", "-input", "b", code=2)


def test_blast_shows_the_dialogue(server: Server, here: Path) -> None:
    Path("in.mbox").write_text(MBOX)
    command = [sys.executable, "-m", "lamsonq", "blast", "in.mbox", "-debug", "True", *port_of(server)]
    done = subprocess.run(command, capture_output=True, env=ENVIRON, check=True, timeout=30)
    assert b"RCPT TO:<b@y.org>" in done.stderr


# ---- mailboxes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_an_mbox_is_split_as_the_standard_library_splits_it(here: Path, seed: int) -> None:
    chance = random.Random(seed)
    box = mailbox.mbox("in.mbox")
    for number in range(chance.randrange(6)):
        lines = chance.choices(["text", "", "> quoted", "From the start", " ", "." * 70_000], k=chance.randrange(8))
        box.add(f"From: a{number}@x.org\n\n" + "\n".join(lines) + "\n" * chance.randrange(1, 4))
    box.flush()
    expected = [box.get_bytes(key) for key in box.iterkeys()]
    assert [entry.read().Data.rstrip(b"\n") for entry in open_mailbox("in.mbox")] == [e.rstrip(b"\n") for e in expected]


@pytest.mark.parametrize("size", [10_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_a_large_mailbox_needs_no_memory(here: Path, size: int) -> None:
    mailbox.Maildir("in", create=True)
    for number in range(size // 10):
        Path(f"in/new/{number}").touch()
    with open("in.mbox", "w") as file:
        for number in range(size):
            file.write(f"From a@x.org Mon Jan  1 00:00:00 2024\nTo: b{number}@y.org\n\nhello\n\n")
    tracemalloc.start()
    try:
        assert sum(1 for _ in open_mailbox("in.mbox")) == size
        assert sum(1 for _ in open_mailbox("in")) == size // 10
        assert tracemalloc.get_traced_memory()[1] < 500_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("command", ["blast", "cleanse"])
def test_a_bar_is_shown_on_a_terminal_and_only_there(server: Server, here: Path, command: str) -> None:
    Path("in.mbox").write_text(MBOX)
    args = ["blast", "in.mbox", *port_of(server)] if command == "blast" else ["cleanse", "in.mbox", "out"]
    screen, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "lamsonq", *args], env={**ENVIRON, "TERM": "xterm"}, stderr=terminal, stdout=-1
    )
    os.close(terminal)
    shown: list[bytes] = []
    reader = threading.Thread(target=_read_all, args=(screen, shown))
    reader.start()
    out, _ = process.communicate(timeout=30)
    reader.join()
    os.close(screen)
    assert process.returncode == 0
    assert b"100%" in b"".join(shown)
    assert b"%" not in out
    quiet = lamsonq(*("again" if word == "out" else word for word in args))
    assert quiet.stderr == ""


def _read_all(descriptor: int, shown: list[bytes]) -> None:
    while True:
        try:
            data = os.read(descriptor, 4096)
        except OSError:  # the last writer has gone
            return
        if not data:
            return
        shown.append(data)


def test_a_port_of_nothing_is_a_mistake_of_the_command_line() -> None:
    with socket.create_server(("127.0.0.1", 0)):
        assert "65535" in refused("send", "-port", "70000", code=2)
