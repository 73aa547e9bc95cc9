"""Return paths that name their recipient, and that nobody else can make."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamsonq.address import canonical, is_path_address
from lamsonq.bouncetext import from_verp
from lamsonq.errors import SettingsError
from lamsonq.mail import MailRequest
from lamsonq.verp import VERP

SECRET = "0123456789abcdef0123456789abcdef"
PATHS = VERP("bounces@ours.test", SECRET)

atoms = st.text("abcXYZ019.+-_=!#$%&'*/?^`{|}~äß漢\"\\ ", min_size=1, max_size=30)
locals_ = st.one_of(atoms, atoms.map(lambda text: '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'))
domains = st.one_of(
    st.sampled_from(["y.org", "a-b.example", "bücher.example", "[192.0.2.1]", "[IPv6:2001:db8::1]", "x" * 60 + ".org"]),
)
addresses = st.builds("{}@{}".format, locals_, domains).filter(is_path_address)


@given(addresses)
def test_every_valid_address_fits_into_a_valid_return_path_and_comes_back(recipient: str) -> None:
    path = PATHS.address(recipient)
    assert is_path_address(path)
    assert path.isascii()
    assert path == path.lower()
    assert len(path.rpartition("@")[0]) <= 64
    assert PATHS.recipient(path, [recipient]) == canonical(recipient)
    assert PATHS.recipient(path.upper(), [recipient]) == canonical(recipient)


@given(addresses, st.integers(0, 80), st.sampled_from("abc+-=.0z"))
def test_whoever_changes_a_letter_is_not_believed(recipient: str, at: int, letter: str) -> None:
    path = PATHS.address(recipient)
    forged = path[:at] + letter + path[at + 1 :]
    if forged != path:
        assert PATHS.recipient(forged, ["other@y.org"]) is None


def test_it_is_readable_and_others_read_it_too() -> None:
    path = PATHS.address("Joe.User+tag@Y.org")
    assert re.fullmatch(r"bounces\+[a-z2-7]{12}\+joe\.user\+2btag=y\.org@ours\.test", path)
    assert from_verp([PATHS.address("joe@y.org")]) == "joe@y.org"


def test_beyond_64_octets_the_bounce_has_to_name_its_recipient() -> None:
    long = "a-very-long-name-of-a-person@a-very-long-domain.example.org"
    path = PATHS.address(long)
    assert re.fullmatch(r"bounces\+[a-z2-7]{24}@ours\.test", path)
    assert PATHS.recipient(path) is None
    assert PATHS.recipient(path, ["other@y.org", long.upper()]) == long
    assert PATHS.recipient(path, ["other@y.org", "no address"]) is None


def test_a_short_path_cannot_be_cut_down_to_a_long_one() -> None:
    token = PATHS.address("joe@y.org").split("+")[1]
    assert PATHS.recipient(f"bounces+{token}@ours.test", ["joe@y.org"]) is None


@pytest.mark.parametrize(
    "address",
    [
        "",
        "bounces@ours.test",
        "bounces+@ours.test",
        "bounces+x+@ours.test",
        "bounces+x+y@ours.test",
        "x+y+a=b@ours.test",
        "bounces+x+a=b@other.test",
        "bounces+x++ff=y.org@ours.test",
        "bounces+ü+a=b@ours.test",
    ],
)
def test_what_is_none_of_ours_is_nobody(address: str) -> None:
    assert PATHS.recipient(address, ["joe@y.org"]) is None


def test_another_secret_does_not_fit() -> None:
    other = VERP("bounces@ours.test", SECRET[::-1])
    assert other.recipient(PATHS.address("joe@y.org")) is None


@pytest.mark.parametrize(
    ("address", "secret"), [("bounces", SECRET), ("b+x@y.org", SECRET), ("b" * 40 + "@y.org", SECRET), ("b@y.org", "x")]
)
def test_what_cannot_work_refuses_the_boot(address: str, secret: str) -> None:
    with pytest.raises(SettingsError):
        VERP(address, secret)


def bounce(to: str, about: str = "joe@y.org", status: str = "5.1.1", action: str = "failed") -> MailRequest:
    """A report as a server sends it."""
    data = (
        "From: MAILER-DAEMON@y.org\r\nSubject: Undelivered Mail\r\nAuto-Submitted: auto-replied\r\n"
        'Content-Type: multipart/report; report-type=delivery-status; boundary="b"\r\n\r\n'
        "--b\r\n\r\nsorry\r\n--b\r\nContent-Type: message/delivery-status\r\n\r\nReporting-MTA: dns; y.org\r\n\r\n"
        f"Final-Recipient: rfc822; {about}\r\nAction: {action}\r\nStatus: {status}\r\n"
        "Diagnostic-Code: smtp; 550 gone\r\n\r\n--b--\r\n"
    )
    return MailRequest(None, "", [to], data)


def test_a_bounce_to_it_is_about_its_recipient_whatever_the_report_says() -> None:
    assert PATHS.bounced(bounce(PATHS.address("joe@y.org"), about="forwarded@z.org")) == "joe@y.org"
    assert PATHS.bounced(bounce("bounces+aaaaaaaaaaaa+joe=y.org@ours.test")) is None
