"""The sqlite: queue beyond what every backend has to do: its file, other programs, the user's own transaction."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import multiprocessing
import os
import re
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lamsonq.backends import open_backend, sqlite_database
from lamsonq.backends.memory import Memory
from lamsonq.backends.sqlite import SQLite
from lamsonq.backends.sqlite_outgoing import write_down
from lamsonq.clock import replaced
from lamsonq.conformance import Clock, counted, drain, push, take
from lamsonq.errors import BrokerError, Dead, Later, LeaseLost, QueueError, SettingsError
from lamsonq.jobs import DELIVERIES_MAX, DONE, KEPT, Backend, Debounce, Job, Limit, Put, Tick
from lamsonq.reports import entries

from .waiting import PATIENCE, until

FORK = multiprocessing.get_context("fork")
LARGE = b"x" * 140_000


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def make(tmp_path: Path, clock: Clock) -> Iterator[Callable[..., SQLite]]:
    """`make("posts")` opens a queue of tmp_path/q.db, as a process would that has just started."""
    made: list[SQLite] = []

    def open_one(name: str = "posts", file: str = "q.db", now: Callable[[], float] = clock) -> SQLite:
        made.append(SQLite(f"sqlite:{tmp_path / file}?queue={name}", now=now))
        return made[-1]

    yield open_one
    for queue in made:
        queue.close()


@pytest.fixture
def queue(make: Callable[..., SQLite]) -> SQLite:
    queue = make()
    queue.release_stale()
    return queue


@pytest.fixture
def mine(queue: SQLite, tmp_path: Path) -> Iterator[sqlite3.Connection]:
    """The user's own connection to the file, with a table of his."""
    with contextlib.closing(sqlite3.connect(tmp_path / "q.db", timeout=0.2)) as connection:
        connection.execute("create table orders (number integer)")
        connection.commit()
        yield connection


def bodies(tmp_path: Path) -> list[str]:
    return sorted(os.listdir(tmp_path / "q.db-bodies"))


def put(queue: Backend, conn: object = None, **fields: Any) -> list[bool]:
    return queue.put([Put(queue, Job(**{"key": queue.new_key(), "body": b"", **fields}))], conn)


# -- the URL -----------------------------------------------------------------------------------------------------------


def test_a_url_names_the_file_and_the_queue(here: Path) -> None:
    one, two = open_backend("sqlite:run/q.db"), open_backend(f"sqlite://{here}/run/q.db?queue=jobs")
    push(one, b"hello")
    assert drain(two) == [b"hello"]
    assert (here / "run/q.db").exists()


def test_a_relative_path_is_taken_from_where_the_process_is(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    push(open_backend("sqlite:q.db"), b"here")
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    assert drain(open_backend("sqlite:q.db")) == []
    monkeypatch.chdir(here)
    assert drain(open_backend("sqlite:q.db")) == [b"here"]


def test_a_parameter_that_is_unknown_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(BrokerError, match=r"'sync'.* it knows: queue"):
        open_backend("sqlite:q.db?queue=a&sync=off")
    with pytest.raises(BrokerError, match="names no file"):
        open_backend("sqlite:?queue=a")
    with pytest.raises(BrokerError, match="names several"):
        open_backend("sqlite:q.db?queue=a&queue=b")
    with pytest.raises(SettingsError, match="maildir"):
        open_backend("sqlite:q.db", pop_limit=5)


# -- the file ----------------------------------------------------------------------------------------------------------


def test_any_program_puts_a_job_with_one_insert(queue: SQLite, tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "q.db")) as other:
        for number in range(30):
            insert = "insert into jobs (queue, target, body) values ('posts', 'send_email', ?)"
            other.execute(insert, (f'{{"to": "{number}"}}',))
        other.commit()
    before = time.time()
    jobs = queue.reserve(100)
    assert [job.body for job in jobs] == [b'{"to": "%d"}' % number for number in range(30)]
    assert {(job.target, job.sender, job.recipients, job.priority) for job in jobs} == {("send_email", None, (), 0)}
    assert all(abs(job.received - before) < PATIENCE for job in jobs)
    queue.settle(jobs[0], DONE, [Put(queue, Job(key=queue.new_key(), body=b""))])


def test_keys_of_other_programs_stand_among_ours_in_the_order_of_arrival(queue: SQLite, tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "q.db", isolation_level=None)) as other:
        for number in range(3):
            push(queue, b"%d ours" % number)
            time.sleep(0.005)
            other.execute("insert into jobs (queue, body) values ('posts', ?)", (f"{number} theirs",))
            time.sleep(0.005)
    assert drain(queue) == [b"0 ours", b"0 theirs", b"1 ours", b"1 theirs", b"2 ours", b"2 theirs"]


def test_a_waiting_worker_hears_of_such_an_insert(make: Callable[..., SQLite], tmp_path: Path) -> None:
    queue = make(now=time.time)
    assert queue.reserve(1) == []
    with contextlib.closing(sqlite3.connect(tmp_path / "q.db", check_same_thread=False)) as other:

        def insert() -> None:
            other.execute("insert into jobs (queue, body) values ('posts', 'hello')")
            other.commit()

        timer = threading.Timer(0.1, insert)
        timer.start()
        begun = time.monotonic()
        assert [job.body for job in queue.reserve(1, wait=PATIENCE)] == [b"hello"]
        assert time.monotonic() - begun < PATIENCE / 2
        timer.join()


def test_what_another_program_puts_for_later_waits(queue: SQLite, tmp_path: Path, clock: Clock) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "q.db")) as other:
        other.execute("insert into jobs (queue, body, due) values ('posts', 'x', ?)", (clock.now + 10,))
        other.commit()
    assert (queue.reserve(1), counted(queue)) == ([], {"delayed": 1})
    clock.now += 11
    assert take(queue).body == b"x"


def test_what_another_program_puts_as_delayed_without_a_moment_is_ready(queue: SQLite, tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "q.db")) as other:
        other.execute("insert into jobs (queue, state, body) values ('posts', 'delayed', 'x')")
        other.commit()
    [key] = queue.keys()
    assert (counted(queue), queue.state(key)) == ({"ready": 1}, "ready")
    assert drain(queue) == [b"x"]


def test_a_count_of_deliveries_below_zero_is_refused_where_it_is_put(queue: SQLite, tmp_path: Path) -> None:
    queue.counts()
    other = sqlite3.connect(tmp_path / "q.db")
    with contextlib.closing(other), pytest.raises(sqlite3.IntegrityError, match="deliveries >= 0"):
        other.execute("insert into jobs (queue, deliveries, body) values ('posts', -1, 'x')")


def test_a_table_that_somebody_has_dropped_is_told_with_what_to_do(queue: SQLite, tmp_path: Path) -> None:
    queue.counts()
    with contextlib.closing(sqlite3.connect(tmp_path / "q.db")) as other:
        other.execute("drop table jobs")
        other.commit()
    with pytest.raises(QueueError, match=r"no such table: jobs; .* restore them, or move the file away"):
        queue.reserve(1)


def test_a_row_that_is_no_job_becomes_a_dead_letter_and_stops_nothing(queue: SQLite, tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "q.db")) as other:
        for column, value in [("metadata", "{"), ("metadata", "[]"), ("recipients", '{"a": 1}')]:
            other.execute(f"insert into jobs (queue, {column}, body) values ('posts', ?, 'bad')", (value,))
        other.execute("insert into jobs (queue, file) values ('posts', '../../etc/passwd')")
        other.execute("insert into jobs (queue, body) values ('posts', 'good')")
        other.commit()
    assert drain(queue) == [b"good"]
    dead = queue.keys("dead")
    reasons = [entries(queue.report(key))[-1].reason for key in dead]
    assert [reason.split(":")[0] for reason in reasons[:3]] == ["its row is not what a job's is"] * 3
    assert "is gone" in reasons[3]


@pytest.mark.parametrize(
    ("columns", "values"),
    [
        ("metadata", '{"a":' * 50_000),
        ("recipients", "[" * 100_000),
        ("key", b"\xff\xfe"),
        ("sender", b"\xff"),
        ("file", ""),
        ("file", ".."),
        ("file", "x" * 300),
        ("deliveries", 2**63 - 1),
        ("attempts, metadata", (2**63 - 1, "junk")),
    ],
)
def test_whatever_stands_in_a_row_the_jobs_behind_it_are_handed_out(
    queue: SQLite, tmp_path: Path, columns: str, values: Any
) -> None:
    values = values if isinstance(values, tuple) else (values,)
    with contextlib.closing(sqlite3.connect(tmp_path / "q.db")) as other, other:
        marks = ", ".join("?" * len(values))
        other.execute(f"insert into jobs (queue, {columns}, body) values ('posts', {marks}, 'bad')", values)
    push(queue, b"good")
    handed_out = []
    while jobs := queue.reserve(9):
        for job in jobs:
            handed_out.append(job.body)
            queue.settle(job, Dead() if job.body == b"bad" else DONE)
    assert b"good" in handed_out
    assert counted(queue) == {"dead": 1}
    [key] = queue.keys("dead")
    assert isinstance(key, str)


def test_a_number_as_a_key_stands_among_texts_also_where_a_worker_has_died(queue: SQLite, tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "q.db")) as other, other:
        other.execute("insert into jobs (queue, key, body) values ('posts', 7, 'number')")
        other.execute("insert into jobs (queue, key, body, deliveries) values ('posts', 'k', 'text', 1)")
    assert [job.body for job in queue.reserve(9)] == [b"number", b"text"]


def test_a_claim_whose_token_another_program_has_written_goes_back(queue: SQLite, tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "q.db")) as other, other:
        token = "1.abcd/1:nonsense.4"
        other.execute("insert into jobs (queue, state, token, body) values ('posts', 'reserved', ?, 'x')", (token,))
    assert queue.release_stale() == 1
    assert counted(queue) == {"ready": 1}


def test_the_job_whose_body_cannot_be_read_can_still_be_looked_at(queue: SQLite, tmp_path: Path) -> None:
    push(queue, LARGE)
    [name] = bodies(tmp_path)
    (tmp_path / "q.db-bodies" / name).unlink()
    (tmp_path / "q.db-bodies" / name).mkdir()
    [key] = queue.keys()
    assert "cannot be read: Is a directory" in queue.get(key).trouble  # type: ignore[union-attr]
    assert queue.reserve(1) == []
    assert counted(queue) == {"dead": 1}


def test_a_wrong_value_fails_where_it_is_put(queue: SQLite, tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "q.db")) as other:
        for column, value in [("priority", "high"), ("priority", -1), ("state", "new"), ("due", "tomorrow")]:
            with pytest.raises(sqlite3.IntegrityError):
                other.execute(f"insert into jobs (queue, {column}) values ('posts', ?)", (value,))


def test_text_that_is_no_unicode_comes_back_as_it_was(queue: SQLite) -> None:
    odd = "a\udcff@b.example"
    fields: dict[str, Any] = {"sender": odd, "recipients": (odd,), "peer": odd, "target": odd, "unique": odd}
    key = push(queue, key="k\udcff", **fields)
    assert not put(queue, unique=odd)[0]
    [job] = queue.reserve(1, only={odd})
    assert (job.key, key) == ("k\udcff", "k\udcff")
    assert {name: getattr(job, name) for name in fields} == fields
    queue.settle(job, Dead(f"no {odd}"))
    assert (queue.state(key), queue.keys("dead")) == ("dead", [key])
    assert "no a\\udcff@b.example" in queue.report(key)


def test_the_file_of_a_newer_version_is_left_untouched(queue: SQLite, tmp_path: Path) -> None:
    queue.close()
    with contextlib.closing(sqlite3.connect(tmp_path / "q.db")) as newer:
        newer.execute("update lamsonq set version = 2")
        newer.commit()
    before = (tmp_path / "q.db").read_bytes()
    with pytest.raises(QueueError, match=r"newer lamsonq \(schema 2\); it is left untouched"):
        push(SQLite(queue.name))
    assert (tmp_path / "q.db").read_bytes() == before


def test_a_table_of_somebody_else_is_not_taken_for_ours(tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "q.db")) as other:
        other.execute("create table jobs (title text)")
        other.commit()
    with pytest.raises(QueueError, match="has a table `jobs` that is not lamsonq's"):
        push(SQLite(f"sqlite:{tmp_path}/q.db"))


def test_a_file_of_version_1_is_read(tmp_path: Path) -> None:
    script = Path(__file__).parent / "samples" / "queue-1.sql"
    with contextlib.closing(sqlite3.connect(tmp_path / "q.db", isolation_level=None)) as sample:
        sample.executescript(script.read_text())
    queue = SQLite(f"sqlite:{tmp_path}/q.db?queue=posts", now=lambda: 1_700_000_100.0)
    assert queue.counts() == {"ready": 4, "delayed": 1, "reserved": 1, "dead": 1, "done": 1}
    assert queue.release_stale() == 1
    jobs = queue.reserve(9)
    assert [job.body for job in jobs] == [b"urgent", b"first", b"parked", b"claimed", b""]
    assert [job.deliveries for job in jobs] == [0, 0, 0, 1, 0]
    assert jobs[1].sender == "a@example.org"
    assert (jobs[1].recipients, jobs[1].metadata) == (("b@example.org", "ü@example.org"), {"k": "v"})
    [dead] = queue.keys("dead")
    assert [(entry.attempt, entry.reason) for entry in entries(queue.report(dead))] == [(1, "no such list")]
    assert put(queue, unique="u") == [False]
    assert queue.put([Put(queue, Job(key="t", body=b""), gate=Tick("cron", 100.0))]) == [False]
    assert put(SQLite(f"sqlite:{tmp_path}/q.db?queue=paused"), unique="u") == [True]
    assert SQLite(f"sqlite:{tmp_path}/q.db?queue=paused").paused()
    queue.close()


def test_a_file_that_was_removed_while_it_was_open_is_made_anew(queue: SQLite, tmp_path: Path) -> None:
    push(queue, b"lost with the file")
    for name in ("q.db", "q.db-wal", "q.db-shm"):
        (tmp_path / name).unlink()
    assert put(queue, body=b"new") == [True]
    assert counted(queue) == {"ready": 1}
    assert take(queue).body == b"new"


def test_every_statement_of_the_way_of_a_job_finds_its_rows_by_an_index(queue: SQLite, tmp_path: Path) -> None:
    for number in range(50):
        push(queue, b"x", target="t", unique=str(number), due=None if number % 2 else queue._now() + 5)
    statements: list[str] = []
    queue.close()
    connect = queue._database._connect

    def traced() -> sqlite3.Connection:
        connection = connect()
        connection.set_trace_callback(statements.append)
        return connection

    queue._database._connect = traced  # type: ignore[method-assign]
    for job in [*queue.reserve(3), *queue.reserve(3, only={"t", "u"})]:
        queue.settle(job, Later("x"), [Put(queue, Job(key=queue.new_key(), body=b"", unique="v"))])
    queue.limit([Limit("target", concurrency=1), Limit("sender", rate=5)])
    for job in queue.reserve(9):
        queue.settle(job, DONE)
    queue.release_stale()
    queue.wait(0)
    for look in (queue.counts, queue.oldest, queue.keys, queue.paused):
        look()
    queue._database._connect = connect  # type: ignore[method-assign]
    with contextlib.closing(sqlite3.connect(tmp_path / "q.db")) as database:
        for statement in {s for s in statements if re.match(r"\s*(select|insert|update|delete|with)", s)}:
            plan = [row[3] for row in database.execute(f"explain query plan {statement}")]
            scans = [step for step in plan if re.match(r"SCAN (jobs|lamsonq_lanes)\b(?!.*COVERING)", step)]
            scans = [step for step in scans if "jobs_reserved" not in step]  # what is worked at the moment is little
            assert scans == [], f"{statement}: {plan}"
            assert "order by priority" not in statement or not any("TEMP B-TREE" in step for step in plan), statement
    assert len(statements) > 30


# -- large bodies ------------------------------------------------------------------------------------------------------


def test_a_large_body_lies_beside_the_database_until_its_job_ends(queue: SQLite, tmp_path: Path) -> None:
    push(queue, LARGE)
    assert len(bodies(tmp_path)) == 1
    job = take(queue)
    assert job.body == LARGE
    queue.settle(job, Later("again", at=0))
    assert len(bodies(tmp_path)) == 1
    queue.settle(take(queue), DONE, [Put(queue, Job(key=queue.new_key(), body=LARGE + b"!"))])
    assert take(queue).body == LARGE + b"!"
    queue.close()
    assert len(bodies(tmp_path)) == 1
    assert queue.purge("ready") == 1
    assert bodies(tmp_path) == []


def test_a_large_body_that_was_not_kept_is_removed(queue: SQLite, tmp_path: Path) -> None:
    put(queue, body=LARGE, unique="u")
    put(queue, body=LARGE, unique="u")
    put(queue, body=LARGE, key="k")
    put(queue, body=LARGE, key="k")
    with pytest.raises(QueueError):
        put(queue, body=LARGE, received=float("nan"))
    queue.close()
    assert (len(bodies(tmp_path)), counted(queue)) == (2, {"ready": 2})


def test_a_large_body_whose_writer_died_before_the_row_is_swept(make: Callable[..., SQLite], tmp_path: Path) -> None:
    queue, other = make(), make()
    push(queue, LARGE)
    (tmp_path / "q.db-bodies" / f"{queue._worker()}.77").write_bytes(LARGE)
    (tmp_path / "q.db-bodies" / f"{other._worker()}.78").write_bytes(LARGE)  # of a put that is under way
    queue.forget()
    other.release_stale()
    assert {name.rpartition(".")[2] for name in bodies(tmp_path)} == {"1", "78"}
    assert drain(other) == [LARGE]


# -- the user's own transaction ----------------------------------------------------------------------------------------


def test_a_job_put_with_a_connection_exists_exactly_when_its_rows_do(queue: SQLite, mine: sqlite3.Connection) -> None:
    for number, end in enumerate((mine.commit, mine.rollback, mine.commit)):
        mine.execute("insert into orders values (?)", (number,))
        assert put(queue, mine, body=b"%d" % number) == [True]
        assert counted(queue) == ({"ready": 1} if number else {})
        end()
    assert drain(queue) == [b"0", b"2"]
    assert mine.execute("select number from orders").fetchall() == [(0,), (2,)]


def test_a_put_may_come_before_the_first_statement(queue: SQLite, mine: sqlite3.Connection) -> None:
    assert put(queue, mine) == [True]
    assert (mine.in_transaction, counted(queue)) == (True, {})
    mine.rollback()
    assert counted(queue) == {}


def test_on_a_connection_that_commits_each_statement_a_put_is_kept_at_once(queue: SQLite, tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "q.db", isolation_level=None)) as mine:
        assert put(queue, mine) == [True]
        assert counted(queue) == {"ready": 1}
        mine.execute("begin")
        assert put(queue, mine) == [True]
        mine.execute("rollback")
        assert counted(queue) == {"ready": 1}


class WithAutocommit(sqlite3.Connection):
    """A connection as Python 3.12 makes it of `autocommit=True`: its `commit` does nothing."""

    autocommit = True

    def commit(self) -> None:
        pass


def test_on_a_connection_with_autocommit_a_put_is_kept_at_once_and_leaves_no_transaction_open(
    queue: SQLite, tmp_path: Path
) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "q.db", factory=WithAutocommit)) as mine:
        assert put(queue, mine) == [True]
        mine.commit()
        assert (mine.in_transaction, counted(queue)) == (False, {"ready": 1})


def test_a_connection_that_is_closed_or_of_another_thread_is_told(queue: SQLite, mine: sqlite3.Connection) -> None:
    with ThreadPoolExecutor() as pool, pytest.raises(QueueError, match="same thread"):
        pool.submit(put, queue, mine).result()
    mine.close()
    with pytest.raises(QueueError, match="closed"):
        put(queue, mine)


def test_what_a_users_trigger_rolls_back_is_not_kept_in_part(queue: SQLite, tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "q.db")) as other:
        other.execute(
            "create trigger no before insert on jobs when new.sender = 'bad' begin select raise(rollback, 'no'); end"
        )
    puts = [Put(queue, Job(key=queue.new_key(), body=b"", sender=sender)) for sender in ("good", "bad", "good")]

    with pytest.raises(QueueError, match="nothing was kept"):
        queue.put(puts)

    assert queue.reserve(3) == []


def test_unique_and_gates_hold_on_the_users_connection_and_go_back_with_it(
    queue: SQLite, mine: sqlite3.Connection
) -> None:
    puts = [
        Put(queue, Job(key=queue.new_key(), body=b"1", unique="u")),
        Put(queue, Job(key=queue.new_key(), body=b"2", unique="u")),
        Put(queue, Job(key=queue.new_key(), body=b"3"), gate=Tick("cron", 5.0)),
        Put(queue, Job(key=queue.new_key(), body=b"4"), gate=Tick("cron", 5.0)),
    ]
    for end in (mine.rollback, mine.commit):
        assert queue.put(puts, mine) == [True, False, True, False]
        end()
    assert drain(queue) == [b"1", b"3"]


def test_of_several_puts_on_a_connection_none_is_kept_when_one_fails(queue: SQLite, mine: sqlite3.Connection) -> None:
    mine.execute("insert into orders values (1)")
    good, bad = Job(key=queue.new_key(), body=LARGE), Job(key=queue.new_key(), body=b"", received=float("nan"))
    with pytest.raises(QueueError, match="NOT NULL"):
        queue.put([Put(queue, good), Put(queue, bad)], mine)
    mine.commit()
    assert (counted(queue), mine.execute("select * from orders").fetchall()) == ({}, [(1,)])


def test_a_large_body_on_the_users_connection_goes_with_a_rollback(
    queue: SQLite, mine: sqlite3.Connection, tmp_path: Path
) -> None:
    put(queue, mine, body=LARGE)
    mine.rollback()
    put(queue, mine, body=LARGE + b"2")
    mine.commit()
    assert len(bodies(tmp_path)) == 2
    queue._bodies.settle_doubts()
    assert (len(bodies(tmp_path)), take(queue).body) == (1, LARGE + b"2")


def test_a_large_body_is_not_swept_while_its_transaction_is_open(
    queue: SQLite, mine: sqlite3.Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_database, "BUSY_TIMEOUT", 0.1)
    queue.close()
    put(queue, mine, body=LARGE)
    with pytest.raises(QueueError, match="locked"):
        queue._bodies.settle_doubts()
    mine.commit()
    assert take(queue).body == LARGE


def test_a_waiting_worker_hears_of_the_users_commit(make: Callable[..., SQLite], tmp_path: Path) -> None:
    queue, other = make(now=time.time), make(now=time.time)
    assert queue.reserve(1) == []
    with contextlib.closing(sqlite3.connect(tmp_path / "q.db", check_same_thread=False)) as mine:
        put(other, mine, body=b"mine")
        timer = threading.Timer(0.3, mine.commit)
        timer.start()
        begun = time.monotonic()
        found = until(lambda: queue.reserve(1, wait=PATIENCE))
        assert [job.body for job in found] == [b"mine"]
        assert time.monotonic() - begun < PATIENCE / 2
        timer.join()


def test_the_tables_may_be_made_in_the_users_transaction(tmp_path: Path) -> None:
    queue = SQLite(f"sqlite:{tmp_path}/app.db")
    with contextlib.closing(sqlite3.connect(tmp_path / "app.db")) as mine:
        mine.text_factory = bytes
        mine.row_factory = sqlite3.Row
        for end in (mine.rollback, mine.commit):
            mine.execute("create table if not exists orders (number integer)")
            mine.execute("insert into orders values (1)")
            assert put(queue, mine, body=LARGE) == [True]
            end()
    assert drain(queue) == [LARGE]
    queue.close()


def test_a_connection_to_another_file_is_refused_with_what_to_do(queue: SQLite, tmp_path: Path) -> None:
    said = r"is to .*other.db, and the queue lies in .*q.db: connect to that file"
    with contextlib.closing(sqlite3.connect(tmp_path / "other.db")) as other, pytest.raises(QueueError, match=said):
        put(queue, other)
    with contextlib.closing(sqlite3.connect(":memory:")) as other, pytest.raises(QueueError, match="in memory"):
        put(queue, other)
    with pytest.raises(QueueError, match=r"takes a sqlite3.Connection to .*, not str"):
        put(queue, "q.db")


# -- claims ------------------------------------------------------------------------------------------------------------


def died(make: Callable[..., SQLite], times: int, n: int) -> None:
    """So many workers die with the next n jobs."""
    for _ in range(times):
        worker = make()
        worker.release_stale()
        jobs = [job for _ in range(n) for job in worker.reserve(1)]
        assert len(jobs) == n or times > 1
        worker.forget()


def test_jobs_whose_worker_died_run_one_at_a_time_beside_others(make: Callable[..., SQLite]) -> None:
    queue = make()
    suspects = [push(queue) for _ in range(3)]
    died(make, 1, 3)
    fresh = [push(queue) for _ in range(3)]
    jobs = queue.reserve(9)
    assert [job.key for job in jobs] == [suspects[0], *fresh]
    assert queue.reserve(9) == []
    queue.settle(jobs[1], DONE)
    assert queue.reserve(9) == []
    queue.settle(jobs[0], DONE)
    assert [job.key for job in queue.reserve(9)] == [suspects[1]]


def test_settling_one_of_them_wakes_the_worker_for_the_next(make: Callable[..., SQLite]) -> None:
    queue = make()
    for _ in range(2):
        push(queue)
    died(make, 1, 2)
    [job] = queue.reserve(9)
    threading.Timer(0.1, lambda: queue.settle(job, DONE)).start()
    begun = time.monotonic()
    found = until(lambda: queue.reserve(9, wait=PATIENCE))
    assert (len(found), time.monotonic() - begun < PATIENCE / 2) == (1, True)


def test_a_worker_with_nothing_but_suspects_sleeps(make: Callable[..., SQLite]) -> None:
    queue = make()
    for _ in range(2):
        push(queue)
    died(make, 1, 2)
    assert len(queue.reserve(9)) == 1
    begun = time.monotonic()
    queue.wait(0.2)
    assert time.monotonic() - begun > 0.15


def test_a_job_at_its_last_chance_runs_alone(make: Callable[..., SQLite]) -> None:
    queue = make()
    key = push(queue)
    died(make, DELIVERIES_MAX - 1, 1)
    queue.release_stale()
    before = push(queue, priority=0, key="0")
    first = queue.reserve(9)
    assert [job.key for job in first] == [before]
    push(queue)
    assert queue.reserve(9) == []  # nothing new is begun, so that its turn comes
    queue.settle(first[0], DONE)
    alone = queue.reserve(9)
    assert [(job.key, job.deliveries) for job in alone] == [(key, DELIVERIES_MAX - 1)]
    assert queue.reserve(9) == []
    queue.settle(alone[0], DONE)
    assert len(queue.reserve(9)) == 1


def test_a_worker_whose_file_was_deleted_loses_its_claims_and_works_on(queue: SQLite, tmp_path: Path) -> None:
    push(queue)
    job = take(queue)
    for path in (tmp_path / "q.db-workers").glob("*.lock"):
        path.unlink()
    assert queue.release_stale() == 1
    with pytest.raises(LeaseLost):
        queue.settle(job, DONE)
    assert take(queue).deliveries == 1


def test_a_claim_holds_as_long_as_its_process(make: Callable[..., SQLite]) -> None:
    queue = make()
    key = push(queue)
    ready = FORK.Event()

    def work() -> None:
        take(queue)
        ready.set()
        time.sleep(60)

    child = FORK.Process(target=work)
    child.start()
    assert ready.wait(PATIENCE)
    assert (queue.release_stale(), queue.state(key)) == (0, "reserved")
    child.kill()
    child.join()
    assert (queue.release_stale(), queue.state(key)) == (1, "ready")
    assert take(queue).deliveries == 1


def test_a_forked_child_is_a_worker_of_its_own(make: Callable[..., SQLite]) -> None:
    queue = make()
    push(queue, b"parent")
    job = take(queue)

    def work() -> None:
        push(queue, b"child")
        with contextlib.suppress(LeaseLost):
            assert [found.body for found in queue.reserve(9)] == [b"child"]

    child = FORK.Process(target=work)
    child.start()
    child.join()
    assert child.exitcode == 0
    assert queue.release_stale() == 1
    queue.settle(job, DONE)
    assert drain(queue) == [b"child"]


def test_a_child_that_lives_on_does_not_keep_its_dead_parents_claims(make: Callable[..., SQLite]) -> None:
    queue = make()
    push(queue)
    pids = FORK.Queue()

    def parent() -> None:
        take(queue)
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        pids.put(child)
        time.sleep(60)

    process = FORK.Process(target=parent)
    process.start()
    grandchild = pids.get(timeout=10)
    try:
        process.kill()
        process.join()
        assert until(queue.release_stale) == 1  # the grandchild lets go in its first moments
    finally:
        os.kill(grandchild, 9)


def test_kicking_or_claiming_a_dead_job_while_another_like_it_waits_is_no_error(queue: SQLite) -> None:
    keys = []
    for _ in range(2):
        keys.append(push(queue, unique="u"))
        queue.settle(take(queue), Dead("no"))
    push(queue, unique="u")
    assert queue.kick(keys[0])
    assert queue.claim(keys[1]) is not None
    assert len(queue.reserve(9)) == 2


# -- what goes into other stores ---------------------------------------------------------------------------------------


class Refusing(Memory):
    """A store that is down until it is up."""

    up = False

    def put(self, puts: Any, conn: object = None) -> list[bool]:  # noqa: ARG002
        if not self.up:
            raise QueueError("it is down")
        return super().put(puts)


def test_what_another_store_does_not_take_is_tried_again(queue: SQLite, caplog: pytest.LogCaptureFixture) -> None:
    other = Refusing("memory:down")
    push(queue)
    assert queue.settle(take(queue), DONE, [Put(other, Job(key="a", body=b"there"))]) == [True]
    assert (counted(queue), "is tried again: it is down" in caplog.text) == ({}, True)
    other.up = True
    queue._outgoing.retry()
    assert drain(other) == [b"there"]
    assert queue._database.rows("select 1 from lamsonq_outgoing") == []


def test_what_a_dead_worker_has_not_handed_over_is_handed_over_by_who_finds_it(
    make: Callable[..., SQLite], tmp_path: Path
) -> None:
    queue = make()
    other = SQLite(f"sqlite:{tmp_path}/other.db?queue=a b&", now=queue._now)
    push(queue)
    cause = Later("busy", queue._now() + 5)
    try:
        raise ValueError("of this")
    except ValueError as error:
        cause.__cause__ = error
    puts = [
        Put(other, Job(key="1", body=LARGE, sender="\udcff", recipients=("a", "b"), metadata={"a": "b"}, priority=3)),
        Put(other, Job(key="2", body=b"", attempts=2), cause, report="before\n\n"),
        Put(other, Job(key="3", body=b"", attempts=1), Dead("no")),
        Put(other, Job(key="4", body=b""), KEPT),
        Put(other, Job(key="5", body=b""), gate=Tick("cron", 5.0)),
        Put(other, Job(key="6", body=b""), gate=Debounce("x", 60.0, always_delay=True)),
    ]
    job = take(queue)
    down = Refusing("memory:down")
    queue.settle(job, DONE, [Put(down, Job(key="lost", body=b""))])
    queue._database.write(lambda connection: write_down(connection, queue._worker(), puts))
    queue.forget()
    with replaced(queue._now):
        make().release_stale()
    assert counted(other) == {"ready": 2, "delayed": 2, "dead": 1, "done": 1}
    assert [(e.attempt, e.reason) for e in entries(other.report("2"))] == [(1, "before"), (2, "busy")]
    assert "ValueError: of this" in other.report("2")
    job = other.claim("1") or pytest.fail("it is not there")
    assert (job.body, job.sender, job.recipients, job.metadata, job.priority) == (
        *(LARGE, "\udcff", ("a", "b")),
        *({"a": "b"}, 3),
    )
    assert queue._database.rows("select 1 from lamsonq_outgoing") == []
    other.close()


# -- many at once ------------------------------------------------------------------------------------------------------


def test_threads_that_put_at_the_same_time_share_a_transaction(queue: SQLite, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[int] = []
    transaction = queue._database._transaction

    def slow(batch: list[Any]) -> None:
        batches.append(len(batch))
        until(lambda: sum(batches) + len(queue._database._pending) == 20)  # all the others wait
        transaction(batch)

    monkeypatch.setattr(queue._database, "_transaction", slow)
    with ThreadPoolExecutor(20) as pool:
        list(pool.map(lambda _: push(queue), range(20)))
    assert (sum(batches), len(batches) <= 2) == (20, True)
    assert len(queue.keys()) == 20


def test_of_many_that_are_put_at_once_those_that_are_refused_stop_no_other(queue: SQLite) -> None:
    put(queue, key="there", body=b"first")
    names = [*map(str, range(40)), "there", *map(str, range(40, 45))]
    jobs = [Job(key=name, body=b"second") for name in names]
    jobs += [Job(key=name, body=b"", unique="u") for name in ("one", "other")]
    assert queue.put([Put(queue, job) for job in jobs]) == [*[True] * 47, False]
    assert set(queue.keys()) == {*names, "one"}
    assert queue.get("there") == Job(key="there", body=b"first", received=queue._now())


def test_a_claim_does_not_write_the_body_once_more(queue: SQLite, tmp_path: Path) -> None:
    put(queue, body=b"x" * 60_000)
    [(busy, _, _)] = queue._database.rows("pragma wal_checkpoint(truncate)")
    assert not busy
    [job] = queue.reserve(1)
    assert len(job.body) == 60_000
    assert (tmp_path / "q.db-wal").stat().st_size < 30_000


@pytest.mark.parametrize("durable", [False, True])
def test_who_finds_another_process_writing_steps_aside_once_and_then_lines_up(
    queue: SQLite, monkeypatch: pytest.MonkeyPatch, durable: bool
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    write = partial(queue._database.write, lambda _: 7, durable=durable)
    write()
    assert pauses == []
    other = os.open(queue._database.turn, os.O_RDWR)
    fcntl.flock(other, fcntl.LOCK_EX)
    with ThreadPoolExecutor() as pool:
        writing = pool.submit(write)
        while not pauses:
            assert not writing.done()
        os.close(other)
        assert writing.result() == 7
    assert pauses == [0.0 if durable else sqlite_database.STEP_ASIDE]


def test_one_put_that_cannot_be_written_takes_no_other_with_it(queue: SQLite, monkeypatch: pytest.MonkeyPatch) -> None:
    transaction = queue._database._transaction

    def slow(batch: list[Any]) -> None:
        time.sleep(0.02)
        transaction(batch)

    monkeypatch.setattr(queue._database, "_transaction", slow)

    def act(number: int) -> bool:
        try:
            return put(queue, received=float("nan") if number == 7 else 0.0) == [True]
        except QueueError:
            return False

    with ThreadPoolExecutor(20) as pool:
        results = list(pool.map(act, range(20)))
    assert [number for number, kept in enumerate(results) if not kept] == [7]
    assert len(queue.keys()) == 19


def test_an_idle_worker_does_not_look_again_and_again(make: Callable[..., SQLite]) -> None:
    queue = make(now=time.time)
    push(queue, due=time.time() + 0.4)
    looks: list[str] = []
    rows = queue._database.rows
    assert queue.reserve(1, wait=0.2) == []
    queue._database.rows = lambda *values: looks.append(values[0]) or rows(*values)  # type: ignore[method-assign,func-returns-value]
    begun = time.monotonic()
    [job] = queue.reserve(1, wait=PATIENCE)
    assert (job.due, time.monotonic() - begun < PATIENCE / 2) == (None, True)
    assert len(looks) < 40


def test_a_waiting_worker_hears_of_a_job_that_a_program_of_its_own_puts(
    make: Callable[..., SQLite], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lamsonq.backends.sqlite_wake.LOOK_EVERY", 0.1)
    queue = make(now=time.time)
    assert queue.reserve(1) == []

    def work() -> None:
        time.sleep(0.2)
        push(queue, b"hello")

    child = FORK.Process(target=work)
    child.start()
    begun = time.monotonic()
    found = until(lambda: queue.reserve(1, wait=PATIENCE))
    assert ([job.body for job in found], time.monotonic() - begun < PATIENCE / 2) == ([b"hello"], True)
    child.join()


def test_without_watches_a_worker_looks_once_a_second(
    make: Callable[..., SQLite], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none_left(**_: object) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("asyncinotify.Inotify", none_left)
    monkeypatch.setattr("lamsonq.backends.sqlite_wake.LOOK_EVERY", 0.1)
    queue, other = make(now=time.time), make(now=time.time)
    assert queue.reserve(1) == []
    threading.Timer(0.05, lambda: push(other)).start()
    with caplog.at_level(logging.WARNING):
        assert len(queue.reserve(1, wait=4)) == 1
    assert caplog.text.count("looking once a second") == 1


def test_what_a_forked_child_puts_is_there_when_another_program_has_closed_the_file(
    make: Callable[..., SQLite], tmp_path: Path
) -> None:
    """SQLite's locks do not pass a fork: a child without any would write into a -wal that is deleted under it."""
    queue = make()
    push(queue)
    path, parent_has_left = queue._database.path, FORK.Event()

    def child() -> None:
        parent_has_left.wait(10)
        for _ in range(3):
            push(queue)
            look = "import sqlite3, sys; sqlite3.connect(sys.argv[1]).execute('select count(*) from jobs').fetchone()"
            subprocess.run([sys.executable, "-c", look, path], check=True)
        push(queue)
        os._exit(0)

    process = FORK.Process(target=child)
    process.start()
    queue.close()
    parent_has_left.set()
    process.join()
    assert process.exitcode == 0
    assert make().counts()["ready"] == 5
