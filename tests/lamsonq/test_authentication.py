"""Who wrote a message: SPF, DKIM, ARC and DMARC against a DNS server on the loopback; what others are told of it."""

from __future__ import annotations

import asyncio
import base64
import inspect
import ipaddress
import os
import re
import shutil
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from email import message_from_bytes
from pathlib import Path
from typing import Any

import dkim
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from hypothesis import given
from hypothesis import strategies as st
from nacl.signing import SigningKey

from lamsonq.authentication import Verifier, authentication_results, require, without_forged
from lamsonq.envelope import Envelope
from lamsonq.errors import SMTPError
from lamsonq.mail import MailRequest
from lamsonq.marks import marks_of
from lamsonq.names import Unsure
from lamsonq.routing import RoutingBase
from lamsonq.spf import check
from lamsonq.verdicts import Auth, Verdict

from .pages import Page, Run
from .servers import Dns

MESSAGE = b"From: Joe <joe@example.test>\r\nTo: ann@y.test\r\nSubject: Hello\r\n\r\nHello Ann,\r\n\r\nbye\r\n\r\n"


def _rsa(bits: int) -> tuple[bytes, str]:
    key = rsa.generate_private_key(65537, bits)
    private = key.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption())
    public = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return private, base64.b64encode(public).decode()


PRIVATE, PUBLIC = _rsa(1024)
ED_KEY = SigningKey(b"\1" * 32)
ED_PRIVATE = base64.b64encode(bytes(ED_KEY))
ED_PUBLIC = base64.b64encode(bytes(ED_KEY.verify_key)).decode()


def _txt(name: str, text: str) -> str:
    pieces = " ".join(f'"{text[i : i + 200]}"' for i in range(0, len(text), 200))
    return f"{name}. 60 IN TXT {pieces}"


ZONE = "\n".join(
    [
        _txt("example.test", "v=spf1 ip4:192.0.2.1 -all"),
        _txt("_dmarc.example.test", "v=DMARC1; p=reject; sp=quarantine; np=none"),
        _txt("sub.example.test", "v=spf1 ip4:192.0.2.1 -all"),
        _txt("strict.test", "v=spf1 -all"),
        _txt("_dmarc.strict.test", "v=DMARC1; p=reject; adkim=s; aspf=s; pct=0"),
        _txt("mail.strict.test", "v=spf1 ip4:192.0.2.1 -all"),
        _txt("none.test", "v=spf1 ip4:192.0.2.1 -all"),
        _txt("two.test", "v=spf1 -all") + "\n" + _txt("two.test", "v=spf1 +all"),
        _txt("_dmarc.two.test", "v=DMARC1; p=none") + "\n" + _txt("_dmarc.two.test", "v=DMARC1; p=reject"),
        _txt("_dmarc.suffix.test", "v=DMARC1; p=reject; psd=y"),
        _txt("a.suffix.test", "v=spf1 ip4:192.0.2.1 -all"),
        _txt("_dmarc.own.example.test", "v=DMARC1; p=none; psd=n"),
        _txt("broken.test", "v=spf1 include:fails.test -all"),
        _txt("_dmarc.broken.test", "v=DMARC1; p=reject"),
        _txt("helo.test", "v=spf1 ip4:192.0.2.1 -all"),
        _txt("xn--mnchen-3ya.test", "v=spf1 ip4:192.0.2.1 -all"),
        *(_txt(f"s._domainkey.{d}", f"v=DKIM1; k=rsa; p={PUBLIC}") for d in ("example.test", "mail.strict.test")),
        *(_txt(f"s._domainkey.{d}", f"v=DKIM1; k=rsa; p={PUBLIC}") for d in ("sub.example.test", "other.test")),
        _txt("ed._domainkey.example.test", f"v=DKIM1; k=ed25519; p={ED_PUBLIC}"),
        _txt("gone._domainkey.example.test", "v=DKIM1; p="),
        _txt("sha1._domainkey.example.test", f"v=DKIM1; h=sha1; p={PUBLIC}"),
        _txt("web._domainkey.example.test", f"v=DKIM1; s=web; p={PUBLIC}"),
        _txt("bad._domainkey.example.test", "v=DKIM1; p=AAAA"),
    ]
)


@pytest.fixture(scope="module")
def dns_server() -> Iterator[Dns]:
    server = Dns(ZONE, broken=["fails.test", "_dmarc.fails.test", "s._domainkey.fails.test"])
    yield server
    server.close()


@pytest.fixture
def verify(dns_server: Dns) -> Callable[..., Auth]:
    verifier = Verifier("mx.y.test", dns_server.resolver)

    def verified(data: bytes, sender: str | None = "joe@nowhere.test", ip: str = "192.0.2.1", **given: Any) -> Auth:
        return verifier.verify(Envelope(sender, ("ann@y.test",), (ip, 25), **given), data)

    return verified


def signed(
    data: bytes = MESSAGE, domain: str = "example.test", selector: str = "s", key: bytes = PRIVATE, **given: Any
) -> bytes:
    field = dkim.sign(data, selector.encode(), domain.encode(), key, **given)
    return bytes(field) + data


def dkim_of(auth: Auth) -> list[tuple[str, str]]:
    return [(verdict.result, verdict.reason) for verdict in auth.verdicts if verdict.method == "dkim"]


# -- SPF -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sender", "ip", "result"),
    [
        ("joe@example.test", "192.0.2.1", "pass"),
        ("joe@example.test", "::ffff:192.0.2.1", "pass"),
        ("joe@EXAMPLE.test", "192.0.2.1", "pass"),
        ("joe@münchen.test", "192.0.2.1", "pass"),
        ("joe@example.test", "192.0.2.2", "fail"),
        ("joe@nowhere.test", "192.0.2.1", "none"),
        ("joe@[192.0.2.1]", "192.0.2.1", "none"),
        ("joe@two.test", "192.0.2.1", "permerror"),
        ("joe@broken.test", "192.0.2.1", "temperror"),
        ("joe@example.test", "no address", "none"),
        (None, "192.0.2.1", "none"),
    ],
)
def test_spf_says_whether_the_host_may_use_the_sender(
    verify: Callable[..., Auth], sender: str | None, ip: str, result: str
) -> None:
    assert verify(MESSAGE, sender, ip).spf == result


def test_the_null_sender_is_the_postmaster_of_the_host_that_greeted(verify: Callable[..., Auth]) -> None:
    auth = verify(MESSAGE, "", helo="helo.test")
    assert auth.verdicts[0] == Verdict("spf", "pass", "", {"smtp.helo": "helo.test"})


def asked(zone: dict[tuple[str, str], list[str]]) -> Callable[[str, str], list[str]]:
    return lambda name, kind: zone.get((name.lower(), kind), [])


@pytest.mark.parametrize(
    ("record", "result"),
    [
        ("v=spf1 a:a.test -all", "pass"),
        ("v=spf1 a:b.test/24 -all", "pass"),
        ("v=spf1 mx:m.test -all", "pass"),
        ("v=spf1 include:i.test ?all", "pass"),
        ("v=spf1 redirect=i.test", "pass"),
        ("v=spf1 exists:%{ir}.%{v}.list.test -all", "pass"),
        ("v=spf1 exists:%{l1r-}.%{d2}.list.test -all", "pass"),  # of bounce-joe, turned round, the last word
        ("v=spf1 ptr:a.test -all", "pass"),
        ("v=spf1 ~all", "softfail"),
        ("v=spf1", "neutral"),
        ("v=spf10 +all", "none"),
        ("v=spf1 +all wrong", "permerror"),
        ("v=spf1 ip4:1.2.3 +all", "permerror"),
        ("v=spf1 include:none.test +all", "permerror"),
        ("v=spf1 redirect=none.test", "permerror"),
        ("v=spf1 exists:%{x}.test", "permerror"),
        ("v=spf1 include:x.test", "permerror"),
        ("v=spf1 a:v1.test a:v2.test a:v3.test +all", "permerror"),
        ("v=spf1" + " a:b.test" * 10 + " -all", "fail"),
        ("v=spf1" + " a:b.test" * 11 + " -all", "permerror"),
        ("v=spf1 mx:many.test +all", "permerror"),
    ],
)
def test_spf_evaluates_a_record_within_its_limits(record: str, result: str) -> None:
    zone = {
        ("x.test", "TXT"): [record],
        ("i.test", "TXT"): ["v=spf1 ip4:192.0.2.0/24 -all"],
        ("a.test", "A"): ["192.0.2.3"],
        ("b.test", "A"): ["192.0.2.99"],
        ("m.test", "MX"): ["b.test", "a.test"],
        ("many.test", "MX"): [f"{n}.test" for n in range(11)],
        ("3.2.0.192.in-addr.arpa", "PTR"): ["a.test"],
        ("3.2.0.192.in-addr.list.test", "A"): ["127.0.0.2"],
        ("bounce.x.test.list.test", "A"): ["127.0.0.2"],
    }
    found, _ = check(asked(zone), ipaddress.ip_address("192.0.2.3"), "bounce-joe@x.test", "h.test")
    assert found == result


@given(st.text(alphabet="v=spf1 aemxip4:6/%{}ldir-+~?.,0123", max_size=200))
def test_no_record_makes_spf_raise(text: str) -> None:
    check(asked({("x.test", "TXT"): [f"v=spf1 {text}"]}), ipaddress.ip_address("192.0.2.3"), "j@x.test", "h.test")


@pytest.mark.skipif("PYSPF_SDIST" not in os.environ, reason="PYSPF_SDIST is where pyspf's source distribution lies")
def test_spf_agrees_with_the_test_suite_of_rfc_7208() -> None:
    import yaml

    wrong, seen = [], 0
    for suite in yaml.safe_load_all(Path(os.environ["PYSPF_SDIST"], "test/rfc7208-tests.yml").read_text()):
        ask = _suite_dns(suite["zonedata"])
        for name, case in suite["tests"].items():
            seen += 1
            result, _ = check(ask, ipaddress.ip_address(case["host"]), case["mailfrom"], case["helo"])
            if result not in case["result"]:
                wrong.append((name, result, case["result"]))
    assert seen > 200
    assert wrong == []


def _suite_dns(zonedata: dict[str, list[Any]]) -> Callable[[str, str], list[str]]:
    """What stands under SPF is a TXT record too, where there is no other (the suite's own rule)."""
    zone: dict[str, list[tuple[str, Any]]] = {}
    for name, records in zonedata.items():
        pairs = [("TIMEOUT", None) if r == "TIMEOUT" else next(iter(r.items())) for r in records]
        if not any(kind == "TXT" for kind, _ in pairs):
            pairs = [("TXT" if kind == "SPF" else kind, value) for kind, value in pairs]
        zone[name.lower()] = [pair for pair in pairs if pair[1] != "NONE"]

    def ask(name: str, kind: str, level: int = 0) -> list[str]:
        name = name.lower().removesuffix(".")
        if any(len(label) > 63 for label in name.split(".")):
            return []
        found: list[Any] = []
        for known, value in zone.get(name, []):
            if known == "CNAME":
                return ask(value, kind, level + 1) if level < 5 else []
            if (known == "TIMEOUT" and not found) or (known == kind and value == "TIMEOUT"):
                raise Unsure
            if known == kind:
                found.append(value if kind == "MX" or isinstance(value, str) else "".join(value))
        return [host for _, host in sorted(found)] if kind == "MX" else found

    return ask


UNSIGNED_FROM = b"DKIM-Signature: v=1; a=rsa-sha256; d=example.test; s=s; h=to:subject; bh=AAAA; b=AAAA\r\n" + MESSAGE

# -- DKIM ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("header", [b"simple", b"relaxed"])
@pytest.mark.parametrize("body", [b"simple", b"relaxed"])
@pytest.mark.parametrize(
    "text",
    [b"", b"\r\n", b"\r\n\r\n", b"a", b"a\r\n\r\n\r\n", b" a \t b \r\n \r\n", b"a\r\r\n\r\n", b"\r\r\n", b"a\r\n\r"],
)
def test_what_dkimpy_signs_passes(verify: Callable[..., Auth], header: bytes, body: bytes, text: bytes) -> None:
    auth = verify(signed(b"From: joe@example.test\r\nX:  a \r\n b\r\n\r\n" + text, canonicalize=(header, body)))
    assert dkim_of(auth) == [("pass", "")]
    assert auth.verdicts[1].properties["header.d"] == "example.test"


def test_ed25519_passes(verify: Callable[..., Auth]) -> None:
    data = signed(selector="ed", key=ED_PRIVATE, signature_algorithm=b"ed25519-sha256")
    assert verify(data).dkim == "pass"


@pytest.mark.parametrize(
    ("data", "verdict"),
    [
        (signed() + b"more\r\n", ("fail", "the body has been changed")),
        (signed().replace(b"Hello\r\n", b"Hallo\r\n"), ("fail", "the signature does not hold")),
        (b"From: eve@example.test\r\n" + signed(), ("fail", "the signature does not hold")),
        (signed(length=True) + b"more\r\n", ("policy", "l= leaves the end of the body unsigned")),
        (signed(signature_algorithm=b"rsa-sha1"), ("policy", "SHA-1 is no longer good enough")),
        (signed(selector="none"), ("permerror", "there is no key")),
        (signed(selector="gone"), ("permerror", "the key is revoked")),
        (signed(selector="sha1"), ("permerror", "the key is for something else")),
        (signed(selector="web"), ("permerror", "the key is for something else")),
        (signed(selector="bad"), ("permerror", "the key cannot be read")),
        (signed(selector="ed"), ("permerror", "the key is of another kind")),
        (signed(domain="fails.test"), ("temperror", "the DNS does not tell the TXT record of s._domainkey.fails.test")),
        (b"DKIM-Signature: nonsense\r\n" + MESSAGE, ("permerror", "the signature cannot be read")),
        (UNSIGNED_FROM, ("permerror", "From is not signed")),
        (b"DKIM-Signature: v=1;" + b" " * 40 + b"\r\n" + MESSAGE, ("policy", "a signature with a long run of blanks")),
        (MESSAGE, ("none", "")),
    ],
)
def test_a_signature_that_says_nothing_does_not_pass(
    verify: Callable[..., Auth], data: bytes, verdict: tuple[str, str]
) -> None:
    assert dkim_of(verify(data)) == [verdict]


def test_only_some_signatures_are_looked_at(verify: Callable[..., Auth]) -> None:
    field = signed()[: -len(MESSAGE)]
    assert len(dkim_of(verify(field * 20 + MESSAGE))) == 5


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
def test_what_opendkim_signs_holds(tmp_path: Path, verify: Callable[..., Auth], line_end: bytes) -> None:
    program = shutil.which("opendkim-testmsg", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        if os.environ.get("CI"):
            pytest.fail("opendkim-testmsg is missing")
        pytest.skip("opendkim-testmsg is not installed")
    key = tmp_path / "key.pem"
    key.write_bytes(PRIVATE)
    command = [program, "-d", "example.test", "-s", "s", "-k", str(key), "-t", str(tmp_path)]
    message = b"Date: Mon, 1 Jan 2024 00:00:00 +0000\n" + MESSAGE.replace(b"\r\n", b"\n")
    done = subprocess.run(command, input=message, capture_output=True, check=True, timeout=30)
    # Debian's repeats the last octets of b= behind its padding: what comes after the first "=" of that line is dropped.
    data = re.sub(rb"(?m)^([\t ]+[\w+/]{5,}=)[\w+/=]+$", rb"\1", done.stdout.replace(b"\r\n", b"\n"), count=1)
    data = data.replace(b"\n", line_end)
    # This program signs with SHA-1 and nothing else; that is looked at last, after the signature has held.
    assert dkim_of(verify(data)) == [("policy", "SHA-1 is no longer good enough")]
    assert dkim_of(verify(data + b"x")) == [("fail", "the body has been changed")]


# -- ARC -------------------------------------------------------------------------------------------------------------


def sealed(data: bytes, cv: bytes = b"none") -> bytes:
    data = without_forged(data, "list.test")
    data = b"Authentication-Results: list.test; arc=" + cv + b"; spf=pass smtp.mailfrom=example.test\r\n" + data
    return b"".join(dkim.arc_sign(data, b"s", b"example.test", PRIVATE, b"list.test")) + data


def test_a_chain_holds_until_somebody_changes_the_message(verify: Callable[..., Auth]) -> None:
    pytest.importorskip("authres")
    one = sealed(MESSAGE)
    assert verify(one).arc == "pass"
    two = sealed(one, b"pass")
    auth = verify(two)
    assert auth.arc == "pass"
    assert auth.verdicts[-1].properties == {"arc.chain": "example.test:example.test"}
    assert verify(two + b"more").arc == "fail"
    assert verify(two.replace(b"ARC-Seal: i=1", b"X-Seal: i=1")).arc == "fail"
    assert verify(two.replace(b"Results: i=1; ", b"Results: i=1;  x")).arc == "fail"
    assert verify(MESSAGE).arc == "none"


# -- DMARC -----------------------------------------------------------------------------------------------------------


def from_(text: str) -> bytes:
    return f"From: {text}\r\nSubject: x\r\n\r\nbody\r\n".encode()


@pytest.mark.parametrize(
    ("author", "sender", "signer", "result"),
    [
        ("j@example.test", "b@example.test", "", "pass policy.dmarc=reject"),
        ("j@example.test", "b@sub.example.test", "", "pass policy.dmarc=reject"),
        ("j@example.test", "b@none.test", "", "fail policy.dmarc=reject"),
        ("j@example.test", "b@none.test", "sub.example.test", "pass policy.dmarc=reject"),
        ("j@example.test", "b@none.test", "other.test", "fail policy.dmarc=reject"),
        ("j@sub.example.test", "b@none.test", "", "fail policy.dmarc=none"),
        ("j@own.example.test", "b@example.test", "", "fail policy.dmarc=none"),
        ("j@strict.test", "b@mail.strict.test", "mail.strict.test", "fail policy.dmarc=reject"),
        ("j@mail.strict.test", "b@mail.strict.test", "", "pass policy.dmarc=reject"),
        ("j@a.suffix.test", "b@a.suffix.test", "", "pass policy.dmarc=reject"),
        ("j@b.suffix.test", "b@a.suffix.test", "", "fail policy.dmarc=reject"),
        ("j@none.test", "b@none.test", "", "none"),
        ("j@two.test", "b@none.test", "", "none"),
        ("j@fails.test", "b@none.test", "", "temperror"),
        ("j@broken.test", "b@broken.test", "", "temperror policy.dmarc=reject"),
    ],
)
def test_dmarc_wants_a_pass_for_the_domain_of_the_author(
    verify: Callable[..., Auth], author: str, sender: str, signer: str, result: str
) -> None:
    data = from_(author)
    auth = verify(signed(data, signer) if signer else data, sender)
    [verdict] = [verdict for verdict in auth.verdicts if verdict.method == "dmarc"]
    policy = verdict.properties.get("policy.dmarc")
    assert verdict.result + (f" policy.dmarc={policy}" if policy else "") == result
    assert auth.domain == author.partition("@")[2]


@pytest.mark.parametrize(
    "data",
    [
        b"Subject: nobody\r\n\r\n",
        from_("j@example.test\r\nFrom: j@example.test"),
        from_("j@example.test\r\nfrom : eve@evil.test"),
        from_("j@example.test, eve@evil.test"),
        from_("undisclosed:;"),
        from_("group: j@example.test, eve@evil.test;"),
        from_("=?utf-8?q?j=40example.test?="),
        from_("eve@evil.test <j@example.test> <eve@evil.test>"),
        from_('"unfinished <j@example.test>'),
        from_("j@[192.0.2.1]"),
        from_("j@example.test").replace(b"Subject: x", b"Subject: x\rFrom: eve@evil.test"),
        b"X: y\r\n" * 2000 + from_("j@example.test"),
        from_(" " * 9000 + "j@example.test (" + "a" * 9000 + ")"),
    ],
)
def test_a_message_without_exactly_one_author_passes_for_nobody(verify: Callable[..., Auth], data: bytes) -> None:
    auth = verify(data, "joe@example.test")
    assert (auth.dmarc, auth.domain) == ("permerror", "")


@pytest.mark.parametrize(
    "author",
    [
        "Joe <j@example.test>",
        "=?utf-8?q?eve=40evil=2Etest?= <j@example.test>",
        '"eve@evil.test" <j@EXAMPLE.test>',
        "(eve@evil.test) j@example.test",
        "group: j@example.test;",
    ],
)
def test_a_display_name_is_no_author(verify: Callable[..., Auth], author: str) -> None:
    auth = verify(from_(author), "joe@example.test")
    assert (auth.dmarc, auth.domain) == ("pass", "example.test")


# -- the cost of hostile mail ----------------------------------------------------------------------------------------


RELAXED = signed(canonicalize=(b"relaxed", b"relaxed"))


@pytest.mark.parametrize(
    "data",
    [
        RELAXED[: -len(MESSAGE)] * 5 + MESSAGE + b"a  b\t" * 5_000_000,
        b"X: " + b" a" * 500_000 + b"\r\n" + MESSAGE,
        b"DKIM-Signature: " + b"v=1; b=" + b"a" * 1_000_000 + b"\r\n" + MESSAGE,
        signed()[: -len(MESSAGE)] * 1000 + MESSAGE,
        b"X: y\r\n" * 100_000 + MESSAGE,
        b"Authentication-Results: ((((\r\n" * 30_000 + MESSAGE,
        b"From:" + b"(" * 1_000_000 + b"\r\n\r\n",
        RELAXED[: -len(MESSAGE)] + MESSAGE + b" " * 10_000_000,
        RELAXED[: -len(MESSAGE)] + MESSAGE + b"\r\n" * 5_000_000,
        RELAXED[: -len(MESSAGE)] + MESSAGE + b" \r\t\n" * 2_500_000,
        b"ARC-Seal: i=1; b=" + b"a " * 1000 + b"\r\n" + MESSAGE,
    ],
    ids=["text", "long", "signature", "signatures", "fields", "comments", "from", "blanks", "lines", "mixed", "seal"],
)
def test_hostile_mail_costs_little(verify: Callable[..., Auth], data: bytes) -> None:
    began = time.process_time()
    verify(data)
    without_forged(data, "mx.y.test")
    assert time.process_time() - began < 3


@given(st.binary(max_size=300))
def test_nothing_makes_verify_raise(data: bytes) -> None:
    import dns.resolver

    class Nothing:
        def resolve(self, *_args: Any, **_given: Any) -> Any:
            raise dns.resolver.NXDOMAIN

    verifier = Verifier("mx.y.test", Nothing())  # type: ignore[arg-type]
    verifier.verify(Envelope("a@b.test", (), ("192.0.2.1", 1)), data)
    verifier.verify(Envelope("a@b.test", ()), b"DKIM-Signature:" + data + b"\r\nARC-Seal: i=1;" + data + b"\r\n\r\n")


# -- Authentication-Results ------------------------------------------------------------------------------------------


def test_the_field_tells_the_verdicts() -> None:
    auth = Auth(
        (
            Verdict("spf", "pass", "", {"smtp.mailfrom": "example.org"}),
            Verdict("dkim", "fail", 'the "body"', {"header.d": "example.org", "header.b": "a+/="}),
        )
    )
    assert authentication_results(auth, "mx.y.test") == (
        b"Authentication-Results: mx.y.test;\r\n"
        b" spf=pass\r\n  smtp.mailfrom=example.org;\r\n"
        b' dkim=fail\r\n  reason="the \\"body\\""\r\n  header.d=example.org\r\n  header.b="a+/="\r\n'
    )
    assert authentication_results(Auth(), "mx.y.test") == b"Authentication-Results: mx.y.test;\r\n none\r\n"


hostile = st.text(alphabet='a;="\\()\r\n\0 :é\udc80')


@given(hostile, hostile, hostile, hostile, hostile)
def test_no_value_leaves_its_place(id: str, result: str, reason: str, name: str, value: str) -> None:
    auth = Auth((Verdict("spf", result, reason, {name: value, "smtp.mailfrom": value}),))
    field = authentication_results(auth, id)
    message = message_from_bytes(field + b"\r\nbody")
    assert message.keys() == ["Authentication-Results"]
    assert message.get_payload() == "body"
    assert field.count(b"\r\n") == field.count(b"\r") == field.count(b"\n")
    assert all(len(line) < 998 for line in field.splitlines())


@pytest.mark.parametrize(
    "forged",
    [
        b"Authentication-Results: mx.y.test; spf=pass\r\n",
        b"AUTHENTICATION-RESULTS : MX.Y.TEST ; spf=pass\r\n",
        b"Authentication-Results:\r\n\tmx.y.test;\r\n spf=pass\r\n",
        b"Authentication-Results: (a (b) \\( c)(d) mx.y.test; spf=pass\r\n",
        b'Authentication-Results: "mx.y.test"; spf=pass\r\n',
        b'Authentication-Results: "mx\\.y.test" 1; spf=pass\r\n',
        b"Authentication-Results: mx.y.test 1; none\r\n",
        b"Authentication-Results: mx.y.test(comment); none\r\n",
        b"Authentication-Results: mx.y.test.; none\r\n",
        b"Authentication-Results: mx.y.test\r\n",
        b"Authentication-Results: m\0x.y.test; none\r\n",
        b"Authentication-Results: (never ends mx.y.test; none\r\n",
        b"Authentication-Results: \r mx.y.test; none\r\n",
        b"Authentication-Results: mx.y.test; none\n",
    ],
)
def test_a_field_in_our_name_is_dropped(forged: bytes) -> None:
    other = b"Authentication-Results: other.test; spf=pass\r\n"
    assert without_forged(other + forged + MESSAGE, "MX.y.test") == other + MESSAGE
    assert without_forged(forged + forged + MESSAGE, "mx.y.test") == MESSAGE


def test_a_field_behind_a_bare_cr_is_dropped_out_of_the_other_one() -> None:
    data = b"Subject: x\rAuthentication-Results: mx.y.test; spf=pass\r\nFrom: a@b.test\r\n\r\nbody"
    assert without_forged(data, "mx.y.test") == b"Subject: x\r\nFrom: a@b.test\r\n\r\nbody"


@pytest.mark.parametrize(
    "data",
    [
        MESSAGE,
        b"Authentication-Results: other.test; spf=pass (mx.y.test)\r\n" + MESSAGE,
        b"Authentication-Results: mx.y.test.evil.test; spf=pass\r\n" + MESSAGE,
        b"Authentication-Results: amx.y.test; spf=pass\r\n" + MESSAGE,
        b"Authentication-Results: (mx.y.test) other.test; spf=pass\r\n" + MESSAGE,
        b"ARC-Authentication-Results: i=1; mx.y.test; spf=pass\r\n" + MESSAGE,
        b"X-Authentication-Results: mx.y.test; spf=pass\r\n" + MESSAGE,
        b"Subject: x\r\n Authentication-Results: mx.y.test; spf=pass\r\n" + MESSAGE,
        MESSAGE + b"Authentication-Results: mx.y.test; spf=pass\r\n",
        b"\r\nAuthentication-Results: mx.y.test; spf=pass\r\n",
        b"",
    ],
)
def test_nothing_else_is_touched(data: bytes) -> None:
    assert without_forged(data, "mx.y.test") is data


def test_the_last_of_very_many_fields_is_dropped_too() -> None:
    many = b"X: y\r\n" * 20_000
    assert without_forged(many + b"Authentication-Results: y.test; none\r\n\r\n", "y.test") == many + b"\r\n"


# -- the guard -------------------------------------------------------------------------------------------------------


def message(*verdicts: Verdict) -> MailRequest:
    return MailRequest(
        ("x", 1), "a@b.test", "c@d.test", MESSAGE, envelope=Envelope("a@b.test", (), auth=Auth(verdicts))
    )


DMARC = Verdict("dmarc", "pass", "", {"header.from": "example.org"})
DKIM = Verdict("dkim", "pass", "", {"header.d": "example.org"})


@pytest.mark.parametrize(
    ("wanted", "verdicts", "code"),
    [
        (require("dmarc"), [DMARC], 0),
        (require("dmarc", domain="Example.org"), [DMARC], 0),
        (require("dmarc", domain="other.org"), [DMARC], 550),
        (require("dmarc"), [], 550),
        (require("dmarc"), [Verdict("dmarc", "fail")], 550),
        (require("dmarc"), [Verdict("dmarc", "temperror")], 451),
        (require("dmarc", "dkim"), [DMARC], 550),
        (require("dmarc", "dkim"), [DMARC, DKIM], 0),
        (require("dmarc", "dkim"), [Verdict("dmarc", "temperror"), Verdict("dkim", "fail")], 550),
        (require("dkim", domain="example.org"), [Verdict("dkim", "fail"), DKIM], 0),
        (require("dkim", domain="example.org"), [Verdict("dkim", "pass", "", {"header.d": "evil.org"})], 550),
        (require("spf", domain="x.org"), [Verdict("spf", "pass", "", {"smtp.mailfrom": "x.org"})], 0),
    ],
)
def test_a_function_runs_only_for_what_passes(wanted: Any, verdicts: list[Verdict], code: int) -> None:
    @wanted  # type: ignore[untyped-decorator]
    def START(message: MailRequest, host: str) -> str:
        return host

    @wanted  # type: ignore[untyped-decorator]
    async def LATER(message: MailRequest, host: str) -> str:
        return host

    def run() -> tuple[Any, Any]:
        return START(message(*verdicts), host="h"), asyncio.run(LATER(message(*verdicts), host="h"))

    assert inspect.iscoroutinefunction(LATER)
    if not code:
        assert run() == ("h", "h")
        return
    with pytest.raises(SMTPError) as raised:
        run()
    assert raised.value.code == code
    with pytest.raises(SMTPError):
        asyncio.run(LATER(message(*verdicts), host="h"))


def test_a_guarded_function_is_routed(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("guarded_handlers")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    source = (
        "from lamsonq.routing import route, stateless\nfrom lamsonq.authentication import require\nseen = []\n"
        "@route('below@h')\n@stateless\n@require('dmarc')\ndef below(message):\n    seen.append(message)\n"
        "@require('dmarc')\n@route('above@h')\n@stateless\ndef above(message):\n    seen.append(message)\n"
    )
    exec(source, vars(module))
    router = RoutingBase()
    router.load([module.__name__])
    for name in ("below@h", "above@h"):
        envelope = Envelope("a@b.test", (name,), auth=Auth((DMARC,)))
        router.deliver(MailRequest(("x", 1), "a@b.test", name, MESSAGE, envelope=envelope))
        with pytest.raises(Exception, match=r"5\.7\.1"):
            router.deliver(MailRequest(("x", 1), "a@b.test", name, MESSAGE))
    assert len(vars(module)["seen"]) == 2
    assert marks_of(vars(module)["above"]).stateless


@pytest.mark.parametrize("methods", [(), ("dmark",)])
def test_a_misspelt_method_is_told_at_once(methods: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="spf, dkim, dmarc, arc"):
        require(*methods)


# -- the page --------------------------------------------------------------------------------------------------------

PAGE = Page("authentication.md")


@pytest.mark.parametrize("section", ["In a handler", "A guard on a route", "The field for others"])
def test_the_blocks_of_the_page_run(section: str, here: Path) -> None:
    run = Run(PAGE)
    try:
        session = run.section(section)
        if section == "The field for others":
            assert session.data.count(b"Authentication-Results") == 1
            return
        router = RoutingBase()
        router.load([session.__name__])
        address = "orders@example.org" if section == "In a handler" else "commands@example.org"
        envelope = Envelope("joe@example.org", (address,), auth=Auth((DMARC,), "example.org"))
        router.deliver(MailRequest(None, "joe@example.org", address, MESSAGE, envelope=envelope))
        with pytest.raises(Exception, match=r"5\.7\.1"):
            router.deliver(MailRequest(None, "joe@example.org", address, MESSAGE))
    finally:
        run.close()
