"""The verbs of `lamsonq queue`, from outside, on every backend: what they show, change, refuse and leave alone."""

from __future__ import annotations

import base64
import itertools
import json
import os
import pty
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lamsonq.commands.queues import VERBS, opened
from lamsonq.errors import Dead, Later
from lamsonq.jobs import KEPT, Job, Put
from lamsonq.queue import Queue
from lamsonq.reports import entries

from .cli import ENVIRON, lamsonq, refused

_numbers = itertools.count(1)
BODY = b"From: joe@example.com\r\nSubject: hello\r\n there\r\n\r\nbody\r\n"


@pytest.fixture(params=["maildir", "sqlite", "memory"])
def url(request: pytest.FixtureRequest, here: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a queue that does not exist yet."""
    monkeypatch.setattr(opened, "refuse_private", lambda _: None)  # the commands run in this process
    names = {"maildir": "run/posts", "sqlite": "sqlite:run/q.db?queue=posts", "memory": f"memory:verbs{next(_numbers)}"}
    return names[str(request.param)]


@pytest.fixture
def queue(url: str) -> Queue:
    """That queue, with nothing in it."""
    made = Queue(url)
    made.remove(made.push("makes the queue"))
    return made


def put(queue: Queue, body: bytes = BODY, outcome: Any = None, **fields: Any) -> str:
    """One job in the queue; its key."""
    store = queue.backend
    fields = {"received": time.time(), **fields}
    job = Job(key=store.new_key(), body=body, **fields)
    assert store.put([Put(store, job, outcome)]) == [True]
    return job.key


def told(*args: str, code: int = 0) -> dict[str, Any]:
    """What a verb prints as JSON."""
    found: dict[str, Any] = json.loads(lamsonq(*args, "--json", code=code).stdout)
    return found


# ---- looking ---------------------------------------------------------------------------------------------------


def test_ls_lists_one_state_in_its_order(queue: Queue) -> None:
    later = put(queue, priority=5, sender="", recipients=("desk@example.com", "b@example.com"))
    first = put(queue, target="app.handlers.index.START", sender="joe@example.com", received=time.time() - 7200)
    put(queue, outcome=Dead("no"))
    found = told("queue", "ls", queue.dir)
    assert (found["queue"], found["state"], found["total"]) == (queue.dir, "ready", 2)
    assert [job["key"] for job in found["jobs"]] == [first, later]
    assert found["jobs"][0]["target"] == "app.handlers.index.START"
    assert 7200 <= found["jobs"][0]["age"] < 7300
    assert found["jobs"][1]["recipients"] == ["desk@example.com", "b@example.com"]
    assert [job["sender"] for job in found["jobs"]] == ["joe@example.com", ""]
    one, two = lamsonq("queue", "ls", queue.dir).stdout.splitlines()
    assert one.split("  ")[0] == first
    assert "2h  priority 0  attempts 0  app.handlers.index.START  <joe@example.com> -> -" in one
    assert two.endswith("priority 5  attempts 0  by address  <> -> desk@example.com, b@example.com")


def test_ls_shows_each_state_and_no_more_than_asked_for(queue: Queue) -> None:
    keys = [put(queue, outcome=Dead("no"), attempts=3) for _ in range(3)]
    delayed = put(queue, due=time.time() + 3600)
    put(queue, outcome=KEPT)
    assert [job["key"] for job in told("queue", "ls", queue.dir, "-state", "dead")["jobs"]] == keys
    assert [job["attempts"] for job in told("queue", "ls", queue.dir, "-state", "dead", "-limit", "0")["jobs"]] == [
        3,
        3,
        3,
    ]
    assert [job["key"] for job in told("queue", "ls", queue.dir, "--state", "delayed")["jobs"]] == [delayed]
    assert "  due in 59m  " in lamsonq("queue", "ls", queue.dir, "-state", "delayed").stdout
    assert told("queue", "ls", queue.dir, "-state", "done")["total"] == 1
    short = lamsonq("queue", "ls", queue.dir, "-state", "dead", "-limit", "2")
    assert len(short.stdout.splitlines()) == 2
    assert short.stderr == "... and 1 more: -limit 0 shows all\n"


def test_ls_of_a_state_that_nothing_is_in_says_where_something_is(queue: Queue) -> None:
    assert lamsonq("queue", "ls", queue.dir, "-state", "dead").stderr == ""
    put(queue, outcome=Dead("no"))
    put(queue, due=time.time() + 3600)
    empty = lamsonq("queue", "ls", queue.dir)
    assert empty.stdout == ""
    assert empty.stderr == "nothing is ready; there are 1 delayed (-state delayed), 1 dead (-state dead)\n"


def test_what_is_being_worked_is_listed_as_reserved(queue: Queue) -> None:
    key = put(queue)
    [job] = queue.backend.reserve(1)
    assert [job["key"] for job in told("queue", "ls", queue.dir, "-state", "reserved")["jobs"]] == [key]
    queue.backend.touch(job)


def test_a_state_that_is_none_is_refused(queue: Queue) -> None:
    assert "'ready', 'delayed', 'reserved', 'dead', 'done'" in refused("queue", "ls", queue.dir, "-state", "x", code=2)


def test_a_stranger_writes_nothing_to_the_terminal(queue: Queue) -> None:
    key = put(queue, b"Subject: \x1b[2J\n\nx", sender="a\x1b[2Jb@example.com", outcome=Dead("red \x1b[31m"))
    for args in (("ls", queue.dir, "-state", "dead"), ("show", queue.dir, key), ("dead", queue.dir)):
        assert "\x1b" not in lamsonq("queue", *args).stdout


def test_show_tells_record_headers_and_failures(queue: Queue) -> None:
    key = put(queue, sender="joe@example.com", recipients=("desk@example.com",), metadata={"trace": "1"}, priority=2)
    [job] = queue.backend.reserve(1)
    try:
        raise ValueError("no post 12")
    except ValueError as error:
        dead = Dead("ValueError: no post 12")
        dead.__cause__ = error
    queue.backend.settle(job, dead)
    text = lamsonq("queue", "show", queue.dir, key).stdout
    assert "state:      dead\n" in text
    assert "recipients: desk@example.com\n" in text
    assert "metadata:   trace=1\n" in text
    assert "\nSubject: hello there\n" in text
    assert " attempt 1: ValueError: no post 12 [" in text
    assert 'raise ValueError("no post 12")' in text
    found = told("queue", "show", queue.dir, key)
    assert {"state": "dead", "sender": "joe@example.com", "priority": 2, "attempts": 1}.items() <= found.items()
    assert found["headers"] == [["From", "joe@example.com"], ["Subject", "hello there"]]
    [failure] = found["failures"]
    assert (failure["attempt"], failure["reason"]) == (1, "ValueError: no post 12")
    assert "body" not in found


def test_show_prints_the_message_byte_for_byte(here: Path) -> None:
    queue = Queue("run/posts")
    key = put(queue, b"Subject: \xe4\n\n\xff\x00\r\n")
    command = [sys.executable, "-m", "lamsonq", "queue", "show", "run/posts", key, "-body"]
    shown = subprocess.run(command, env=ENVIRON, capture_output=True, check=True, timeout=30)
    assert shown.stdout == b"Subject: \xe4\n\n\xff\x00\r\n"
    assert base64.b64decode(told("queue", "show", "run/posts", key, "-body")["body_base64"]) == shown.stdout


def test_a_key_that_is_not_there_is_one_line(queue: Queue) -> None:
    assert refused("queue", "show", queue.dir, "nobody") == f"ERROR: queue {queue.dir} has no message 'nobody'"


def test_stats_count_and_tell_of_servers(queue: Queue) -> None:
    put(queue, received=time.time() - 90)
    put(queue, outcome=Dead("no"))
    put(queue)
    queue.backend.reserve(1)
    queue.backend.pause()
    Path("pids").mkdir()
    Path("pids/smtp.pid").write_text("4711\n")
    found = told("queue", "stats", queue.dir, "-run", "pids")
    assert {"ready": 1, "reserved": 1, "dead": 1, "delayed": 0, "done": 0, "paused": True}.items() <= found.items()
    assert found["oldest"] < 60
    assert [(server["pid_file"], server["running"]) for server in found["servers"]] == [("pids/smtp.pid", False)]
    text = lamsonq("queue", "stats", queue.dir, "-run", "pids").stdout
    assert text.startswith(f"queue:    {queue.dir} (paused)\nready:    1, the oldest ")
    assert "reserved: 1 (in flight)\n" in text
    assert text.endswith("pids/smtp.pid: not running\n")


def test_export_prints_everything_and_takes_nothing_out(queue: Queue) -> None:
    plain = put(queue, "Subject: ü\n\nx\n".encode(), sender="joe@example.com", metadata={"a": "b"}, unique="u")
    binary = put(queue, b"\xff\x00", outcome=Dead("why not"), attempts=2)
    lines = [json.loads(line) for line in lamsonq("queue", "export", queue.dir).stdout.splitlines()]
    assert [(line["key"], line["state"], line["version"]) for line in lines] == [
        (plain, "ready", 1),
        (binary, "dead", 1),
    ]
    assert (lines[0]["body"], lines[0]["metadata"], lines[0]["unique"]) == ("Subject: ü\n\nx\n", {"a": "b"}, "u")
    assert base64.b64decode(lines[1]["body_base64"]) == b"\xff\x00"
    assert "why not" in lines[1]["report"]
    only = lamsonq("queue", "export", queue.dir, "-state", "dead", "-json").stdout.splitlines()
    assert [json.loads(line)["key"] for line in only] == [binary]
    assert sum(queue.backend.counts().values()) == 2


# ---- dead letters ----------------------------------------------------------------------------------------------


def test_dead_letters_come_in_groups_that_failed_alike(queue: Queue) -> None:
    alike = [put(queue, outcome=Dead(f"no post {number}"), target="app.jobs.index") for number in (1, 22)]
    other = put(queue, outcome=Dead("the disk is full"))
    groups = told("queue", "dead", queue.dir)["groups"]
    assert [(group["count"], sorted(group["keys"])) for group in groups] == [(2, sorted(alike)), (1, [other])]
    assert groups[0]["target"] == "app.jobs.index"
    assert groups[0]["first"] <= groups[0]["last"]
    large, small = lamsonq("queue", "dead", queue.dir).stdout.splitlines()
    assert large.startswith(groups[0]["fingerprint"])
    assert large.endswith(("app.jobs.index  no post 1", "app.jobs.index  no post 22"))
    assert small.endswith("by address  the disk is full")
    fingerprint = groups[0]["fingerprint"]
    keys = lamsonq("queue", "dead", queue.dir, "-fingerprint", fingerprint, "-keys").stdout.split()
    assert sorted(keys) == sorted(alike)
    assert "those there are" in refused("queue", "dead", queue.dir, "-fingerprint", "000")


def test_retry_makes_those_of_one_kind_ready(queue: Queue) -> None:
    alike = [put(queue, outcome=Dead(f"no post {number}"), attempts=4) for number in (1, 22)]
    other = put(queue, outcome=Dead("the disk is full"))
    fingerprint = told("queue", "dead", queue.dir)["groups"][0]["fingerprint"]
    assert sorted(told("queue", "retry", queue.dir, "-fingerprint", fingerprint)["retried"]) == sorted(alike)
    assert sorted(queue.keys()) == sorted(alike)
    assert [job["attempts"] for job in told("queue", "ls", queue.dir)["jobs"]] == [0, 0]
    assert lamsonq("queue", "retry", queue.dir, other).stdout == f"retried 1 of {queue.dir}\n"
    put(queue, outcome=Dead("again"))
    assert lamsonq("queue", "retry", queue.dir, "-all").stdout == f"retried 1 of {queue.dir}\n"
    assert queue.backend.counts()["dead"] == 0


def test_retry_does_what_it_can_and_names_the_rest(queue: Queue) -> None:
    ready, dead = put(queue), put(queue, outcome=Dead("no"))
    done = lamsonq("queue", "retry", queue.dir, ready, dead, "nobody", code=1)
    assert done.stdout == f"retried 1 of {queue.dir}\n"
    assert done.stderr.splitlines() == [
        f"{ready} was not retried: it is ready",
        f"nobody was not retried: {queue.dir} has no such message",
    ]
    assert sorted(queue.keys()) == sorted([ready, dead])


def test_what_is_retried_is_named_in_one_way(queue: Queue) -> None:
    for args in ([], ["key", "-all"], ["-all", "-fingerprint", "f"]):
        line = refused("queue", "retry", queue.dir, *args, code=2)
        assert "Give dead letters in one way: their keys, or -fingerprint F, or -all." in line


def test_bury_makes_a_dead_letter_with_its_reason(queue: Queue) -> None:
    ready, delayed, taken = put(queue, priority=1), put(queue, due=time.time() + 60), put(queue)
    [job] = queue.backend.reserve(1)
    assert job.key == taken
    assert told("queue", "bury", queue.dir, ready, delayed, "-reason", "a loop")["buried"] == [ready, delayed]
    assert "a loop" in queue.backend.report(ready)
    line = refused("queue", "bury", queue.dir, taken)
    assert line.startswith(f"{taken} was not buried: it is being worked")
    queue.backend.touch(job)
    assert "`retry` makes it ready" in refused("queue", "bury", queue.dir, ready)
    assert queue.backend.counts()["dead"] == 2


# ---- hurrying, deleting, holding up ----------------------------------------------------------------------------


def test_kick_makes_delayed_messages_ready(queue: Queue) -> None:
    first, second, third = (put(queue, due=time.time() + 3600) for _ in range(3))
    dead = put(queue, outcome=Dead("no"))
    assert told("queue", "kick", queue.dir, first)["kicked"] == [first]
    assert refused("queue", "kick", queue.dir, dead).endswith("it is a dead letter: `retry` makes it ready")
    assert lamsonq("queue", "kick", queue.dir, "-all").stdout == f"kicked 2 of {queue.dir}\n"
    assert sorted(queue.keys()) == sorted([first, second, third])
    assert "in one way: their keys, or -all." in refused("queue", "kick", queue.dir, code=2)


def test_purge_deletes_one_state_and_nothing_else(queue: Queue) -> None:
    put(queue, outcome=Dead("no"))
    ready = put(queue)
    assert told("queue", "purge", queue.dir, "-state", "dead", "-older", "1h", "-yes")["purged"] == 0
    line = refused("queue", "purge", queue.dir, "-state", "dead")
    assert line == "ERROR: nothing was deleted: give -yes where nobody can be asked"
    assert queue.backend.counts()["dead"] == 1
    assert lamsonq("queue", "purge", queue.dir, "-state", "dead", "-y").stdout == f"purged 1 dead of {queue.dir}\n"
    assert queue.keys() == [ready]


def test_purge_counts_back_from_now(queue: Queue) -> None:
    put(queue, outcome=Dead("no"))
    time.sleep(0.05)
    assert told("queue", "purge", queue.dir, "-state", "dead", "-older", "0.01s", "--yes")["purged"] == 1
    assert "write 90s, 15m, 12h, 7d or 2w" in refused(
        "queue", "purge", queue.dir, "-state", "dead", "-older", "7", code=2
    )


@pytest.mark.parametrize(("answer", "left"), [("n", 1), ("y", 0)])
def test_purge_asks_at_a_terminal(here: Path, answer: str, left: int) -> None:
    queue = Queue("run/posts")
    put(queue, outcome=Dead("no"))
    parent, child = pty.openpty()
    command = [sys.executable, "-m", "lamsonq", "queue", "purge", "run/posts", "-state", "dead"]
    os.write(parent, answer.encode() + b"\n")
    done = subprocess.run(command, env=ENVIRON, stdin=child, capture_output=True, text=True, timeout=30, check=False)
    os.close(parent)
    os.close(child)
    assert "Delete all dead messages of run/posts (it has 1 dead)? [y/N]" in done.stderr
    assert (done.returncode, queue.backend.counts()["dead"]) == (left, left)


def test_a_paused_queue_gives_nothing_out_until_it_is_resumed(queue: Queue) -> None:
    key = put(queue)
    assert lamsonq("queue", "pause", queue.dir).stdout == f"{queue.dir} is paused\n"
    assert told("queue", "pause", queue.dir) == {"queue": queue.dir, "paused": True}
    assert queue.backend.reserve(1) == []
    assert told("queue", "resume", queue.dir) == {"queue": queue.dir, "paused": False}
    assert [job.key for job in queue.backend.reserve(1)] == [key]


def test_every_verb_prints_json_in_both_spellings(queue: Queue) -> None:
    key = put(queue, outcome=Dead("no"))
    lines = [
        ["queue", "ls", queue.dir, "-json"],
        ["queue", "show", queue.dir, key, "-json"],
        ["queue", "stats", queue.dir, "-json"],
        ["queue", "dead", queue.dir, "-json"],
        ["queue", "export", queue.dir, "-json"],
        ["queue", "retry", queue.dir, key, "-json"],
        ["queue", "bury", queue.dir, key, "-json"],
        ["queue", "kick", queue.dir, "-all", "-json"],
        ["queue", "purge", queue.dir, "-state", "done", "-yes", "-json"],
        ["queue", "pause", queue.dir, "-json"],
        ["queue", "resume", queue.dir, "-json"],
        ["queue", "move", queue.dir, "run/other", "-json"],
    ]
    assert {line[1] for line in lines} == set(VERBS)
    for line in lines:
        found = json.loads(lamsonq(*line).stdout)
        assert found.get("queue", found.get("from")) == queue.dir
        assert isinstance(
            json.loads(lamsonq(*line[:-1], "--json", code=int(line[1] in ("retry", "bury"))).stdout), dict
        )
        if line[1] == "export":
            assert (found["key"], found["state"]) == (key, "dead")


# ---- what cannot be read ---------------------------------------------------------------------------------------


def test_what_cannot_be_read_is_shown_with_the_reason_and_stays_where_it_is(here: Path) -> None:
    store = Queue("sqlite:run/q.db").backend
    large = put(Queue("sqlite:run/q.db"), BODY + b"x" * 140_000, recipients=("joe@example.com",))
    [body] = Path("run/q.db-bodies").iterdir()
    body.unlink()
    with sqlite3.connect("run/q.db") as database:
        database.execute("insert into jobs (key, body, metadata) values ('odd', 'Subject: hello', '[')")
    assert told("queue", "ls", store.name)["jobs"][0]["trouble"].endswith("is gone")
    assert "It cannot be read: its row is not what" in lamsonq("queue", store.name, "-report", "odd").stdout
    assert store.reserve(9) == []
    reasons = {key: entries(store.report(key))[0].reason for key in store.keys("dead")}
    assert len(told("queue", "dead", store.name)["groups"]) == 2
    assert {job["key"]: job["trouble"] for job in told("queue", "ls", store.name, "-state", "dead")["jobs"]} == reasons
    shown = told("queue", "show", store.name, "odd", "-body")
    assert (shown["body"], shown["metadata"], shown["trouble"]) == ("Subject: hello", {}, reasons["odd"])
    assert "attempt 1: its body, " in lamsonq("queue", store.name, "-report", large).stdout
    exported = [json.loads(line) for line in lamsonq("queue", "export", store.name).stdout.splitlines()]
    assert [(each["key"], each["recipients"]) for each in exported] == [(large, ["joe@example.com"]), ("odd", [])]
    lamsonq("queue", "move", store.name, "run/elsewhere")
    assert store.keys("dead") == [large, "odd"]


# ---- which queue -----------------------------------------------------------------------------------------------

NEEDED = {"show": ["key"], "retry": ["-all"], "bury": ["key"], "kick": ["-all"], "move": ["run/other"]}
NEEDED["purge"] = ["-state", "dead", "-yes"]


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", ["run/psots", "sqlite:run/psots.db?queue=posts"])
def test_a_slip_in_the_name_makes_no_queue(here: Path, verb: str, name: str) -> None:
    assert refused("queue", verb, name, *NEEDED.get(verb, [])).startswith("ERROR: there is no ")
    assert list(here.iterdir()) == []


def test_a_slip_in_the_name_is_told_what_was_meant(here: Path) -> None:
    put(Queue("run/posts"))
    assert refused("queue", "ls", "run/psots") == "ERROR: there is no queue run/psots: did you mean run/posts?"


def test_a_queue_that_a_database_does_not_have_is_named_with_those_it_has(here: Path) -> None:
    put(Queue("sqlite:run/q.db?queue=posts"))
    done = lamsonq("queue", "ls", "sqlite:run/q.db?queue=psots")
    assert done.stdout == ""
    assert done.stderr == "There is nothing in the queue psots of run/q.db; it has posts.\n"
    assert refused("queue", "-count", "-name", "sqlite:run/no.db") == (
        "ERROR: there is no run/no.db, and so no queue sqlite:run/no.db"
    )
    assert not Path("run/no.db").exists()


def test_another_file_is_no_queue(here: Path) -> None:
    Path("app").mkdir()
    Path("notes.db").write_text("notes")
    assert refused("queue", "ls", "app").startswith("ERROR: app is not a queue: a queue is a maildir")
    assert refused("queue", "ls", "sqlite:notes.db").startswith("ERROR: cannot read notes.db: file is not a database")


def test_a_verb_without_a_queue_says_so(here: Path) -> None:
    line = refused("queue", "ls", code=2)
    assert line == "ERROR: Give the queue, a directory or a URL.  Try lamsonq queue ls -h."


@pytest.mark.parametrize("words", [*([verb] for verb in VERBS if verb != "move"), ["-count", "-name"], ["-keys"]])
def test_a_queue_in_the_memory_of_another_process_is_refused(here: Path, words: list[str]) -> None:
    verb, name = words[0], f"memory:elsewhere{next(_numbers)}"
    assert refused("queue", *words, name, *NEEDED.get(verb, [])) == (
        f"ERROR: {name} cannot be reached from here: a queue in memory is in its own process"
    )


def test_a_verb_that_there_is_not_is_named_with_those_there_are(here: Path) -> None:
    put(Queue("run/posts"))
    verbs = ", ".join(VERBS)
    assert refused("queue", "bogus", "run/posts", code=2) == (
        f"ERROR: There is no verb 'bogus'. There are {verbs}.  Try lamsonq help -for queue."
    )
    line = refused("queue", "shwo", "run/posts", "-body", code=2)
    assert line.startswith("ERROR: There is no verb 'shwo': did you mean show? There are ls, ")


def test_a_queue_that_is_called_like_a_verb_is_written_with_its_directory(here: Path) -> None:
    key = put(Queue("ls"))
    assert lamsonq("queue", "./ls", "-keys").stdout.splitlines()[1:] == [key]
    assert lamsonq("queue", "-keys", "-name", "ls").stdout.splitlines()[1:] == [key]
    assert told("queue", "ls", "ls")["total"] == 1


def test_the_help_of_queue_lists_the_verbs_and_each_explains_itself(here: Path) -> None:
    text = lamsonq("queue", "-h").stdout
    for verb, command in VERBS.items():
        assert f"\n  {verb} " in text
        assert lamsonq("queue", verb, "-help").stdout.startswith(f"Usage: lamsonq queue {verb} [OPTIONS]")
        assert command.help


def test_delayed_by_a_failure_is_shown_with_its_report(queue: Queue) -> None:
    key = put(queue)
    [job] = queue.backend.reserve(1)
    queue.backend.settle(job, Later("try again", time.time() + 3600))
    found = told("queue", "show", queue.dir, key)
    assert (found["state"], found["failures"][0]["reason"]) == ("delayed", "try again")
