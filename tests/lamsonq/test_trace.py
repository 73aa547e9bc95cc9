"""The fields that are put on top of a message: what they say, and that nothing a client says adds to them."""

from __future__ import annotations

from email import message_from_bytes, policy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamsonq.envelope import Envelope
from lamsonq.trace import delivered_to_field, hops, protocol_word, received_field, return_path_field

ENVELOPE = Envelope("joe@example.org", ("ann@y.test",), ("192.0.2.1", 25), 1e9, helo="mail.example.org")


def test_received_says_from_whom_by_whom_how_and_when() -> None:
    assert received_field(ENVELOPE, "mx.y.test", "1.M2P3Q4", "ESMTPS") == (
        b"Received: from mail.example.org ([192.0.2.1])\r\n"
        b" by mx.y.test with ESMTPS id 1.M2P3Q4\r\n"
        b" for <ann@y.test>;\r\n"
        b" Sun, 09 Sep 2001 01:46:40 +0000\r\n"
    )


def test_nobody_is_told_of_other_recipients() -> None:
    envelope = Envelope("joe@example.org", ("ann@y.test", "bob@y.test"), None, 1e9, helo="x.test")
    assert received_field(envelope, "mx.y.test", "1", "SMTP") == (
        b"Received: from x.test\r\n by mx.y.test with SMTP id 1;\r\n Sun, 09 Sep 2001 01:46:40 +0000\r\n"
    )


@pytest.mark.parametrize(
    ("peer", "shown"),
    [
        (("192.0.2.1", 25), b"[192.0.2.1]"),
        (("::ffff:192.0.2.1", 25, 0, 0), b"[192.0.2.1]"),
        (("2001:db8::1", 25, 0, 0), b"[IPv6:2001:db8::1]"),
        (("fe80::1%eth0", 25, 0, 3), b"[IPv6:fe80::1]"),
    ],
)
def test_a_client_is_an_address_literal(peer: object, shown: bytes) -> None:
    field = received_field(Envelope("", (), peer, 1e9, helo="x.test"), "mx.y.test", "1", "SMTP")
    assert field.startswith(b"Received: from x.test (" + shown + b")\r\n")


@pytest.mark.parametrize(
    ("word", "base", "said"),
    [
        ("SMTP", "SMTP", ""),
        ("ESMTP", "ESMTP", ""),
        ("ESMTPS", "ESMTP", "tls"),
        ("ESMTPSA", "ESMTP", "tls login"),
        ("ESMTPA", "SMTP", "login"),
        ("UTF8SMTPS", "ESMTP", "tls utf8"),
        ("LMTP", "LMTP", ""),
        ("LMTPS", "LMTP", "tls"),
        ("UTF8LMTPA", "LMTP", "login utf8"),
    ],
)
def test_the_word_for_the_protocol(word: str, base: str, said: str) -> None:
    assert protocol_word(base, **dict.fromkeys(said.split(), True)) == word


def test_the_null_sender_is_an_empty_path() -> None:
    assert return_path_field(Envelope("", ())) == b"Return-Path: <>\r\n"
    assert return_path_field(Envelope("Joe@X.org", ())) == b"Return-Path: <Joe@X.org>\r\n"
    assert return_path_field(Envelope(None, ())) == b""


def test_delivered_to_is_an_address_or_nothing() -> None:
    assert delivered_to_field("ann@y.test") == b"Delivered-To: ann@y.test\r\n"
    assert delivered_to_field("postmaster") == b"Delivered-To: postmaster\r\n"
    assert delivered_to_field("ann@y.test\r\nBcc: x@y.test") == b""


hostile = st.one_of(st.text(), st.text(alphabet='a.()<>\r\n\0\\";: \t\x85é\udc80'))


@given(hostile, hostile, hostile, hostile, hostile)
def test_nothing_that_a_client_says_adds_a_field_or_a_comment(
    helo: str, sender: str, recipient: str, peer: str, id: str
) -> None:
    envelope = Envelope(sender, (recipient,), (peer, 25), 1e9, helo=helo)
    fields = received_field(envelope, "mx.y.test", id, "ESMTP") + return_path_field(envelope)
    fields += delivered_to_field(recipient)
    message = message_from_bytes(fields + b"\r\nbody", policy=policy.compat32)
    assert message.get_payload() == "body"
    assert [name for name in message if name != "Delivered-To"] == ["Received", "Return-Path"]
    assert not message.defects
    assert fields.count(b"(") == fields.count(b")") <= 1
    assert fields.count(b"\r") == fields.count(b"\r\n") == fields.count(b"\n")


def test_hops_are_the_received_fields_of_the_header_alone() -> None:
    assert hops(b"Received: a\r\n b\r\nreceived : c\r\nX-Received: d\r\n\r\nReceived: e\r\n") == 2
    assert hops(b"RECEIVED\t: a\nX: b\n\nReceived: c\n") == 1
    assert hops(b"\r\nReceived: a\r\n") == hops(b"\nReceived: a\n") == hops(b"") == 0
    assert hops(b"Received: a\n" * 200) == 200
