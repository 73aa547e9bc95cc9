"""HUP, from outside: nobody is refused, nothing is lost, and what cannot be loaded changes nothing."""

from __future__ import annotations

import json
import os
import shutil
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

from lamsonq import reload, tally
from lamsonq.child import GRACE
from lamsonq.pidfile import PidFile
from lamsonq.queue import Queue
from lamsonq.reload import Old, Record, Role
from lamsonq.sockets import Listener
from lamsonq.tally import figures

from .projects import ENVIRON, MailProject, Project, children_of, gone, holdings
from .waiting import PATIENCE, until

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
    with smtplib.SMTP("127.0.0.1", port, timeout=PATIENCE) as client:
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


def end(parent: int) -> None:
    """Leave nothing of a server that no pid file tells of, whatever came of its test."""
    if not gone(parent):
        os.killpg(parent, signal.SIGKILL)


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
        client.settimeout(PATIENCE)
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
        boot.write("from lamsonq import child, tally\nchild.EVERY = tally.EVERY = 0.05\n")
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


@pytest.mark.slow
@pytest.mark.parametrize("boot", ["", "settings.nothing\n"])
def test_a_pid_file_that_was_deleted_is_there_again_after_a_hup_whatever_comes_of_that(
    project: Project, boot: str
) -> None:
    parent = project.start()
    before = holdings(parent)
    project.boot(LOG + boot)
    (project.path / "run" / "smtp.pid").unlink()
    os.kill(parent, signal.SIGHUP)
    try:
        until(lambda: logged(project, "Loaded anew.") + logged(project, "could not be loaded anew") == 1)
        assert project.pid() == parent
        assert project.run("start").returncode == 4
        until(lambda: holdings(parent) == before)
        assert project.run("stop").stdout == f"Attempting to stop lamsonq at pid {parent}\n"
        assert gone(parent)
    finally:
        end(parent)
    assert list((project.path / "run").glob("smtp.*")) == []


@pytest.mark.slow
def test_a_pid_file_that_is_another_servers_by_now_stays_his_and_the_reload_goes_on(project: Project) -> None:
    parent = project.start()
    (project.path / "run" / "smtp.pid").unlink()
    other = project.start()
    (old,) = children_of(parent)
    os.kill(parent, signal.SIGHUP)
    try:
        until(lambda: gone(old) and len(children_of(parent)) == 1)
        assert project.pid() == other
        assert logged(project, "ERROR: The PID file was removed, and cannot be written anew") == 1
        assert logged(project, "Loaded anew.") == 1
        os.kill(parent, signal.SIGTERM)
        until(lambda: gone(parent))
    finally:
        end(parent)
    assert project.run("status").stdout == f"lamsonq running with PID {other}\n"


@pytest.mark.slow
def test_a_pid_file_that_somebody_has_written_into_is_reason_enough_not_to_reload(project: Project) -> None:
    parent = project.start()
    children = children_of(parent)
    (project.path / "run" / "smtp.pid").write_text("1234567\n")
    os.kill(parent, signal.SIGHUP)
    until(lambda: logged(project, "run/smtp.pid is not as it was written: remove it, and try again") == 1)
    assert children_of(parent) == children
    (project.path / "run" / "smtp.pid").unlink()
    os.kill(parent, signal.SIGHUP)
    until(lambda: logged(project, "Loaded anew.") == 1)
    assert project.pid() == parent


# ---- what is handed over, and what only looks like it ----------------------------------------------------------

IGNORED = "LAMSONQ_RELOAD in the environment is ignored: it is lamsonq's own.\n"


def forged(pid_file: int = -1, answer: int = -1, **more: object) -> str:
    """What a reload would hand over with these descriptors, though none is under way."""
    role: Role = "trial" if answer >= 0 else "successor"
    return reload._encoded(Record(role, answer=answer, pid_file=pid_file, **more))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nonsense",
        "\udcff",
        '{"role":"successor"}',
        '[{"role":"successor"},[]]',
        '[{"role":"trial"},[]]',
        '[{"role":"trial","answer":1},[1]]',
        '[{"role":"trial","answer":77},[77]]',
        '[{"role":"trial","answer":99999999999999999999},[1]]',
        '[{"role":"rehearsal","answer":-1},[]]',
    ],
)
def test_what_nobody_has_handed_over_is_ignored(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(reload, "_inherited", [])
    monkeypatch.setenv(reload.VARIABLE, text)
    assert reload.inherited("run/smtp.pid") is None
    assert reload.VARIABLE not in os.environ


@pytest.mark.slow
def test_a_server_starts_and_restarts_as_ever_with_a_forged_variable(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ENVIRON, reload.VARIABLE, '[{"role":"successor","pid_file":2,"lifeline":[0,1]},[1,2,3]]')
    done = project.run("start")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", IGNORED)
    assert len(children_of(project.pid())) == 1
    restarted = project.run("restart")
    assert (restarted.returncode, restarted.stderr) == (0, "")


def test_whoever_is_named_in_a_forged_variable_is_left_alone(project: Project) -> None:
    parent = project.start()
    with (
        subprocess.Popen(["sleep", "60"]) as stranger,
        (project.path / "run" / "smtp.pid").open() as file,
        socket.create_server(("127.0.0.1", 0)) as listener,
    ):
        reading, writing = os.pipe()
        fds = (file.fileno(), listener.fileno(), reading, writing)
        children = tuple(Old(pid, reading, False) for pid in (stranger.pid, *children_of(parent)))
        listeners = (Listener(listener.fileno(), ("127.0.0.1", 0, None)),)
        text = forged(file.fileno(), lifeline=(reading, writing), listeners=listeners, children=children)
        command = project.command("start", "-pid", "run/smtp.pid", "--no-daemon")
        environ = {**ENVIRON, reload.VARIABLE: text}
        try:
            done = subprocess.run(
                command, cwd=project.path, env=environ, pass_fds=fds, capture_output=True, timeout=60, check=False
            )
            assert done.returncode == 4
            assert done.stderr.decode().startswith(IGNORED + "ERROR: PID file run/smtp.pid exists")
            assert stranger.poll() is None
            assert not any(gone(child.pid) for child in children)
        finally:
            stranger.kill()
            os.close(reading)
            os.close(writing)


def test_a_former_image_is_believed_by_its_own_process_with_its_own_pid_file(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = PidFile("x.pid")
    mine.take()

    def believed(text: str, path: str = "x.pid") -> bool:
        monkeypatch.setattr(reload, "_inherited", [])
        monkeypatch.setenv(reload.VARIABLE, text)
        found = reload.inherited(path) is not None
        assert reload.VARIABLE not in os.environ
        return found

    assert believed(forged(mine.fd))
    assert not believed(forged(mine.fd), "y.pid")
    with open("x.pid") as unlocked:
        assert not believed(forged(unlocked.fileno()))
    with open("y.pid", "w+") as other:
        text = forged(other.fileno())
        assert not believed(text.replace(f'"pid_file":{other.fileno()}', f'"pid_file":{mine.fd}'))
    mine.give_back()
    assert not believed(text)


def test_a_child_that_has_the_descriptor_of_the_lock_is_no_former_image(here: Path) -> None:
    mine = PidFile("x.pid")
    mine.take()
    script = "from lamsonq import reload; print(reload.inherited('x.pid'))"
    environ = {**ENVIRON, reload.VARIABLE: forged(mine.fd)}
    command = [sys.executable, "-c", script]
    told = subprocess.run(command, env=environ, pass_fds=[mine.fd], capture_output=True, text=True, check=True)
    assert (told.stdout, told.stderr) == ("None\n", IGNORED)
    mine.give_back()


def test_a_trial_is_believed_only_with_the_pipe_for_its_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reload, "_inherited", [])
    first, second = os.pipe(), os.pipe()
    text = forged(answer=first[1])
    os.dup2(second[1], first[1])  # the same number, another pipe
    monkeypatch.setenv(reload.VARIABLE, text)
    assert reload.inherited("x.pid") is None
    monkeypatch.setenv(reload.VARIABLE, forged(answer=first[1]))
    record = reload.inherited("x.pid")
    assert record is not None
    assert record.role == "trial"
    for fd in (*first, *second):
        os.close(fd)


def test_what_is_handed_over_is_not_seen_by_a_boot_a_handler_and_what_they_start(
    desk: MailProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    look = "import subprocess\nsubprocess.run('env >> run/env; ls -l /proc/self/fd >> run/env', shell=True)\n"
    with (desk.path / "config" / "boot.py").open("a") as boot:
        boot.write(look)
    with (desk.path / "handlers.py").open("a") as handlers:
        handlers.write("".join(f"    {line}\n" for line in look.splitlines()))
    monkeypatch.setitem(ENVIRON, reload.VARIABLE, "forged")
    assert desk.run("start").returncode == 0
    assert send(desk.port, "<a>") == 250
    desk.reload()
    assert send(desk.port, "<b>") == 250
    told = (desk.path / "run" / "env").read_text()
    assert told.count("PYTHONPATH=") == 5
    assert reload.VARIABLE not in told
    assert "socket:" not in told
    assert "smtp.pid" not in told


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


NO_PROGRAMS = """
import errno, subprocess
popen = subprocess.Popen
def failing(*args, **options):
    if os.path.exists("run/no-programs"):
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
    return popen(*args, **options)
subprocess.Popen = failing
"""


def test_a_trial_that_cannot_be_started_is_one_error_line_and_everything_goes_on(project: Project) -> None:
    project.boot(LOG + NO_PROGRAMS)
    parent = project.start()
    before = holdings(parent), children_of(parent)
    (project.path / "run" / "no-programs").touch()
    hup(project)
    line = "as before: cannot start the process that tries the boot: Resource temporarily unavailable"
    until(lambda: logged(project, line) == 1)
    assert (holdings(parent), children_of(parent)) == before
    (project.path / "run" / "no-programs").unlink()
    hup(project)
    until(lambda: logged(project, "Loaded anew.") == 1)


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
            assert started.wait(PATIENCE) == 0


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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["trial", "successor"])
def test_a_parent_that_is_killed_while_it_loads_anew_leaves_no_orphan(project: Project, kind: str) -> None:
    parent = project.start("-workers", "2")
    (project.path / "run" / f"{kind}-waits").touch()
    hup(project)
    running = [*project.noted("start"), *project.wait_for(kind, 1)]
    os.kill(parent, signal.SIGKILL)
    until(lambda: all(gone(pid) for pid in (parent, *running)))
    assert project.run("status").returncode == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGQUIT, marks=pytest.mark.slow)])
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
    assert time.monotonic() - began < GRACE
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


def what_runs(project: Project, pid_file: str) -> tuple[str, int, float]:
    path = str(project.path / pid_file)
    found = tally.started(path, int(Path(path).read_text()))
    assert found is not None
    return found.boot, found.workers, found.grace


def test_restart_without_a_boot_is_of_the_boot_that_runs_as_it_runs(project: Project) -> None:
    project.boot("")
    shutil.copy(project.path / "config" / "boot.py", project.path / "config" / "outbox.py")
    project.boot("raise Refusal('not this one')\n")
    first = started(project, "-boot", "config.outbox", "-pid", "run/outbox.pid", "-workers", "2", "-grace", "7")
    done = project.run("restart", "-pid", "run/outbox.pid")
    assert (done.returncode, done.stdout) == (0, f"Attempting to stop lamsonq at pid {first}\n")
    assert what_runs(project, "run/outbox.pid") == ("config.outbox", 2, 7.0)
    assert project.run("restart", "-pid", "run/outbox.pid", "-workers", "1", "--grace=9").returncode == 0
    assert what_runs(project, "run/outbox.pid") == ("config.outbox", 1, 9.0)


def started(project: Project, *options: str) -> int:
    done = project.run("start", *options)
    assert (done.returncode, done.stderr) == (0, "")
    return int((project.path / options[options.index("-pid") + 1]).read_text())


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["", '{"pid": 1, "version": 1}', "{"])
def test_restart_of_nobody_knows_what_stops_nothing(project: Project, damage: str) -> None:
    parent = project.start()
    (project.path / "run" / "smtp.status").write_text(damage)
    done = project.run("restart")
    line = "ERROR: it is not known which boot runs under run/smtp.pid (yet): give -boot\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", line)
    assert not gone(parent)
    assert project.run("restart", "-boot", "config.boot").returncode == 0
    assert gone(parent)


def test_restart_of_a_log_server_stops_nothing(project: Project) -> None:
    assert project.run("log", "-port", "0").returncode == 0
    parent = int((project.path / "run" / "log.pid").read_text())
    done = project.run("restart", "-pid", "run/log.pid")
    assert (done.returncode, done.stdout) == (1, "")
    assert "runs `lamsonq log`: stop it, and start that again" in done.stderr
    assert not gone(parent)


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
