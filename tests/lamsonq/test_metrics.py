"""lamsonq metrics, from outside: figures, liveness and readiness of what lies under a directory."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from lamsonq import metrics, pidfile
from lamsonq.errors import Dead, UsageError
from lamsonq.jobs import Job, Put
from lamsonq.queue import Queue

from .cli import ENVIRON, lamsonq
from .projects import Project
from .waiting import PATIENCE, until

Get = Callable[[str], tuple[int, str]]


@pytest.fixture
def get(here: Path) -> Iterator[Get]:
    """`get(path)` is what the metrics of ./run answer: code and text."""
    Path("run").mkdir(exist_ok=True)
    command = [sys.executable, "-m", "lamsonq", "metrics", "-port", "0", "-host", "127.0.0.1", "-run", "run"]
    process = subprocess.Popen(command, env=ENVIRON, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert process.stderr is not None
    line = process.stderr.readline()
    found = re.fullmatch(r"metrics on (http://127[.]0[.]0[.]1:\d+/)metrics\n", line)
    assert found, line + process.stderr.read()

    def ask(path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(found[1] + path, timeout=PATIENCE) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    ask.url = found[1]  # type: ignore[attr-defined]
    yield ask
    process.send_signal(signal.SIGTERM)
    _, rest = process.communicate(timeout=20)
    assert (process.returncode, rest) == (0, "")


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    made = Project(tmp_path)
    yield made
    made.clean_up()


def sample(text: str, name: str, **labels: str) -> float | None:
    for family in text_string_to_metric_families(text):
        for each in family.samples:
            if each.name == name and labels.items() <= each.labels.items():
                return each.value
    return None


def put(url: str, outcome: Dead | None = None, age: float = 0.0) -> None:
    store = Queue(url).backend
    store.put([Put(store, Job(key=store.new_key(), body=b"x", received=time.time() - age), outcome)])


def test_queues_are_told_by_state_and_age(here: Path) -> None:
    put("run/posts")
    put("run/posts", Dead("no"))
    put("sqlite:run/q.db?queue=jobs", age=500)
    put("sqlite:run/q.db?queue=other", Dead("no"))
    server = metrics.bound("127.0.0.1", 0, "run")
    text = generate_latest(server.registry).decode()
    server.server_close()
    assert sample(text, "lamsonq_queue_jobs", queue="run/posts", state="ready") == 1
    assert sample(text, "lamsonq_queue_jobs", queue="run/posts", state="dead") == 1
    assert sample(text, "lamsonq_queue_jobs", queue="sqlite:run/q.db?queue=jobs", state="ready") == 1
    assert sample(text, "lamsonq_queue_jobs", queue="sqlite:run/q.db?queue=other", state="dead") == 1
    assert 500 <= (sample(text, "lamsonq_queue_oldest_seconds", queue="sqlite:run/q.db?queue=jobs") or 0) < 600
    assert sample(text, "lamsonq_trouble") == 0


def test_a_paused_queue_and_a_full_disk_are_told(here: Path) -> None:
    put("run/posts")
    put("run/other")
    Queue("run/posts").backend.pause()
    server = metrics.bound("127.0.0.1", 0, "run")
    text = generate_latest(server.registry).decode()
    server.server_close()
    assert sample(text, "lamsonq_queue_paused", queue="run/posts") == 1
    assert sample(text, "lamsonq_queue_paused", queue="run/other") == 0
    assert (sample(text, "lamsonq_free_bytes") or 0) > 0
    assert sample(text, "lamsonq_mail_put_off") is None  # no settings, so nobody knows the mark
    Path("config").mkdir()
    for min_free, put_off in ((0, 0), (1 << 62, 1)):
        Path("config/settings.toml").write_text(f"[receiver]\nmin_free = {min_free}\n")
        views = metrics.Views("run")
        told = {metric.name: metric for metric in metrics.Collector(views).collect()}
        assert told["lamsonq_mail_put_off"].samples[0].value == put_off
        assert told["lamsonq_min_free_bytes"].samples[0].value == min_free
        view = replace(views.now(), servers=[{"running": True, "workers": 1}])
        assert ["mail is put off" in reason for reason in view.not_ready()] == [True] * put_off


@pytest.mark.slow
def test_a_server_is_told_while_it_runs_and_when_it_has_ended(project: Project, get: Get) -> None:
    assert get("live") == (200, "ok\n")
    assert get("ready") == (503, "no server has been started here\n")
    pid = project.start()
    until((project.path / "run/smtp.status").exists)
    until(lambda: get("ready") == (200, "ok\n"))
    text = get("metrics")[1]
    labels = {"pid_file": "run/smtp.pid", "boot": "config.boot"}
    assert sample(text, "lamsonq_up", **labels) == 1
    assert sample(text, "lamsonq_workers", **labels) == 1
    assert sample(text, "lamsonq_handled_total", **labels) == 0
    assert sample(text, "lamsonq_failed_total", **labels) == 0
    assert sample(text, "lamsonq_last_settled_timestamp_seconds", **labels) is None
    running = pidfile.find(str(project.path / "run/smtp.pid"))
    assert running is not None
    assert running.pid == pid
    running.signal(signal.SIGKILL)
    running.wait(5)
    running.close()
    until(lambda: get("live") == (503, "run/smtp.pid: its server has ended\n"))
    assert get("ready") == (503, "run/smtp.pid: its server has ended\n")
    assert sample(get("metrics")[1], "lamsonq_up", pid_file="run/smtp.pid") == 0


@pytest.mark.slow
def test_nothing_that_lies_there_ends_it(here: Path, get: Get) -> None:
    Path("run/aaa.pid").symlink_to("elsewhere")
    Path("run/bbb.pid").write_bytes(b"\xff\xfe")
    Path("run/ccc.status").write_text("[" * 100000)
    Path("run/ddd.db").write_bytes(b"SQLite format 3\0" + os.urandom(5000))
    put("sqlite:run/eee.db")
    Queue("sqlite:run/eee.db").backend.close()
    Path("run/eee.db").write_bytes(os.urandom(5000))
    os.mkdir(b"run/\xff")
    until(lambda: get("live")[0] == 503)
    code, text = get("metrics")
    assert code == 200
    assert (sample(text, "lamsonq_trouble") or 0) >= 2
    assert "run/aaa.pid is a link" in get("ready")[1]
    for path in list(Path("run").iterdir()):
        if path.is_file() or path.is_symlink():
            path.unlink()
    until(lambda: get("live") == (200, "ok\n"))


def test_it_answers_get_and_head_and_knows_three_places(get: Get) -> None:
    assert get("nothing") == (404, "there are /metrics, /live and /ready\n")
    url = get.url  # type: ignore[attr-defined]
    with urllib.request.urlopen(urllib.request.Request(f"{url}live", method="HEAD"), timeout=PATIENCE) as answer:
        assert (answer.status, answer.read()) == (200, b"")
    with pytest.raises(urllib.error.HTTPError, match="501"):
        urllib.request.urlopen(urllib.request.Request(f"{url}live", method="DELETE"), timeout=PATIENCE)


@pytest.mark.slow
def test_clients_that_say_nothing_hold_it_up_for_a_few_seconds_only(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics.Handler, "timeout", 0.3)
    Path("run").mkdir()
    server = metrics.bound("127.0.0.1", 0, "run")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    port = int(server.server_address[1])
    silent = [socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) for _ in range(metrics.AT_ONCE + 3)]
    assert silent[-1].recv(1) == b""  # one too many is hung up on

    def lives() -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{server.url}live", timeout=PATIENCE) as answer:
            return bool(answer.status == 200)
        return False

    until(lives)  # though nobody else has hung up
    for client in silent:
        client.close()
    server.shutdown()
    server.server_close()


def test_a_look_at_the_disk_serves_all_who_ask_within_a_second(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, looks = [10.0], []

    def look(run: str) -> dict[str, object]:
        looks.append(run)
        now[0] += 0.5
        return {}

    Path("run").mkdir()
    monkeypatch.setattr("lamsonq.survey.queues", look)
    views = metrics.Views("run", clock=lambda: now[0])
    views.now()
    now[0] += 4.9  # ten times the half second that it took
    views.now()
    assert looks == ["run"]
    now[0] += 0.2
    views.now()
    assert looks == ["run", "run"]


def test_what_cannot_be_served_is_one_line(here: Path) -> None:
    assert lamsonq("metrics", code=1).stderr.startswith("ERROR: run is not a directory: give the one that holds")
    Path("run").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        line = lamsonq("metrics", "-port", port, code=1).stderr
        assert line == f"ERROR: cannot listen on 127.0.0.1:{port}: Address already in use\n"


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    monkeypatch.delitem(sys.modules, "lamsonq.metrics")
    with pytest.raises(UsageError, match=r"pip install 'lamsonq\[metrics\]'"):
        importlib.import_module("lamsonq.metrics")
