"""Producers and consumers in many processes, some of which are killed: no job is lost, none runs twice but by a kill.

How many jobs: the environment variable JOBS, 20,000 without it.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest

from lamsonq.backends import open_backend
from lamsonq.errors import BrokerError
from lamsonq.jobs import DONE, Job, Put

JOBS = int(os.environ.get("JOBS", "20000"))
PRODUCERS = CONSUMERS = 8
SECONDS = 60.0
"""After that no more is put: what was put until then is what is looked for."""

FORK = multiprocessing.get_context("fork")
BODY = b"x" * 1000


class Ledger:
    """What was put, begun and settled, one line each; a line is written by one call, so none is torn."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def write(self, *words: str) -> None:
        os.write(self._file, f"{' '.join(words)}\n".encode())

    def lines(self) -> list[list[str]]:
        return [line.split() for line in self._path.read_text().splitlines()]


def produce(url: str, ledger: Ledger, jobs: int, until: float) -> None:
    queue = open_backend(url)
    while jobs > 0 and time.monotonic() < until:
        keys = [queue.new_key() for _ in range(min(jobs, random.choice([1, 1, 10, 50])))]
        queue.put([Put(queue, Job(key=key, body=BODY)) for key in keys])
        ledger.write("put", *keys)
        jobs -= len(keys)


def consume(url: str, ledger: Ledger, ended: Any) -> None:
    queue, me = open_backend(url), str(os.getpid())
    while True:
        jobs = queue.reserve(random.choice([1, 5, 20]), wait=0.2)
        if jobs:
            ledger.write("begun", me, *(job.key for job in jobs))
        for job in jobs:
            assert job.body == BODY
            queue.settle(job, DONE)
        if jobs:
            ledger.write("settled", me, *(job.key for job in jobs))
        elif ended.is_set() and not any(queue.counts()[state] for state in ("ready", "delayed", "reserved")):
            queue.close()
            return


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("url", ["{folder}/posts", "sqlite:{folder}/q.db?queue=posts"], ids=["maildir", "sqlite"])
def test_whatever_is_killed_no_job_is_lost_and_none_runs_twice_but_by_a_kill(
    tmp_path: Path, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    url = url.format(folder=tmp_path)
    try:
        open_backend(url)
    except BrokerError as error:
        pytest.skip(str(error))
    ledger, ended, begun = Ledger(tmp_path / "ledger"), FORK.Event(), time.monotonic()
    share = (url, ledger, JOBS // PRODUCERS, begun + SECONDS)
    producers = [FORK.Process(target=produce, args=share) for _ in range(PRODUCERS)]
    consumers = [FORK.Process(target=consume, args=(url, ledger, ended)) for _ in range(CONSUMERS)]
    for process in producers + consumers:
        process.start()
    killed: set[str] = set()
    while any(process.is_alive() for process in producers):
        time.sleep(random.uniform(0.05, 0.4))
        victim = random.randrange(CONSUMERS)
        consumers[victim].kill()
        consumers[victim].join()
        killed.add(str(consumers[victim].pid))
        consumers[victim] = FORK.Process(target=consume, args=(url, ledger, ended))
        consumers[victim].start()
    ended.set()
    for process in producers + consumers:
        process.join(200)
        assert process.exitcode == 0
    queue = open_backend(url)
    lines = ledger.lines()
    put = {key for line in lines if line[0] == "put" for key in line[1:]}
    runs: dict[str, list[str]] = {}
    for word, worker, *keys in (line for line in lines if line[0] == "begun"):
        assert word == "begun"
        for key in keys:
            runs.setdefault(key, []).append(worker)
    dead = set(queue.keys("dead"))
    with capsys.disabled():
        again = sum(len(workers) > 1 for workers in runs.values())
        print(f"\n{len(put)} put, {len(killed)} killed, {again} run again, {len(dead)} dead,", end=" ")
        print(f"{time.monotonic() - begun:.0f} s")
    assert queue.counts() == {"ready": 0, "delayed": 0, "reserved": 0, "dead": len(dead), "done": 0}
    assert set(runs) | dead == put, "a job was lost, or came from nowhere"
    settled = {key for line in lines if line[0] == "settled" for key in line[2:]}
    assert settled <= put
    for key, workers in runs.items():
        assert all(worker in killed for worker in workers[:-1]), f"{key} ran twice, by {workers}"
    queue.close()
