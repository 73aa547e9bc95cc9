"""The names of files in a maildir queue, and the line that we put in front of a message. Version 1.

    1244080328.M408474P3147Q4.mycomputer.local,S=812,LQ=1b96d1f2t1244080400000o1e1:2,S
    |------------------ key -----------------| |   | |  |            ours        | |
                                             others' version b=length of our line  flags of mail programs

Rules:

1. A name begins with the key; fields follow, each behind a comma; `:2,` and flags end it. Fields of other programs are
   kept as they are. Ours is `LQ=`, a version, then letters with numbers; those that are zero are left out.
   b: length of our line, d: deliveries, f: failures, t: due (ms since the epoch), o: has a target, e: a report lies
   beside, k: mark of a claim, c: number of a commit, p: priority, x: expires (ms since the epoch), q: is unique, r:
   taken by a tool (1 from the ready, 2 the delayed, 3 the dead, 4 the archive), and goes back there.
2. No `LQ=`: a stranger's file, and all of it is the message. A version that we do not know: left untouched.
3. What must be known about a message stands in one line of ASCII JSON in front of it, and the *name* tells how long
   that line is. A header that looks like ours inside a message is only a header: nobody can forge a record by mail.
4. Letters that other programs look for (`S` `W` of dovecot and courier, `U` `FMD5` of mbsync and offlineimap) are
   never used for a field.
"""

from __future__ import annotations

import json
import os
import re
from typing import NamedTuple

import msgspec

from lamsonq.jobs import Job
from lamsonq.keys import new_key
from lamsonq.records import make_ready
from lamsonq.trace import trace_block

VERSION = 1
PREFIX = b"X-Lamsonq-Job: "
NAME_MAX = 255
"""Bytes that a file name may have on every local file system of Linux."""

_OURS_MAX = 124  # our field with every number at its longest, and the flags that a mail program may add
_NEWER = re.compile(r",LQ=(?!1(?![0-9]))[0-9]")
_BOUND = re.compile(r",LQ=1[a-z0-9]*o1")
_DUE = re.compile(r",LQ=1[a-z0-9]*?t([0-9]{1,15})")
_PRIORITY = re.compile(r",LQ=1[a-z0-9]*?p([0-9]{1,18})")
_FIELD = re.compile(r"LQ=1((?:[a-z][0-9]{1,18})*)")
_PAIR = re.compile(r"([a-z])([0-9]+)")
_TAGS = "bdftoekcpxqr"


class Name(NamedTuple):
    """What one file name says. `block` is the length of our line; `mark` keeps two files with one key apart; `commit`
    is the number of the settle whose puts are certain (lamsonq/backends/maildir_commit.py); `taken` is 1 and where in
    lamsonq.backends.maildir_files.TAKEN_FROM a tool has taken it."""

    key: str
    others: tuple[str, ...] = ()
    block: int = 0
    deliveries: int = 0
    failures: int = 0
    due: int = 0
    bound: int = 0
    errors: int = 0
    mark: int = 0
    commit: int = 0
    priority: int = 0
    expires: int = 0
    unique: int = 0
    taken: int = 0
    trouble: str = ""

    def text(self) -> str:
        """The file name, without flags."""
        head = ",".join((self.key, *self.others))
        pairs = zip(_TAGS[1:], self[3:14], strict=True)
        return f"{head},LQ={VERSION}b{self.block}" + "".join(f"{tag}{number}" for tag, number in pairs if number)


def parse_name(text: str) -> Name | None:
    """Read a file name; None when a newer version wrote it. A field that cannot be read is told in `trouble`."""
    if is_newer(text):
        return None
    key, *fields = text.partition(":2,")[0].split(",")
    ours = [field for field in fields if field.startswith("LQ=")]
    others = tuple(field for field in fields if not field.startswith("LQ=")) if ours else tuple(fields)
    if not ours:
        return Name(key, others)
    match = _FIELD.fullmatch(ours[0])
    numbers = {tag: int(digits) for tag, digits in _PAIR.findall(match[1])} if match else {}
    if match is None or len(ours) > 1 or not numbers.keys() <= set(_TAGS):
        return Name(key, others, trouble=f"its name has a field that cannot be read: {text!r}")
    return Name._make((key, others, *(numbers.get(tag, 0) for tag in _TAGS), ""))


def is_newer(text: str) -> bool:
    """Whether a newer version of lamsonq has written this name."""
    return ",LQ=" in text and _NEWER.search(text) is not None


def is_deleted(text: str) -> bool:
    """Whether somebody has marked the file as deleted in a mail program (flag T)."""
    return ":2," in text and "T" in text.rpartition(":2,")[2]


def is_bound(text: str) -> bool:
    """Whether the job in this file has a target."""
    return _BOUND.search(text) is not None


def due_of(text: str) -> int:
    """When the delayed job in this file is due, in milliseconds since the epoch; 0 when the name does not tell."""
    match = _DUE.search(text)
    return int(match[1]) if match else 0


def priority_of(text: str) -> int:
    """How urgent the job in this file is; 0, the most urgent, when the name does not tell."""
    begin = text.find(",LQ=1")
    if begin < 0 or text.find("p", begin) < 0:  # nearly all, and every look at a directory asks for every name
        return 0
    match = _PRIORITY.search(text, begin)
    return int(match[1]) if match else 0


def key_of(text: str) -> str:
    """The key in a file's name."""
    return text.partition(":2,")[0].partition(",")[0]


def fitted(name: Name) -> Name:
    """The same name, or one with a key of our own where this one would not fit into a file system."""
    size = len(os.fsencode(",".join((name.key, *name.others)))) + _OURS_MAX
    usable = name.key and not name.key.startswith(".") and not any(sign in name.key for sign in "/,\0")
    return name if usable and ":2," not in name.key and size <= NAME_MAX else name._replace(key=new_key(), others=())


class Record(msgspec.Struct, omit_defaults=True):
    """What stands in our line. A field that is missing has its default; one that is unknown is passed over."""

    sender: str | None = None
    recipients: tuple[str, ...] = ()
    peer: str | None = None
    target: str | None = None
    received: float = 0.0
    metadata: dict[str, str] = {}
    unique: str | None = None


make_ready(Record)


def encode_block(job: Job, received: float) -> bytes:
    """What stands in front of a message, for a job that was received at this time: the line with its record, and the
    trace fields, so that other programs show them."""
    record = Record(job.sender, job.recipients, job.peer, job.target, received, dict(job.metadata), job.unique)
    # json, not msgspec, because it writes ASCII and does not refuse the surrogates of undecodable bytes.
    line = PREFIX + json.dumps(msgspec.to_builtins(record), separators=(",", ":")).encode("ascii") + b"\n"
    return line + trace_block(job.sender, job.recipients, job.metadata)


def decode_block(block: bytes, length: int) -> Record:
    """Read the line; `length` is what the name said. Raises ValueError with a reason."""
    if len(block) < length:
        raise ValueError(f"the file ends within its job record ({len(block)} of {length} bytes)")
    line, end, _ = block.partition(b"\n")
    if not block.startswith(PREFIX) or not end or not block.endswith(b"\n"):
        raise ValueError(f"the first {length} bytes of the file are no job record")
    try:
        return msgspec.convert(json.loads(line[len(PREFIX) :]), Record)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the job record cannot be read: {error}") from error
