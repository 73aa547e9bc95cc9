"""The headers of lists, and the way out of them."""

from __future__ import annotations

import email
import email.policy
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamsonq.errors import SettingsError
from lamsonq.lists import MailingList, is_one_click
from lamsonq.mail import MailResponse

SECRET = "0123456789abcdef0123456789abcdef"
NEWS = MailingList(
    "news.example.org",
    'The "news"',
    secret=SECRET,
    unsubscribe="https://example.org/leave?list=news",
    unsubscribe_mail="leave+news@example.org",
    post="NO",
    help="https://example.org/help",
    archive="https://example.org/archive",
    owner="owner@example.org",
)


def token_in(headers: dict[str, str]) -> str:
    found = re.search(r"token=([^>]+)>", headers["List-Unsubscribe"])
    assert found
    return found[1]


def test_a_message_says_which_list_it_is_of_and_how_to_leave_it() -> None:
    message = MailResponse(From="news@example.org", To="joe@y.org", Subject="x", Body="y")
    sent = email.message_from_bytes(NEWS.mark(message, "joe@y.org").to_bytes(), policy=email.policy.default)
    assert sent["List-Id"] == '"The \\"news\\"" <news.example.org>'
    assert sent["List-Post"] == "NO"
    assert sent["List-Help"] == "<https://example.org/help>"
    assert sent["List-Owner"] == "<mailto:owner@example.org>"
    assert sent["List-Archive"] == "<https://example.org/archive>"
    assert sent["List-Unsubscribe-Post"] == "List-Unsubscribe=One-Click"
    links = sent["List-Unsubscribe"]
    assert links.startswith("<https://example.org/leave?list=news&token=")
    assert "<mailto:leave+news@example.org?subject=unsubscribe%20" in links


def test_without_https_there_is_no_one_click() -> None:
    by_mail = MailingList("a.example.org", secret=SECRET, unsubscribe_mail="leave@example.org")
    assert "List-Unsubscribe-Post" not in by_mail.headers("joe@y.org")


def test_the_name_of_a_list_may_be_in_any_script() -> None:
    named = MailingList("a.example.org", "Grüße", secret=SECRET, unsubscribe_mail="leave@example.org")
    assert re.fullmatch(r"=\?utf-8\?b\?\S+\?= <a\.example\.org>", named.headers("joe@y.org")["List-Id"])


@pytest.mark.parametrize("recipient", ["Joe@Y.org", "jö@bücher.example", '"a b"@y.org', "x+y=z@y.org"])
def test_one_click_leaves_the_list(recipient: str) -> None:
    token = token_in(NEWS.headers(recipient))
    assert re.fullmatch(r"[A-Za-z0-9._-]+", token)
    assert NEWS.unsubscribed(token, b"List-Unsubscribe=One-Click") == recipient.lower()


FORM = b'--b\r\nContent-Disposition: form-data; name="List-Unsubscribe"\r\n\r\nOne-Click\r\n--b--\r\n'  # RFC 8058, 8.2


@pytest.mark.parametrize(
    ("body", "is_one"),
    [
        (b"List-Unsubscribe=One-Click", True),
        (b"List-Unsubscribe=One-Click\r\n", True),
        (b"a=b&List-Unsubscribe=One%2DClick", True),
        (FORM, True),
        (FORM.replace(b"\r\n\r\n", b"\r\nContent-Type: text/plain\r\n\r\n", 1), True),
        (b"", False),
        (b"List-Unsubscribe=Two-Clicks", False),
        (b"List-Unsubscribe=One-Click&List-Unsubscribe=x", False),
        (FORM.replace(b"One-Click", b"x"), False),
        (b"\xff", False),
        (b"x=y&" * 30_000 + b"List-Unsubscribe=One-Click", False),
    ],
)
def test_only_the_body_of_a_one_click_post_leaves(body: bytes, is_one: bool) -> None:
    assert is_one_click(body) == is_one
    assert (NEWS.unsubscribed(NEWS.token("joe@y.org"), body) is not None) == is_one


@given(st.text(max_size=60))
def test_a_token_cannot_be_made_up(token: str) -> None:
    assert NEWS.member(token) is None


def test_a_token_is_for_one_recipient_of_one_list() -> None:
    joe, ann = NEWS.token("joe@y.org"), NEWS.token("ann@y.org")
    assert NEWS.member(joe.partition(".")[0] + "." + ann.partition(".")[2]) is None
    other = MailingList("other.example.org", secret=SECRET, unsubscribe_mail="leave@example.org")
    assert other.member(joe) is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"id": "news"},
        {"id": "a.b\r\nX: y"},
        {"unsubscribe": "http://example.org"},
        {"unsubscribe": "https://x.org/>\r\nX: y"},
        {"unsubscribe": "", "unsubscribe_mail": ""},
        {"unsubscribe_mail": "nobody"},
        {"help": "javascript:1"},
        {"secret": "short"},
    ],
)
def test_what_cannot_stand_in_a_header_refuses_the_boot(wrong: dict[str, str]) -> None:
    right = {"id": "a.example.org", "secret": SECRET, "unsubscribe": "https://example.org/leave"}
    with pytest.raises(SettingsError):
        MailingList(**{**right, **wrong})
