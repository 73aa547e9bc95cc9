"""Bounces: who could not be reached, why, and for good or for now. The mails are written for these tests, in the styles
of the mail systems that are named."""

import base64
import importlib.util
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import flufl.bounce
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamsonq.bounce import NO_STATUS, BounceAnalyzer, bounce_to, detect
from lamsonq.mail import MailRequest
from lamsonq.routing import RoutingBase
from lamsonq.statuscodes import find_reply, find_status

OUR = "news-bounces@lists.example.com"
LETTER = (
    "From: News <news@lists.example.com>\nTo: {to}\nSubject: News of May\nMessage-ID: <7@lists.example.com>\n\nHello\n"
)


def request(text: str, sender: str = "", to: str = OUR) -> MailRequest:
    return MailRequest(("192.0.2.1", 25), sender, to, text.encode())


def headers(sender: str, subject: str, *more: str) -> str:
    return "\n".join([f"From: {sender}", f"To: {OUR}", f"Subject: {subject}", "MIME-Version: 1.0", *more, "", ""])


def report(status: str, text: str = "I am sorry.", to: str = "bob@example.org", **changes: str) -> str:
    """A delivery report; `changes` replace the type, the encoding or the headers of the status part."""
    part = changes.get("part", "Content-Type: message/delivery-status")
    head = headers(
        changes.get("sender", "MAILER-DAEMON@mx.example.net (Mail Delivery System)"),
        changes.get("subject", "Undelivered Mail Returned to Sender"),
        'Content-Type: multipart/report; report-type=delivery-status; boundary="b1"',
    )
    returned = changes.get("returned", LETTER.format(to=to))
    return (
        f"{head}--b1\nContent-Type: text/plain\n\n{text}\n\n--b1\n{part}\n\n{status}\n"
        f"--b1\nContent-Type: message/rfc822\n\n{returned}\n--b1--\n"
    )


def fields(to: str = "bob@example.org", action: str = "failed", status: str = "5.1.1", said: str = "") -> str:
    lines = [f"Final-Recipient: rfc822; {to}", f"Action: {action}", f"Status: {status}"]
    return "\n".join([*lines, *([f"Diagnostic-Code: smtp; {said}"] if said else [])]) + "\n"


MTA = "Reporting-MTA: dns; mx.example.net\nArrival-Date: Mon, 4 May 2026 10:00:00 +0200\n\n"

POSTFIX = report(
    MTA + "Final-Recipient: rfc822; bob@example.org\nOriginal-Recipient: rfc822;Bob@Example.org\n"
    "Action: failed\nStatus: 5.1.1\nRemote-MTA: dns; mx1.example.org\n"
    "Diagnostic-Code: smtp; 550 5.1.1 <bob@example.org>: Recipient address rejected:\n"
    "    User unknown in virtual mailbox table\n"
)
GMAIL = report(
    "Reporting-MTA: dns; googlemail.com\n\nFinal-Recipient: rfc822; bob@example.org\nAction: failed\nStatus: 5.7.26\n"
    "Remote-MTA: dns; gmail-smtp-in.l.google.com. (192.0.2.26)\n"
    "Diagnostic-Code: smtp; 550-5.7.26 Your email has been blocked because the sender is unauthenticated.\n"
    " 550-5.7.26 Gmail requires all senders to authenticate with either SPF or DKIM.\n 550 5.7.26 x-1 - gsmtp\n",
    sender="Mail Delivery Subsystem <mailer-daemon@googlemail.com>",
    subject="Delivery Status Notification (Failure)",
)
GMAIL_EMPTY = report(
    "\n",
    text="** Message not delivered **\n\nThe response was:\n\nUnspecified Error: the server does not offer AUTH\n",
).replace("Subject:", "X-Failed-Recipients: bob@example.org\nSubject:", 1)
OUTLOOK = report(
    "Reporting-MTA: dns;DB9.eurprd01.prod.example.com\n\nFinal-Recipient: rfc822;bob@example.org\nAction: failed\n"
    "Status: 5.1.10\nDiagnostic-Code: smtp;550 5.1.10 RESOLVER.ADR.RecipientNotFound; Recipient bob@example.org"
    " not found\nX-Display-Name: Bob\n",
    sender="Microsoft Outlook <MicrosoftExchange329e71ec@example.org>",
    subject="Undeliverable: News of May",
)
EXIM = (
    headers("Mail Delivery System <Mailer-Daemon@mx.example.net>", "Mail delivery failed")
    + (
        "This message was created automatically by mail delivery software.\n\n"
        "A message that you sent could not be delivered to one or more of its\n"
        "recipients. This is a permanent error. The following address(es) failed:\n\n"
        "  bob@example.org\n    host mx1.example.org [192.0.2.7]\n"
        "    SMTP error from remote mail server after RCPT TO:<bob@example.org>:\n"
        "    550 5.1.1 no mailbox here by that name\n\n"
        "------ This is a copy of the message, including all the headers. ------\n\n"
    )
    + LETTER.format(to="bob@example.org")
)
QMAIL = (
    headers("MAILER-DAEMON@mx.example.net", "failure notice")
    + (
        "Hi. This is the qmail-send program at mx.example.net.\nI'm afraid I wasn't able to deliver your message to"
        " the\nfollowing addresses. This is a permanent error; I've given up. Sorry it"
        " didn't\nwork out.\n\n<bob@example.org>:\n"
        "192.0.2.7 does not like recipient.\nRemote host said: 550 sorry, no mailbox here by that name (#5.1.1)\n"
        "Giving up on 192.0.2.7.\n\n--- Below this line is a copy of the message.\n\n"
    )
    + LETTER.format(to="bob@example.org")
)
SENDMAIL = report(
    "Reporting-MTA: dns; mx.example.net\nReceived-From-MTA: DNS; lists.example.com\n\n"
    "Final-Recipient: RFC822; <bob@example.org>\nAction: failed\nStatus: 5.1.2\nRemote-MTA: DNS; example.org\n"
    "Diagnostic-Code: SMTP; 550 Host unknown\nLast-Attempt-Date: Mon, 4 May 2026 10:00:01 +0200\n",
    text="   ----- The following addresses had permanent fatal errors -----\n<bob@example.org>\n",
)
YAHOO = (
    headers("MAILER-DAEMON@yahoo.com", "Failure Notice")
    + (
        "Sorry, we were unable to deliver your message to the following address.\n\n<bob@example.org>:\n"
        "554: delivery error: dd This user doesn't have an example.org account (bob@example.org)"
        " [0] - mta1.example.com\n\n"
        "--- Below this line is a copy of the message.\n\n"
    )
    + LETTER.format(to="bob@example.org")
)
HOSTED = headers(
    "Mail Delivery Subsystem <MAILER-DAEMON@appliance.example.net>", "Undeliverable mail", "Content-Type: text/html"
) + (
    "<html><head><style>p {}</style></head><body><p>Your message to "
    "<b><a href='mailto:bob@example.org'>bob@example.org</a></b>"
    " could&nbsp;not be delivered.</p><p>The other server said:<br>452 4.2.2 The mailbox is full</p></body></html>\n"
)
JAPANESE = (
    headers("postmaster@mf.example.net", "failure notice", "Content-Type: text/plain; charset=iso-2022-jp")
    + (
        "以下のアドレスに送信できませんでした。\nbob@example.org\n\n-------server message\n"
        "550 unknown user <bob@example.org>\n\n"
        "-------original message\n"
    )
    + LETTER.format(to="bob@example.org")
)
DELAYED = report(MTA + fields(action="delayed", status="4.4.1", said="connect to mx1.example.org: timed out"))

KNOWN = [
    pytest.param(POSTFIX, "5.1.1", True, id="postfix"),
    pytest.param(GMAIL, "5.7.26", True, id="gmail"),
    pytest.param(GMAIL_EMPTY, "None", True, id="gmail without a status"),
    pytest.param(OUTLOOK, "5.1.10", True, id="outlook"),
    pytest.param(EXIM, "5.1.1", True, id="exim"),
    pytest.param(QMAIL, "5.1.1", True, id="qmail"),
    pytest.param(SENDMAIL, "5.1.2", True, id="sendmail"),
    pytest.param(YAHOO, "None", True, id="yahoo"),
    pytest.param(HOSTED, "4.2.2", False, id="an appliance, in HTML"),
    pytest.param(JAPANESE, "None", True, id="a filter, in Japanese"),
    pytest.param(DELAYED, "4.4.1", False, id="delayed"),
]


@pytest.mark.parametrize(("text", "status", "hard"), KNOWN)
@pytest.mark.parametrize("sender", ["", "mailer-daemon@mx.example.net"])
def test_the_bounces_of_the_mail_systems_are_understood(text: str, status: str, hard: bool, sender: str) -> None:
    message = request(text, sender)
    assert message.is_bounce()
    bounce = message.bounce
    assert bounce is not None
    assert [(r.address, str(r.status)) for r in bounce.recipients] == [("bob@example.org", status)]
    assert (bounce.is_hard(), bounce.is_soft()) == (hard, not hard)
    assert bounce.final_recipient == "bob@example.org"


def test_what_lamson_tells_of_a_bounce() -> None:
    bounce = detect(request(POSTFIX))
    assert bounce.primary_status == (5, "Permanent Failure")
    assert bounce.secondary_status == (1, "Addressing Status")
    assert bounce.combined_status == (11, "Bad destination mailbox address")
    assert bounce.error_for_humans() == "Permanent Failure, Addressing Status, Bad destination mailbox address"
    assert (bounce.remote_mta, bounce.reporting_mta, bounce.action) == ("mx1.example.org", "mx.example.net", "failed")
    rest = "5.1.1 <bob@example.org>: Recipient address rejected: User unknown in virtual mailbox table"
    assert bounce.diagnostic_codes == ["550", rest]
    assert bounce.headers["Final-Recipient"] == ["rfc822; bob@example.org"]
    assert set(bounce.content_parts) == {"notification", "delivery report", "undelivered message"}
    assert bounce.notification is not None
    assert bounce.notification.body == "I am sorry.\n"
    assert bounce.original is not None
    assert bounce.original["message-id"] == "<7@lists.example.com>"
    assert bounce.report[-1]["status"] == "5.1.1"
    assert bounce.probable()
    assert bounce.score == 1.0


def test_a_bounce_without_status_says_so() -> None:
    bounce = detect(request(YAHOO))
    assert bounce.primary_status == bounce.secondary_status == bounce.combined_status == (None, None)
    assert bounce.error_for_humans() == NO_STATUS
    assert bounce.diagnostic_codes[0] == "554"
    empty = BounceAnalyzer({}, 0.0)
    assert empty.diagnostic_codes == [None, None]
    assert (empty.is_hard(), empty.is_soft(), empty.probable()) == (False, False, False)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5.7.26", "5.7.26"),
        ("5.0.0 (permanent failure)", "5.0.0"),
        ("#5.1.1", "5.1.1"),
        ("550-5.7.1 [192.0.2.1] no", "5.7.1"),
        ("server 5.6.7 said: 450 4.2.1 try later", "4.2.1"),
        ("(#5.1.1)", "5.1.1"),
        ("5.999.999", "5.999.999"),
        ("host 5.1.1.9 and 192.5.1.1", "None"),
        ("version 5.1.1.7-rc", "None"),
        ("7.1.1", "None"),
        ("5.1", "None"),
    ],
)
def test_status_codes_are_found(text: str, expected: str) -> None:
    assert str(find_status(text)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("550 no", 550),
        ("host x[192.0.2.1] said: 451 4.7.1 wait", 451),
        ("550-5.7.1 x", 550),
        ("554: no", 554),
        ("port:550 and 5500 and 192.550", None),
    ],
)
def test_replies_are_found(text: str, expected: int | None) -> None:
    assert find_reply(text) == expected


@pytest.mark.parametrize("status", ["5.1.10", "5.7.26", "5.999.1", "5.0.0 (permanent failure)", "#5.9.9"])
def test_an_unknown_status_of_class_5_is_hard_and_has_words(status: str) -> None:
    bounce = detect(request(report(MTA + fields(status=status))))
    assert bounce.is_hard()
    assert bounce.error_for_humans().startswith("Permanent Failure, ")
    assert bounce.error_for_humans().count(",") >= 2


@pytest.mark.parametrize(
    ("status", "hard"),
    [
        (fields(status="4.4.7"), False),
        (fields(action="delayed", status="5.1.1"), False),
        ("Final-Recipient: rfc822; bob@example.org\nAction: failed\n", True),
        ("Final-Recipient: rfc822; bob@example.org\nAction: Failed (permanently)\n", True),
        ("Final-Recipient: rfc822; bob@example.org\nAction: error\nStatus: x\n", True),
        ("Final-Recipient: rfc822; bob@example.org\nAction: failed\nDiagnostic-Code: smtp; 452 mailbox full\n", False),
        ("Final-Recipient: rfc822; bob@example.org\nDiagnostic-Code: smtp; 550 no\n", True),
        ("Final-Recipient: rfc822; bob@example.org\nDiagnostic-Code: smtp; 421 later\n", False),
        ("Final-Recipient: rfc822; bob@example.org\nDiagnostic-Code: x-unix; 4.3.0 disk\n", False),
        ("Final-Recipient: rfc822; bob@example.org\n", False),
    ],
)
def test_hard_or_soft_by_status_then_diagnostic_then_action(status: str, hard: bool) -> None:
    message = request(report(MTA + status))
    assert message.is_bounce()
    assert message.bounce is not None
    assert (message.bounce.is_hard(), message.bounce.is_soft()) == (hard, not hard)


@pytest.mark.parametrize("action", ["relayed", "expanded", "delivered"])
def test_a_report_of_success_is_no_bounce(action: str) -> None:
    for status in ("2.1.5", "5.1.1"):
        message = request(report(MTA + fields(action=action, status=status)))
        assert not message.is_bounce()
        assert message.bounce is not None
        assert not message.bounce.is_hard()
        assert not message.bounce.is_soft()
        assert [r.action for r in message.bounce.recipients] == [action]


def test_every_recipient_has_a_record_and_the_worst_one_decides() -> None:
    blocks = [fields("a@x.example", "delivered", "2.0.0"), fields("b@x.example", "delayed", "4.2.2")]
    bounce = detect(request(report(MTA + "\n".join([*blocks, fields("c@x.example", said="550 no")]))))
    assert [(r.address, r.permanent, r.failed) for r in bounce.recipients] == [
        ("a@x.example", False, False),
        ("b@x.example", False, True),
        ("c@x.example", True, True),
    ]
    assert bounce.is_hard()
    assert bounce.final_recipient == "c@x.example"


def test_the_original_recipient_is_whom_we_wrote_to() -> None:
    forwarded = "Original-Recipient: rfc822;bob@example.org\n" + fields("b.jones@inside.example.org")
    bounce = detect(request(report(MTA + forwarded)))
    assert bounce.recipients[0].address == "bob@example.org"
    assert bounce.final_recipient == "b.jones@inside.example.org"


STATUS = MTA + fields(said="550 no such user")
ENCODED = base64.encodebytes(STATUS.encode()).decode()


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(report(STATUS, part="Content-Type: text/plain"), id="as text"),
        pytest.param(report(STATUS, part="Content-Type: application/octet-stream"), id="as data"),
        pytest.param(
            report(ENCODED, part="Content-Type: message/delivery-status\nContent-Transfer-Encoding: base64"),
            id="in base64",
        ),
        pytest.param(report(STATUS).replace('boundary="b1"', 'boundary="b2"'), id="a wrong boundary"),
        pytest.param(report(STATUS).replace('boundary="b1"', "x=y"), id="no boundary"),
        pytest.param(report(STATUS)[: report(STATUS).index("--b1\nContent-Type: message/rfc822")], id="cut off"),
        pytest.param(
            report(STATUS).replace("multipart/report; report-type=delivery-status", "multipart/mixed"), id="mixed"
        ),
        pytest.param(report(MTA.strip() + "\n" + fields()), id="one block"),
        pytest.param(report(MTA + fields().replace("\nAction", "\n\nAction")), id="an empty line inside"),
        pytest.param(
            report(MTA + "Action: failed\nStatus: 5.1.1\nDiagnostic-Code: smtp; 550 <bob@example.org> no\n"),
            id="no final",
        ),
        pytest.param(report(MTA + fields("<bob@example.org>")), id="angle brackets"),
        pytest.param(report(MTA + fields().replace("rfc822; ", "")), id="no type"),
        pytest.param(report(MTA + fields("Bob Jones (home) bob@example.org")), id="a name"),
        pytest.param(
            headers("MAILER-DAEMON@gw.example.net", "Undelivered", 'Content-Type: multipart/mixed; boundary="o"')
            + "--o\nContent-Type: text/plain\n\nscanned\n--o\n"
            + report(STATUS)
            + "\n--o--\n",
            id="in another container",
        ),
        pytest.param(
            headers("MAILER-DAEMON@gw.example.net", "Undelivered", 'Content-Type: multipart/mixed; boundary="o"')
            + "--o\nContent-Type: message/rfc822\n\n"
            + report(STATUS)
            + "\n--o--\n",
            id="in another message",
        ),
        pytest.param(report(STATUS).replace("\n", "\r\n"), id="CRLF"),
    ],
)
def test_broken_reports_are_read(text: str) -> None:
    message = request(text)
    assert message.is_bounce()
    assert message.bounce is not None
    assert [(r.address, r.permanent) for r in message.bounce.recipients] == [("bob@example.org", True)]


def test_recipients_without_an_empty_line_between_them_are_two() -> None:
    bounce = detect(request(report(MTA + fields("a@x.example") + fields("b@x.example", status="4.2.2"))))
    assert [(r.address, r.permanent) for r in bounce.recipients] == [("a@x.example", True), ("b@x.example", False)]


def test_the_returned_message_is_not_the_report() -> None:
    returned = report(MTA + fields("victim@example.org")).replace("b1", "b9")
    bounce = detect(request(report(MTA + fields("bob@example.org", "delayed", "4.4.1"), returned=returned)))
    assert [r.address for r in bounce.recipients] == ["bob@example.org"]
    assert not bounce.is_hard()
    letter = LETTER.format(to="bob@example.org").replace("Hello", fields("victim@example.org"))
    bounce = detect(request(report(STATUS, part="Content-Type: text/plain", returned=letter)))
    assert [r.address for r in bounce.recipients] == ["bob@example.org"]


@pytest.mark.parametrize(
    ("written", "address"),
    [
        (r"utf-8; \x{75}ser\x{F6}@example.org", "userö@example.org"),
        ("utf-8; josé@exämple.org", "josé@exämple.org"),
        (r"utf-8; \x{110000}x@example.org", "\ufffdx@example.org"),
        ("rfc822; bob+40example.org", "bob@example.org"),
    ],
)
def test_international_addresses_are_read(written: str, address: str) -> None:
    status = MTA + fields().replace("rfc822; bob@example.org", written)
    bounce = detect(request(report(status, part="Content-Type: message/global-delivery-status")))
    assert [r.address for r in bounce.recipients] == [address]


def test_a_report_that_names_nobody_is_completed_by_the_other_headers() -> None:
    nameless = MTA + "Action: failed\nStatus: 5.2.1\n"
    text = report(nameless, text="no more").replace("Subject:", "X-Failed-Recipients: bob@example.org\nSubject:", 1)
    assert [(r.address, str(r.status)) for r in detect(request(text)).recipients] == [("bob@example.org", "5.2.1")]
    verp = request(report(nameless, text="no more"), to="news+bob=example.org@lists.example.com")
    assert [(r.address, r.permanent) for r in detect(verp).recipients] == [("bob@example.org", True)]
    told = request(report(nameless, text="could not be delivered to:\n\n  bob@example.org\n"))
    assert [(r.address, r.permanent) for r in detect(told).recipients] == [("bob@example.org", True)]


COMPLAINT = headers(
    "<feedback@isp.example.net>", "complaint", "Content-Type: multipart/report; report-type=feedback-report; boundary=b"
)
COMPLAINT += (
    "--b\n\nThis is an abuse report.\n--b\nContent-Type: message/feedback-report\n\nFeedback-Type: abuse\nVersion: 1\n"
)
COMPLAINT += "Original-Rcpt-To: <bob@example.org>\n\n--b\nContent-Type: message/rfc822\n\n" + LETTER.format(
    to="bob@example.org"
)
READ = headers(
    "bob@example.org", "Read: News", "Content-Type: multipart/report; report-type=disposition-notification; boundary=b"
)
READ += "--b\n\nYour message was displayed.\n--b\nContent-Type: message/disposition-notification\n\n"
READ += "Final-Recipient: rfc822;bob@example.org\nDisposition: manual-action/MDN-sent-manually; displayed\n\n--b--\n"
AWAY = (
    headers("bob@example.org", "Out of office", "Auto-Submitted: auto-replied") + "I cannot be reached until Monday.\n"
)
FORWARDED = headers("joe@example.org", "Fwd: Undelivered Mail Returned to Sender") + EXIM
ORDINARY = (
    headers("joe@example.org", "Re: Undelivered Mail Returned to Sender")
    + "bob@example.org: 550 5.1.1 is what it said\n"
)


@pytest.mark.parametrize("sender", ["", "joe@example.org"])
@pytest.mark.parametrize(
    "text",
    [
        pytest.param(COMPLAINT, id="complaint"),
        pytest.param(READ, id="receipt"),
        pytest.param(READ.replace("message/disposition-notification", "text/plain"), id="receipt as text"),
        pytest.param(AWAY, id="away"),
    ],
)
def test_other_automatic_mail_is_no_bounce(text: str, sender: str) -> None:
    message = request(text, sender)
    assert not message.is_bounce()
    assert message.bounce is not None
    assert not message.bounce.is_hard()


def test_a_report_of_another_kind_stays_none_whatever_its_text_says() -> None:
    receipt = READ.replace("was displayed", "to bob@example.org was deleted unread: 550 5.1.1")
    tls = headers("tls@isp.example", "Report", "Content-Type: multipart/report; report-type=tlsrpt; boundary=b")
    for text in (receipt, tls + "--b\n\nbob@example.org: 550 5.1.1 failed\n--b--\n"):
        assert_is_none(request(text))


SUBJECTS = ["Undelivered Mail Returned to Sender", "Undeliverable: News of May", "failure notice"]
PREFIXES = [
    "RV: ",
    "[list] Fwd: ",
    "[list] Re: ",
    "[a][b] AW: ",
    "Re[2]: ",
    "WG: ",
    "TR: ",
    "VB: ",
    "ENC: ",
    "Rif: ",
    "I: ",
]
PREFIXES += ["Doorst: ", "转发：", "Пересл: ", "Weitergeleitet: ", "Fwd: Re: ", "[list] "]
TOLD = EXIM.partition("\n\n")[2]
QUOTED = "Is it so?\n\n" + "".join(f"> {line}\n" for line in TOLD.split("\n"))
MIXED = 'Content-Type: multipart/mixed; boundary="o"'
ATTACHED = (
    f"--o\n\nbob@example.org was not reached, 550 5.1.1!\n--o\nContent-Type: message/rfc822\n\n{POSTFIX}\n--o--\n"
)
FLAT = f"--o\n\nsee below\n--o\nContent-Type: message/delivery-status\n\n{STATUS}\n--o--\n"
SYSTEM = "MAILER-DAEMON@mx.example.net (Mail Delivery System)"


def assert_is_none(message: MailRequest) -> None:
    assert not message.is_bounce()
    bounce = detect(message)
    assert bounce.score <= 0.2
    assert (bounce.is_hard(), bounce.is_soft()) == (False, False)


@pytest.mark.parametrize("subject", SUBJECTS)
@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_bounce_that_somebody_sends_on_is_none_of_ours(prefix: str, subject: str) -> None:
    for sender in ("joe@example.org", "postmaster@example.org"):
        for more, body in (((), TOLD), ((), QUOTED), ((MIXED,), ATTACHED), ((MIXED,), FLAT)):
            assert_is_none(request(headers(f"Joe <{sender}>", prefix + subject, *more) + body, sender))
    whole = POSTFIX.replace(SYSTEM, "Joe <joe@example.org>").replace(SUBJECTS[0], prefix + subject)
    assert_is_none(request(whole, "joe@example.org"))


@pytest.mark.parametrize("name", ["Mail Delivery System via News", "'Mail Delivery Subsystem' via RT"])
def test_a_bounce_that_a_list_or_a_ticket_system_sends_on_is_none_of_ours(name: str) -> None:
    address = "news@lists.example.org"
    assert_is_none(request(POSTFIX.replace(SYSTEM, f'"{name}" <{address}>'), address))
    assert_is_none(request(headers(f'"{name}" <{address}>', "[help #12] failure notice") + TOLD, address))


DIGEST = headers("news-request@x.example", "Undelivered mail digest", MIXED, "List-Id: <news.x.example>") + (
    f"--o\n\nUndelivered Mail Returned to Sender\n--o\nContent-Type: multipart/digest; boundary=p\n\n"
    f"--p\n\n{POSTFIX}\n--p--\n--o--\n"
)
PARCEL = "Your parcel could not be delivered to bob@example.org: address unknown, 550 5.1.1.\n"


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(headers("joe@example.org", "Undelivered Mail Returned to Sender") + TOLD, id="a subject alone"),
        pytest.param(headers("joe@example.org", "Delivery failure", MIXED) + ATTACHED, id="an attached bounce"),
        pytest.param(headers("joe@example.org", "Delivery failure", MIXED) + FLAT, id="an attached report"),
        pytest.param(headers("joe@example.org", "Is this mail not delivered?") + TOLD, id="a person asks"),
        pytest.param(headers("postmaster@example.org", "Is this mail not delivered?") + QUOTED, id="a postmaster asks"),
        pytest.param(headers("postmaster@example.org", "failure notice of the meeting") + TOLD, id="of the meeting"),
        pytest.param(headers("postmaster@example.org", "Our server") + TOLD, id="a postmaster alone"),
        pytest.param(headers('"Royal Mail Delivery" <x@mail.example>', "Delivery failure: AB12") + PARCEL, id="parcel"),
        pytest.param(headers("Mail Delivery Service <x@mail.example>", "Your parcel AB12") + PARCEL, id="courier"),
        pytest.param(headers("bob@example.org", "Declined: failure notice") + "STATUS:5.1.1\n", id="invitation"),
        pytest.param(headers("mailman@x.example", "Uncaught bounce notification", MIXED) + ATTACHED, id="to the owner"),
        pytest.param(DIGEST, id="digest"),
    ],
)
def test_an_ordinary_letter_is_no_bounce(text: str) -> None:
    assert_is_none(request(text, "joe@example.org"))


ABSENT = "I am out, my mail is not delivered. Call 550 12 34, or write to Ann, ann@example.org, in room 5.1.1.\n"


@pytest.mark.parametrize("author", ["bob@example.org", "Postmaster <postmaster@example.org>"])
@pytest.mark.parametrize("sender", ["", "bob@example.org"])
@pytest.mark.parametrize(
    "marks",
    [
        *("Auto-Submitted: auto-replied", "Auto-Submitted: auto-replied; owner=x", "Auto-Submitted: auto-notified"),
        *("X-Autoreply: yes", "X-Autorespond: News", "X-Auto-Reply: 1", "Precedence: auto_reply"),
    ],
)
def test_an_automatic_reply_is_no_bounce_whatever_it_says(marks: str, sender: str, author: str) -> None:
    for subject in ("News of May", "Undeliverable: News of May", "Delivery failure"):
        for body in (ABSENT, "Your request has a number.\n\n" + QUOTED, TOLD):
            assert_is_none(request(headers(author, subject, marks) + body, sender))


@pytest.mark.parametrize(
    "subject",
    [
        *("Out of office: News", "Automatic reply: Undeliverable: News", "Abwesenheitsnotiz: News", "Re: News of May"),
        *("Réponse automatique : News", "Automatische Antwort: failure notice", "自動応答: News"),
    ],
)
def test_an_absence_is_told_by_its_subject_too(subject: str) -> None:
    for author in ("bob@example.org", "Postmaster <postmaster@example.org>"):
        assert_is_none(request(headers(author, subject) + ABSENT))


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(ABSENT.replace("I am out", "I am back on Monday"), id="absence"),
        pytest.param("Call Ann, ann@example.org, or Bob: 550-1234.\n", id="a list of words"),
        pytest.param("We have got it.\n\n" + QUOTED, id="a quotation"),
        pytest.param("Thanks.\n\nOn Mon, 4 May 2026 Joe <joe@example.org> wrote:\n" + TOLD, id="wrote"),
        pytest.param("Thanks.\n\n---------- Forwarded message ----------\n" + TOLD, id="forwarded"),
        pytest.param("Your mail is kept until you answer: ann@example.org, 550\n", id="a challenge"),
    ],
)
def test_the_null_sender_alone_makes_nobody_a_failed_recipient(body: str) -> None:
    for author in ("bob@example.org", "Postmaster <postmaster@example.org>"):
        assert detect(request(headers(author, "News of May") + body)).recipients == []


def test_who_can_help_is_no_failed_recipient() -> None:
    text = headers(SYSTEM, "News") + "Your mail was read.\nQuestions? Call Ann, ann@example.org, at 550 12 34.\n"
    assert not detect(request(text)).is_hard()


def test_a_report_is_one_also_where_it_is_marked_as_an_automatic_reply() -> None:
    for known in KNOWN:
        text = str(known.values[0]).replace("Subject:", "Auto-Submitted: auto-replied\nSubject:", 1)
        if "postmaster@mf" not in text:  # neither a report nor a name that only a mail system has
            message = request(text)
            assert message.is_bounce()
            assert [r.address for r in detect(message).recipients] == ["bob@example.org"]


def test_only_the_report_of_this_message_makes_an_automatic_reply_a_bounce() -> None:
    marks = ("Auto-Submitted: auto-replied", "Content-Type: multipart/report; report-type=delivery-status; boundary=o")
    assert_is_none(request(headers("postmaster@example.org", "Delivery failure", *marks) + ATTACHED))
    assert detect(request(headers("postmaster@example.org", "Delivery failure", *marks) + FLAT)).is_hard()


def test_a_report_without_recipients_does_not_take_those_of_the_mail_that_it_returns() -> None:
    returned = report(MTA + fields("victim@example.org")).replace("b1", "b9")
    assert detect(request(report("Reporting-MTA: dns; x\n", text="no", returned=returned))).recipients == []


def multipart(subject: str, text: str, *more: str) -> str:
    letter = LETTER.format(to="bob@example.org")
    part = f"--o\nContent-Type: text/plain\n\n{text}\n--o\nContent-Type: message/rfc822\n\n{letter}\n--o--\n"
    return headers("System Administrator <postmaster@example.net>", subject, MIXED, *more) + part


EXCHANGE = multipart(
    "Undeliverable: News of May",
    "Your message\n\n  To: bob@example.org\n  Subject: News of May\n\ndid not reach the following recipient(s):\n\n"
    "bob@example.org on Mon, 4 May 2026 10:00:00 +0200\n    The recipient name is not recognized\n\tMSEXCH:IMS:X\n",
    "X-Mailer: Internet Mail Service (5.5.2653.19)",
)
WARNING = headers(SYSTEM, "Warning: message 1abc-0001 delayed 24 hours", "Auto-Submitted: auto-replied") + (
    "This message was created automatically by mail delivery software.\nA message that you sent has not yet been"
    " delivered.\n\nThe address to which the message has not yet been delivered is:\n\n  bob@example.org\n\n"
    "No action is required on your part.\n"
)
ROBOT = "Robot <robot@example.net>"
NOT_DELIVERED = "Your mail to bob@example.org could not be delivered.\n\n550 5.1.1 no such user\n"
SOFTLY = "To =\nbob@example.org it could=20not be delivered: 452 4.2.2 mailbox=\n full\n"
POSTMASTER = headers("postmaster@example.net", "Undeliverable: x", "Content-Type: text/html") + (
    "<html><p>Delivery has failed to these recipients:<p><a href='mailto:bob@example.org'>&lt;bob@example.org></a>"
    "<p>The server returned '550 5.1.10 RecipientNotFound'</html>\n"
)


@pytest.mark.parametrize(
    ("text", "sender", "hard"),
    [
        pytest.param(EXCHANGE, "postmaster@example.net", True, id="Exchange 5.5"),
        pytest.param(OUTLOOK.replace("Undeliverable:", "Unzustellbar:"), "", True, id="Exchange in German"),
        pytest.param(OUTLOOK.replace("Undeliverable:", "Re:"), "", True, id="the subject of the mail"),
        pytest.param(
            OUTLOOK.replace("Undeliverable:", "[EXTERNAL] Undeliverable:"), "", True, id="tagged by a gateway"
        ),
        pytest.param(
            EXIM.replace("Subject:", "X-Failed-Recipients: bob@example.org\nAuto-Submitted: auto-replied\nSubject:", 1),
            "",
            True,
            id="Exim",
        ),
        pytest.param(WARNING, "", False, id="Exim warns"),
        pytest.param(QMAIL, "SRS0=a=bc=mx.example.net=mailer-daemon@fwd.example", True, id="SRS"),
        pytest.param(headers(ROBOT, "your mail") + NOT_DELIVERED, "", True, id="the null sender and a text"),
        pytest.param(headers(ROBOT, "x") + "bob@example.org\nmx said: 550 go away\n", "", True, id="the other server"),
        pytest.param(
            headers(ROBOT, "x", "Content-Transfer-Encoding: quoted-printable") + SOFTLY, "", False, id="encoded text"
        ),
        pytest.param(POSTMASTER, "postmaster@example.net", True, id="a postmaster in HTML"),
        pytest.param(
            POSTFIX.replace("Subject:", "List-Id: <news.x>\nPrecedence: bulk\nSubject:", 1),
            "n@x.example",
            True,
            id="list",
        ),
    ],
)
def test_bounces_of_all_kinds_are_understood(text: str, sender: str, hard: bool) -> None:
    message = request(text, sender)
    assert message.is_bounce()
    bounce = detect(message)
    assert [r.address for r in bounce.recipients] == ["bob@example.org"]
    assert bounce.is_hard() is hard


@pytest.mark.parametrize("tag", ["", "prvs=1234abcdef="])
def test_the_address_that_it_came_to_names_the_recipient(tag: str) -> None:
    text = headers(SYSTEM, "failure notice") + "It did not work.\n"
    bounce = detect(request(text, to=f"{tag}news+bob=example.org@lists.example.com"))
    assert [(r.address, r.permanent) for r in bounce.recipients] == [("bob@example.org", None)]


def test_a_complaint_is_told_apart() -> None:
    assert detect(request(COMPLAINT)).feedback_type == "abuse"
    assert detect(request(POSTFIX)).feedback_type is None


@pytest.mark.parametrize("text", [pytest.param(FORWARDED, id="forwarded"), pytest.param(ORDINARY, id="quoted")])
def test_a_letter_about_a_bounce_is_none_and_is_not_even_parsed(text: str) -> None:
    message = request(text, "joe@example.org")
    assert not message.is_bounce()
    assert "tree" not in vars(message._source)
    assert not detect(message).is_hard()


def test_mail_of_the_null_sender_that_nobody_understands_is_soft() -> None:
    message = request(headers("robot@example.org", "hm") + "beep\n")
    assert message.is_bounce()
    assert message.bounce is not None
    assert (message.bounce.is_soft(), message.bounce.is_hard(), message.bounce.recipients) == (True, False, [])
    assert not message.is_bounce(threshold=0.9)


def test_who_writes_and_who_reads_is_no_failed_recipient() -> None:
    text = headers("Mail Delivery System <mailer-daemon@mx.example.net>", "Undeliverable") + (
        f"Your message to {OUR} is here. Write to postmaster@mx.example.net about it.\n"
        "News <news@lists.example.com> sent it.\n\nCould not reach user bob@example.org: 550 5.2.1 disabled\n\n"
        "----- Original message -----\n" + LETTER.format(to="all@lists.example.com")
    )
    assert [(r.address, str(r.status)) for r in detect(request(text)).recipients] == [("bob@example.org", "5.2.1")]


def test_each_recipient_in_a_text_has_its_own_reason() -> None:
    text = headers("MAILER-DAEMON@mx.example.net", "failure notice") + (
        "Hi. This is the qmail-send program at mx.example.net.\nThe following addresses failed.\n\n"
        "<ann@example.org>:\nThis address no longer takes mail.\n\n"
        "<bob@example.org>:\nRemote host said: 452 4.2.2 mailbox full\n\n"
        "<cyd@example.org>:\nRemote host said: 550 5.1.1 unknown\n\n"
    )
    told = [(r.address, str(r.status), r.permanent, r.diagnostic) for r in detect(request(text)).recipients]
    assert told == [
        ("ann@example.org", "None", True, ""),
        ("bob@example.org", "4.2.2", False, "452 4.2.2 mailbox full"),
        ("cyd@example.org", "5.1.1", True, "550 5.1.1 unknown"),
    ]


def test_a_text_names_no_more_recipients_than_it_may() -> None:
    named = "".join(f"<u{number}@example.org>: 550 no such user\n" for number in range(900))
    text = headers("MAILER-DAEMON@mx.example.net", "failure notice") + named
    assert len(detect(request(text)).recipients) == 500


# Handlers.


HANDLERS = """
    import asyncio
    from lamsonq.bounce import bounce_to

    def SOFT(message):
        CALLS.append(("soft", message.bounce.final_recipient))
        return QUIET

    async def HARD(message, host=None):
        await asyncio.sleep(0)
        CALLS.append(("hard", host))

    @route("bounces@(host)", host=r".+")
    @bounce_to(soft=SOFT, hard=HARD)
    def START(message, host=None):
        CALLS.append(("letter", host))

    @route("bounces@(host)", host=r".+")
    @bounce_to(soft=SOFT, hard=HARD)
    async def QUIET(message, host=None):
        CALLS.append(("quiet", host))

    @route("(list)-bounces@(host)", list="[a-z]+", host=r".+")
    @stateless
    @bounce_to(soft=lambda message, **captures: CALLS.append(captures), hard=HARD)
    def STATELESS(message, list=None, host=None):
        CALLS.append(("stateless letter", list))

    @bounce_to(soft=SOFT, hard=HARD)
    @route("above@(host)", host=r".+")
    @stateless
    def ABOVE(message, host=None):
        CALLS.append("above")
"""


@pytest.fixture
def calls(module: Callable[..., str], router: RoutingBase) -> list[object]:
    name = module(HANDLERS)
    router.load([name])
    called: list[object] = importlib.import_module(name).CALLS
    return called


def test_bounces_go_to_their_functions_and_letters_to_the_handler(router: RoutingBase, calls: list[object]) -> None:
    router.deliver(request(LETTER, "joe@example.org", "bounces@x.example"))
    router.deliver(request(POSTFIX, "", "bounces@x.example"))
    router.deliver(request(DELAYED, "", "bounces@x.example"))
    assert calls == [("letter", "x.example"), ("hard", "x.example"), ("soft", "bob@example.org")]


def test_what_the_function_for_bounces_returns_moves_the_conversation(router: RoutingBase, calls: list[object]) -> None:
    system = "postmaster@mx.example.net"
    router.deliver(request(DELAYED, system, "bounces@x.example"))
    router.deliver(request(LETTER, system, "bounces@x.example"))
    assert calls == [("soft", "bob@example.org"), ("quiet", "x.example")]


def test_a_stateless_handler_may_be_decorated(router: RoutingBase, calls: list[object]) -> None:
    router.deliver(request(DELAYED, "", "news-bounces@x.example"))
    router.deliver(request(POSTFIX, "", "news-bounces@x.example"))
    router.deliver(request(LETTER, "joe@example.org", "news-bounces@x.example"))
    assert calls == [{"list": "news", "host": "x.example"}, ("hard", "x.example"), ("stateless letter", "news")]


def test_the_decorator_may_stand_above_the_route(router: RoutingBase, calls: list[object]) -> None:
    router.deliver(request(POSTFIX, "", "above@x.example"))
    assert calls == [("hard", "x.example")]


def test_what_cannot_be_called_is_refused_where_it_stands() -> None:
    with pytest.raises(TypeError, match=r"bounce_to\(hard=\.\.\.\) takes a function"):
        bounce_to(soft=print, hard="GONE")  # type: ignore[arg-type]


# Strangers.


SAMPLES = [text for param in KNOWN for text in [str(param.values[0])]] + [COMPLAINT, READ, FORWARDED]


@settings(max_examples=150)
@given(st.data())
def test_no_mutation_of_a_bounce_raises(data: st.DataObject) -> None:
    octets = bytearray(data.draw(st.sampled_from(SAMPLES)).encode())
    for _ in range(data.draw(st.integers(1, 6))):
        start = data.draw(st.integers(0, len(octets)))
        end = min(len(octets), start + data.draw(st.integers(0, 60)))
        octets[start:end] = data.draw(
            st.one_of(st.binary(max_size=8), st.sampled_from([b"\n\n", b"--b1", b"@", b";", b":"]))
        )
    look_at(MailRequest("x", "", OUR, bytes(octets)))


@settings(max_examples=100)
@given(
    st.binary(max_size=400),
    st.sampled_from(["text/plain", "message/delivery-status", "multipart/report; boundary=b", "text/html"]),
)
def test_random_bytes_never_raise(octets: bytes, kind: str) -> None:
    head = f"From: MAILER-DAEMON@x\nSubject: Undeliverable\nContent-Type: {kind}\n\n--b\n".encode()
    look_at(MailRequest("x", "", OUR, octets))
    look_at(MailRequest("x", "", OUR, head + octets))
    look_at(MailRequest("x", "", OUR, head + b"Final-Recipient: " + octets + b"\nAction: failed\nStatus: " + octets))


def look_at(message: MailRequest) -> None:
    message.is_bounce()
    bounce = detect(message)
    assert 0.0 <= bounce.score <= 1.0
    assert not (bounce.is_hard() and bounce.is_soft())
    assert bounce.error_for_humans()
    for recipient in bounce.recipients:
        assert recipient.address.isprintable()


DAEMON = b"From: MAILER-DAEMON@x\r\nSubject: failure notice\r\n"
REPORT = DAEMON + b"Content-Type: message/delivery-status\r\n\r\n"
HTML = b"Content-Type: text/html\r\n\r\n<html>"
PARTS = b"Content-Type: multipart/mixed; boundary=b\r\n\r\n--b\n"
HTML_PART = b"Content-Type: text/html\n\n<html>"
ENCODED_BRACKETS = (
    DAEMON + b"X-Mailer: Internet\r\nContent-Type: multipart/mixed; boundary=b\r\n\r\n"
    b"--b\nContent-Transfer-Encoding: quoted-printable\n\n" + (b"<" * 70 + b"=\n") * 900 + b"--b--\n"
)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(DAEMON + b"\r\n" + b"a" * 10_000_000, id="one line"),
        pytest.param(DAEMON + b"\r\n" + b"\n" * 10_000_000, id="empty lines"),
        pytest.param(DAEMON + b"\r\nfailed addresses follow:\n" + (b"x" * 900 + b"\n") * 10_000, id="no address"),
        pytest.param(DAEMON + b"\r\n" + b"<a@b.example>: 550 failed\n" * 400_000, id="addresses"),
        pytest.param(
            DAEMON + b"\r\nfailed\n" + b"".join(b"<u%d@b.example>: 550 no\n" % i for i in range(20_000)),
            id="recipients in text",
        ),
        pytest.param(DAEMON + b"X-A: b\r\n" * 100_000 + b"\r\nfailed: <a@b.example>", id="header lines"),
        pytest.param(REPORT + b"Final-Recipient: rfc822; a\nAction: failed\n\n" * 200_000, id="recipients"),
        pytest.param(REPORT + b"x\n" * 5_000_000, id="no fields"),
        pytest.param(REPORT + b"Action: failed\nDiagnostic-Code: " + b"5-4 " * 2_500_000, id="a long diagnostic"),
        pytest.param(DAEMON + HTML + b"<style <a <b" * 800_000, id="tags"),
        pytest.param(DAEMON + HTML + b"<a@" * 30_000, id="addresses in brackets"),
        pytest.param(DAEMON + PARTS + (HTML_PART + b"<style " * 9000 + b"\n--b\n") * 15, id="styles that do not end"),
        pytest.param(DAEMON + PARTS + (HTML_PART + b"<a <b&#1" * 8000 + b"\n--b\n") * 150, id="many parts of HTML"),
        pytest.param(
            DAEMON + PARTS + (b'Content-Type: text/plain; x="' + b";" * 8000 + b"\n\nx\n--b\n") * 990,
            id="parameters",
        ),
        pytest.param(ENCODED_BRACKETS, id="a long line in quoted-printable"),
        pytest.param(
            DAEMON + b"Content-Type: multipart/report; report-type=" + b" " * 100_000 + b";\r\n\r\n", id="type"
        ),
        pytest.param(
            DAEMON + b"X-Failed-Recipients: a" + b" " * 100_000 + b"x;\r\nContent-Type: message/delivery-status\r\n\r\n"
            b"Action: failed\nStatus: 5.1.1\n",
            id="a failed recipient",
        ),
        *(
            pytest.param(head + (unit * 65536)[:65536], id=f"{kind}: {unit.decode()!r}")
            for kind, head in (("daemon", DAEMON + b"\r\n"), ("null sender", b"From: a@b.example\r\n\r\n"))
            for unit in b" |<|@|&|5|\n |a@|a@.|550 |5.1.|user:|user |deliver a ".split(b"|")
        ),
    ],
)
def test_a_hostile_bounce_takes_bounded_time(data: bytes) -> None:
    message = MailRequest("x", "", OUR, data)
    began = time.process_time()
    bounce = detect(message)
    assert time.process_time() - began < 4
    assert len(bounce.recipients) <= 2000


def test_numbers_that_python_does_not_read_are_read_past() -> None:
    huge = b"9" * 5000
    text = b"<p>&#" + huge + b";<p>bob@example.org could not be delivered: 550 5.1.1 no"
    for kind in (b"text/html", b"text/html; charset*" + huge + b"=x"):
        data = DAEMON + b"Content-Type: " + kind + b"\r\n\r\n" + text
        assert [r.address for r in detect(MailRequest("x", "", OUR, data)).recipients] == ["bob@example.org"]


# Real bounces.


SDIST = Path(os.environ.get("FLUFL_BOUNCE_SDIST") or Path(flufl.bounce.__file__).parents[3])


@pytest.mark.skipif(
    not (SDIST / "tests" / "test_detectors.py").exists(),
    reason="flufl.bounce's wheel has no samples: FLUFL_BOUNCE_SDIST names its unpacked source distribution",
)
def test_the_recipients_in_the_samples_of_flufl_bounce_are_found() -> None:
    bench = bench_module()
    expected = bench.expected_in(SDIST)
    read = {name: bench.ours((SDIST / "tests" / "data" / name).read_bytes()) for name in expected}
    assert {name for name in expected if set(read[name]) != set(expected[name])} == set()


def bench_module() -> ModuleType:
    path = Path(__file__).parents[1] / "bench" / "bounces.py"
    spec = importlib.util.spec_from_file_location("bench_bounces", path)
    assert spec is not None
    assert spec.loader is not None
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    return bench
