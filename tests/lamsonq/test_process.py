"""Processes, seen from outside: real parents and children, with a receiver that only waits."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lamsonq import pidfile
from lamsonq.deferred import publish
from lamsonq.errors import PidFileError, Refusal
from lamsonq.queue import Queue

from .cli import lamsonq
from .projects import ENVIRON, Project, children_of, gone
from .waiting import PATIENCE, until


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    made = Project(tmp_path)
    yield made
    made.clean_up()


# ---- start and stop --------------------------------------------------------------------------------------------


def test_start_returns_when_all_children_have_started_and_stop_when_all_have_ended(project: Project) -> None:
    parent = project.start("-workers", "3")
    assert project.noted("bind") == [parent]
    children = project.noted("start")
    assert len(set(children)) == 3
    stopped = project.run("stop")
    assert (stopped.returncode, stopped.stdout) == (0, f"Attempting to stop lamsonq at pid {parent}\n")
    assert all(gone(pid) for pid in (parent, *children))
    assert not (project.path / "run" / "smtp.pid").exists()


def test_a_server_has_no_terminal_and_its_files_are_not_for_others(project: Project) -> None:
    parent = project.start()
    assert os.readlink(f"/proc/{parent}/fd/0") == "/dev/null"
    assert os.readlink(f"/proc/{parent}/fd/2") == str(project.path / "logs" / "lamsonq.err")
    assert os.getsid(parent) != os.getsid(0)
    assert (project.path / "run" / "smtp.pid").stat().st_mode & 0o777 == 0o640
    assert (project.path / "run" / "notes").stat().st_mode & 0o007 == 0


def test_a_receiver_whose_start_works_until_it_is_stopped_counts_as_started(project: Project) -> None:
    project.boot("Waiting.start = lambda self: (self.note('start'), self.stopped.wait())\n")
    project.start()
    assert project.run("stop").returncode == 0


def test_a_second_start_is_refused_and_force_cannot_take_the_lock(project: Project) -> None:
    parent = project.start()
    for options in ([], ["-FORCE", "True"]):
        again = project.run("start", *options)
        assert again.returncode == 4
        assert again.stderr == (
            "ERROR: PID file run/smtp.pid exists, so assuming lamsonq is running.  "
            "Stop it first (lamsonq stop -pid run/smtp.pid); for a boot lamsonq restart does both.\n"
        )
    assert not gone(parent)


@pytest.mark.slow
def test_of_starts_at_the_same_time_exactly_one_wins(project: Project) -> None:
    with ThreadPoolExecutor(5) as pool:
        done = list(pool.map(lambda _: project.run("start"), range(5)))
    assert sorted(each.returncode for each in done) == [0, 4, 4, 4, 4]
    assert len(project.noted("bind")) == 1
    assert project.noted("bind") == [project.pid()]


def test_a_killed_server_leaves_a_stale_file_that_the_next_start_takes_over(project: Project) -> None:
    parent = project.start()
    os.kill(parent, signal.SIGKILL)
    until(lambda: gone(parent))
    assert project.run("status").returncode == 1
    assert project.start() != parent


def test_children_end_when_their_parent_is_killed(project: Project) -> None:
    parent = project.start("-workers", "2")
    children = project.noted("start")
    os.kill(parent, signal.SIGKILL)
    until(lambda: all(gone(pid) for pid in children))
    assert sorted(project.noted("stop(0)")) == sorted(children)


@pytest.mark.slow
def test_a_surviving_child_does_not_hold_the_pid_file(project: Project) -> None:
    project.boot("Waiting.stop = lambda self, grace=30.0: None\nfrom lamsonq import child\nchild.MARGIN = 2.0\n")
    parent = project.start()
    os.kill(parent, signal.SIGKILL)
    until(lambda: gone(parent))
    assert not gone(project.noted("start")[0])
    assert pidfile.find(str(project.path / "run" / "smtp.pid")) is None
    until(lambda: gone(project.noted("start")[0]))


@pytest.mark.parametrize("workers", ["1", "3"])
def test_a_job_that_its_process_dies_of_at_once_keeps_no_server_from_starting(project: Project, workers: str) -> None:
    project.boot(
        "from lamsonq.deferred import deferrable\n"
        "from lamsonq.server import QueueReceiver\n"
        "@deferrable(name='dies')\n"
        "def dies():\n"
        "    os._exit(3)\n"
        "settings.receiver = QueueReceiver('run/jobs')\n"
    )
    jobs = str(project.path / "run" / "jobs")
    publish(jobs, "dies", {})
    parent = project.start("-workers", workers)
    until(lambda: Queue(jobs).backend.counts()["dead"] == 1)
    assert project.pid() == parent
    assert project.run("stop").returncode == 0


def test_a_child_that_dies_is_replaced(project: Project) -> None:
    project.start()
    first = project.noted("start")[0]
    os.kill(first, signal.SIGKILL)
    second = project.wait_for("start", 2)[1]
    assert second != first
    assert project.run("stop").returncode == 0
    assert gone(second)


def test_a_child_whose_receiver_is_stuck_is_replaced_before_it_has_ended(project: Project) -> None:
    project.boot(
        "Waiting.drains = False\n"
        "def start(self):\n"
        "    self.note('start')\n"
        "    if not os.path.exists('run/replaced'):\n"
        "        open('run/replaced', 'w').close()\n"
        "        self.stuck = True\n"
        "Waiting.start = start\n"
    )
    project.start()
    first, second = project.wait_for("start", 2)
    assert not gone(first)
    assert not gone(second)
    assert project.noted("stop(30)") == [first]


def test_hup_ends_no_child(project: Project) -> None:
    project.start("-workers", "2")
    children = project.noted("start")
    for pid in children:
        os.kill(pid, signal.SIGHUP)
    assert project.run("stop").returncode == 0
    assert sorted(project.noted("stop(30)")) == sorted(children)


def test_a_second_term_ends_quickly_what_the_first_one_waits_for(project: Project) -> None:
    project.boot("Waiting.drains = False\n")
    parent = project.start()
    os.kill(parent, signal.SIGTERM)
    project.wait_for("stop(30)", 1)
    assert not gone(parent)
    os.kill(parent, signal.SIGTERM)
    until(lambda: gone(parent))
    assert len(project.noted("stop(0)")) == 1


@pytest.mark.slow
@pytest.mark.parametrize("grace", ["0", "7"])
def test_the_grace_is_what_children_get_at_term_and_at_hup(project: Project, grace: str) -> None:
    project.start("-grace", grace)
    reload(project)
    assert len(project.noted(f"stop({grace})")) == 1
    assert project.run("stop").returncode == 0
    assert project.noted(f"stop({grace})") == project.noted("start")


@pytest.mark.slow
def test_stop_waits_as_long_as_the_grace_of_the_server_allows(project: Project) -> None:
    project.boot("from lamsonq import child\nchild.MARGIN = 0.2\nWaiting.drains = False\n")
    parent = project.start("--grace=2")
    impatient = "from lamsonq import process; process.GRACE, process.MARGIN = 0, 0.75"
    script = f"{impatient}; print(process.stop(['run/smtp.pid']))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=project.path, env=ENVIRON, capture_output=True, text=True, check=True
    )
    assert done.stdout == f"Attempting to stop lamsonq at pid {parent}\n[]\n"


def test_kill_ends_a_server_and_its_children_at_once(project: Project) -> None:
    project.boot("Waiting.drains = False\n")
    parent = project.start("-workers", "2")
    assert project.run("stop", "-KILL").returncode == 0
    until(lambda: all(gone(pid) for pid in (parent, *project.noted("start"))))
    assert project.noted("stop(30)") == []
    assert not (project.path / "run" / "smtp.pid").exists()


# ---- what a boot or a handler forks ----------------------------------------------------------------------------

HELPER = """
if not os.fork():
    settings.receiver.note("helper")
    while True:
        threading.Event().wait(60)
"""


@pytest.fixture
def helped(project: Project) -> Iterator[Project]:
    """A project whose boot forks a process that stays."""
    project.boot(HELPER)
    yield project
    for pid in project.noted("helper"):
        if not gone(pid):
            os.kill(pid, signal.SIGKILL)


def reload(project: Project) -> None:
    """Load anew, and wait until the old child has gone."""
    old, begun = project.noted("start"), len(project.noted("start"))
    os.kill(project.pid(), signal.SIGHUP)
    project.wait_for("start", begun + 1)
    until(lambda: all(gone(pid) for pid in old))


@pytest.mark.slow
def test_a_helper_that_a_boot_has_forked_is_not_taken_for_a_child(helped: Project) -> None:
    parent = helped.start()
    (helper,) = helped.wait_for("helper", 1)
    os.kill(helper, signal.SIGTERM)
    until(lambda: gone(helper))
    reload(helped)
    first, _trial, fresh = helped.wait_for("helper", 3)
    assert first == helper
    os.kill(fresh, signal.SIGTERM)
    until(lambda: gone(fresh))
    assert len(helped.noted("start")) == 2
    assert not gone(helped.noted("start")[-1])
    assert helped.run("stop").stdout == f"Attempting to stop lamsonq at pid {parent}\n"
    assert (helped.path / "logs" / "lamsonq.err").read_text() == ""


@pytest.mark.slow
@pytest.mark.parametrize("reloads", [0, 1])
def test_a_helper_that_a_boot_has_forked_keeps_neither_the_lock_nor_the_children(helped: Project, reloads: int) -> None:
    parent = helped.start()
    for _ in range(reloads):
        reload(helped)
    helper = helped.wait_for("helper", 1 + 2 * reloads)[-1]
    os.kill(parent, signal.SIGKILL)
    until(lambda: gone(helped.noted("start")[-1]))
    assert helped.run("status").returncode == 1
    assert not gone(helper)
    assert helped.start() != parent


def test_a_helper_of_a_trial_ends_with_it(helped: Project) -> None:
    helped.start()
    reload(helped)
    first, trial, fresh = helped.wait_for("helper", 3)
    assert [gone(pid) for pid in (first, trial, fresh)] == [False, True, False]


@pytest.mark.slow
@pytest.mark.parametrize("end", ["", "if not child:\n    raise RuntimeError('lost')\n", "if not child:\n    exit()\n"])
def test_a_helper_that_comes_out_of_its_boot_is_no_second_server(project: Project, end: str) -> None:
    project.boot(f"child = os.fork()\n{end}")
    parent = project.start()
    reload(project)
    first, _trial, fresh = project.noted("bind")
    assert first == fresh == parent
    assert len(project.noted("start")) == 2
    assert project.run("stop").returncode == 0


def test_the_end_of_a_child_is_noticed_although_what_a_handler_has_forked_lives_on(project: Project) -> None:
    project.boot(
        "def start(self):\n"
        "    self.note('start')\n"
        "    if not os.fork():\n"
        "        self.note('helper')\n"
        "        threading.Event().wait(60)\n"
        "        os._exit(0)\n"
        "Waiting.start = start\n"
    )
    project.start()
    first = project.wait_for("helper", 1)[0]
    try:
        os.kill(project.noted("start")[0], signal.SIGKILL)
        project.wait_for("helper", 2)
        assert project.run("stop").returncode == 0
        assert not gone(first)
    finally:
        for pid in project.noted("helper"):
            os.kill(pid, signal.SIGKILL)


LATE = """
import ctypes, operator, select
from functools import partial
from types import SimpleNamespace
from lamsonq import supervisor

class Late:
    def __init__(self):
        self.real = select.poll()
        self.register = self.real.register
    def poll(self, timeout):
        if not os.path.exists("run/late"):
            return self.real.poll(timeout)
        os.unlink("run/late")
        kill = partial(ctypes.CDLL(None).kill, os.getpid(), 15)
        # C calls C here: no handler that is written in Python runs between the two.
        return list(map(operator.call, [kill, partial(self.real.poll, timeout)]))[1]

supervisor.select = SimpleNamespace(poll=Late, POLLIN=select.POLLIN)
"""
"""What a boot adds so that TERM comes to a parent that has looked for signals and is just going to sleep."""


def test_a_signal_that_comes_in_the_moment_before_the_parent_sleeps_is_heard(project: Project) -> None:
    project.boot(LATE)
    parent = project.start()
    (project.path / "run" / "late").touch()
    os.kill(parent, signal.SIGUSR1)
    until(lambda: gone(parent))
    assert len(project.noted("stop(30)")) == 1


# ---- a machine that is short of processes ----------------------------------------------------------------------

NO_FORKS = """
import ctypes
import errno
from lamsonq import supervisor
supervisor._QUICK = 0.05
fork = os.fork
def counted():
    if os.path.exists("run/forks-left"):
        with open("run/forks-left") as file:
            left = int(file.read())
        if not left:
            settings.receiver.note("refused")
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        with open("run/forks-left", "w") as file:
            file.write(str(left - 1))
    return fork()
os.fork = counted
"""
"""What a boot adds so that only so many processes can be forked as the file run/forks-left says."""

CANNOT_FORK = "cannot start a process: Resource temporarily unavailable"


@pytest.mark.slow
def test_a_parent_that_cannot_fork_keeps_trying_and_the_server_lives(project: Project) -> None:
    project.boot(NO_FORKS)
    parent = project.start("-workers", "2")
    first, second = project.noted("start")
    limit = project.path / "run" / "forks-left"
    limit.write_text("0")
    os.kill(first, signal.SIGKILL)
    project.wait_for("refused", 3)
    assert project.run("status").stdout == f"lamsonq running with PID {parent}\n"
    assert children_of(parent) == [second]
    assert f"{CANNOT_FORK}; trying again." in (project.path / "logs" / "lamsonq.err").read_text()
    limit.unlink()
    third = project.wait_for("start", 3)[2]
    assert sorted(children_of(parent)) == sorted([second, third])
    assert project.run("stop").returncode == 0


@pytest.mark.parametrize(
    ("forks", "line"),
    [
        (0, f"ERROR: {CANNOT_FORK}"),
        (1, "ERROR: the server ended before it listened; logs/lamsonq.err may tell why"),
    ],
)
def test_a_start_that_cannot_become_a_daemon_is_refused(project: Project, forks: int, line: str) -> None:
    (project.path / "run" / "forks-left").write_text(str(forks))
    script = NO_FORKS.replace("settings.receiver.note", "print")
    command = [sys.executable, "-c", f"import os\n{script}from lamsonq import commands\ncommands.main()", "start"]
    done = subprocess.run(
        command, cwd=project.path, env=ENVIRON, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, line)
    assert project.noted("bind") == []
    assert not (project.path / "run" / "smtp.pid").exists()


@pytest.mark.parametrize("forks", [0, 1])
def test_a_start_that_cannot_fork_all_its_children_leaves_none(project: Project, forks: int) -> None:
    project.boot(NO_FORKS)
    (project.path / "run" / "forks-left").write_text(str(forks))
    assert failed(project, "-workers", "2") == (1, f"ERROR: {CANNOT_FORK}\n")
    assert len(project.noted("start")) == forks
    assert all(gone(pid) for pid in project.noted("start"))


@pytest.mark.slow
@pytest.mark.parametrize("forks", [0, 1])
def test_a_reload_that_cannot_fork_leaves_the_old_children_where_they_are(project: Project, forks: int) -> None:
    project.boot(NO_FORKS)
    parent = project.start("-workers", "2")
    old = project.noted("start")
    limit = project.path / "run" / "forks-left"
    limit.write_text(str(forks))
    os.kill(parent, signal.SIGHUP)
    error = project.path / "logs" / "lamsonq.err"
    until(lambda: f"everything goes on as before: {CANNOT_FORK}" in error.read_text())
    until(lambda: sorted(children_of(parent)) == sorted(old))
    limit.unlink()
    os.kill(parent, signal.SIGHUP)
    until(lambda: all(gone(pid) for pid in old) and len(children_of(parent)) == 2)
    assert "Traceback" not in error.read_text()
    assert project.run("stop").returncode == 0


# ---- failures at the start -------------------------------------------------------------------------------------


def failed(project: Project, *args: str) -> tuple[int, str]:
    """The code and the one line of a start that has to fail, and that leaves nothing behind."""
    done = project.run("start", *args)
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert not os.path.lexists(project.path / "run" / "smtp.pid")
    return done.returncode, done.stderr


def test_a_bind_that_is_refused_ends_the_start_with_its_line(project: Project) -> None:
    project.boot("def bind(self):\n    raise Refusal('port 25 on 127.0.0.1 is in use')\nWaiting.bind = bind\n")
    assert failed(project) == (1, "ERROR: port 25 on 127.0.0.1 is in use\n")


def test_a_receiver_that_fails_in_the_child_ends_the_start_with_its_line(project: Project) -> None:
    project.boot("def start(self):\n    raise OSError('no luck')\nWaiting.start = start\n")
    assert failed(project, "-workers", "2") == (1, "ERROR: OSError: no luck\n")


def test_a_child_that_is_killed_at_once_ends_the_start(project: Project) -> None:
    project.boot("Waiting.start = lambda self: os.kill(os.getpid(), 9)\n")
    code, line = failed(project)
    assert code == 1
    assert "was killed by signal 9 before the server listened" in line


def test_a_boot_that_ends_the_process_is_noticed(project: Project) -> None:
    project.boot("os._exit(7)\n")
    done = project.run("start")
    assert done.returncode == 1
    assert done.stderr == "ERROR: the server ended before it listened; logs/lamsonq.err may tell why\n"


def test_a_boot_with_a_mistake_is_a_line_with_its_place(project: Project) -> None:
    project.boot("\nsettings.recever.port\n")
    line = (project.path / "config" / "boot.py").read_text().splitlines().index("settings.recever.port") + 1
    code, text = failed(project)
    assert code == 2
    assert text.startswith(f"ERROR: config/boot.py:{line}: AttributeError: module 'config.settings' has no attribute")


def test_a_boot_without_a_receiver_is_refused(project: Project) -> None:
    project.boot("settings.receiver = None\n")
    code, text = failed(project)
    assert (code, text) == (
        2,
        "ERROR: config.boot sets no settings.receiver: there is nothing to start; write settings.receiver = ...\n",
    )


def test_wrong_settings_have_a_code_of_their_own(project: Project) -> None:
    (project.path / "config" / "settings.toml").write_text("[receiver]\nport = 'x'\n")
    (project.path / "config" / "settings.py").write_text("from lamsonq.settings import machine\nhere = machine()\n")
    expected = 'ERROR: config/settings.toml: receiver.port: expected an int, found the str "x"\n'
    assert failed(project) == (5, expected)


def test_a_directory_that_is_no_project_is_left_as_it_is(project: Project, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    code, line = failed(project, "-chdir", str(empty), "-boot", "no_such_project.boot")
    assert code == 2
    assert line.startswith(f"ERROR: there is no no_such_project.boot in {empty}")
    assert list(empty.iterdir()) == []


def test_a_run_directory_that_cannot_be_written_is_refused(project: Project) -> None:
    (project.path / "run").rmdir()
    (project.path / "run").write_text("a file, not a directory")
    done = project.run("start")
    assert (done.returncode, done.stderr) == (
        1,
        "ERROR: run is a file, and has to be a directory for run/smtp.pid: move it away\n",
    )


# ---- the foreground --------------------------------------------------------------------------------------------


def test_in_the_foreground_it_tells_systemd_when_it_listens_and_ends_with_0_at_ctrl_c(project: Project) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(project.path / "notify"))
        manager.settimeout(PATIENCE)
        environ = {**ENVIRON, "NOTIFY_SOCKET": str(project.path / "notify")}
        command = project.command("start", "--no-daemon")
        with subprocess.Popen(command, cwd=project.path, env=environ, process_group=0) as server:
            try:
                assert manager.recv(64) == b"READY=1"
                assert project.pid() == server.pid
                os.killpg(server.pid, signal.SIGINT)  # as the terminal does it: to the children too
                assert server.wait(PATIENCE) == 0
            finally:
                server.kill()
    assert project.noted("stop(30)") == project.noted("start")
    assert project.noted("stop(0)") == []
    assert not (project.path / "run" / "smtp.pid").exists()


def test_of_signals_that_come_together_a_child_hears_each_at_once(project: Project) -> None:
    parent = project.start()
    (child,) = project.noted("start")
    output = project.path / "logs" / "lamsonq.out"
    for _ in range(100):  # of two signals the kernel may give one to a thread in which Python runs no handlers
        output.unlink()
        os.kill(child, signal.SIGHUP)
        os.kill(child, signal.SIGUSR1)
        until(output.exists)
    os.kill(child, signal.SIGHUP)
    os.kill(parent, signal.SIGTERM)
    until(lambda: gone(parent))
    assert project.noted("stop(30)") == [child]


def test_debug_shows_the_log_on_stderr(project: Project) -> None:
    project.boot("import logging\nlogging.getLogger().setLevel('INFO')\n")
    command = project.command("start", "-debug")
    with subprocess.Popen(command, cwd=project.path, env=ENVIRON, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            lines = iter(server.stderr.readline, "")
            assert next(lines) == "lamsonq started in debug mode. ctrl-c to quit...\n"
            assert any("INFO:root:waiting with 1 process(es)." in line for line in lines)
            server.terminate()
            assert server.wait(PATIENCE) == 0
        finally:
            server.kill()


# ---- pid files -------------------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "x.pid")


def test_a_pid_file_holds_the_pid_and_a_newline_and_goes_when_it_is_given_back(path: str) -> None:
    mine = pidfile.PidFile(path)
    mine.take()
    assert Path(path).read_text() == f"{os.getpid()}\n"
    running = pidfile.find(path)
    assert running is not None
    assert running.pid == os.getpid()
    running.close()
    mine.give_back()
    mine.give_back()
    assert not os.path.lexists(path)


def test_a_pid_file_that_is_held_is_not_taken(path: str) -> None:
    mine = pidfile.PidFile(path)
    mine.take()
    with pytest.raises(PidFileError, match="assuming lamsonq is running"):
        pidfile.PidFile(path).take()
    mine.give_back()


@pytest.mark.parametrize("content", ["1234567\n", "{own}\n", "4711", "", "0\n", "1", "1\n", "99999999\n"])
def test_a_file_that_nobody_locks_is_stale_whatever_pid_it_names(path: str, content: str) -> None:
    Path(path).write_text(content.format(own=os.getpid()))
    assert pidfile.find(path) is None
    mine = pidfile.PidFile(path)
    mine.take()
    assert Path(path).read_text() == f"{os.getpid()}\n"
    mine.give_back()


@pytest.mark.parametrize("content", ["-5\n", "0x1\n", "port = 25\n", "12\n13\n", "\n", "1" * 64])
def test_a_file_that_is_no_pid_file_is_left_alone(path: str, content: str) -> None:
    Path(path).write_text(content)
    with pytest.raises(PidFileError, match="no pid"):
        pidfile.PidFile(path).take()
    with pytest.raises(PidFileError, match="no pid"):
        pidfile.find(path)
    assert Path(path).read_text() == content


@pytest.mark.parametrize("options", [(), ("-json",)])
def test_status_of_what_is_no_pid_file_is_no_no_but_4(here: Path, options: tuple[str, ...]) -> None:
    Path("run").mkdir()
    Path("run/settings").write_text("port = 25\n")
    for path in ("run/settings", "/etc/passwd", "run"):
        done = lamsonq("status", "-pid", path, *options, code=4)
        assert done.stdout == ""
        assert done.stderr.startswith(f"ERROR: PID file {path} ")
    lamsonq("status", "-pid", "run/nothing.pid", code=1)


@pytest.mark.slow
def test_a_pid_file_that_a_container_has_left_behind_does_not_stop_a_start(project: Project) -> None:
    for options in ((), ("-FORCE",)):
        (project.path / "run" / "smtp.pid").write_text("1\n")
        assert project.run("status").returncode == 1
        project.start(*options)
        assert project.run("stop").returncode == 0


def test_a_link_is_no_pid_file(path: str, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("4711\n")
    os.symlink(target, path)
    for look in (pidfile.PidFile(path).take, lambda: pidfile.find(path), lambda: pidfile.remove_stale(path)):
        with pytest.raises(PidFileError, match="is a link"):
            look()
    assert target.read_text() == "4711\n"


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_a_directory_or_a_pipe_is_no_pid_file(path: str, make: Callable[[str], None]) -> None:
    make(path)
    with pytest.raises(PidFileError):
        pidfile.PidFile(path).take()


@pytest.mark.parametrize("pid", ["1\n", "0\n"])
def test_nobody_below_2_is_signalled_even_when_the_file_is_locked(path: str, pid: str) -> None:
    Path(path).write_text(pid)
    with open(path) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(PidFileError):
            pidfile.find(path)


def test_a_stranger_with_the_pid_of_an_unlocked_file_is_not_signalled(project: Project) -> None:
    with subprocess.Popen(["sleep", "60"]) as stranger:
        try:
            pid_file = project.path / "run" / "smtp.pid"
            pid_file.write_text(f"{stranger.pid}\n")
            stopped = project.run("stop", "-KILL")
            assert (stopped.returncode, stopped.stdout) == (0, "")
            assert "left behind by a server that has ended: removed" in stopped.stderr
            assert stranger.poll() is None
            assert not pid_file.exists()
        finally:
            stranger.kill()


def test_a_pid_file_that_another_start_has_replaced_is_not_removed(path: str) -> None:
    mine = pidfile.PidFile(path)
    mine.take()
    os.unlink(path)
    Path(path).write_text("another\n")
    mine.give_back()
    assert Path(path).read_text() == "another\n"


def test_a_pid_file_that_was_removed_is_written_anew_with_the_lock(path: str) -> None:
    mine = pidfile.PidFile(path)
    mine.take()
    before = mine.fd
    mine.renew()
    assert mine.fd == before
    os.unlink(path)
    mine.renew()
    assert Path(path).read_text() == f"{os.getpid()}\n"
    running = pidfile.find(path)
    assert running is not None
    running.close()
    assert not any(os.readlink(f"/proc/self/fd/{fd}") == f"{path} (deleted)" for fd in open_descriptors())
    mine.give_back()
    assert not os.path.lexists(path)


def open_descriptors() -> list[str]:
    """Those of this process that are open for longer than this look."""
    return [fd for fd in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{fd}")]


def test_a_pid_file_is_written_anew_where_it_was_although_the_directory_has_changed(here: Path) -> None:
    mine = pidfile.PidFile("x.pid")
    mine.take()
    os.unlink("x.pid")
    (here / "elsewhere").mkdir()
    os.chdir("elsewhere")
    mine.renew()
    assert (here / "x.pid").read_text() == f"{os.getpid()}\n"
    mine.give_back()
    assert [each.name for each in here.iterdir()] == ["elsewhere"]


def test_a_pid_file_is_not_written_anew_in_the_place_of_what_is_there_now(path: str, tmp_path: Path) -> None:
    mine, other = pidfile.PidFile(path), pidfile.PidFile(path)
    mine.take()
    os.unlink(path)
    other.take()
    with pytest.raises(PidFileError, match="assuming lamsonq is running"):
        mine.renew()
    other.give_back()
    os.symlink(tmp_path / "target", path)
    with pytest.raises(PidFileError, match="is a link"):
        mine.renew()
    os.unlink(path)
    mine.renew()
    assert Path(path).read_text() == f"{os.getpid()}\n"
    mine.give_back()


def test_a_pid_file_that_does_not_fit_on_the_disk_is_refused_and_leaves_nothing(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_fd: int, _data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    mine = pidfile.PidFile(path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(Refusal, match=r"x\.pid: No space left on device"):
            mine.take()
    assert not os.path.lexists(path)
    mine.take()
    assert Path(path).read_text() == f"{os.getpid()}\n"
    mine.give_back()


def test_only_a_file_that_this_process_has_taken_is_its_own(path: str) -> None:
    mine = pidfile.PidFile(path)
    mine.take()
    assert pidfile.is_own(mine.fd, path)
    assert not pidfile.is_own(mine.fd, f"{path}.other")
    with open(path) as look:  # another view of it, without the lock
        assert not pidfile.is_own(look.fileno(), path)
    Path(path).write_text("4711\n")
    assert not pidfile.is_own(mine.fd, path)
    Path(path).write_text(f"{os.getpid()}\n")
    os.unlink(path)
    assert pidfile.is_own(mine.fd, path)
    mine.give_back()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_file_of_another_user_is_not_our_own(path: str) -> None:
    mine = pidfile.PidFile(path)
    mine.take()
    os.chown(path, 4242, -1)
    assert not pidfile.is_own(mine.fd, path)
    mine.give_back()


UNSHARE = ("unshare", "--pid", "--mount-proc", "--fork", "--kill-child")


@pytest.mark.skipif(
    subprocess.run([*UNSHARE, "true"], capture_output=True, check=False).returncode != 0,
    reason="a process of its own namespace takes root, and a kernel that allows it",
)
def test_a_server_may_be_the_first_process_of_a_container(project: Project) -> None:
    # Another process of the container waits until it listens, looks at it, and stops it.
    script = """
        (until [ -s run/smtp.status ]; do sleep 0.05; done; "$0" -m lamsonq status; "$0" -m lamsonq stop) &
        exec "$0" -m lamsonq start --no-daemon
    """
    command = [*UNSHARE, "sh", "-c", script, sys.executable]
    done = subprocess.run(
        command, cwd=project.path, env=ENVIRON, capture_output=True, text=True, timeout=60, check=False
    )
    assert "lamsonq running with PID 1\n" in done.stdout
    assert done.returncode == 0
    assert project.noted("stop(30)") == project.noted("start")


# ---- memory ----------------------------------------------------------------------------------------------------

LARGE_BLOCKS = """
import ctypes, os
from lamsonq.child import Child

class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd b c d e f".split()]

def mapped():
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = Info
    return mallinfo().hblks

class Receiver:
    stuck = False

    def start(self):
        for _ in range(3):  # after the first one glibc would take room for the next ones from its heap
            before = mapped()
            block = bytes(256 * 1024)
            print(mapped() - before)
            del block

    def join(self): ...

lifeline, parent = os.pipe()
told, status = os.pipe()
Child(Receiver(), status, lifeline, 0.0, None).live()
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33")
def test_a_child_gives_each_large_block_back_to_the_system() -> None:
    done = subprocess.run([sys.executable, "-c", LARGE_BLOCKS], capture_output=True, text=True, check=False)
    assert (done.stdout.split(), done.stderr) == (["1", "1", "1"], "")


SEARCHING = """
import gc
from lamsonq.server import SMTPReceiver

def own():
    with open("/proc/self/smaps_rollup") as lines:
        return sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty:"))

class Searching(Waiting):
    def start(self):
        before = own()
        gc.collect()
        self.note("shares" if own() - before < 2500 else "copies")

settings.receiver = Searching()
"""


def test_a_child_shares_what_the_boot_has_loaded_also_after_a_search_for_garbage(project: Project) -> None:
    project.boot(SEARCHING)
    project.start()
    until(lambda: bool(project.noted("shares") or project.noted("copies")))
    assert project.noted("copies") == []
