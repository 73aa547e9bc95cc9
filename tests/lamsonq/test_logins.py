"""Who may log in: the file of names, and `lamsonq logins`."""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path

import pytest

from lamsonq import logins
from lamsonq.errors import SettingsError
from lamsonq.logins import Logins

from .cli import lamsonq, refused


@pytest.fixture(autouse=True)
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logins, "_COST", (16, 1, 1))


@pytest.fixture
def file(here: Path) -> str:
    logins.add("logins", "joe", "secret")
    return "logins"


def test_a_name_and_its_password_belong_together(file: str) -> None:
    known = Logins(file)
    assert known("joe", "secret")
    assert not known("joe", "Secret")
    assert not known("joe", "")
    assert not known("Joe", "secret")
    assert not known("nobody", "nobody's")
    assert not known("", "")


def test_the_file_holds_no_password_and_is_its_owners_alone(file: str) -> None:
    logins.add(file, "jim", "secret")
    text = Path(file).read_text()
    assert "secret" not in text
    hashes = [line.rsplit(":", 1)[1] for line in text.splitlines()]
    assert len(set(hashes)) == 2  # each with salt of its own
    assert stat.S_IMODE(os.stat(file).st_mode) == 0o600
    assert [path.name for path in Path().iterdir() if path.name.startswith(".")] == []


def test_the_mode_of_a_file_that_is_there_stays(file: str) -> None:
    os.chmod(file, 0o640)
    logins.add(file, "jim", "secret")
    assert stat.S_IMODE(os.stat(file).st_mode) == 0o640


def test_what_looks_the_same_is_the_same(here: Path) -> None:
    logins.add("logins", "zoe\u0308", "u\u0308ber")
    assert Logins("logins")("zo\u00eb", "\u00fcber")
    assert logins.remove("logins", "zo\u00eb")


def test_a_name_may_be_an_address_and_a_password_anything(here: Path) -> None:
    logins.add("logins", "joe@example.com", "a:b c\u20ac")
    assert Logins("logins")("joe@example.com", "a:b c\u20ac")
    assert not Logins("logins")("joe@example.com", "\udcff")


@pytest.mark.parametrize("name", ["", "a:b", "a\nb", "a\rb", "a\0b", " a", "#a", "a\u2028b", "a\x85b", "a\x0cb"])
def test_what_would_break_the_file_is_no_name(file: str, name: str) -> None:
    before = Path(file).read_text()
    with pytest.raises(ValueError, match=r"no name to log in with"):
        logins.add(file, name, "x")
    assert Path(file).read_text() == before


def test_comments_and_empty_lines_are_let_be(file: str) -> None:
    Path(file).write_text("# who may send\n\n" + Path(file).read_text())
    logins.add(file, "jim", "x")
    assert logins.names(file) == ["joe", "jim"]
    assert Path(file).read_text().startswith("# who may send\n\n")
    assert Logins(file)("joe", "secret")


def test_a_change_counts_at_the_next_login(file: str) -> None:
    known = Logins(file)
    logins.add(file, "jim", "x")
    assert known("jim", "x")
    logins.remove(file, "joe")
    assert not known("joe", "secret")


@pytest.mark.parametrize(
    "line",
    [
        "joe",
        "joe:secret",
        "joe:md5:16:1:1:YWFh:YWFh",
        ":scrypt:16:1:1:YWFh:YWFh",
        "joe:scrypt:x:1:1:YWFh:YWFh",
        "joe:scrypt:0:1:1:YWFh:YWFh",
        "joe:scrypt:15:1:1:YWFh:YWFh",
        "joe:scrypt:1073741824:64:1:YWFh:YWFh",
        "joe:scrypt:16:1:1:!!!:YWFh",
        "joe:scrypt:16:1:1:YWFh:",
        "joe:scrypt:16:1:1:YWFh:YWFh",
    ],
)
def test_a_line_that_is_no_login_is_named_and_ends_the_boot(file: str, line: str) -> None:
    with open(file, "a") as lines:
        lines.write(line + "\n")
    with pytest.raises(SettingsError, match=r"receiver.logins_file: logins:2: this is no login; `lamsonq logins add"):
        Logins(file)


def test_a_file_that_breaks_later_lets_nobody_in_and_a_repaired_one_does(
    file: str, caplog: pytest.LogCaptureFixture
) -> None:
    known, whole = Logins(file), Path(file).read_text()
    Path(file).write_text(whole + "broken\n")
    assert not known("joe", "secret")
    assert "this is no login" in caplog.text
    assert "nobody can log in" in caplog.text
    Path(file).unlink()
    assert not known("joe", "secret")
    Path(file).write_text(whole)
    assert known("joe", "secret")


@pytest.mark.parametrize(
    ("octets", "why"),
    [
        (None, "No such file or directory; `lamsonq logins -file logins add NAME` makes it"),
        (b"\xff\n", "it is not UTF-8"),
    ],
)
def test_a_file_that_cannot_be_read_ends_the_boot(here: Path, octets: bytes | None, why: str) -> None:
    if octets is not None:
        Path("logins").write_bytes(octets)
    with pytest.raises(SettingsError, match=f"receiver.logins_file: cannot read logins: {why}"):
        Logins("logins")


def test_an_unknown_name_costs_what_a_known_one_costs(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    costs: list[tuple[int, int, int]] = []
    hashed = logins._hash

    def note(password: str, n: int, r: int, p: int, salt: bytes) -> bytes:
        costs.append((n, r, p))
        return hashed(password, n, r, p, salt)

    monkeypatch.setattr(logins, "_hash", note)
    known = Logins(file)
    known("joe", "wrong")
    known("nobody", "wrong")
    assert costs[0] == costs[1]


# -- the command --------------------------------------------------------------------------------------------------


def test_the_command_adds_lists_and_removes(here: Path) -> None:
    lamsonq("logins", "add", "joe", "-file", "who", stdin="secret\n")
    lamsonq("logins", "add", "jim", "--file", "who", stdin="other\n")
    assert lamsonq("logins", "ls", "-file", "who").stdout == "joe\njim\n"
    assert Logins("who")("joe", "secret")
    lamsonq("logins", "add", "joe", "-file", "who", stdin="new\n")
    assert Logins("who")("joe", "new")
    lamsonq("logins", "rm", "joe", "-file", "who")
    assert lamsonq("logins", "ls", "-file", "who").stdout == "jim\n"


def test_the_file_is_config_logins_unless_told_otherwise(here: Path) -> None:
    os.mkdir("config")
    lamsonq("logins", "add", "joe", stdin="secret\n")
    assert logins.names("config/logins") == ["joe"]


def test_the_command_says_what_it_needs(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert refused("logins", code=2).endswith("logins: ls, add NAME, or rm NAME?")
    assert "whom? lamsonq logins add NAME" in refused("logins", "add", code=2)
    assert "the password is empty" in refused("logins", "add", "joe", "-file", "who", code=2)
    assert "no name to log in with" in refused("logins", "add", "a:b", "-file", "who", code=2, stdin="x\n")
    assert "cannot use who: No such file" in refused("logins", "ls", "-file", "who")
    lamsonq("logins", "add", "joe", "-file", "who", stdin="secret\n")
    assert "who: nobody is called jim" in refused("logins", "rm", "jim", "-file", "who")
    assert "cannot use nowhere/who" in refused("logins", "add", "joe", "-file", "nowhere/who", stdin="x\n")
    Path("who").write_bytes(b"\xff")
    assert "who" in refused("logins", "ls", "-file", "who", code=1)
    with caplog.at_level(logging.DEBUG):
        assert "secret" not in caplog.text
