"""The sqlite: queue when the disk is full, broken or read-only, the file locked or damaged, and the process killed."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lamsonq.backends import sqlite_database
from lamsonq.backends.sqlite import SQLite
from lamsonq.backends.sqlite_bodies import INLINE_MAX
from lamsonq.conformance import drain, push, take
from lamsonq.errors import QueueError
from lamsonq.jobs import DELIVERIES_MAX, DONE, Job, Put

FORK = multiprocessing.get_context("fork")
LARGE = b"x" * 140_000


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[SQLite]:
    queue = SQLite(f"sqlite:{tmp_path}/q.db")
    queue.release_stale()
    yield queue
    with contextlib.suppress(QueueError):
        queue.close()


def fill(queue: SQLite, body: bytes, kept: list[str]) -> None:
    """Put jobs until one is refused; `kept` are the keys of the others."""
    for _ in range(2000):
        kept.append(push(queue, body))


# -- refusals --------------------------------------------------------------------------------------------------------


def test_a_full_disk_is_told_and_nothing_is_lost(queue: SQLite) -> None:
    kept = [push(queue, b"x" * 3000) for _ in range(5)]
    jobs = queue.reserve(2)
    queue._database._opened().execute("pragma max_page_count = 1")  # no more than it has
    with pytest.raises(QueueError, match=r"database or disk is full; free some space") as told:
        fill(queue, b"x" * 3000, kept)
    assert told.value.data
    queue.settle(jobs[0], DONE)  # what ends a job needs no room
    child = Put(queue, Job(key="child", body=b"x" * 60_000))
    with pytest.raises(QueueError, match="nothing was kept"):
        queue.settle(jobs[1], DONE, [child])
    assert (queue.state("child"), queue.state(jobs[1].key)) == (None, "reserved")
    queue._database._opened().execute("pragma max_page_count = 1000000")
    queue.settle(jobs[1], DONE, [child])
    assert len(drain(queue)) == len(kept) - 1


def test_a_locked_file_is_told(queue: SQLite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_database, "BUSY_TIMEOUT", 0.1)
    queue.close()
    with contextlib.closing(sqlite3.connect(tmp_path / "q.db", isolation_level=None)) as other:
        other.execute("begin immediate")
        for act in (lambda: push(queue), lambda: queue.claim("x"), queue.release_stale):
            with pytest.raises(QueueError, match="is locked; another program has a transaction open in it"):
                act()
        assert queue.counts()["ready"] == 0  # looking needs no lock
        other.execute("rollback")
    push(queue)
    assert len(drain(queue)) == 1


@pytest.mark.parametrize("content", [b"", b"this is no database, but a letter\n" * 500])
def test_a_file_that_is_no_database_is_told(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "q.db").write_bytes(content)
    queue = SQLite(f"sqlite:{tmp_path}/q.db")
    if content:
        with pytest.raises(QueueError, match="the file is no SQLite database: move it away"):
            push(queue)
        assert (tmp_path / "q.db").read_bytes() == content
    else:
        push(queue)
        queue.close()


def test_a_damaged_file_is_told(queue: SQLite, tmp_path: Path) -> None:
    for _ in range(50):
        push(queue, b"x" * 3000)
    queue.close()
    with (tmp_path / "q.db").open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * 4096 * 40)
    with pytest.raises(QueueError, match="save what it has by"):
        drain(queue)


def test_a_damaged_file_is_told_whose_error_is_no_text(queue: SQLite, tmp_path: Path) -> None:
    push(queue)
    queue.close()
    damaged = (tmp_path / "q.db").read_bytes().replace(b"CREATE INDEX jobs_dead", b"\xffREATE INDEX jobs_dead")
    (tmp_path / "q.db").write_bytes(damaged)
    for use in (queue.counts, lambda: queue.reserve(1), lambda: push(queue)):
        with pytest.raises(QueueError, match="save what it has by"):
            use()


def test_a_path_through_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(QueueError, match="in its path is a file"):
        push(SQLite(f"sqlite:{tmp_path}/file/q.db"))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system")
@pytest.mark.parametrize("body", [b"x" * 3000, LARGE])
def test_on_a_file_system_that_is_full_or_read_only_nothing_is_lost(tmp_path: Path, body: bytes) -> None:
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount")
    try:
        queue = SQLite(f"sqlite:{place}/q.db")
        kept: list[str] = []
        with pytest.raises(QueueError, match="space"):
            fill(queue, body, kept)
        assert len(kept) > 3
        assert queue.keys() == kept
        queue.close()
        subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
        with pytest.raises(QueueError, match=r"mount it writable|on a file system mounted writable"):
            push(queue, body)
        subprocess.run(["mount", "-o", "remount,rw,size=20m", str(place)], check=True)
        assert len(drain(queue)) == len(kept)
        queue.close()
        assert os.listdir(place / "q.db-bodies") == []
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system")
def test_on_a_full_disk_what_waits_is_worked_and_makes_room(tmp_path: Path) -> None:
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount")
    try:
        queue = SQLite(f"sqlite:{place}/q.db")
        for _ in range(300):
            push(queue, b"x" * 3000)
        drain(queue)
        queue.close()  # the file is as large as it was, the -wal is gone
        for _ in range(30):
            push(queue, b"x" * 3000)
        with contextlib.suppress(OSError), open(place / "logs", "ab", buffering=0) as logs:
            while logs.write(b"x" * 4096):
                pass
        assert len(drain(queue)) == 30
        push(queue, b"x" * 3000)
        queue.close()
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_limit_on_the_size_of_files_is_told(tmp_path: Path) -> None:
    url = f"sqlite:{tmp_path}/q.db"
    queue = SQLite(url)
    push(queue, b"before")

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
        kept: list[str] = []
        with pytest.raises(QueueError, match="nothing was kept"):
            fill(queue, b"x" * 3000, kept)
        (tmp_path / "kept").write_text(str(len(kept)))

    child = FORK.Process(target=work)
    child.start()
    child.join()
    assert child.exitcode == 0
    assert len(drain(queue)) == 1 + int((tmp_path / "kept").read_text())
    queue.close()


# -- every step ------------------------------------------------------------------------------------------------------

STEPS = """
import sys
from lamsonq.backends.memory import Memory
from lamsonq.backends.sqlite import SQLite
from lamsonq.errors import QueueError, Later
from lamsonq.jobs import DONE, Job, Put
queue = SQLite(sys.argv[1])
def tell(what):
    with open(sys.argv[2], "a") as ledger:
        ledger.write(what + "\\n")
def attempt(what, act):
    try:
        result = act()
    except QueueError as error:
        assert ";" in str(error), error
        tell("refused " + what)
        return None
    tell("kept " + what)
    return result
for key in ("small", "large"):
    body = b"x" * (140_000 if key == "large" else 3000)
    attempt(key, lambda: queue.put([Put(queue, Job(key=key, body=body))]))
for _ in range(2):
    for job in attempt("claim", lambda: queue.reserve(1)) or ():
        if job.key.startswith("child"):
            continue
        puts = [Put(queue, Job(key="child of " + job.key, body=job.body))]
        attempt("child of " + job.key, lambda: queue.settle(job, DONE, puts))
"""


def check(folder: Path, url: str) -> None:
    """What was told to be kept is there once, what was refused is not, nothing has half a body."""
    ledger = (folder / "ledger").read_text().splitlines() if (folder / "ledger").exists() else []
    queue = SQLite(url)
    queue.release_stale()
    queue.release_stale()
    keys = set(queue.keys()) | set(queue.keys("reserved"))
    for key in ("small", "large"):
        child = f"child of {key}"
        assert not {key, child} <= keys, f"{key} was settled, and is there: {ledger}"
        if f"kept {child}" in ledger:
            assert child in keys, ledger
        elif f"kept {key}" in ledger:
            assert {key, child} & keys, ledger
        if f"refused {key}" in ledger:
            assert not {key, child} & keys, ledger
        if f"refused {child}" in ledger:
            assert key in keys, ledger
    for key in keys:
        job = queue.get(key)
        assert job is not None
        assert len(job.body) == (140_000 if "large" in key else 3000), key
    database = queue._database
    files = {file for [file] in database.rows("select file from jobs where file is not null")}
    queue._bodies.settle_doubts()
    queue.close()
    assert set(os.listdir(folder / "q.db-bodies")) == files, ledger
    with contextlib.closing(sqlite3.connect(folder / "q.db")) as plain:
        assert plain.execute("pragma integrity_check").fetchone() == ("ok",)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("error", ["ENOSPC", "EIO", "EROFS"])
@pytest.mark.parametrize("call", ["pwrite64", "fdatasync,fsync", "write", "openat", "ftruncate", "unlink,mkdir,flock"])
def test_an_error_of_any_system_call_loses_nothing_and_leaves_no_half_job(
    tmp_path: Path, call: str, error: str
) -> None:
    if shutil.which("strace") is None:
        pytest.fail("strace is not installed") if os.environ.get("CI") else pytest.skip("strace is not installed")
    (tmp_path / "steps.py").write_text(STEPS)
    # Only calls on the queue's files count: Python's own start is not ours to survive.
    step = {"pwrite64": 7, "openat": 2}.get(call, 1)
    for number in range(1, 200, step):
        folder = tmp_path / str(number)
        folder.mkdir()
        url = f"sqlite:{folder}/q.db"
        SQLite(url).release_stale()
        paths = [f"-P{folder / name}" for name in ("q.db", "q.db-wal", "q.db-shm", "q.db-bodies", "q.db-workers")]
        inject = f"inject={call}:error={error}:when={number}"
        command = ["strace", "-f", "-qq", "-o", str(folder / "trace"), *paths, "-e", f"trace={call}", "-e", inject]
        steps = [sys.executable, str(tmp_path / "steps.py"), url, str(folder / "ledger")]
        done = subprocess.run([*command, *steps], capture_output=True, text=True, timeout=60)
        hit = "(INJECTED)" in (folder / "trace").read_text()
        assert done.returncode == 0 or "QueueError" in done.stderr, done.stderr
        check(folder, url)
        shutil.rmtree(folder)
        if not hit:
            assert number > 1 or call in ("ftruncate", "write", "unlink,mkdir,flock")
            return


def killed_at(number: int, work: Callable[[], None]) -> bool:
    """Run this in a forked child that is killed when it calls its so many-th function written in C; whether it was."""

    def child() -> None:
        left = number

        def count(frame: Any, event: str, argument: Any) -> None:
            nonlocal left
            if event == "c_call":
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        threading.setprofile(None)
        sys.setprofile(count)
        work()
        sys.setprofile(None)

    process = FORK.Process(target=child)
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("size", [3000, 140_000])
def test_killed_at_any_step_of_a_push_it_is_there_whole_or_not_at_all(tmp_path: Path, size: int) -> None:
    url = f"sqlite:{tmp_path}/q.db"
    queue = SQLite(url)
    queue.release_stale()
    queue.close()
    number, killed = 1, True
    while killed:
        told = tmp_path / "told"

        def work(told: Path = told) -> None:
            push(SQLite(url), b"x" * size, key="k")
            told.touch()

        killed = killed_at(number, work)
        queue = SQLite(url)
        queue.release_stale()
        found = queue.get("k")
        assert found is None or len(found.body) == size
        assert found is not None or not told.exists()
        files = os.listdir(tmp_path / "q.db-bodies")
        assert len(files) == int(found is not None and size > INLINE_MAX), (number, files)
        told.unlink(missing_ok=True)
        queue.remove("k")
        queue.close()
        number += 1 + number // 40
    assert number > 40


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("size", [3000, 140_000])
def test_killed_at_any_step_of_claim_and_settle_the_job_or_what_came_of_it_is_there(tmp_path: Path, size: int) -> None:
    url, there = f"sqlite:{tmp_path}/q.db", f"sqlite:{tmp_path}/other.db"
    number, killed = 1, True
    while killed:
        queue, other = SQLite(url), SQLite(there)
        other.release_stale()
        push(queue, b"x" * size, key="k")
        queue.close()
        other.close()

        def work() -> None:
            queue, other = SQLite(url), SQLite(there)
            job = take(queue)
            puts = [Put(queue, Job(key="a", body=job.body)), Put(other, Job(key="b", body=job.body))]
            queue.settle(job, DONE, puts)

        killed = killed_at(number, work)
        queue, other = SQLite(url), SQLite(there)
        queue.release_stale()
        here, parent = queue.get("a"), queue.state("k")
        assert (parent is None) == (here is not None), number
        assert (other.get("b") is None) == (here is None), number
        if parent:
            assert parent == "ready"
            job = take(queue)
            assert (job.deliveries < DELIVERIES_MAX, len(job.body)) == (True, size)
            queue.settle(job, DONE)
        assert queue._database.rows("select 1 from lamsonq_outgoing") == []
        for store, key in ((queue, "a"), (other, "b")):
            found = store.get(key)
            assert found is None or len(found.body) == size
            store.remove(key)
            store.close()
        assert os.listdir(tmp_path / "q.db-bodies") == []
        number += 1 + number // 40
    assert number > 60
