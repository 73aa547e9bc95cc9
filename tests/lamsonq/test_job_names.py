"""File names and records of the maildir queue: every released version is read, and nothing from outside breaks them."""

from __future__ import annotations

import contextlib
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamsonq.backends.maildir_files import milliseconds
from lamsonq.backends.maildir_names import (
    NAME_MAX,
    PREFIX,
    Name,
    Record,
    decode_block,
    due_of,
    encode_block,
    fitted,
    is_bound,
    is_deleted,
    is_newer,
    key_of,
    parse_name,
    priority_of,
)
from lamsonq.jobs import PRIORITY_MAX, Job
from lamsonq.keys import derived_key, is_derived, new_key, use_key

KEY = "1244080328.M408474P3147Q4.mycomputer.local"

# Names and records that a release has written. Add to them; never change one.
VERSION_1 = {
    f"{KEY},LQ=1b96": Name(KEY, block=96),
    f"{KEY},LQ=1b0": Name(KEY),
    f"{KEY},LQ=1b96d2f3": Name(KEY, block=96, deliveries=2, failures=3),
    f"{KEY},LQ=1b96f1t1244080400123o1e1": Name(KEY, block=96, failures=1, due=1244080400123, bound=1, errors=1),
    f"{KEY},LQ=1b96d1k7c9": Name(KEY, block=96, deliveries=1, mark=7, commit=9),
    f"{KEY},S=812,W=830,LQ=1b96d1:2,S": Name(KEY, ("S=812", "W=830"), block=96, deliveries=1),
    f"{KEY},LQ=1b96,U=12:2,FRS": Name(KEY, ("U=12",), block=96),
    f"{KEY},LQ=1b140o1p7x1244080400123q1": Name(KEY, block=140, bound=1, priority=7, expires=1244080400123, unique=1),
    f"{KEY},LQ=1b96f3e1k2r3": Name(KEY, block=96, failures=3, errors=1, mark=2, taken=3),
}
VERSION_1_RECORD = (
    b'X-Lamsonq-Job: {"sender":"Joe@Example.org","recipients":["a@b.example","\\u00fc@b.example"],'
    b'"peer":"127.0.0.1:4242","target":"app.handlers.index.START","received":1244080328.5,"metadata":{"k":"v"}}\n'
)

numbers = st.integers(0, 10**15)
fields = st.from_regex(r"[A-KM-Z]{1,3}=[0-9]{1,9}", fullmatch=True)
names = st.builds(
    Name,
    key=st.from_regex(r"[0-9]{1,10}\.M[0-9]{6}P[0-9]{1,6}Q[0-9]{1,5}\.[a-z0-9.-]{1,40}", fullmatch=True),
    others=st.lists(fields, max_size=3).map(tuple),
    block=numbers,
    deliveries=numbers,
    failures=numbers,
    due=st.integers(0, 10**15 - 1),
    bound=st.integers(0, 1),
    errors=st.integers(0, 1),
    mark=numbers,
    commit=numbers,
    priority=numbers,
    expires=numbers,
    unique=st.integers(0, 1),
    taken=st.integers(0, 4),
    trouble=st.just(""),
)


@pytest.mark.parametrize("text", VERSION_1)
def test_names_of_version_1_are_read(text: str) -> None:
    assert parse_name(text) == VERSION_1[text]


VERSION_1_UNIQUE = b'X-Lamsonq-Job: {"target":"clean","received":1244080328.5,"unique":"clean:\\u00fc"}\n'


def test_a_record_of_a_unique_job_is_read_and_written_as_version_1_has_it() -> None:
    record = decode_block(VERSION_1_UNIQUE, len(VERSION_1_UNIQUE))
    assert (record.target, record.received, record.unique) == ("clean", 1244080328.5, "clean:ü")
    assert encode_block(Job(key=KEY, body=b"", target="clean", unique="clean:ü"), 1244080328.5) == VERSION_1_UNIQUE


def test_a_record_of_version_1_is_read() -> None:
    record = decode_block(VERSION_1_RECORD, len(VERSION_1_RECORD))
    assert record.sender == "Joe@Example.org"
    assert record.recipients == ("a@b.example", "ü@b.example")
    assert (record.peer, record.target, record.received) == ("127.0.0.1:4242", "app.handlers.index.START", 1244080328.5)
    assert record.metadata == {"k": "v"}


def test_a_record_is_written_as_version_1_has_it() -> None:
    job = Job(
        key=KEY,
        body=b"",
        sender="Joe@Example.org",
        recipients=("a@b.example", "ü@b.example"),
        peer="127.0.0.1:4242",
        target="app.handlers.index.START",
        metadata={"k": "v"},
    )
    assert encode_block(job, 1244080328.5) == VERSION_1_RECORD


@given(names, st.sampled_from(["", ":2,", ":2,S", ":2,FRS"]))
def test_a_name_is_read_as_it_was_written(name: Name, flags: str) -> None:
    assert parse_name(name.text() + flags) == name


@given(names)
def test_the_quick_looks_at_a_name_agree_with_the_grammar(name: Name) -> None:
    assert due_of(name.text()) == name.due
    assert is_bound(name.text()) == bool(name.bound)
    assert priority_of(name.text()) == name.priority
    assert key_of(name.text() + ":2,S") == name.key
    assert not is_newer(name.text())


@given(st.text(min_size=1, max_size=80).filter(lambda text: "/" not in text and "\0" not in text))
def test_any_file_name_is_read_or_left_alone(text: str) -> None:
    name = parse_name(text)
    assert name is None or name.trouble or parse_name(fitted(name).text()) is not None


@given(st.text(st.characters(codec="utf-8", exclude_characters="/\0"), max_size=200), st.lists(fields, max_size=30))
def test_a_name_that_we_write_always_fits(key: str, others: list[str]) -> None:
    name = fitted(Name(key, tuple(others)))._replace(
        block=10**7,
        deliveries=9,
        failures=999,
        due=10**14,
        bound=1,
        errors=1,
        mark=2**48,
        commit=10**10,
        priority=PRIORITY_MAX,
        expires=10**14,
        unique=1,
        taken=4,
    )
    assert len(os.fsencode(name.text() + ":2,FRST")) <= NAME_MAX
    assert parse_name(name.text()) == name


@pytest.mark.parametrize("field", ["LQ=2b96", "LQ=10b96", "LQ=2", "LQ=2b96,S=3:2,S"])
def test_a_name_of_a_newer_version_is_left_alone(field: str) -> None:
    assert is_newer(f"{KEY},{field}")
    assert parse_name(f"{KEY},{field}") is None


@pytest.mark.parametrize("field", ["LQ=", "LQ=x", "LQ=1b", "LQ=1bx", "LQ=1z9", "LQ=1b96-", "LQ=1b9,LQ=1b8"])
def test_a_field_that_cannot_be_read_is_told(field: str) -> None:
    name = parse_name(f"{KEY},{field}")
    assert name is not None
    assert "cannot be read" in name.trouble


def test_a_file_of_another_program_has_all_defaults() -> None:
    assert parse_name("1700000000.V801I2M3.host,S=123,W=130:2,S") == Name(
        "1700000000.V801I2M3.host", ("S=123", "W=130")
    )
    assert parse_name("mail.txt") == Name("mail.txt")


def test_the_deleted_flag_is_seen_only_among_the_flags() -> None:
    assert is_deleted(f"{KEY}:2,ST")
    assert not is_deleted(f"{KEY}:2,S")
    assert not is_deleted("TOTAL.T")


def test_keys_rise_and_look_as_the_tutorial_shows_them() -> None:
    keys = [new_key() for _ in range(2000)]
    assert keys == sorted(keys)
    assert len(set(keys)) == len(keys)
    seconds, middle, host = keys[0].split(".", 2)
    assert seconds.isdigit()
    assert middle.startswith("M")
    assert f"P{os.getpid()}Q" in middle
    assert host


@given(
    sender=st.none() | st.text(),
    recipients=st.lists(st.text(), max_size=4).map(tuple),
    peer=st.none() | st.text(),
    metadata=st.dictionaries(st.text(), st.text(), max_size=3),
    received=st.floats(0, 1e11),
)
def test_a_record_is_one_ascii_line_and_comes_back(
    sender: str | None, recipients: tuple[str, ...], peer: str | None, metadata: dict[str, str], received: float
) -> None:
    block = encode_block(
        Job(key="k", body=b"", sender=sender, recipients=recipients, peer=peer, metadata=metadata), received
    )
    assert block.count(b"\n") == 1
    block.decode("ascii")
    record = decode_block(block, len(block))
    assert (record.sender, record.recipients, record.peer) == (sender, recipients, peer)
    assert (record.metadata, record.received) == (metadata, received)


def test_undecodable_bytes_in_a_record_come_back() -> None:
    block = encode_block(Job(key="k", body=b"", sender="\udcff@example.org"), 1.0)
    assert decode_block(block, len(block)).sender == "\udcff@example.org"


@pytest.mark.parametrize(
    ("block", "length"),
    [
        (b"", 10),
        (VERSION_1_RECORD[:-1], len(VERSION_1_RECORD)),
        (VERSION_1_RECORD[:-1] + b" ", len(VERSION_1_RECORD)),
        (b"From: somebody@example.org\n", 27),
        (PREFIX + b"{\n", len(PREFIX) + 2),
        (PREFIX + b"[]\n", len(PREFIX) + 3),
        (PREFIX + b'{"recipients":3}\n', len(PREFIX) + 17),
        (PREFIX + b"[" * 100_000 + b"\n", len(PREFIX) + 100_001),
        (PREFIX + b"\xff\xfe\n", len(PREFIX) + 3),
    ],
)
def test_a_record_that_does_not_check_out_says_why(block: bytes, length: int) -> None:
    with pytest.raises(ValueError, match="record"):
        decode_block(block, length)


@given(st.binary(max_size=200))
def test_no_bytes_break_the_reader_of_records(tail: bytes) -> None:
    block = PREFIX + tail + b"\n"
    with contextlib.suppress(ValueError):
        assert isinstance(decode_block(block, len(block)), Record)


def test_a_time_is_never_before_itself_in_a_name() -> None:
    assert milliseconds(1.0001) == 1001
    assert milliseconds(2.0) == 2000
    assert milliseconds(-5) == 1


def test_a_key_is_known_to_be_new_once() -> None:
    key = new_key()
    assert [use_key(key), use_key(key), use_key(KEY)] == [True, False, False]


def test_of_very_many_keys_that_were_never_used_the_last_ones_are_known_to_be_new() -> None:
    keys = [new_key() for _ in range(20_000)]
    assert not use_key(keys[0])
    assert use_key(keys[-1])


def test_a_derived_key_is_told_from_others() -> None:
    parts = [derived_key(key, number) for key in (new_key(), "of-a-stranger", "1.M2P3Q4") for number in (0, 12)]
    assert all(is_derived(part) and is_derived(derived_key(part, 3)) for part in parts)
    assert not any(is_derived(key) for key in (new_key(), KEY, "1.M2P3Q4.R2.example", "of-a-stranger", "R3"))
