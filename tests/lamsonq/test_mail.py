"""MailRequest: what came in, byte for byte, readable whatever it is. MailResponse: what goes out, safe and complete."""

from __future__ import annotations

import email
import email.policy
import time
from collections.abc import Callable
from email.message import EmailMessage
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamsonq import mail
from lamsonq.headers import HeaderBlock, decode_words
from lamsonq.mail import Envelope, MailRequest, MailResponse
from lamsonq.mime import parse

SIMPLE = b"From: Joe <joe@x.org>\r\nTo: list@y.org\r\nSubject: Hi\r\n\r\nHello\r\n"
PNG = b"\x89PNG\r\n\x1a\n\x00\xff\r\rx\n" * 50


def request(data: bytes | str, sender: str | None = "joe@x.org", to: Any = "list@y.org") -> MailRequest:
    return MailRequest(("127.0.0.1", 4242), sender, to, data)


def with_attachment() -> bytes:
    message = EmailMessage(policy=email.policy.SMTP)
    message["From"], message["To"] = "a@b", "c@d"
    message.set_content("Text\n")
    message.add_alternative("<p>Html</p>\n", subtype="html")
    message.add_attachment(PNG, "image", "png", filename="Bild ü.png")
    return message.as_bytes()


def nested(depth: int) -> bytes:
    return b"".join(b"Content-Type: multipart/mixed; boundary=b%d\r\n\r\n--b%d\r\n" % (i, i) for i in range(depth))


CORPUS = {
    "nothing": b"",
    "no body": b"Subject: x",
    "no headers": b"\r\nbody",
    "text only": b"just text\nmore",
    "plain": SIMPLE,
    "binary attachment": with_attachment(),
    "eight bits": "Subject: Grüße\r\n\r\näöü\r\n".encode() + b"\xff\xfe\x00",
    "latin-1": b"Subject: caf\xe9\r\nContent-Type: text/plain; charset=iso-8859-1\r\n\r\ncaf\xe9",
    "NUL": b"Sub\x00ject: x\r\nX: \x00\r\n\r\n\x00",
    "bare LF": b"Subject: x\nTo: a@b\n\nbody\n",
    "bare CR": b"Received: from x\rX-Evil: 1\r\nSubject: y\r\n\r\nbody\rmore",
    "no final newline": b"Subject: x\r\n\r\nbody",
    "duplicates": b"Received: one\r\nReceived: two\r\nReceived: three\r\n\r\n",
    "folded": b"Subject: one\r\n two\r\n\tthree\r\nReferences:\r\n <a@b>\r\n\r\n",
    "mbox": b"From joe@x Mon Jan  1 00:00:00 2024\nSubject: x\n\nbody\n",
    "space before colon": b"Subject : x\r\nFrom: a@b\r\n\r\n",
    "no empty line": b"Subject: x\r\nthis is no header\r\nTo: a@b\r\n\r\nbody",
    "broken multipart": b"Content-Type: multipart/mixed; boundary=z\r\n\r\n--z\r\n\r\na\r\n--z\r\nno end",
    "no boundary": b"Content-Type: multipart/mixed\r\n\r\n--z\r\n\r\na\r\n--z--\r\n",
    "message in message": b"Content-Type: message/rfc822\r\n\r\nSubject: inner\r\n\r\ninner body\r\n",
    "broken base64": b"Content-Transfer-Encoding: base64\r\nContent-Type: image/png\r\n\r\n!!!a=b=c",
    "ten megabytes": b"Subject: big\r\n\r\n" + b"0123456789abcdef" * 655_360,
}

BOMBS = {
    "semicolons": b"Content-Type: text/plain" + b";" * 32000 + b"\r\n\r\nx",
    "encoded words": b"Subject: " + b"=?utf-8?q?a?= " * 40000 + b"\r\n\r\nx",
    "addresses": b"To: " + b'"a" <a@b>, ' * 60000 + b"\r\n\r\nx",
    "depth": nested(1000),
    "depth and lines": nested(300) + b"--zz\r\n" * 300_000,
    "messages in messages": b"Content-Type: message/rfc822\r\n\r\n" * 1000,
    "empty parts": b"Content-Type: multipart/mixed; boundary=z\r\n\r\n" + b"--z\r\n" * 100_000,
    "parts of fields": b"Content-Type: multipart/mixed; boundary=z\r\n\r\n" + (b"--z\r\n" + b"a:b\r\n" * 500) * 990,
    "status blocks": b"Content-Type: message/delivery-status\r\n\r\n" + b"A: b\r\n\r\n" * 100_000,
    "parentheses": b"From: " + b"(" * 1000 + b'\r\nTo: a@[\r\nMessage-ID: <\r\nCc: "\r\n\r\n',
    "a long line": b"A: " + b"x" * 10_000_000 + b"\r\n\r\nx",
    "continuation lines": b"A: b\r\n" + b" \r\n" * 1_000_000 + b"\r\nx",
    "many fields": b"A: b\r\n" * 100_000 + b"\r\nx",
    "empty lines": b"A: b\r\n\r\n" + b"\r\n" * 1_000_000,
    "long boundary": b"Content-Type: multipart/mixed; boundary=" + b"z" * 70_000 + b"\r\n\r\n--z",
    "unknown charset": b"Content-Type: text/plain; charset=nosuch\r\n\r\n\xff",
    "NUL charset": b'Content-Type: text/plain; charset="\x00"\r\n\r\n\xff',
    "codec that is no charset": b"Content-Type: text/plain; charset=zlib\r\n\r\nx\x9c",
    "quadratic codec": b"Content-Type: text/plain; charset=punycode\r\n\r\n" + b"a-b" * 100_000,
    "number too large": b"Content-Disposition: attachment; filename*" + b"9" * 5000 + b"*=x\r\n\r\nx",
}


def read_everything(message: MailRequest) -> None:
    message.items()
    for name in {*message.keys(), "subject", "nothing"}:
        assert (name in message) == (message[name] is not None) == bool(message.get_all(name))
    message.body()
    for part in [*message.all_parts(), *message.walk()]:
        assert isinstance(part.body, str | bytes)
        assert "/" in part.content_type
        assert part.filename is None or part.filename.isprintable()
        assert part.disposition is None or isinstance(part.disposition, str)
        assert part["content-id"] is None or "\n" not in part["content-id"]
    message.is_bounce()
    assert message.is_automatic in (True, False)
    assert str(message.defects) + str(message) + repr(message)
    message.to_message()


@pytest.mark.parametrize("name", CORPUS)
def test_a_message_stays_what_it_was_after_everything_was_read(name: str) -> None:
    data = CORPUS[name]
    message = request(data)
    read_everything(message)
    assert message.to_bytes() == message.Data == message.original == bytes(message) == data


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_read_in_time(name: str) -> None:
    start = time.thread_time()
    message = MailRequest("peer", None, None, BOMBS[name])
    read_everything(message)
    answer = MailResponse(To=message.From, From="a@b.c", Subject=message["subject"])
    answer.attach_all_parts(message)
    answer.in_reply_to(message)
    assert answer.to_bytes()
    assert time.thread_time() - start < 5


@pytest.mark.parametrize(
    ("name", "defect"),
    [
        ("semicolons", "Content-Type is longer than 8192"),
        ("encoded words", "Subject is longer than 131072"),
        ("depth", "too many parts"),
        ("messages in messages", "too many parts"),
        ("empty parts", "too many parts"),
        ("many fields", "header block is too large"),
    ],
)
def test_what_was_not_read_is_a_defect(name: str, defect: str) -> None:
    message = request(BOMBS[name])
    message.body()
    assert any(defect in found for found in message.defects)


def test_text_that_cannot_be_decoded_is_a_defect_once_somebody_has_read_it() -> None:
    message = request(b"Subject: gr\xfc\xdfe\r\nX-Fine: yes\r\nContent-Type: text/plain\r\n\r\ngr\xfc\xdfe\r\n")
    assert (message["x-fine"], message.defects) == ("yes", [])
    assert message["subject"] == "gr\ufffd\ufffde"
    assert message.defects == ["Subject holds characters that cannot be decoded"]
    message.body()
    message.addressed("b@y").items()
    assert message.defects[1:] == ["the text holds characters that cannot be decoded"]


def test_a_sound_message_has_no_defects() -> None:
    message = request(with_attachment())
    message.body()
    assert message.defects == []


def test_too_many_parts_are_one_part() -> None:
    message = request(BOMBS["empty parts"])
    assert [part.content_type for part in message.all_parts()] == ["multipart/mixed"]
    assert len(list(request(BOMBS["depth"]).walk())) == 50


FRAGMENTS = (
    b'From: |To: |Subject: |Return-Path: |a@b|<|>|(|"|;|,|=?utf-8?q?|=?x?b?|?=|=0d=0a|\r\n|\r\n|\n|\r| |\xff|\x00|'
    b"\xc3\xa4|Content-Type: |text/plain; charset=|multipart/mixed; boundary=z|multipart/digest; boundary=z|--z|--z--|"
    b"message/rfc822|message/delivery-status|A: b|utf-7|utf-16|Content-Transfer-Encoding: |base64|x-uuencode|"
    b"quoted-printable|Content-Disposition: attachment; filename*0*=|utf-8''%0d%0a"
).split(b"|")
headerish = st.lists(st.sampled_from(FRAGMENTS), max_size=40).map(b"".join)


@given(st.one_of(st.binary(), headerish))
def test_no_bytes_at_all_make_reading_raise(data: bytes) -> None:
    message = MailRequest("peer", None, None, data)
    read_everything(message)
    assert message.to_bytes() == data
    answer = MailResponse(To="a@b", From="c@d", Subject=message["subject"] or "")
    answer.attach_all_parts(message)
    answer.in_reply_to(message)
    wire = answer.to_bytes()
    assert MailRequest("p", None, None, wire).From == "c@d"


@given(st.one_of(st.binary(), headerish))
def test_a_header_that_is_set_is_read_back_and_the_rest_is_untouched(data: bytes) -> None:
    message = request(data)
    before = [(f.name.lower(), message.Data[f.value : f.end].strip()) for f in HeaderBlock(data).fields]
    message["X-New"] = "Grüße, Jörg"
    again = request(message.to_bytes())
    assert again["x-new"] == "Grüße, Jörg"
    fields = [(f.name.lower(), again.Data[f.value : f.end].strip()) for f in HeaderBlock(again.Data).fields]
    assert [f for f in fields if f[0] != "x-new"] == before
    del again["x-new"]
    block = HeaderBlock(data)
    assert again.to_bytes().endswith(data[block.body :])
    if block.fields:
        assert again.to_bytes().strip() == data.strip()


# The envelope and the addresses.


def test_nothing_is_parsed_while_the_envelope_says_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("parsed")

    monkeypatch.setattr(mail, "HeaderBlock", refuse)
    monkeypatch.setattr(mail, "parse", refuse)
    message = request(SIMPLE, to=["a@b", "c@d"]).addressed("a@b")
    assert (message.To, message.From, message.to_bytes()) == ("a@b", "joe@x.org", SIMPLE)


def test_addresses_are_bare_and_lower_case_and_the_envelope_is_as_received() -> None:
    envelope = Envelope("Joe@X.org", ("List@Y.org", "Bob@Y.org"), ("127.0.0.1", 1), 12.5)
    message = MailRequest("run/posts", envelope.mail_from, envelope.rcpt_tos, SIMPLE, envelope=envelope)
    assert (message.From, message.To, message.route_from) == ("joe@x.org", "list@y.org", "joe@x.org")
    assert message.route_to == ["list@y.org", "bob@y.org"]
    assert message.Peer == "run/posts"
    assert message.envelope is envelope


@pytest.mark.parametrize("sender", ["", "<>"])
def test_the_null_sender_stays_empty(sender: str) -> None:
    assert request(SIMPLE, sender).From == ""


def test_postmaster_needs_no_domain() -> None:
    assert request(SIMPLE, to="<Postmaster>").To == "postmaster"


@pytest.mark.parametrize(
    ("headers", "sender"),
    [
        (b"From: Joe <JOE@x>\r\n", "joe@x"),
        (b"Return-Path: <bounce@y>\r\nFrom: joe@x\r\n", "bounce@y"),
        (b"Return-Path: <>\r\nFrom: joe@x\r\n", ""),
        (b"From: =?utf-8?q?=3Cceo=40us=3E=2C?= <joe@x>\r\n", "joe@x"),
        (b"Subject: x\r\n", ""),
    ],
)
def test_a_sender_that_nobody_recorded_comes_from_the_headers(headers: bytes, sender: str) -> None:
    assert MailRequest("run/posts", None, "a@b", headers + b"\r\n").From == sender


def test_recipients_that_nobody_recorded_come_from_the_header(monkeypatch: pytest.MonkeyPatch) -> None:
    data = b"To: Joe Blow <joe@x>, Bob@y\r\nDelivered-To: list@z\r\nTo: =?utf-8?q?evil=40x=2C?= <c@d>\r\n\r\n"
    assert MailRequest("peer", "a@b", None, data).route_to == ["joe@x", "bob@y", "c@d"]
    monkeypatch.setattr(mail, "ROUTABLE_TO_HEADER", "delivered-to")
    assert MailRequest("peer", "a@b", [], data).To == "list@z"
    assert MailRequest("peer", "a@b", [], b"\r\n").To == ""


def test_a_message_for_one_recipient_shares_the_bytes_and_has_its_own_headers() -> None:
    message = request(SIMPLE, to=["a@b", "c@d"])
    one, other = message.addressed("A@b"), message.addressed("c@d")
    one["Subject"] = "changed"
    assert (one.To, one.route_to, other.To) == ("a@b", ["a@b"], "c@d")
    assert one.Data is message.Data
    assert (one["subject"], other["subject"], message["subject"]) == ("changed", "Hi", "Hi")
    assert message.to_bytes() == SIMPLE


def test_a_text_is_taken_as_data() -> None:
    assert request("Subject: ü\n\nx").Data == "Subject: ü\n\nx".encode()


# Headers.


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ("=?utf-8?q?Gr=C3=BC=C3=9Fe?=", "Grüße"),
        ("=?UTF-8?B?U2VuZCBkYQ==?=\r\n =?UTF-8?B?dGEgZnJvbS==?=", "Send data from"),
        ("=?utf-8?b?w?= =?utf-8?b?Zm9v?=", "=?utf-8?b?w?= foo"),
        ("=?utf-8?q?=C3?= =?utf-8?q?=BC?=", "ü"),
        ("a =?utf-8?q?b?= c", "a b c"),
        ("=?utf-8?q?a?=  =?iso-8859-1?q?=FC?=", "aü"),
        ("=?utf-8*en?q?a_b?=", "a b"),
        ("=?nosuch?q?a=FF?=", "a\ufffd"),
        ("=?utf-8?q?broken", "=?utf-8?q?broken"),
        ("=?utf-8?q?=0d=0aBcc:_v?=", "Bcc: v"),
        ("one\r\n two", "one two"),
    ],
)
def test_header_text_is_decoded(raw: str, text: str) -> None:
    assert request(f"Subject: {raw}\r\n\r\n")["subject"] == text


def test_a_display_name_cannot_become_an_address() -> None:
    data = b'From: =?utf-8?q?Joe_=3Cceo=40us=3E=2C?= <joe@x>\r\nTo: "=?utf-8?q?M=C3=BCller=2C_J?=" <m@x>\r\n\r\n'
    message = request(data)
    assert message["From"] == '"Joe <ceo@us>," <joe@x>'
    assert message["To"] == '"Müller, J" <m@x>'
    assert mail.addresses_in(message["from"] or "") == ["joe@x"]


@given(st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"])))
def test_encoded_text_comes_back(text: str) -> None:
    raw = email.header.Header(text, "utf-8").encode()
    assert decode_words(raw) == text


def test_headers_are_found_in_any_case_and_missing_ones_are_none() -> None:
    message = request(b"Received: 1\r\nSUBJECT: x\r\nreceived: 2\r\n\r\n")
    assert (message["subject"], message["nothing"], "Subject" in message, "nothing" in message) == (
        "x",
        None,
        True,
        False,
    )
    assert message.get_all("Received") == ["1", "2"]
    assert message.keys() == list(message) == ["Received", "SUBJECT", "received"]
    assert message.items() == [("Received", "1"), ("SUBJECT", "x"), ("received", "2")]


def test_a_bare_cr_does_not_begin_a_header() -> None:
    message = request(CORPUS["bare CR"])
    assert message["received"] == "from x X-Evil: 1"
    assert "x-evil" not in message
    assert "x-evil" not in message.base


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"A: 1\r\nX: old\r\n folded\r\nA: 2\r\nX: old too\r\n\r\nbo\ndy", b"A: 1\r\nX: new\r\nA: 2\r\n\r\nbo\ndy"),
        (b"A: 1\nA: 2\n\nbody", b"A: 1\nA: 2\nX: new\n\nbody"),
        (b"A: 1", b"A: 1\r\nX: new\r\n"),
        (b"X: 1\r\nA:  2", b"X: new\r\nA:  2"),
        (b"", b"X: new\r\n\r\n"),
        (b"no header\n", b"X: new\n\nno header\n"),
        (b"\r\nbody", b"X: new\r\n\r\nbody"),
        (b"From x Mon\nA: 1\n\nb", b"From x Mon\nA: 1\nX: new\n\nb"),
    ],
)
def test_only_the_header_that_was_set_changes(data: bytes, expected: bytes) -> None:
    message = request(data)
    message["X"] = "new"
    assert message.to_bytes() == expected


def test_a_deleted_header_is_gone_in_every_copy() -> None:
    message = request(b"A: 1\r\nX: 1\r\nB:\t2\r\nx: 2\r\n\r\n\x00body")
    del message["X"]
    assert message.to_bytes() == b"A: 1\r\nB:\t2\r\n\r\n\x00body"
    assert "X" not in message
    assert message["x"] is None
    assert message.to_message().keys() == ["A", "B"]


@pytest.mark.parametrize(
    ("text", "raw"),
    [
        ("Jörg <joerg-AT-x.org>", b"=?utf-8?b?SsO2cmc=?= <joerg-AT-x.org>"),
        ("Jörg", b"=?utf-8?b?SsO2cmc=?="),
        ("Jörg <j@x.org>, ann, Bob <bob>", b"=?utf-8?b?SsO2cmc=?= <j@x.org>, ann, Bob <bob>"),
    ],
)
def test_what_is_no_address_stays_in_a_header_of_addresses(text: str, raw: bytes) -> None:
    written = MailResponse("b@y.org", text).to_bytes()
    assert b"From: " + raw + b"\r\n" in written
    message = request(written)
    assert message["From"] == text
    assert mail.addresses_in(str(message["From"])) == mail.addresses_in(raw.decode())


@pytest.mark.parametrize("raw", ["=?utf-8?q?=22?= <a@b.c> x", "=?utf-8?q?J?= <a@b@c>", '=?utf-8?q?J?= <"a@b.c>, d'])
def test_what_is_no_address_does_not_become_one(raw: str) -> None:
    assert mail.addresses_in(raw) == []
    assert mail.addresses_in(str(request(f"From: {raw}\r\n\r\n", sender=None)["From"])) == []


def test_a_header_that_is_replaced_keeps_its_place_and_its_spelling() -> None:
    message = request(b"From: a@x.org\r\nX-ID: 1\r\nTo: b@y.org\r\n\r\n")
    message["x-id"] = "2"
    assert message.to_bytes() == b"From: a@x.org\r\nX-ID: 2\r\nTo: b@y.org\r\n\r\n"
    response = MailResponse("b@y.org", "a@x.org", "one")
    response["subject"] = "two"
    assert response.items() == [("From", "a@x.org"), ("To", "b@y.org"), ("Subject", "two")]


def test_a_message_without_from_and_to_is_asked_for_those_of_the_envelope() -> None:
    message = request(b"Subject: x\r\n\r\nbody", sender="Joe@x.org", to=["list@y.org", "ann@y.org"])
    assert (message["From"], message["to"]) == ("joe@x.org", "list@y.org")
    assert message.addressed("ann@y.org")["To"] == "ann@y.org"
    assert message.keys() == ["Subject"]
    assert message.to_bytes() == b"Subject: x\r\n\r\nbody"
    del message["From"]
    message["To"] = "Ann <ann@y.org>"
    assert (message["From"], message["To"]) == (None, "Ann <ann@y.org>")
    assert request(b"\r\nbody", sender="")["from"] is None


def test_a_header_that_is_set_is_folded_and_encoded() -> None:
    message = request(SIMPLE)
    message["Subject"] = "ü" * 100
    message["To"] = "Jörg Müller <j@x.org>, list@y.org"
    message["X-Long"] = "word " * 40 + "end"
    lines = message.to_bytes().split(b"\r\n")
    assert all(len(line) <= 78 and line.isascii() for line in lines)
    parsed = email.message_from_bytes(message.to_bytes(), policy=email.policy.default)
    assert parsed["subject"] == "ü" * 100
    assert [(a.display_name, a.addr_spec) for a in parsed["to"].addresses] == [
        ("Jörg Müller", "j@x.org"),
        ("", "list@y.org"),
    ]
    assert parsed["x-long"] == "word " * 40 + "end"


INJECTIONS = [
    "x\r\nBcc: v@x",
    "x\nBcc: v@x",
    "x\rBcc: v",
    "=?utf-8?q?=0d=0aBcc:_v?=",
    "a\u2028b",
    "a\x85b",
    "a\x0bb",
    "a\x00b",
    "\udcff",
]


@pytest.mark.parametrize("value", INJECTIONS)
def test_a_value_that_could_begin_a_header_is_refused(value: str) -> None:
    message, response = request(SIMPLE), MailResponse(From="a@b", To="c@d")
    for headers in (message, response):
        with pytest.raises(ValueError, match="X-Test"):
            headers["X-Test"] = value
        assert "X-Test" not in headers
    with pytest.raises(ValueError, match="Subject"):
        MailResponse(Subject=value)
    with pytest.raises(ValueError, match="Content-Disposition"):
        response.attach(value, data=b"x")


@pytest.mark.parametrize("name", ["", "a b", "a:b", "a\r\nb", "ü", "x\n"])
def test_a_name_that_is_no_field_name_is_refused(name: str) -> None:
    for headers in (request(SIMPLE), MailResponse()):
        with pytest.raises(ValueError, match="header name"):
            headers[name] = "x"


# Parts.


def test_a_body_is_text_or_bytes() -> None:
    assert request(SIMPLE).body() == "Hello\n"
    assert request(CORPUS["latin-1"]).body() == "café"
    assert request(b"Content-Type: text/plain; charset=utf-8\r\n\r\n\xff").body() == "\ufffd"
    assert request(b"Content-Type: image/png\r\nContent-Transfer-Encoding: base64\r\n\r\niVBORw==").body() == b"\x89PNG"
    assert request(b"").body() == ""


def test_the_body_of_a_multipart_is_its_text() -> None:
    message = request(with_attachment())
    assert message.body() == "Text\n"
    assert [p.content_type for p in message.all_parts()] == ["text/plain", "text/html", "image/png"]
    assert [p.content_type for p in message.walk()][:2] == ["multipart/mixed", "multipart/alternative"]
    picture = message.all_parts()[2]
    assert (picture.body, picture.filename, picture.disposition) == (PNG, "Bild ü.png", "attachment")
    assert picture["Content-Transfer-Encoding"] == "base64"
    assert picture["nothing"] is None
    assert "content-transfer-encoding" in picture
    assert "nothing" not in picture
    assert list(picture) == picture.keys() == picture.message.keys()
    assert request("Subject: ü\r\n\r\n").all_parts()[0]["subject"] == "ü"


def test_a_message_inside_a_message_is_one_part_with_its_own_bytes() -> None:
    inner = b"Subject: inner\r\nX:  odd\r\n\r\n\xff\x00inner\r\n"
    message = request(
        b"Content-Type: multipart/mixed; boundary=z\r\n\r\n--z\r\nContent-Type: message/rfc822\r\n\r\n"
        + inner
        + b"\r\n--z--"
    )
    (part,) = message.all_parts()
    assert (part.content_type, part.body) == ("message/rfc822", inner)
    assert [p["subject"] for p in message.walk()] == [None, None, "inner"]


@pytest.mark.parametrize(
    ("given_name", "safe"),
    [
        (b'filename="../../etc/passwd"', "passwd"),
        (b"filename*=utf-8''..%2F..%2Fetc%2Fcron.d%2Fx", "x"),
        (b'filename="C:\\\\x"', "x"),
        (b"filename*=utf-8''a%0D%0Ab%00%E2%80%AE", "ab"),
        (b'filename=".."', None),
        (b'filename=""', None),
        (b'filename="=?utf-8?q?=C3=BC.txt?="', "ü.txt"),
        (b'filename="\xc3\xbc.txt"', "ü.txt"),
        (b"filename=" + b"a" * 5000, "a" * 200),
    ],
)
def test_a_filename_is_only_a_name(given_name: bytes, safe: str | None) -> None:
    (part,) = request(b"Content-Disposition: attachment; " + given_name + b"\r\n\r\n").all_parts()
    assert part.filename == safe


def shape(message: email.message.Message) -> object:
    payload: Any = message.get_payload()
    inner = [shape(m) for m in payload] if isinstance(payload, list) else message.get_payload(decode=True)
    return message.get_content_type(), message.items(), message.preamble, message.epilogue, inner


def digest() -> bytes:
    return (
        b'Content-Type: multipart/digest; boundary="a b"\n\npre\n--a b\n\nSubject: 1\n\none\n--a b  \n\nSubject: 2\n\n'
        b"--a b--\nepilogue\n--a b\n"
    )


STATUS = (
    b"From: MAILER-DAEMON@x\r\nContent-Type: multipart/report; report-type=delivery-status; boundary=z\r\n\r\n"
    b"--z\r\n\r\nSorry\r\n--z\r\nContent-Type: message/delivery-status\r\n\r\n"
    b"Reporting-MTA: dns; x\r\n\r\nFinal-Recipient: rfc822; a@b\r\nStatus: 5.1.1\r\n\r\n--z--\r\n"
)


@pytest.mark.parametrize(
    "data", [SIMPLE, with_attachment(), digest(), STATUS, CORPUS["message in message"], CORPUS["mbox"]]
)
def test_the_tree_is_the_one_that_the_standard_parser_makes(data: bytes) -> None:
    assert shape(parse(data)) == shape(email.message_from_bytes(data))


# What kind of message.


@pytest.mark.parametrize(
    ("data", "sender", "expected"),
    [
        (SIMPLE, "joe@x", False),
        (SIMPLE, "", True),
        (STATUS, "joe@x", True),
        (b"X-Failed-Recipients: a@b\r\n\r\n", "mailer-daemon@x", True),
        (SIMPLE, "postmaster@x", False),
    ],
)
def test_a_bounce_is_told_from_a_letter(data: bytes, sender: str, expected: bool) -> None:
    message = request(data, sender)
    assert message.bounce is None
    assert message.is_bounce() is expected
    assert message.bounce is not None
    assert message.is_bounce(threshold=1.0) is False


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (b"Auto-Submitted: no", False),
        (b"Auto-Submitted: auto-replied; x=y", True),
        (b"Precedence: Bulk", True),
        (b"List-Id: <x>", True),
        (b"Subject: x", False),
    ],
)
def test_automatic_mail_is_told_from_a_letter(header: bytes, expected: bool) -> None:
    assert request(header + b"\r\n\r\n").is_automatic is expected
    assert request(header + b"\r\n\r\n", "").is_automatic


# MailResponse.


def parsed(response: MailResponse) -> EmailMessage:
    message = email.message_from_bytes(response.to_bytes(), policy=email.policy.default)
    assert isinstance(message, EmailMessage)
    assert all(not part.defects for part in message.walk())
    return message


def test_a_response_is_a_complete_message() -> None:
    response = MailResponse(To="joe@x.org", From="Bot <bot@y.org>", Subject="Hi", Body="Hello\n")
    message = parsed(response)
    assert dict(message.items()).keys() >= {"From", "To", "Subject", "Date", "Message-ID", "MIME-Version"}
    assert message["message-id"].endswith("@y.org>")
    assert message.get_content() == "Hello\r\n"
    assert message["date"].datetime.tzinfo is not None
    assert response.to_bytes().count(b"\n") == response.to_bytes().count(b"\r\n")


def test_a_response_is_the_same_message_each_time() -> None:
    response = MailResponse(To="joe@x.org", From="bot@y.org", Body="x", Html="<p>x")
    response.attach("a.txt", data="text")
    assert response.to_bytes() == response.to_bytes()
    assert response.to_bytes() != MailResponse(To="joe@x.org", From="bot@y.org", Body="x").to_bytes()


def test_what_was_not_given_is_left_out() -> None:
    assert "Subject" not in parsed(MailResponse(To="a@b", From="c@d"))
    response = MailResponse(To="a@b", From="c@d", Subject="x")
    response["Subject"] = None
    assert "subject" not in str(response).lower()


def test_text_html_and_attachments_are_nested_as_readers_expect() -> None:
    response = MailResponse(To="a@b", From="c@d", Body="text", Html="<p>html")
    assert response.to_message().get_content_type() == "multipart/alternative"
    response.attach("x.png", data=PNG)
    message = parsed(response)
    assert [p.get_content_type() for p in message.walk()] == [
        "multipart/mixed",
        "multipart/alternative",
        "text/plain",
        "text/html",
        "image/png",
    ]
    assert [p.body for p in response.all_parts()][2] == PNG
    response.clear()
    assert (response.attachments, response.to_message().get_content_type()) == ([], "multipart/alternative")
    assert MailResponse(Html="<p>").to_message().get_content_type() == "text/html"


def test_recipients_are_to_cc_and_bcc_and_bcc_is_never_written() -> None:
    response = MailResponse(To="Jöe <A@b>, k@l", From="Bot <Bot@y>")
    response.update({"Cc": ["Smith <s@t>", "a@b"], "Bcc": "hidden@x"})
    assert response.recipients == ["a@b", "k@l", "s@t", "hidden@x"]
    assert response.sender == "bot@y"
    assert b"hidden" not in response.to_bytes()
    assert b"\nbcc:" not in response.to_bytes().lower()
    message = parsed(response)
    assert [(a.display_name, a.addr_spec) for a in message["to"].addresses] == [("Jöe", "A@b"), ("", "k@l")]
    assert [a.addr_spec for a in message["cc"].addresses] == ["s@t", "a@b"]


def test_a_long_list_of_recipients_is_written_in_short_lines() -> None:
    to = [f'"Smith, {i}" <someone{i}@example.org>' for i in range(2000)]
    response = MailResponse(To=to, From="a@b")
    assert len(response.recipients) == 2000
    assert max(map(len, response.to_bytes().split(b"\r\n"))) <= 78
    assert len(request(response.to_bytes(), to=None).route_to) == 1000


@pytest.mark.parametrize(
    "subject", ["Grüße " * 40, "é", "日本語" * 50, "a" * 3000, "ü\N{GRINNING FACE}" * 60, "  x  y ", "=?nothing?="]
)
def test_any_subject_arrives(subject: str) -> None:
    response = MailResponse(To="a@b", From="c@d", Subject=subject)
    assert max(map(len, response.to_bytes().split(b"\r\n"))) <= 998
    assert parsed(response)["subject"] == subject.strip()
    assert request(response.to_bytes())["subject"] == subject.strip()


printable = st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"])).filter(lambda text: "=?" not in text)


@given(printable, printable)
def test_what_is_said_is_what_is_read(subject: str, body: str) -> None:
    response = MailResponse(To="a@b", From="c@d", Subject=subject, Body=body)
    message = request(response.to_bytes())
    assert message["subject"] == subject.strip()
    assert str(message.body()).rstrip("\n") == body
    assert message.defects == []


def test_a_long_message_id_stays_whole() -> None:
    long_id = "<" + "x" * 200 + "@example.org>"
    response = MailResponse(To="a@b", From="c@d")
    response.in_reply_to(request(f"Message-ID: {long_id}\r\nReferences: <a@b>\r\n <c@d>\r\n\r\n"))
    assert f"In-Reply-To: {long_id}\r\n".encode() in response.to_bytes()
    assert request(response.to_bytes())["references"] == f"<a@b> <c@d> {long_id}"


def test_an_endless_thread_keeps_its_first_and_last_messages() -> None:
    references = " ".join(f"<{i}@x>" for i in range(500))
    response = MailResponse()
    response.in_reply_to(request(f"Message-ID: <new@x>\r\nReferences: {references}\r\n\r\n"))
    ids = (response["References"] or "").split()
    assert len(ids) == 20
    assert (ids[0], ids[-2:]) == ("<0@x>", ["<499@x>", "<new@x>"])


def test_a_message_without_an_id_cannot_be_referred_to() -> None:
    response = MailResponse()
    response.in_reply_to(request(b"Message-ID: broken\r\n\r\n"))
    assert response.keys() == []


@pytest.mark.parametrize(
    ("arguments", "content_type", "filename", "content"),
    [
        ({"filename": "Jürgens Bild.png", "data": PNG}, "image/png", "Jürgens Bild.png", PNG),
        ({"filename": 'a"b\\.bin', "data": b"\x00"}, "application/octet-stream", "b\\.bin", b"\x00"),
        ({"filename": "x.tar.gz", "data": b"\x1f\x8b"}, "application/octet-stream", "x.tar.gz", b"\x1f\x8b"),
        ({"data": "Grüße"}, "text/plain", None, "Grüße".encode()),
        ({"data": b"x", "content_type": "text/calendar; method=REQUEST"}, "text/calendar", None, b"x"),
        ({"filename": "x.eml", "data": SIMPLE}, "message/rfc822", "x.eml", SIMPLE),
    ],
)
def test_an_attachment_arrives(
    arguments: dict[str, Any], content_type: str, filename: str | None, content: bytes
) -> None:
    response = MailResponse(To="a@b", From="c@d", Body="text")
    response.attach(**arguments)
    part = request(response.to_bytes()).all_parts()[1]
    assert (part.content_type, part.data.rstrip(b"\r\n"), part.disposition) == (
        content_type,
        content.rstrip(b"\r\n"),
        "attachment",
    )
    if filename is not None and "\\" not in filename:
        assert part.filename == filename
    assert response.attachments[0]["content_type"] == content_type


def test_a_file_is_attached_under_its_own_name(tmp_path: Path) -> None:
    (tmp_path / "notes.pdf").write_bytes(b"%PDF\xff")
    response = MailResponse(To="a@b", From="c@d", Body="text")
    response.attach(str(tmp_path / "notes.pdf"), disposition="inline")
    part = request(response.to_bytes()).all_parts()[1]
    assert (part.filename, part.content_type, part.disposition, part.data) == (
        "notes.pdf",
        "application/pdf",
        "inline",
        b"%PDF\xff",
    )


@pytest.mark.parametrize(
    ("attach", "error"),
    [
        (lambda r: r.attach(), TypeError),
        (lambda r: r.attach(content_type="text/plain"), TypeError),
        (lambda r: r.attach("nothing/here.png"), FileNotFoundError),
        (lambda r: r.attach("x", data=b"", content_type="nonsense"), ValueError),
        (lambda r: r.attach("x", data=b"", content_type="text/plain\r\nX: y"), ValueError),
        (lambda r: r.attach("x", data=b"", disposition="inline\r\nX: y"), ValueError),
    ],
)
def test_nothing_to_attach_is_an_error(attach: Callable[[MailResponse], None], error: type[Exception]) -> None:
    response = MailResponse()
    with pytest.raises(error):
        attach(response)
    assert response.attachments == []


def test_the_parts_of_a_request_are_attached_unchanged() -> None:
    response = MailResponse(To="a@b", From="c@d", Body="see below")
    response.attach_all_parts(request(with_attachment()))
    response.attach_part(request(CORPUS["latin-1"]).all_parts()[0])
    parts = request(response.to_bytes()).all_parts()
    assert [p.content_type for p in parts] == ["text/plain", "text/plain", "text/html", "image/png", "text/plain"]
    assert (parts[3].data, parts[3].filename) == (PNG, "Bild ü.png")
    assert parts[4].body == "café"


@pytest.mark.parametrize("inner", [SIMPLE, SIMPLE + b"\xff\x00", CORPUS["bare LF"]])
def test_a_message_is_attached_whole(inner: bytes) -> None:
    outer = request(b"Content-Type: message/rfc822\r\n\r\n" + inner)
    response = MailResponse(To="a@b", From="c@d", Body="forwarded")
    response.attach_all_parts(outer)
    part = request(response.to_bytes()).all_parts()[1]
    assert part.data.replace(b"\r\n", b"\n").rstrip(b"\n") == inner.replace(b"\r\n", b"\n").rstrip(b"\n")


def test_a_delivery_report_is_attached_readable() -> None:
    response = MailResponse(To="a@b", From="c@d", Body="look")
    response.attach_all_parts(request(STATUS))
    parts = request(response.to_bytes()).all_parts()
    assert [p.content_type for p in parts] == ["text/plain", "text/plain", "message/delivery-status"]
    assert b"Status: 5.1.1" in parts[2].data


def test_a_response_has_its_headers_at_hand() -> None:
    response = MailResponse(To="a@b", From="c@d", Subject="x")
    response["Reply-To"] = "e@f"
    assert (response["reply-to"], "REPLY-TO" in response, response["nothing"]) == ("e@f", True, None)
    assert response.keys() == list(response) == ["From", "To", "Subject", "Reply-To"]
    del response["reply-to"]
    assert response.items() == [("From", "c@d"), ("To", "a@b"), ("Subject", "x")]
    with pytest.raises(ValueError, match="Html"):
        response["Content-Type"] = "text/html"
