"""DKIM signatures on what leaves, as others verify them: dkimpy and opendkim."""

from __future__ import annotations

import base64
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, NoEncryption, PrivateFormat
from hypothesis import given
from hypothesis import strategies as st

from lamsonq.errors import SettingsError
from lamsonq.mail import MailResponse
from lamsonq.queue import Queue
from lamsonq.relay import Relay
from lamsonq.settings import machine
from lamsonq.signing import DKIM, relaxed_body, signed
from lamsonq.transaction import for_the_wire
from lamsonq.worker import QueueReceiver

from .servers import Server
from .waiting import PATIENCE

dkim = pytest.importorskip("dkim")

RSA = rsa.generate_private_key(public_exponent=65537, key_size=2048)
ED25519 = ed25519.Ed25519PrivateKey.generate()
MESSAGE = (
    b"From: Joe <joe@example.org>\r\nTo: ann@y.test\r\nSubject:  hi\r\n\tthere \r\n"
    b"Message-ID: <1@example.org>\r\n\r\nsome  text \r\n.dot\r\n\r\n\r\n"
)


def key_file(folder: Path, name: str, key: object) -> Path:
    path = folder / name
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())  # type: ignore[attr-defined]
    path.write_bytes(pem)
    path.chmod(0o600)
    return path


@pytest.fixture
def keys(tmp_path: Path) -> list[DKIM]:
    return [
        DKIM("example.org", "r1", key_file(tmp_path, "r1.pem", RSA)),
        DKIM("example.org", "e1", key_file(tmp_path, "e1.pem", ED25519)),
    ]


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


def verdicts(data: bytes, keys: Sequence[DKIM]) -> list[bool]:
    """What dkimpy says of each signature."""
    records = {f"{key.selector}._domainkey.{key.domain}.".encode(): key.record().encode() for key in keys}
    checker = dkim.DKIM(data)
    count = data.lower().count(b"dkim-signature:")
    return [checker.verify(number, dnsfunc=lambda name, **_: records.get(name)) for number in range(count)]


def names_signed(data: bytes) -> list[str]:
    header = data.replace(b"\r\n ", b" ").split(b"\r\n")[0]
    (tag,) = [tag for tag in header.split(b";") if tag.strip().startswith(b"h=")]
    return [name.strip() for name in tag.decode().split("=")[1].replace(" ", "").split(":")]


def test_two_keys_of_a_domain_make_two_signatures_that_others_verify(keys: list[DKIM]) -> None:
    data = signed(MESSAGE, keys)
    assert data.endswith(MESSAGE)
    assert [key.algorithm for key in keys] == ["rsa-sha256", "ed25519-sha256"]
    assert verdicts(data, keys) == [True, True]


def test_the_relay_signs_the_bytes_as_they_leave(keys: list[DKIM], server: Server, here: Path) -> None:
    relay = Relay("127.0.0.1", server.port, sign=keys, timeout=PATIENCE)
    Relay(deliver=Queue("run/outbox").push).deliver(
        MailResponse(From="joe@example.org", To="ann@y.test", Subject="grüße", Body=".dot\n\n..dots\nüber\n")
    )
    assert b"DKIM" not in Queue("run/outbox").backend.get(Queue("run/outbox").keys()[0]).body  # type: ignore[union-attr]
    QueueReceiver("run/outbox", deliver=relay.deliver).run_once()
    wire = server.messages[0]
    assert wire.count(b"\r\n..") == 2
    assert verdicts(wire.replace(b"\r\n..", b"\r\n."), keys) == [True, True]
    relay.close()


@pytest.mark.parametrize(
    "data",
    [
        b"from: joe@example.org\r\n\r\n",
        b"From: joe@example.org\r\n\r\n\r\n\r\n",
        b"From: joe@example.org\r\nTo: x\r\n\r\nno end",
        b"From: joe@example.org\nTo: x\n\nof this system\n",
        b"From: joe@example.org\r\nReceived: a\r\nReceived: b\r\nComments:\r\n\r\n \t\r\n a \t b\r\n \r\n\r\n",
        b"From: joe@example.org\r\nX: \xff\xc3\r\n\r\n\xff\x00\r\n",
        b"From: joe@example.org\r\nCc: a\r\nCc: b\r\nSubject: one\r\nSubject: two\r\n\r\nx\r\n",
    ],
)
def test_messages_of_every_shape_are_verified(data: bytes, keys: list[DKIM]) -> None:
    assert verdicts(signed(for_the_wire(data), keys), keys) == [True, True]


@given(st.lists(st.sampled_from([b"a", b" ", b"\t", b"\r\n", b".", b"\xc3"]), max_size=30).map(b"".join))
def test_the_body_is_relaxed_as_dkimpy_does(body: bytes) -> None:
    theirs = dkim.canonicalization.Relaxed.canonicalize_body(body)
    assert relaxed_body(body) == theirs or not body.endswith(b"\r\n")  # what leaves always ends in CRLF
    assert relaxed_body(body + b"\r\n") == dkim.canonicalization.Relaxed.canonicalize_body(body + b"\r\n")


@pytest.mark.parametrize("name", ["From", "To", "Subject", "Reply-To", "Cc", "Message-ID"])
def test_nobody_can_add_a_second_field_of_what_readers_are_shown(name: str, keys: list[DKIM]) -> None:
    data = signed(MESSAGE, keys)
    forged = f"{name}: evil@z.test\r\n".encode() + data
    for number in range(2):
        checker = dkim.DKIM(forged)
        records = {f"{key.selector}._domainkey.{key.domain}.".encode(): key.record().encode() for key in keys}
        try:
            held = checker.verify(number, dnsfunc=lambda name, known=records, **_: known.get(name))
        except dkim.DKIMException:
            held = False
        assert not held


def test_what_a_list_may_still_add_breaks_nothing(keys: list[DKIM]) -> None:
    data = signed(MESSAGE, keys)
    assert verdicts(b"List-Id: <x.y>\r\nReceived: by z\r\n" + data, keys) == [True, True]


def test_unsubscribing_is_signed_and_oversigned(keys: list[DKIM]) -> None:
    data = b"List-Unsubscribe: <https://x.y>\r\nList-Unsubscribe-Post: List-Unsubscribe=One-Click\r\n" + MESSAGE
    names = names_signed(signed(data, keys))
    for name in ("list-unsubscribe", "list-unsubscribe-post", "from", "subject", "message-id", "to"):
        assert names.count(name) == 2
    assert names.count("reply-to") == 1


def test_the_key_is_that_of_the_author_s_domain_or_of_the_nearest_above(tmp_path: Path, keys: list[DKIM]) -> None:
    below = DKIM("mail.example.org", "m", key_file(tmp_path, "m.pem", ED25519))
    every = [*keys, below]

    def domains(sender: str) -> list[bytes]:
        data = signed(f"From: {sender}\r\n\r\n".encode(), every)
        return [line.split(b"d=")[1].split(b";")[0] for line in data.split(b"\r\n") if b"d=" in line]

    assert domains("joe@EXAMPLE.org") == [b"example.org"] * 2
    assert domains("joe@a.mail.example.org") == [b"mail.example.org"]
    assert domains("joe@a.example.org") == [b"example.org"] * 2
    for stranger in ("joe@org", "joe@badexample.org", "joe@[127.0.0.1]", "nobody", "a@example.org, b@example.org"):
        assert domains(stranger) == []
    assert domains("a@example.org\r\nFrom: b@example.org") == []


# -- the key -------------------------------------------------------------------------------------------------------


def test_a_key_that_others_can_use_refuses_the_boot(tmp_path: Path) -> None:
    path = key_file(tmp_path, "k.pem", RSA)
    for mode in (0o644, 0o604, 0o660):
        path.chmod(mode)
        with pytest.raises(SettingsError, match=rf"k\.pem \(mode {mode:o}\): chmod 600"):
            DKIM("example.org", "s", path)
    path.chmod(0o640)  # readable by a group that is its own
    DKIM("example.org", "s", path)


def test_what_is_no_key_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(octets: bytes) -> Path:
        path = tmp_path / "k"
        path.write_bytes(octets)
        path.chmod(0o600)
        return path

    def pem(key: object, encryption: object = NoEncryption()) -> bytes:
        return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)  # type: ignore[attr-defined,no-any-return]

    small = b"""-----BEGIN RSA PRIVATE KEY-----
MGMCAQACEQDKFcQ0JkqSUBIZmZmUAwHPAgMBAAECEQCVZQ0rHK1RqLOmCpN5vR5B
-----END RSA PRIVATE KEY-----"""
    for octets, words in (
        (b"", "no private key"),
        (b"rubbish", "no private key"),
        (small, "no private key"),
        (b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----", "no private"),
        (pem(ec.generate_private_key(ec.SECP256R1())), "neither an RSA nor an Ed25519"),
        (pem(RSA, BestAvailableEncryption(b"x")), "encrypted"),
    ):
        with pytest.raises(SettingsError, match=words):
            DKIM("example.org", "s", write(octets))
    with pytest.raises(SettingsError, match=r"missing cannot be read: No such file"):
        DKIM("example.org", "s", tmp_path / "missing")
    good = write(pem(RSA))
    for domain, selector in (("exa mple.org", "s"), ("", "s"), ("example.org", "a;b"), ("example.org", "")):
        with pytest.raises(SettingsError, match=r"no (domain|selector)"):
            DKIM(domain, selector, good)


def test_an_ed25519_seed_of_dknewkey_is_a_key(tmp_path: Path) -> None:
    path = tmp_path / "seed"
    path.write_bytes(base64.b64encode(os.urandom(32)) + b"\n")
    path.chmod(0o600)
    key = DKIM("bücher.example", "s", path)
    data = signed("From: joe@bücher.example\r\n\r\n".encode(), [key])
    assert key.domain == "xn--bcher-kva.example"
    assert verdicts(data, [key]) == [True]


def test_the_settings_name_the_keys(tmp_path: Path) -> None:
    one, two = key_file(tmp_path, "r.pem", RSA), key_file(tmp_path, "e.pem", ED25519)
    file = tmp_path / "settings.toml"
    table = f'domain = "example.org"\nselector = "r1"\nkey_file = "{one}"\n'
    file.write_text(f"[relay.dkim]\n{table}")
    assert [key.selector for key in Relay(**machine(str(file)).relay.config()).sign] == ["r1"]
    file.write_text(f"[[relay.dkim]]\n{table}[[relay.dkim]]\n{table.replace('r1', 'e1').replace(str(one), str(two))}")
    assert [key.algorithm for key in machine(str(file)).relay.config()["sign"]] == ["rsa-sha256", "ed25519-sha256"]
    file.write_text(f"[relay.dkim]\n{table}keyfile = 'x'\n")
    with pytest.raises(
        SettingsError, match=r"relay\.dkim\.0\.keyfile: there is no such setting; did you mean key_file"
    ):
        machine(str(file))
    file.write_text("[relay.dkim]\ndomain = 'example.org'\n")
    with pytest.raises(SettingsError, match=r"relay\.dkim\.0: selector is missing"):
        machine(str(file))


# -- opendkim --------------------------------------------------------------------------------------------------------


@pytest.fixture
def opendkim(tmp_path: Path, free_port: Callable[[], int]) -> Callable[[bytes], str]:
    program = shutil.which("opendkim", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        if os.environ.get("CI"):
            pytest.fail("opendkim is not installed")
        pytest.skip("opendkim is not installed")
    keys = tmp_path / "keys"
    records = {
        f"{name}._domainkey.example.org": DKIM("example.org", name, key_file(tmp_path, f"{name}.o", key)).record()
        for name, key in (("r1", RSA),)
    }
    keys.write_text("".join(f"{name} {record}\n" for name, record in records.items()))
    config = tmp_path / "opendkim.conf"
    config.write_text(f"Mode v\nTestPublicKeys {keys}\nUserID {os.getuid()}\nOn-BadSignature reject\n")

    def verify(data: bytes) -> str:
        path = tmp_path / "mail.eml"
        path.write_bytes(data)
        done = subprocess.run(
            [program, "-x", str(config), "-t", str(path), "-vv"], capture_output=True, text=True, check=False
        )
        return done.stdout + done.stderr

    return verify


def test_opendkim_verifies_the_rsa_signature(keys: list[DKIM], opendkim: Callable[[bytes], str]) -> None:
    said = opendkim(signed(MESSAGE, keys[:1]))
    assert "verification (s=r1, d=example.org, 2048-bit key) succeeded" in said, said
    said = opendkim(signed(MESSAGE, keys[:1]).replace(b"some", b"other"))
    assert "succeeded" not in said, said
