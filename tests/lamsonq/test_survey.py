"""Queues in SQLite files as status and fsck see them, beside those that are maildirs."""

from __future__ import annotations

import json
import os
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest

from lamsonq import databases, survey
from lamsonq.commands.queues.printed import columns
from lamsonq.errors import Dead, Later
from lamsonq.jobs import KEPT, Debounce, Job, Put
from lamsonq.queue import Queue
from lamsonq.tally import Totals

from .cli import lamsonq, refused


def put(url: str, body: bytes = b"x", outcome: Any = None, **fields: Any) -> str:
    store = Queue(url).backend
    job = Job(**{"key": store.new_key(), "body": body, "received": time.time(), **fields})
    store.put([Put(store, job, outcome)])
    return job.key


@pytest.fixture
def filled(here: Path) -> Path:
    """A maildir, and a file with two queues in all states; and databases of others."""
    put("run/posts")
    put("sqlite:run/q.db", received=time.time() - 100)
    put("sqlite:run/q.db")
    Queue("sqlite:run/q.db").backend.reserve(1)
    for outcome in (Dead("no"), Later("not yet", time.time() + 60), KEPT):
        put("sqlite:run/q.db?queue=b%20c", outcome=outcome, attempts=1)
    with sqlite3.connect("run/state.db") as other:
        other.execute("create table states (a)")
    Path("run/notes.db").write_text("SQLite format 3, they say")
    return here


def status() -> dict[str, dict[str, Any]]:
    queues: dict[str, dict[str, Any]] = json.loads(lamsonq("status", "-ALL", "run", "-json", code=1).stdout)["queues"]
    return queues


def test_status_counts_the_queues_in_databases_too(filled: Path) -> None:
    found = status()
    assert set(found) == {"run/posts", "sqlite:run/q.db?queue=jobs", "sqlite:run/q.db?queue=b%20c"}
    assert {"ready": 1, "reserved": 1, "dead": 0}.items() <= found["sqlite:run/q.db?queue=jobs"].items()
    assert found["sqlite:run/q.db?queue=jobs"]["oldest"] < 100
    assert {"ready": 0, "delayed": 1, "dead": 1, "done": 1}.items() <= found["sqlite:run/q.db?queue=b%20c"].items()
    assert found["sqlite:run/q.db?queue=b%20c"]["oldest"] is None


def test_status_has_a_line_for_each_queue_below_those_of_the_servers(filled: Path) -> None:
    told = lamsonq("status", code=1)
    assert told.stderr == "lamsonq not running.\n"
    assert [line.split(": ")[0] for line in told.stdout.splitlines()] == list(status())
    Path("run/smtp.pid").touch()
    [server, *queues] = lamsonq("status", "-ALL", "run", code=1).stdout.splitlines()
    assert server == "run/smtp.pid: lamsonq not running."
    assert len(queues) == len(status())


def test_the_lines_of_queues_stand_in_columns() -> None:
    waiting = {**survey.NOTHING, "ready": 1200, "dead": 7, "oldest": 190.0, "paused": True}
    empty = {**survey.NOTHING, "oldest": None, "paused": False}
    broken = {**survey.NOTHING, "oldest": None, "paused": None, "trouble": "it is locked"}
    assert columns({"run/posts": waiting, "sqlite:run/q.db?queue=jobs": empty, "run/\033": broken}) == [
        "run/posts:                   ready 1200  oldest   3m  delayed 0  reserved 0  dead 7  paused",
        "sqlite:run/q.db?queue=jobs:  ready    0  oldest    -  delayed 0  reserved 0  dead 0",
        "run/?:                       it is locked",
    ]
    assert columns({}) == []


def test_the_names_that_status_tells_open_the_queues(filled: Path) -> None:
    for name, counts in status().items():
        store = Queue(name).backend
        assert {state: counts[state] for state in survey.NOTHING} == store.counts()


def test_status_tells_which_queues_are_paused(filled: Path) -> None:
    assert {told["paused"] for told in status().values()} == {False}
    for name in ("run/posts", "sqlite:run/q.db?queue=jobs"):
        Queue(name).backend.pause()
    assert [name for name, told in status().items() if told["paused"]] == ["run/posts", "sqlite:run/q.db?queue=jobs"]


def test_a_queue_that_is_empty_is_listed_when_its_gates_remember_it(here: Path) -> None:
    store = Queue("sqlite:run/q.db?queue=debounced").backend
    key = store.new_key()
    store.put([Put(store, Job(key=key, body=b"x"), gate=Debounce("same", 60))])
    store.remove(key)
    assert list(status()) == ["sqlite:run/q.db?queue=debounced"]


def test_looking_changes_no_file_and_makes_none(filled: Path) -> None:
    Queue("sqlite:run/q.db").backend.close()
    Queue("sqlite:run/q.db?queue=b%20c").backend.close()

    def files() -> dict[str, int]:
        names = [path for path in Path("run").rglob("*") if path.is_file() and not path.name.endswith(("-shm", "-wal"))]
        return {str(path): path.stat().st_mtime_ns for path in names}

    before = files()
    status()
    lamsonq("fsck")
    assert files() == before


def test_a_database_of_a_newer_version_is_told_and_hides_no_other(filled: Path) -> None:
    with sqlite3.connect("run/q.db") as database:
        database.execute("update lamsonq set version = 99")
    found = status()
    assert "newer lamsonq (schema 99)" in found["sqlite:run/q.db"]["trouble"]
    assert found["run/posts"]["ready"] == 1
    report = json.loads(lamsonq("fsck", "-json", code=1).stdout)
    assert list(report["queues"]["sqlite:run/q.db"]["broken"]) == ["q.db"]


def test_counting_reads_no_table(filled: Path) -> None:
    database = sqlite3.connect("run/q.db")
    for places in databases._PLACES.values():
        for place in places:
            plan = database.execute(f"explain query plan select count(*) from jobs where queue = 'x' and {place}")
            assert all("COVERING INDEX" in row[3] or "USING INDEX" in row[3] for row in plan), place
    names = database.execute(f"explain query plan {databases._NAMES}").fetchall()
    assert not [row for row in names if row[3] == "SCAN jobs"]
    database.close()


def test_fsck_accounts_for_rows_and_their_bodies(here: Path) -> None:
    for number in (1, 2, 3):
        big = b"x" * 140_000 if number == 3 else b""
        body = b"Message-ID: <%d@x>\r\n\r\n" % number + big
        put("sqlite:run/q.db", body, recipients=("a@x.org", "b@x.org"))
    Path("accepted").write_text("<1@x> a@x.org\n<2@x>\n<3@x> b@x.org\n<3@x> c@x.org\n")
    done = lamsonq("fsck", "-accepted", "accepted", code=1).stdout
    assert done.splitlines() == [
        "sqlite:run/q.db?queue=jobs: ready 3, delayed 0, reserved 0, dead 0; left over: held 0, tmp 0; broken 0",
        "missing: <3@x> c@x.org",
        "Not all is accounted for.",
    ]
    [body_file] = Path("run/q.db-bodies").iterdir()
    body_file.unlink()
    report = json.loads(lamsonq("fsck", "-json", code=1).stdout)
    [reason] = report["queues"]["sqlite:run/q.db?queue=jobs"]["broken"].values()
    assert reason == f"its body {body_file.name} cannot be read: No such file or directory"


def test_fsck_names_a_row_that_is_no_job(here: Path) -> None:
    put("sqlite:run/q.db")
    with sqlite3.connect("run/q.db") as database:
        database.execute("insert into jobs (key, body, recipients) values ('odd', 'x', '{}')")
    report = json.loads(lamsonq("fsck", "-json", code=1).stdout)
    assert report["queues"]["sqlite:run/q.db?queue=jobs"]["broken"] == {"odd": "`recipients` is no JSON array of texts"}


def test_what_is_dead_because_it_cannot_be_read_is_accounted_for(here: Path) -> None:
    put("sqlite:run/q.db")
    with sqlite3.connect("run/q.db") as database:
        values = ("odd", "Message-ID: <1@x>\n\n", "{", "dead")
        database.execute("insert into jobs (key, body, recipients, state) values (?, ?, ?, ?)", values)
    Path("accepted").write_text("<1@x>\n")
    report = json.loads(lamsonq("fsck", "-json", "-accepted", "accepted").stdout)
    assert (report["good"], report["queues"]["sqlite:run/q.db?queue=jobs"]["broken"]) == (True, {})


def test_what_is_on_its_way_to_another_store_is_accounted_for(here: Path) -> None:
    put("sqlite:run/q.db")
    with sqlite3.connect("run/q.db") as database:
        job = json.dumps({"version": 1, "job": {"recipients": ["a@x.org"]}})
        database.execute(
            "insert into lamsonq_outgoing (worker, store, record, body) values ('w', 'run/lost', ?, ?)",
            (job.encode(), b"Message-ID: <9@x>\n\nhello"),
        )
    Path("accepted").write_text("<9@x> a@x.org\n")
    assert lamsonq("fsck", "-accepted", "accepted").stdout.splitlines() == [
        "sqlite:run/q.db?queue=jobs: ready 1, delayed 0, reserved 0, dead 0; left over: held 0, tmp 0; broken 0",
        "run/q.db: 1 on their way to other queues",
        "All is accounted for.",
    ]


def test_a_directory_that_is_none_is_refused(here: Path) -> None:
    assert refused("status", "-ALL", "nowhere", code=4).startswith("ERROR: nowhere is not a directory")
    assert survey.queues("nowhere") == {}
    assert survey.servers("nowhere") == []


def test_names_and_urls_belong_together() -> None:
    for path, queue in (("run/q.db", "jobs"), ("run/a b?.db", "x/y&z"), ("/abs/q.db", "é")):
        assert databases.parsed(databases.url_of(path, queue)) == (path, queue)
    assert databases.parsed("sqlite:///abs/q.db?queue=") == ("/abs/q.db", "jobs")


def test_a_file_that_cannot_be_opened_is_trouble(filled: Path) -> None:
    Queue("sqlite:run/q.db").backend.close()
    Queue("sqlite:run/q.db?queue=b%20c").backend.close()
    Path("run/q.db").write_bytes(os.urandom(4096))
    assert "is not a database" in status()["sqlite:run/q.db"]["trouble"]


def test_figures_that_the_disk_has_no_room_for_leave_no_half_file(tmp_path: Path) -> None:
    half = tmp_path / "smtp.status.tmp"
    half.symlink_to("/dev/full")
    totals = Totals(str(tmp_path / "smtp.status"))
    totals.write("config.boot", [], 1, 30)
    assert list(tmp_path.iterdir()) == []
    totals.write("config.boot", [], 1, 30)
    assert [path.name for path in tmp_path.iterdir()] == ["smtp.status"]
