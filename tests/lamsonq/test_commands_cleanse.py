"""cleanse: what it leaves alone, what it puts right, and what it refuses."""

from __future__ import annotations

import email
import mailbox
from email import policy
from email.message import EmailMessage
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamsonq.commands.cleansing import cleansed, faults_of

from .cli import lamsonq, refused

HEAD = b"From: a@x.org\nTo: b@y.org\nSubject: hi\n"
SEPARATOR = b"From a@x.org Mon Jan  1 00:00:00 2024\n"
GOOD = {
    "plain": HEAD + b"\nhello\n",
    "empty": HEAD + b"\n",
    "utf-8": HEAD + b"Content-Type: text/plain; charset=utf-8\nContent-Transfer-Encoding: 8bit\n\n\xc3\xa4\n",
    "folded": b"Subject: one\n two\n" + HEAD + b"\nhello\n",
    "encoded": HEAD + b"Content-Transfer-Encoding: base64\n\naGVsbG8=\n",
    "quoted": HEAD + b"Content-Transfer-Encoding: quoted-printable\n\n=E4=\nb\n",
    "parts": HEAD + b"Content-Type: multipart/mixed; boundary=b\n\npreamble\n--b\n\none\n--b\n\ntwo\n--b--\nepilogue\n",
    "message": HEAD + b"Content-Type: message/rfc822\n\nSubject: inner\n\nhello\n",
    "signed": HEAD + b"DKIM-Signature: v=1; b=abc\n  def\n\nhello  \n\n\n",
}

TEXT = b"Content-Type: text/plain"
BAD = {
    "raw latin-1 in the header": HEAD.replace(b"hi", b"gr\xfc\xdfe") + b"\nhello\n",
    "raw utf-8 in a name": HEAD.replace(b"a@x.org", "Jörg Ä <a@x.org>".encode()) + b"\nhello\n",
    "control characters": HEAD.replace(b"hi", b"h\x00i") + b"\nhello\n",
    "a long line in the header": HEAD.replace(b"hi", b"word " * 300) + b"\nhello\n",
    "no charset": HEAD + b"\ngr\xc3\xbc\xc3\x9fe\n",
    "a wrong charset": HEAD + TEXT + b"; charset=us-ascii\nContent-Transfer-Encoding: 8bit\n\ngr\xfc\xdfe\n",
    "an unknown charset": HEAD + TEXT + b"; charset=x-nosuch\nContent-Transfer-Encoding: 8bit\n\n\xc3\xa4\n",
    "an unknown encoding": HEAD + b"Content-Transfer-Encoding: x-uu\n\nhello\n",
    "bad base64": HEAD + b"Content-Transfer-Encoding: base64\n\naGVsbG8\n",
    "bad quoted-printable": HEAD + b"Content-Transfer-Encoding: quoted-printable\n\n=ZZ\xe4\n",
    "a long line": HEAD + b"\n" + b"x" * 3000 + b"\n",
    "bare line ends": HEAD + b"\none\rtwo\n",
    "nul": HEAD + b"\none\x00two\n",
    "no empty line": HEAD + b"hello\n",
    "no boundary": HEAD + b"Content-Type: multipart/mixed\n\nhello\n",
    "no end": HEAD + b"Content-Type: multipart/mixed; boundary=b\n\n--b\n\none\n--b\n\ntwo\n",
    "a bad part": HEAD + b"Content-Type: multipart/alternative; boundary=b\n\n--b\n\n\xe4\n--b\n\ntwo\n--b--\n",
    "a bad inner message": HEAD + b"Content-Type: message/rfc822\n\nSubject: \xe4\n\nhello\n",
    "a raw file name": HEAD
    + 'Content-Type: application/x; name="ä.bin"\nContent-Disposition: attachment; filename="ä.bin"\n\n'.encode()
    + b"\xff\n",
}


def read(data: bytes) -> EmailMessage:
    return email.message_from_bytes(data, policy=policy.default)


def defects(message: EmailMessage) -> list[object]:
    """What the standard library has against a message."""
    return [d for part in message.walk() for d in (*part.defects, *(e for h in part.values() for e in h.defects))]


@pytest.mark.parametrize("name", GOOD)
def test_what_is_well_formed_keeps_its_bytes(name: str) -> None:
    assert cleansed(GOOD[name]) == GOOD[name]
    assert cleansed(GOOD[name].replace(b"\n", b"\r\n")) == GOOD[name]


@pytest.mark.parametrize("name", BAD)
def test_what_is_malformed_is_put_right(name: str) -> None:
    assert faults_of(BAD[name]) != []
    anew = cleansed(BAD[name])
    assert faults_of(anew) == []
    assert anew.isascii()
    assert max(map(len, anew.split(b"\n"))) <= 998
    assert defects(read(anew)) == []
    assert cleansed(anew) == anew


def test_what_a_message_says_is_still_said() -> None:
    def text(name: str) -> str:
        return str(read(cleansed(BAD[name])).get_content())

    assert read(cleansed(BAD["raw utf-8 in a name"]))["from"] == "Jörg Ä <a@x.org>"
    assert cleansed(b"From: \xe4 at home\n\nhello\n").startswith(b"From: =?utf-8?b?w6QgYXQgaG9tZQ==?=\n")
    assert "grüße" in text("no charset")
    assert text("an unknown charset") == "ä\n"
    assert text("no empty line") == text("no boundary") == "hello\n"
    assert text("bare line ends").startswith("one")
    for name in ("no end", "a bad part"):
        assert len(list(read(cleansed(BAD[name])).iter_parts())) == 2
    attached = read(cleansed(BAD["a raw file name"]))
    assert (attached.get_filename(), attached.get_content()) == ("ä.bin", b"\xff\n")


LATIN = "„Grüße“ für 5 €"
MARKED = HEAD.replace(b"hi", b"SUBJECT") + TEXT


@pytest.mark.parametrize(
    "declared", [b"", b"; charset=us-ascii", b"; charset=utf-8", b"; charset=x-nosuch", b"; charset=ISO-8859-1"]
)
@pytest.mark.parametrize("encoding", ["utf-8", "windows-1252"])
def test_text_that_is_not_what_it_says_is_read_as_utf_8_or_windows_1252(declared: bytes, encoding: str) -> None:
    text = LATIN.replace("„", '"').replace("“", '"').replace("€", "EUR") if b"8859" in declared else LATIN
    octets = text.encode("latin-1" if b"8859" in declared else encoding)
    anew = read(cleansed(MARKED.replace(b"SUBJECT", LATIN.encode(encoding)) + declared + b"\n\n" + octets + b"\n"))
    assert anew["subject"] == LATIN
    assert anew.get_content() == f"{text}\n"


def test_a_charset_that_fits_is_believed() -> None:
    assert read(cleansed(HEAD + TEXT + b"; charset=koi8-r\n\n\xf0\xd2\n")).get_content() == "Пр\n"


@pytest.mark.parametrize("encoding", ["utf-8", "windows-1252"])
@pytest.mark.parametrize("content", [b"\xff\xfe", b"aGVsbG8="])
def test_a_raw_file_name_is_read_in_the_same_way_whatever_the_content(content: bytes, encoding: str) -> None:
    fields = 'Content-Type: application/x; name="grüße.bin"\nContent-Description: ü\n'
    fields += 'Content-Disposition: attachment; filename="grüße.bin"\n'
    base64 = b"Content-Transfer-Encoding: base64\n" if content.isascii() else b""
    anew = read(cleansed(HEAD + fields.encode(encoding) + base64 + b"\n" + content + b"\n"))
    assert (anew.get_content_type(), anew.get_filename()) == ("application/x", "grüße.bin")
    assert anew["content-description"] == "ü"
    assert anew.get_content() == (b"hello" if content.isascii() else content + b"\n")


def test_an_encoded_word_in_a_line_that_is_written_anew_is_read_in_the_same_way() -> None:
    long = HEAD.replace(b"hi", b"=?us-ascii?q?gr=FC=DFe?= " + b"word " * 300)
    assert str(read(cleansed(long + b"\nhello\n"))["subject"]).startswith("grüße word")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (MARKED + b"\n\n\x81\x8d\n", "neither in UTF-8 nor in windows-1252"),
        (MARKED.replace(b"SUBJECT", b"\x81") + b"\n\nhello\n", "neither in UTF-8 nor in windows-1252"),
        (MARKED + b"; charset=utf-8\n\n" + "grüße".encode() + b"\xc3\n", "UTF-8 with broken characters"),
        (MARKED + b"\n\n" + "ü".encode() + b"\xc3\n", "UTF-8 with broken characters"),
        (MARKED + b"; charset=shift_jis\n\n\x93\xfa\x96\n", "not in its charset shift_jis, nor in UTF-8"),
        (HEAD + b"Content-Type: image/png; name*=utf-8''%E4.png\n\n\xff\n", "a file name in it cannot be read"),
        (MARKED.replace(b"SUBJECT", b"=?big5?q?=FF?= \xe4") + b"\n\nhello\n", "not in its charset big5"),
    ],
)
def test_text_that_nobody_can_read_is_refused_and_never_replaced(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        cleansed(data)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "it has no header"),
        (b"no header\n\nhello\n", "it has no header"),
        (b"X: y\n" * 5000 + b"\nhello\n", "too large"),
        (b"From: \xe4:;\n\nhello\n", "From holds no address"),
    ],
)
def test_what_cannot_be_put_right_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        cleansed(data)


_pieces = st.lists(
    st.sampled_from(
        [
            *(
                b"From: a@x.org\n",
                b"Subject: x\n",
                b"\n",
                b"\r",
                b"\x00",
                b"\xe4",
                b"hello",
                b": ",
                b"--b\n",
                b"--b--\n",
            ),
            *(b"Content-Type: multipart/mixed; boundary=b\n", b"Content-Type: text/html; charset=utf-8\n"),
            *(
                b"Content-Transfer-Encoding: base64\n",
                b"Content-Type: message/rfc822\n",
                b"=?utf-8?q?=00?=",
                b"x" * 999,
            ),
            *(b"Content-Type: message/delivery-status\n", b"Content-Type: image/png; name*=x'y\n", b" folded\n"),
        ]
    ),
    max_size=20,
).map(b"".join)


@settings(max_examples=300)
@given(_pieces)
def test_whatever_comes_is_put_right_or_refused(data: bytes) -> None:
    try:
        anew = cleansed(b"From: a@x.org\n" + data)
    except ValueError:
        return
    assert faults_of(anew) == []
    assert cleansed(anew) == anew


def test_cleanse_writes_a_maildir(here: Path) -> None:
    Path("in.mbox").write_bytes(b"".join(SEPARATOR + data + b"\n" for data in [*GOOD.values(), *BAD.values()]))
    done = lamsonq("cleanse", "in.mbox", "out")
    assert (done.stdout, done.stderr) == ("Completed without errors\n", "")
    written = [path.read_bytes() for path in Path("out/new").iterdir()]
    assert len(written) == len(GOOD) + len(BAD)
    assert {GOOD["plain"], GOOD["parts"], GOOD["signed"]} <= set(written)
    assert all(faults_of(data) == [] for data in written)


def test_cleanse_of_a_maildir_names_what_it_leaves_out(here: Path) -> None:
    source = mailbox.Maildir("in", create=True)
    key = source.add(b"no header\n")
    source.add(BAD["no charset"])
    done = lamsonq("cleanse", "-input", "in", "-output", "out", code=1)
    assert done.stdout == "TOTAL ERRORS: 1\n"
    assert done.stderr == f"ERROR: in/new/{key}: it has no header\n"
    assert len(list(Path("out/new").iterdir())) == 1


def test_cleanse_takes_input_and_output_in_any_way(here: Path) -> None:
    Path("in.mbox").write_bytes(SEPARATOR + GOOD["plain"])
    for args in (["in.mbox", "-output", "one"], ["-input", "in.mbox", "two"], ["--input=in.mbox", "--output=three"]):
        lamsonq("cleanse", *args)
    assert [len(list(Path(name, "new").iterdir())) for name in ("one", "two", "three")] == [1, 1, 1]
    assert "Give the maildir to write once" in refused("cleanse", "in.mbox", code=2)
    assert "Give the mbox or maildir to read once" in refused("cleanse", code=2)


def test_cleanse_into_a_maildir_that_is_there_adds_to_it_and_says_so(here: Path) -> None:
    Path("in.mbox").write_bytes(SEPARATOR + GOOD["plain"])
    assert lamsonq("cleanse", "in.mbox", "out").stderr == ""
    again = lamsonq("cleanse", "in.mbox", "out")
    assert again.stderr == "out is there already: the messages are added to what is in it.\n"
    assert len(list(Path("out/new").iterdir())) == 2


def test_cleanse_of_latin_1_is_what_people_read_and_names_what_nobody_can(here: Path) -> None:
    latin = HEAD.replace(b"hi", b"gr\xfc\xdfe") + b"\nein sch\xf6ner Gru\xdf\n"
    Path("in.mbox").write_bytes(SEPARATOR + latin + b"\n" + SEPARATOR + HEAD + b"\n\x81\n")
    done = lamsonq("cleanse", "in.mbox", "out", code=1)
    assert done.stdout == "TOTAL ERRORS: 1\n"
    assert "it holds text that is neither in UTF-8 nor in windows-1252" in done.stderr
    [written] = Path("out/new").iterdir()
    message = read(written.read_bytes())
    assert (message["subject"], message.get_content()) == ("grüße", "ein schöner Gruß\n")


def test_cleanse_does_not_write_over_anything_else(here: Path) -> None:
    mailbox.Maildir("in", create=True)
    Path("file").touch()
    assert refused("cleanse", "in", "file") == "ERROR: file exists and is no maildir: give another name"
    assert refused("cleanse", "in", "./in") == "ERROR: ./in is what is read: give another name for what is written"
