"""HUP, from outside: nobody is refused, nothing is lost, and what cannot be loaded changes nothing."""

from __future__ import annotations

import json
import os
import signal
import smtplib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lamsonq.queue import Queue
from lamsonq.tally import figures

from .projects import ENVIRON, MailProject, Project, children_of, gone, holdings, until

SLOW = """
kind = "successor" if open("run/smtp.pid").read() == f"{os.getpid()}\\n" else "trial"
if os.path.exists(f"run/{kind}-fails"):
    raise RuntimeError("no luck")
if os.path.exists(f"run/{kind}-waits"):
    import time
    settings.receiver.note(kind)
    while os.path.exists(f"run/{kind}-waits"):
        time.sleep(0.01)
"""
"""What a boot adds to fail or to wait in one of its two runs of a reload."""

LOG = """
import logging
logging.basicConfig(filename="run/log", level="INFO", format="[%(process)d] %(levelname)s: %(message)s")
"""


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    """A project whose receiver only waits."""
    made = Project(tmp_path)
    made.boot(LOG + SLOW)
    yield made
    made.clean_up()


@pytest.fixture
def desk(tmp_path: Path, free_port: Callable[[], int]) -> Iterator[MailProject]:
    """A project that takes mail."""
    made = MailProject(tmp_path, free_port())
    yield made
    made.clean_up()


def send(port: int, name: str, subject: str = "hi") -> int:
    """Send a message; the reply to it. Raises what smtplib raises."""
    with smtplib.SMTP("127.0.0.1", port, timeout=20) as client:
        client.ehlo("client.example.com")
        client.mail("alice@example.com")
        client.rcpt("desk@example.com")
        code, _ = client.data(f"Message-ID: {name}\r\nSubject: {subject}\r\n\r\nhello\r\n".encode())
        return code


def hup(project: Project) -> None:
    os.kill(project.pid(), signal.SIGHUP)


def logged(project: Project, what: str) -> int:
    path = project.path / "run" / "log"
    return path.read_text().count(what) if path.exists() else 0


def everything_of(pid: int) -> list[int]:
    """A process and all that it has started."""
    return [pid, *(each for child in children_of(pid) for each in everything_of(child))]


# ---- a reload that succeeds ------------------------------------------------------------------------------------


class Client(threading.Thread):
    """Sends message after message until it is told to stop."""

    def __init__(self, port: int, number: int, done: threading.Event) -> None:
        super().__init__()
        self.port = port
        self.number = number
        self.done = done
        self.accepted: list[str] = []
        self.sent_away = 0
        self.failure: BaseException | None = None

    def run(self) -> None:
        while not self.done.is_set():
            name = f"<{self.number}.{len(self.accepted)}.{self.sent_away}>"
            try:
                if send(self.port, name) == 250:
                    self.accepted.append(name)
                else:
                    self.sent_away += 1
            except smtplib.SMTPResponseException as error:
                if error.smtp_code != 421:  # who says nothing for half a second may be told to come again
                    self.failure = error
                    return
                self.sent_away += 1
            except BaseException as error:
                self.failure = error
                return


@pytest.mark.slow
def test_clients_are_served_through_three_reloads_and_every_250_is_handled_once(desk: MailProject) -> None:
    desk.start("-workers", "2")
    parent = desk.pid()
    done = threading.Event()
    clients = [Client(desk.port, number, done) for number in range(3)]
    for client in clients:
        client.start()
    for _ in range(3):
        desk.reload()
    done.set()
    for client in clients:
        client.join()
    assert [client.failure for client in clients] == [None] * 3
    accepted = [name for client in clients for name in client.accepted]
    assert len(accepted) > 20
    assert sum(client.sent_away for client in clients) < len(accepted)
    assert desk.run("stop").returncode == 0
    handled = [name for _, name in desk.handled()]
    assert sorted(set(accepted)) == sorted(set(accepted) & set(handled))
    assert sorted(handled) == sorted(set(handled))
    assert gone(parent)


def test_a_reload_brings_new_code_and_keeps_the_pid_and_the_lock(desk: MailProject) -> None:
    parent = desk.start()
    old = children_of(parent)
    assert send(desk.port, "<a>") == 250
    desk.version(2)
    assert send(desk.port, "<b>") == 250
    desk.reload()
    assert send(desk.port, "<c>") == 250
    assert desk.handled() == [(1, "<a>"), (1, "<b>"), (2, "<c>")]
    assert desk.pid() == parent
    assert desk.run("start").returncode == 4
    until(lambda: all(gone(pid) for pid in old))
    assert desk.run("stop").stdout == f"Attempting to stop lamsonq at pid {parent}\n"
    assert gone(parent)
    assert list((desk.path / "run").glob("*.pid")) == []


def test_another_port_in_the_settings_takes_effect_and_the_old_one_is_given_up(
    desk: MailProject, free_port: Callable[[], int]
) -> None:
    desk.start()
    new = free_port()
    desk.listen_on(new)
    desk.reload()
    assert send(new, "<a>") == 250
    until(lambda: not connects(desk.port))


@pytest.mark.slow
def test_a_unix_socket_stays_the_same_through_a_reload(desk: MailProject) -> None:
    desk.receive("SMTPReceiver(socket='run/smtp.sock', hostname='localhost')", "Queue('run/undeliverable')")
    desk.start()
    path = desk.path / "run" / "smtp.sock"
    before = path.stat().st_ino
    desk.reload()
    until(lambda: len(children_of(desk.pid())) == 1)
    assert path.stat().st_ino == before
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(20)
        client.connect(str(path))
        assert client.recv(64).startswith(b"220 localhost")


def connects(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def test_old_workers_of_a_queue_finish_their_jobs_and_new_ones_take_the_others(desk: MailProject) -> None:
    desk.receive("QueueReceiver('run/jobs', workers=2)")
    (desk.path / "run" / "hold").touch()
    jobs = Queue(str(desk.path / "run" / "jobs"))

    def push(name: str, subject: str) -> None:
        jobs.push(f"To: desk@example.com\nMessage-ID: {name}\nSubject: {subject}\n\nhello\n")

    push("<slow>", "slow")
    desk.start()
    until(lambda: jobs.backend.counts()["reserved"] == 1)
    desk.version(2)
    desk.reload(old_stay=True)
    push("<quick>", "quick")
    until(lambda: desk.handled() == [(2, "<quick>")])
    (desk.path / "run" / "hold").unlink()
    until(lambda: sum(jobs.backend.counts().values()) == 0)
    assert desk.handled() == [(2, "<quick>"), (1, "<slow>")]
    until(lambda: len(children_of(desk.pid())) == 1)


@pytest.mark.slow
def test_several_reloads_leave_nothing_behind(project: Project) -> None:
    parent = project.start("-workers", "2")
    hup(project)
    until(lambda: logged(project, "Loaded anew.") == 1 and len(children_of(parent)) == 2)
    before = holdings(parent), holdings(children_of(parent)[0])
    for _ in range(30):
        hup(project)
        time.sleep(0.005)
    until(lambda: logged(project, "Loaded anew.") >= 2)
    hup(project)
    until(lambda: quiet(project))
    assert (holdings(parent), holdings(children_of(parent)[0])) == before
    assert project.run("stop").returncode == 0
    assert all(gone(pid) for pid in project.noted("start"))


def quiet(project: Project) -> bool:
    """Whether no reload is under way: every one that began has ended, and so have the old children."""
    begun, ended = logged(project, "Loading anew:"), logged(project, "Loaded anew.")
    return begun == ended and len(children_of(project.pid())) == 2


@pytest.mark.slow
def test_twenty_reloads_leave_as_many_descriptors_threads_and_processes_as_one(desk: MailProject) -> None:
    parent = desk.start("-workers", "2")
    desk.reload()

    def held() -> tuple[dict[str, int], list[int]]:
        return holdings(parent), [holdings(child)["fds"] for child in children_of(parent)]

    until(lambda: desk.log().count("Queue receiver started") == 4)
    assert send(desk.port, "<a>") == 250
    until(lambda: len({*held()[1]}) == 1)
    before = held()
    for _ in range(20):
        desk.reload(old_stay=True)  # whom an old process has accepted in the last moment is served as well
        assert send(desk.port, "<a>") == 250
    until(lambda: len(children_of(parent)) == 2)
    until(lambda: held() == before)


@pytest.mark.slow
def test_a_hup_during_a_reload_means_one_more_reload(project: Project) -> None:
    project.start()
    (project.path / "run" / "trial-waits").touch()
    hup(project)
    project.wait_for("trial", 1)
    project.boot(LOG + SLOW + "settings.receiver.note('changed')\n")
    hup(project)
    hup(project)
    (project.path / "run" / "trial-waits").unlink()
    until(lambda: logged(project, "Loaded anew.") == 2)
    assert project.pid() in project.noted("changed")
    assert logged(project, "Loading anew:") == 2


@pytest.mark.slow
def test_what_a_server_has_handled_is_told_by_status_and_survives_a_reload(desk: MailProject) -> None:
    before = time.time()
    parent = desk.start("-workers", "2")
    for name in ("<a>", "<b>"):
        assert send(desk.port, name) == 250
    Queue(str(desk.path / "run" / "posts")).push("Subject: hi\n\nhello\n")
    pid_file = str(desk.path / "run" / "smtp.pid")
    until(lambda: figures(pid_file, parent)["handled"] == 2)
    started = figures(pid_file, parent)["started"]
    desk.reload()
    assert send(desk.port, "<c>") == 250
    until(lambda: figures(pid_file, parent)["handled"] == 3)
    told = json.loads(desk.run("status", "--json").stdout)
    found = told["servers"][0]
    assert (found["running"], found["workers"], found["failed"]) == (True, 2, 0)
    assert before < started == found["started"] < found["last_settled"] < time.time()
    assert 0 < found["uptime"] < time.time() - before
    assert found["per_minute"] == 3
    assert told["queues"]["run/posts"]["ready"] == 1
    assert 0 <= told["queues"]["run/posts"]["oldest"] < 20
    assert told["queues"]["run/undeliverable"]["oldest"] is None
    assert desk.run("stop", "-ALL").returncode == 0
    assert list((desk.path / "run").glob("smtp*")) == []


def test_a_handler_that_crashes_counts_as_failed(desk: MailProject) -> None:
    with (desk.path / "handlers.py").open("a") as handlers:
        handlers.write("    if message['subject'] == 'crash':\n        raise RuntimeError('no luck')\n")
    with (desk.path / "config" / "boot.py").open("a") as boot:
        boot.write("from lamsonq import tally\ntally.EVERY = 0.05\n")
    parent = desk.start()
    assert send(desk.port, "<a>") == 250
    assert send(desk.port, "<b>", "crash") == 250
    pid_file = str(desk.path / "run" / "smtp.pid")
    told = ("handled", "failed")
    until(lambda: sum(figures(pid_file, parent)[name] or 0 for name in told) == 2)
    assert [figures(pid_file, parent)[name] for name in told] == [1, 1]


@pytest.mark.slow
def test_usr1_opens_output_anew_and_the_log_follows_by_itself(desk: MailProject) -> None:
    with (desk.path / "config" / "boot.py").open("a") as boot:
        boot.write("print('booted', flush=True)\n")
    with (desk.path / "handlers.py").open("a") as handlers:
        handlers.write("print('loaded', flush=True)\nimport logging\n")
    (desk.path / "handlers.py").write_text(
        (desk.path / "handlers.py").read_text().replace("    line =", "    print('handling', flush=True)\n    line =")
    )
    parent = desk.start()
    for name in ("logs/lamsonq.out", "logs/lamsonq.err", "run/log"):
        (desk.path / name).rename(desk.path / f"{name}.1")
    before = holdings(parent)
    os.kill(parent, signal.SIGUSR1)
    new = desk.path / "logs" / "lamsonq.out"
    until(lambda: new.exists() and all(str(new) == os.readlink(f"/proc/{p}/fd/1") for p in everything_of(parent)))
    assert holdings(parent) == before
    assert send(desk.port, "<a>") == 250
    assert new.read_text() == "handling\n"
    new.rename(desk.path / "logs" / "lamsonq.out.2")
    desk.reload()
    assert "booted" in new.read_text()
    assert "Loading anew" in desk.log()
    assert not any(".err.1" in link for link in links(parent))


def links(pid: int) -> list[str]:
    return [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]


# ---- a reload that fails ---------------------------------------------------------------------------------------


def test_a_broken_boot_is_one_error_line_and_everything_goes_on(desk: MailProject) -> None:
    parent = desk.start()
    children = children_of(parent)
    good = (desk.path / "config" / "boot.py").read_text()
    (desk.path / "config" / "boot.py").write_text(good + "settings.nothing\n")
    hup(desk)
    until(lambda: "ERROR" in desk.log())
    assert send(desk.port, "<a>") == 250
    assert children_of(parent) == children
    (line,) = [line for line in desk.log().splitlines() if "ERROR" in line]
    place = f"config/boot.py:{good.count(chr(10)) + 1}: AttributeError: module 'config.settings' has no attribute"
    assert f"could not be loaded anew, and everything goes on as before: {place}" in line
    (desk.path / "config" / "boot.py").write_text(good)
    desk.version(2)
    desk.reload()
    assert send(desk.port, "<b>") == 250
    assert desk.handled() == [(1, "<a>"), (2, "<b>")]


@pytest.mark.slow
def test_a_trial_that_ends_without_an_answer_is_a_failure(project: Project) -> None:
    parent = project.start()
    children = children_of(parent)
    project.boot(LOG + "os._exit(7)\n")
    hup(project)
    until(lambda: logged(project, "ERROR: The boot could not be loaded anew") == 1)
    assert logged(project, "the process that tried the boot ended with exit code 7 before it had an answer") == 1
    assert children_of(parent) == children


@pytest.mark.slow
def test_a_trial_that_takes_too_long_is_given_up(project: Project) -> None:
    impatient = "from lamsonq import reload, commands; reload.PATIENCE = 1.0; commands.main()"
    command = [sys.executable, "-c", impatient, "start", "--no-daemon"]
    with subprocess.Popen(command, cwd=project.path, env=ENVIRON) as started:
        try:
            project.wait_until_it_listens()
            children = children_of(started.pid)
            (project.path / "run" / "trial-waits").touch()
            hup(project)
            until(lambda: logged(project, "the boot took longer than 1 seconds") == 1)
            assert children_of(started.pid) == children
        finally:
            started.terminate()
            assert started.wait(20) == 0


@pytest.mark.slow
def test_when_only_the_second_boot_fails_the_old_children_go_on_until_one_is_missing(project: Project) -> None:
    parent = project.start("-workers", "2")
    old = children_of(parent)
    (project.path / "run" / "successor-fails").touch()
    hup(project)
    until(lambda: logged(project, ": RuntimeError: no luck") == 1)
    assert children_of(parent) == old
    (project.path / "run" / "successor-fails").unlink()
    os.kill(old[0], signal.SIGKILL)
    until(lambda: logged(project, "Loaded anew.") == 1)
    until(lambda: gone(old[1]) and len(children_of(parent)) == 2)
    assert not set(old) & set(children_of(parent))
    assert project.run("stop").returncode == 0


@pytest.mark.slow
def test_new_children_that_do_not_come_up_leave_the_old_ones_where_they_are(project: Project) -> None:
    project.start("-workers", "2")
    old = project.noted("start")
    project.boot(LOG + SLOW + "def start(self):\n    raise OSError('no room')\nWaiting.start = start\n")
    hup(project)
    until(lambda: logged(project, "everything goes on as before: OSError: no room") == 1)
    until(lambda: sorted(children_of(project.pid())) == sorted(old))
    project.boot(LOG + SLOW)
    hup(project)
    until(lambda: logged(project, "Loaded anew.") == 1)
    assert project.run("stop").returncode == 0
    assert all(gone(pid) for pid in project.noted("start"))


# ---- the end of a server that loads anew -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["trial", "successor"])
def test_stop_works_while_a_boot_is_tried(project: Project, kind: str) -> None:
    parent = project.start("-workers", "2")
    (project.path / "run" / f"{kind}-waits").touch()
    hup(project)
    running = [*project.noted("start"), *project.wait_for(kind, 1)]
    stopped = project.run("stop")
    assert (stopped.returncode, stopped.stderr) == (0, "")
    assert all(gone(pid) for pid in (parent, *running))
    assert sorted(project.noted("stop(30)")) == sorted(project.noted("start"))
    assert list((project.path / "run").glob("smtp.*")) == []


@pytest.mark.parametrize("kind", ["trial", "successor"])
def test_a_parent_that_is_killed_while_it_loads_anew_leaves_no_orphan(project: Project, kind: str) -> None:
    parent = project.start("-workers", "2")
    (project.path / "run" / f"{kind}-waits").touch()
    hup(project)
    running = [*project.noted("start"), *project.wait_for(kind, 1)]
    os.kill(parent, signal.SIGKILL)
    until(lambda: all(gone(pid) for pid in (parent, *running)))
    assert project.run("status").returncode == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGQUIT])
def test_a_second_term_or_a_quit_gives_back_at_once_and_uncounted_what_a_handler_is_busy_with(
    desk: MailProject, number: int
) -> None:
    desk.receive("QueueReceiver('run/jobs')")
    (desk.path / "run" / "hold").touch()
    jobs = Queue(str(desk.path / "run" / "jobs"))
    key = jobs.push("To: desk@example.com\nMessage-ID: <a>\nSubject: slow\n\nhello\n")
    parent = desk.start()
    until(lambda: jobs.backend.counts()["reserved"] == 1)
    began = time.monotonic()
    os.kill(parent, number)
    while not gone(parent):
        time.sleep(0.05)  # two TERMs that come together are one to the kernel
        if number == signal.SIGTERM:
            os.kill(parent, number)
    assert time.monotonic() - began < 20
    assert jobs.backend.counts() == {"ready": 1, "delayed": 0, "dead": 0, "reserved": 0, "done": 0}
    job = jobs.backend.get(key)
    assert job is not None
    assert (job.deliveries, job.attempts) == (0, 0)
    assert desk.handled() == []


# ---- restart ---------------------------------------------------------------------------------------------------


def test_restart_stops_and_starts(project: Project) -> None:
    first = project.start()
    done = project.run("restart", "-workers", "2")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"Attempting to stop lamsonq at pid {first}\n", "")
    assert gone(first)
    second = project.pid()
    assert len(children_of(second)) == 2
    hup(project)  # it is a server like any other
    until(lambda: logged(project, "Loaded anew.") == 1)


@pytest.mark.slow
def test_restart_of_what_does_not_run_starts_it_and_says_so(project: Project) -> None:
    project.boot("")
    done = project.run("restart", "-pid", "run/other.pid")
    assert (done.returncode, done.stdout) == (0, "lamsonq not running: it is only started.\n")
    assert (project.path / "run" / "other.pid").exists()


def test_restart_of_what_cannot_be_booted_stops_nothing(desk: MailProject) -> None:
    parent = desk.start()
    with (desk.path / "config" / "boot.py").open("a") as boot:
        boot.write("settings.nothing\n")
    done = desk.run("restart")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("ERROR: config/boot.py:")
    assert desk.pid() == parent
    assert send(desk.port, "<a>") == 250


def test_restart_takes_the_port_of_the_server_that_it_has_stopped(desk: MailProject, tmp_path: Path) -> None:
    first = desk.start()
    desk.version(2)
    done = desk.run("restart", "-chdir", str(tmp_path), "-KILL")
    assert (done.returncode, done.stderr) == (0, "")
    assert gone(first)
    assert send(desk.port, "<a>") == 250
    assert desk.handled() == [(2, "<a>")]
