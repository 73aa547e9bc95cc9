"""The command line, from outside: both spellings, output, exit codes."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import pytest

from lamsonq import commands, pidfile
from lamsonq.commands import servers
from lamsonq.errors import Dead, Later
from lamsonq.jobs import Put
from lamsonq.mail import MailRequest
from lamsonq.queue import Queue, job_of

from .cli import ENVIRON, every_command, lamsonq, parsed, refused
from .waiting import PATIENCE, until

# ---- spelling --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "lamson", "usual", "expected"),
    [
        ("start", "-boot config.queue", "--boot config.queue", {"boot": "config.queue"}),
        ("start", "-boot=config.queue -pid run/q.pid", "--boot=config.queue --pid=run/q.pid", {"pid": "run/q.pid"}),
        ("start", "-FORCE True", "--force", {"force": True}),
        ("start", "-FORCE", "-f", {"force": True}),
        ("start", "-FORCE False", "", {"force": False}),
        ("start", "-debug", "--debug", {"debug": True}),
        ("start", "-debug True -workers 4", "--debug --workers 4", {"debug": True, "workers": 4}),
        ("log", "-port 9 -host 0.0.0.0", "--port 9 --host 0.0.0.0", {"port": 9, "host": "0.0.0.0"}),
        ("log", "", "", {"port": 8825, "host": "127.0.0.1", "pid": "run/log.pid"}),
        ("stop", "-ALL run", "--all run", {"run": "run", "kill": False}),
        ("stop", "-ALL", "--all", {"run": "run"}),
        ("stop", "-ALL -KILL", "--all --kill", {"run": "run", "kill": True}),
        ("stop", "-KILL True -ALL other", "-f --all other", {"run": "other", "kill": True}),
        ("status", "-pid run/q.pid", "--pid run/q.pid", {"pid": "run/q.pid"}),
        ("gen", "-project osb", "osb", {}),
        ("gen", "-project osb -FORCE True", "osb --force", {}),
        ("queue", "-pop -name run/posts", "run/posts --pop", {"pop": True}),
        ("queue", "-keys", "--list", {"keys": True}),
        ("queue", "-get KEY", "--get KEY", {"get": "KEY"}),
        ("routes", "-test a@b -- config.testing", "config.testing --test a@b", {"modules": ("config.testing",)}),
        ("help", "-for start", "start", {}),
    ],
)
def test_lamsons_spelling_and_the_usual_one_mean_the_same(
    command: str, lamson: str, usual: str, expected: dict[str, Any]
) -> None:
    for spelling in (lamson, usual):
        params = parsed(command, *spelling.split())
        assert {name: params[name] for name in expected} == expected


@pytest.mark.parametrize("command", every_command())
def test_dashes_and_capitals_of_an_option_do_not_matter(command: str) -> None:
    """Each option of each command, in every spelling that is declared and in Lamson's, gives the same value."""
    for option in every_command()[command].params:
        if not isinstance(option, click.Option) or option.is_flag:
            continue
        value = {"integer": "7", "boolean": "yes", "integer range": "7", "span": "7d"}.get(option.type.name, "x")
        if isinstance(option.type, click.Choice):
            value = option.type.choices[-1]
        long_names = [name for name in option.opts if len(name) > 2]
        spelled = [f"{dashes}{case(name.lstrip('-'))}" for name in long_names for dashes in ("-", "--", "---")
                   for case in (str.lower, str.upper, str.capitalize)]  # fmt: skip
        found = [_value(command, option, [name, value]) for name in (*option.opts, *spelled)]
        found += [_value(command, option, [f"{name}={value}"]) for name in long_names]
        assert len(found) > 0
        assert all(each == found[0] and each != option.default for each in found), option.name


def _value(command: str, option: click.Option, args: list[str]) -> Any:
    """What a command understands by one option, whatever else it may want."""
    found = every_command()[command]
    assert option.name is not None
    return found.make_context(command, args, resilient_parsing=True).params[option.name]


@pytest.mark.parametrize(
    ("args", "subject"),
    [(["-subject", "yes"], "yes"), (["-subject", "-TO"], "-TO"), (["-subject", "--"], "--"), (["-subject=-To"], "-To")],
)
def test_a_text_stays_what_it_is(args: list[str], subject: str) -> None:
    assert parsed("send", "-sender", "a@b", *args, "-to", "c@d", "-body", "1")["subject"] == subject


@pytest.mark.parametrize(
    ("command", "words", "expected"),
    [
        ("gen", "--force osb", {"force": True, "path": "osb"}),
        ("gen", "-FORCE False -project osb", {"force": False, "project": "osb"}),
        ("gen", "-f osb", {"force": True, "path": "osb"}),
        ("queue", "-count run/posts", {"count": True, "path": "run/posts"}),
        ("queue", "-count True -name run/posts", {"count": True, "name": "run/posts"}),
        ("sendmail", "-lmtp b@y.org", {"lmtp": True, "recipients": ("b@y.org",)}),
        ("sendmail", "-debug 1 -ti -fa@x.org -- b@y.org", {"debug": True, "from_header": True, "sender": "a@x.org"}),
        ("blast", "--lmtp --debug in", {"lmtp": True, "debug": True, "path": "in"}),
        ("send", "-ssl True -sender a -to b -subject c -body d", {"ssl": True, "starttls": False}),
        ("start", "-debug -FORCE no", {"debug": True, "force": False}),
        ("stop", "-ALL -KILL", {"run": "run", "kill": True}),
    ],
)
def test_a_switch_takes_only_yes_or_no(command: str, words: str, expected: dict[str, Any]) -> None:
    params = parsed(command, *words.split())
    assert {name: params[name] for name in expected} == expected


@pytest.mark.parametrize("word", ["-boo", "--boo", "-bootconfig", "-farce"])
def test_an_unknown_option_is_named_whole(word: str) -> None:
    with pytest.raises(click.NoSuchOption) as caught:
        parsed("start", word, "x")
    assert caught.value.option_name == word


def test_an_unknown_option_ends_with_2_and_names_what_was_meant(here: Path) -> None:
    line = refused("start", "-boo", "x", code=2)
    assert line == "ERROR: No such option '-boo'. Did you mean '-boot'?  Try lamsonq help -for start."
    assert refused("-boo", code=2).startswith("ERROR: No such option '-boo'")


@pytest.mark.parametrize("args", [["web"], ["web", "-port", "8888"], ["help", "-for", "web"]])
def test_what_is_gone_names_what_replaces_it(here: Path, args: list[str]) -> None:
    assert "python3 -m http.server" in refused(*args, code=2)


def test_gen_adds_to_a_project_only_when_it_is_told_to(here: Path) -> None:
    Path("osb").mkdir()
    Path("osb/README.md").write_text("mine")
    assert refused("gen", "osb") == "ERROR: Project osb exists, delete it first."
    assert refused("gen", "-project", "osb", "-FORCE", "False") == "ERROR: Project osb exists, delete it first."
    assert "exists: osb/README.md\ncopy: osb/.gitignore\n" in lamsonq("gen", "--force", "osb").stdout
    assert Path("osb/README.md").read_text() == "mine"


# ---- help ------------------------------------------------------------------------------------------------------


def test_no_command_is_help_and_no_mistake(here: Path) -> None:
    done = lamsonq()
    for name in commands.lamsonq.commands:
        assert re.search(rf"^  {name} ", done.stdout, re.MULTILINE)
    assert lamsonq("--help").stdout == done.stdout


def test_the_summaries_of_all_commands_stand_uncut_in_eighty_columns(here: Path) -> None:
    listed = lamsonq(env={"COLUMNS": "80"}).stdout
    assert max(map(len, listed.splitlines())) <= 80
    for name, command in commands.lamsonq.commands.items():
        [summary] = re.findall(rf"^  {name} +(.*)", listed, re.MULTILINE)
        assert summary == (command.help or "").split("\n\n")[0].split(". ")[0].removesuffix(".") + "."


def test_help_lists_the_commands_and_explains_one(here: Path) -> None:
    listed = lamsonq("help").stdout
    assert ", ".join(sorted(commands.lamsonq.commands)) in listed
    assert "Use lamsonq help -for <command> to find out more." in listed
    explained = lamsonq("help", "-for", "start").stdout
    assert explained.startswith("Usage: lamsonq start [OPTIONS]")
    assert "-boot, --boot MODULE" in explained
    for spelling in ("-h", "-help", "--help"):
        assert lamsonq("start", spelling).stdout.split() == explained.split()


def test_every_command_has_a_help_of_its_own() -> None:
    for command in every_command().values():
        assert command.help
        assert all(param.help for param in command.params if isinstance(param, click.Option) and not param.hidden)


def test_an_unknown_command_ends_with_2(here: Path) -> None:
    assert "No such command 'begin'" in refused("begin", code=2)
    assert "There is no command 'begin'" in refused("help", "-for", "begin", code=2)


def test_version_is_told(here: Path) -> None:
    assert lamsonq("version").stdout == "Lamsonq-Version:  0.1.0\n"
    assert lamsonq("--version").stdout == "0.1.0\n"


@pytest.mark.parametrize(
    "environment", [{}, {"_LAMSONQ_COMPLETE": "bash_complete", "COMP_WORDS": "lamsonq start -b", "COMP_CWORD": "2"}]
)
def test_help_and_completion_do_not_wait_for_heavy_imports(here: Path, environment: dict[str, str]) -> None:
    code = """if True:
        import atexit, sys
        atexit.register(lambda: print(*sys.modules, file=sys.stderr))
        from lamsonq.commands import main
        sys.argv = ["lamsonq", "--help"]
        main()
    """
    done = subprocess.run(
        [sys.executable, "-c", code], env={**ENVIRON, **environment}, capture_output=True, text=True, check=True
    )
    assert ("-boot" if environment else "Usage: lamsonq") in done.stdout
    assert not {"aiosmtpd", "asyncio", "jinja2", "msgspec", "email", "sqlite3", "smtplib"} & set(done.stderr.split())


def test_other_systems_are_told_no_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(SystemExit, match="lamsonq runs on Linux"):
        commands.main()


# ---- stop and status -------------------------------------------------------------------------------------------

BOOT = """
import threading
from config import settings

class Waiting:
    stuck = False
    stopped = threading.Event()
    def bind(self): pass
    def start(self): pass
    def stop(self, grace=30.0): self.stopped.set()
    def join(self): self.stopped.wait()
    def listening(self): return "waiting"

settings.receiver = Waiting()
"""


@pytest.fixture
def project(here: Path) -> Iterator[Path]:
    """A project whose receiver only waits; what runs in it is ended."""
    for name, text in (("__init__", ""), ("settings", "receiver = None\n"), ("boot", BOOT), ("queue", BOOT)):
        (here / "config").mkdir(exist_ok=True)
        (here / "config" / f"{name}.py").write_text(text)
    (here / "run").mkdir()
    yield here
    for path in here.glob("run/*.pid"):
        if path.is_symlink() or not re.fullmatch("[0-9]+\n", path.read_text()):
            continue
        running = pidfile.find(str(path))
        if running is not None:
            running.signal(9)
            running.wait(5)
            running.close()


def test_stop_all_prints_what_the_tutorial_shows_and_leaves_nothing(project: Path) -> None:
    pids = []
    for name in ("log", "queue", "smtp"):
        lamsonq("start", "-boot", "config.queue" if name == "queue" else "config.boot", "-pid", f"run/{name}.pid")
        pids.append(int(Path(f"run/{name}.pid").read_text()))
    done = lamsonq("stop", "-ALL", "run")
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "Stopping processes with the following PID files:",
        "['run/log.pid', 'run/queue.pid', 'run/smtp.pid']",
        *(f"Attempting to stop lamsonq at pid {pid}" for pid in pids),
    ]
    assert list(project.glob("run/*.pid")) == []
    until(lambda: not any(os.path.exists(f"/proc/{pid}/fd/0") for pid in pids))


def test_stop_all_of_nothing_is_no_mistake(project: Path) -> None:
    assert lamsonq("stop", "-ALL").stdout == "Stopping processes with the following PID files:\n[]\n"


def test_stop_all_goes_on_after_a_file_that_is_no_pid_file(project: Path) -> None:
    lamsonq("start")
    Path("run/aaa.pid").write_text("garbage")
    done = lamsonq("stop", "-ALL", "run", code=4)
    assert done.stderr == "ERROR: PID file run/aaa.pid holds b'garbage' and no pid, so it is no PID file: not touched\n"
    assert Path("run/aaa.pid").read_text() == "garbage"
    assert not Path("run/smtp.pid").exists()


def test_stop_ends_the_server_of_a_pid_file(project: Path) -> None:
    lamsonq("start", "-pid", "run/other.pid")
    pid = int(Path("run/other.pid").read_text())
    assert lamsonq("stop", "-pid", "run/other.pid").stdout == f"Attempting to stop lamsonq at pid {pid}\n"
    assert not Path("run/other.pid").exists()


def test_stop_without_a_pid_file_says_so(project: Path) -> None:
    assert refused("stop", code=4) == "ERROR: PID file run/smtp.pid doesn't exist, maybe lamsonq isn't running?"
    assert refused("stop", "-ALL", "nowhere", code=4).startswith("ERROR: nowhere is not a directory")


def test_status_tells_who_runs_by_its_exit_code(project: Path) -> None:
    assert refused("status") == "lamsonq not running."
    lamsonq("start", "-boot", "config.queue", "-pid", "run/queue.pid")
    pid = int(Path("run/queue.pid").read_text())
    assert lamsonq("status", "-pid", "run/queue.pid").stdout.startswith(f"lamsonq running with PID {pid}\n")
    Path("run/smtp.pid").write_text(f"{os.getpid()}\n")  # left behind, and the pid is somebody else's by now
    listed = lamsonq("status", "-ALL", code=1).stdout
    assert listed.startswith(f"run/queue.pid: lamsonq running with PID {pid}\nrun/smtp.pid: lamsonq not running.\n")


def test_status_of_all_says_so_where_there_is_no_server(project: Path) -> None:
    told = lamsonq("status", "-ALL", "run", code=1)
    assert (told.stdout, told.stderr) == ("", "lamsonq not running: no pid file in run.\n")


def test_status_of_all_tells_of_a_file_that_is_no_pid_file(project: Path) -> None:
    Path("run/aaa.pid").symlink_to("elsewhere")
    Path("run/bbb.pid").write_text("4711\n")
    first, second = lamsonq("status", "-ALL", code=1).stdout.splitlines()
    assert first.startswith("run/aaa.pid: PID file run/aaa.pid is a link")
    assert second == "run/bbb.pid: lamsonq not running."


def test_restart_takes_the_options_of_start(project: Path) -> None:
    Path("sub").mkdir()
    Path("config").rename("sub/config")
    first = lamsonq("restart", "-boot", "config.queue", "-pid", "run/q.pid", "-chdir", "sub", "-umask", "077")
    assert first.stdout == "lamsonq not running: it is only started.\n"
    pid = int(Path("sub/run/q.pid").read_text())
    user, group = str(os.getuid()), str(os.getgid())
    try:
        second = lamsonq(
            *("restart", "-boot=config.queue", "-pid=run/q.pid", "-chdir=sub", "-workers=2", "-KILL"),
            *("--daemon", "-uid", user, "-gid", group),
        )
        assert second.stdout == f"Attempting to stop lamsonq at pid {pid}\n"
        assert int(Path("sub/run/q.pid").read_text()) != pid
        assert lamsonq("status", "-pid", "sub/run/q.pid").stdout.startswith("lamsonq running with PID ")
        command = [sys.executable, "-m", "lamsonq", "restart", "-KILL", "-debug", "-chdir", "sub", "-pid", "run/q.pid"]
        _runs_here(command, Path("sub/run/q.pid"), "ctrl-c to quit")
    finally:
        lamsonq("stop", "-ALL", "sub/run")


def test_log_takes_the_options_of_start(project: Path, free_port: Callable[[], int]) -> None:
    Path("sub/run").mkdir(parents=True)
    port, user, group = str(free_port()), str(os.getuid()), str(os.getgid())
    lamsonq(
        *("log", "-host", "127.0.0.2", "-port", port, "-pid", "run/x.pid", "-chdir", "sub", "-umask", "077"),
        *("-FORCE", "--daemon", "-uid", user, "-gid", group),
    )
    try:
        with socket.create_connection(("127.0.0.2", int(port)), timeout=PATIENCE) as client:
            assert client.recv(3) == b"220"
        assert Path("sub/logs/logger.log").stat().st_mode & 0o777 == 0o600
    finally:
        lamsonq("stop", "-pid", "sub/run/x.pid")
    command = [sys.executable, "-m", "lamsonq", "log", "-debug", "-port", "0", "-pid", "run/y.pid"]
    _runs_here(command, Path("run/y.pid"), "ctrl-c to quit")


def log_listens_at(*, says: str, env: Mapping[str, str] | None = None) -> tuple[str, int]:
    """Where `lamsonq log` listens without an option, when that is what it says on stderr."""
    done = lamsonq("log", env=env)
    assert done.stderr == says
    status = json.loads(lamsonq("status", "-pid", "run/log.pid", "-json").stdout)
    assert status["servers"][0]["boot"] == "log"
    [found] = re.findall(r"SMTPReceiver started on (\S+):(\d+)\.", Path("logs/logger.log").read_text())
    lamsonq("stop", "-pid", "run/log.pid")
    Path("logs/logger.log").unlink()
    return found[0], int(found[1])


def test_log_listens_where_the_project_relays_to(project: Path, free_port: Callable[[], int]) -> None:
    port, other = free_port(), free_port()
    Path("config/settings.toml").write_text(f'[relay]\nhost = "127.0.0.2"\nport = {port}\n')
    assert log_listens_at(says="") == ("127.0.0.2", port)
    assert log_listens_at(says="", env={"LAMSONQ_RELAY__PORT": str(other)}) == ("127.0.0.2", other)
    Path("config/settings.toml").write_text("[relay]\nprot = 1\n")
    assert "relay.prot: there is no such setting" in refused("log", code=5)
    assert not Path("run/log.pid").exists()


@pytest.mark.parametrize(
    ("toml", "why"),
    [
        (None, "there is no config/settings.toml"),
        ('host = "mx.test"\nport = 2525', "config/settings.toml has [relay] host = 'mx.test', port = 2525"),
        ('host = "/run/lmtp"\nport = 2525', "config/settings.toml has [relay] host = '/run/lmtp', port = 2525"),
        ('host = ""\nport = 25', "config/settings.toml has [relay] host = '', port = 25"),
        ('host = "localhost"', "config/settings.toml has [relay] host = 'localhost', port = 25"),
    ],
)
def test_log_says_where_it_listens_when_it_cannot_be_there(
    project: Path, monkeypatch: pytest.MonkeyPatch, toml: str | None, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if toml is not None:
        Path("config/settings.toml").write_text(f"[relay]\n{toml}\n")
    assert servers._relayed_to("127.0.0.1", 8825) == ("127.0.0.1", 8825)
    assert capsys.readouterr().err == f"lamsonq log listens on 127.0.0.1:8825, because {why}.\n"


def test_a_root_directory_that_is_not_there_is_refused(project: Path) -> None:
    for done in (
        lamsonq("start", "-chroot", "nowhere", code=1),
        lamsonq("restart", "-chroot", "nowhere", code=1),
        lamsonq("log", "-chroot", "nowhere", code=1),
    ):
        assert done.stderr.startswith("ERROR: ")
        assert "nowhere" in done.stderr.splitlines()[0]
    assert not list(Path("run").iterdir())


def _runs_here(command: list[str], pid_file: Path, says: str) -> None:
    """The command stays in the foreground, with its pid in the file, until it is told to end."""
    process = subprocess.Popen(command, env=ENVIRON, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)

    def runs() -> bool:
        assert process.poll() is None
        return pid_file.exists() and pid_file.read_text() == f"{process.pid}\n" and _expects_the_end(process.pid)

    until(runs)
    process.terminate()
    _, shown = process.communicate(timeout=30)
    assert process.returncode == 0, shown
    assert says in shown


def _expects_the_end(pid: int) -> bool:
    """Whether the process has a handler for TERM, or waits for it."""
    masks = re.findall(r"Sig(?:Cgt|Blk):\t([0-9a-f]+)", Path(f"/proc/{pid}/status").read_text())
    return any(int(mask, 16) >> (signal.SIGTERM - 1) & 1 for mask in masks)


def test_several_processes_with_states_in_memory_are_refused(project: Path) -> None:
    Path("handlers.py").write_text(HANDLERS.replace("@stateless\n", ""))
    with Path("config/boot.py").open("a") as boot:
        boot.write("from lamsonq.routing import Router\nRouter.load(['handlers'])\n")
    line = refused("start", "-workers", "2")
    assert line.startswith("ERROR: 2 processes need states that they share: set Router.STATE_STORE = SQLiteStorage(")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("receiver", "named"),
    [
        ("QueueReceiver('memory:posts')", "memory:posts"),
        ("QueueReceiver(['run/posts', 'memory:bulk'])", "memory:bulk"),
        ("QueueReceiver('run/posts')", "memory:undeliverable"),
        ("SMTPReceiver('127.0.0.1', 0)", "memory:undeliverable"),
    ],
)
def test_several_processes_with_queues_in_memory_are_refused(project: Path, receiver: str, named: str) -> None:
    undeliverable = "memory:undeliverable" if named == "memory:undeliverable" else "run/undeliverable"
    Path("config/boot.py").write_text(
        "from config import settings\nfrom lamsonq.queue import Queue\nfrom lamsonq.routing import Router\n"
        "from lamsonq.server import QueueReceiver, SMTPReceiver\n"
        f"Router.UNDELIVERABLE_QUEUE = Queue({undeliverable!r})\nsettings.receiver = {receiver}\n"
    )
    assert refused("start", "-workers", "2") == (
        f"ERROR: 2 processes need queues that they share, and {named} is in one only: name a directory (run/posts) or"
        " sqlite:run/queues.db?queue=posts instead"
    )
    lamsonq("start")


@pytest.mark.parametrize(
    "receiver",
    [
        "QueueReceiver('sqlite:run/q.db')",
        pytest.param("QueueReceiver('run/p', deliver=print)", marks=pytest.mark.slow),
    ],
)
def test_several_processes_share_directories_and_databases(project: Path, receiver: str) -> None:
    undeliverable = "memory:undeliverable" if "deliver" in receiver else "run/undeliverable"  # nothing goes there
    Path("config/boot.py").write_text(
        "from config import settings\nfrom lamsonq.queue import Queue\nfrom lamsonq.routing import Router\n"
        "from lamsonq.server import QueueReceiver\n"
        f"Router.UNDELIVERABLE_QUEUE = Queue({undeliverable!r})\nsettings.receiver = {receiver}\n"
    )
    lamsonq("start", "-workers", "2")


@pytest.mark.slow
def test_status_tells_when_a_job_was_claimed_last(project: Path) -> None:
    Path("config/boot.py").write_text(
        "from config import settings\nfrom lamsonq.server import QueueReceiver\n"
        "settings.receiver = QueueReceiver('run/posts', deliver=print)\n"
    )
    begun = time.time()
    lamsonq("start")
    Queue("run/posts").push("Subject: hi\n\nhello\n")

    def status() -> dict[str, Any]:
        (server,) = json.loads(lamsonq("status", "-ALL", "run", "-json").stdout)["servers"]
        assert isinstance(server, dict)
        return server

    until(lambda: status()["handled"])
    server = status()
    assert begun <= server["last_claim"] <= server["last_settled"] <= time.time()


def test_request_types_that_mean_nothing_fail_the_boot(project: Path) -> None:
    Path("jobs.py").write_text(
        "from lamsonq.deferred import deferrable\n@deferrable()\ndef send_email(to): ...\ndef plain(): ...\n"
    )
    for types, line in (
        ("{'send_email': 'jobs.plain'}", "'send_email' means jobs.plain, which is no @deferrable function"),
        ("{'send_email': 'nojobs.x'}", "there is no module nojobs in "),
        ("{'send_email': 'plain'}", "config.settings.request_types: 'plain' names no module: app.jobs.plain"),
        ("['send_email']", "config.settings.request_types: expected a table of names such as"),
        ("{'send_email': 7}", "found {'send_email': 7}"),
    ):
        Path("config/settings.py").write_text(f"receiver = None\nrequest_types = {types}\n")
        done = lamsonq("start", code=5 if "settings" in line or "found" in line else 2)
        assert line in done.stderr
        assert len(done.stderr.splitlines()) == 1
    Path("config/settings.py").write_text("receiver = None\nrequest_types = {'send_email': 'jobs.send_email'}\n")
    lamsonq("start")


def test_status_as_json_has_servers_and_queues(project: Path) -> None:
    Queue("run/posts").push("Subject: hi\n\nhello\n")
    lamsonq("start", "--boot=config.queue")
    found = json.loads(lamsonq("status", "--all", "run", "--json").stdout)
    pid = int(Path("run/smtp.pid").read_text())
    (server,) = found["servers"]
    assert {"pid_file": "run/smtp.pid", "running": True, "pid": pid, "boot": "config.queue"}.items() <= server.items()
    assert {"ready": 1, "delayed": 0, "dead": 0, "reserved": 0}.items() <= found["queues"]["run/posts"].items()


def test_log_outside_a_project_leaves_nothing_behind(here: Path) -> None:
    assert refused("log", code=2).startswith(f"ERROR: {here} is no project: it has neither config/ nor run/")
    assert list(here.iterdir()) == []


def test_start_outside_a_project_leaves_nothing_behind(here: Path) -> None:
    assert refused("start", code=2).startswith(f"ERROR: there is no config.boot in {here}: start a server in a project")
    assert list(here.iterdir()) == []


def test_a_directory_that_does_not_exist_is_named(here: Path) -> None:
    assert refused("start", "-chdir", "nowhere") == "ERROR: cannot change to nowhere: No such file or directory"


# ---- queue -----------------------------------------------------------------------------------------------------


@pytest.fixture
def posts(here: Path) -> Queue:
    return Queue("run/posts")


def test_queue_counts_lists_gets_and_removes(posts: Queue) -> None:
    first = posts.push("Subject: one\n\nhello\n")
    second = posts.push("Subject: two\n\nhello\n")
    assert lamsonq("queue", "-count", "-name", "run/posts").stdout == (
        "Using queue: 'run/posts'\nQueue run/posts contains 2 messages\n"
    )
    assert lamsonq("queue", "run/posts", "--keys").stdout == f"Using queue: 'run/posts'\n{first}\n{second}\n"
    shown = lamsonq("queue", "-get", second, "-name", "run/posts").stdout
    assert shown == "Using queue: 'run/posts'\nSubject: two\n\nhello\n"
    assert lamsonq("queue", "-remove", first, "-name", "run/posts").stdout == "Using queue: 'run/posts'\n"
    assert posts.keys() == [second]


def test_queue_pops_the_oldest(posts: Queue) -> None:
    key = posts.push("Subject: one\n\nhello\n")
    posts.push("Subject: two\n\nhello\n")
    popped = lamsonq("queue", "run/posts", "-pop").stdout
    assert popped == f"Using queue: 'run/posts'\nKEY:  {key}\nSubject: one\n\nhello\n"
    assert posts.count() == 1


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_what_pop_cannot_print_stays_in_the_queue(posts: Queue, options: list[str]) -> None:
    key = posts.push("Subject: one\n\nhello\n")
    command = [sys.executable, "-m", "lamsonq", "queue", "run/posts", "-pop", *options]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command, env=ENVIRON, stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=30
        )
    assert (done.returncode, done.stderr) == (1, "ERROR: cannot print: No space left on device\n")
    assert posts.backend.counts() == {"ready": 1, "delayed": 0, "reserved": 0, "dead": 0, "done": 0}
    job = posts.backend.get(key)
    assert job is not None
    assert (job.deliveries, job.attempts) == (0, 0)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_message_that_can_be_printed_only_in_part_is_not_popped(posts: Queue, here: Path, unbuffered: str) -> None:
    posts.push(b"Subject: one\n\n" + b"x" * 100_000)
    script = 'ulimit -f 64; exec "$0" -m lamsonq queue run/posts -pop > printed'
    done = subprocess.run(
        ["sh", "-c", script, sys.executable],
        env={**ENVIRON, "PYTHONUNBUFFERED": unbuffered},
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert (done.returncode, done.stderr) == (1, "ERROR: cannot print: File too large\n")
    assert b"xxx" in (here / "printed").read_bytes()
    assert posts.count() == 1


def test_pop_of_an_empty_queue_is_no_mistake(here: Path) -> None:
    assert lamsonq("queue", "-pop").stdout == "Using queue: 'run/queue'\nKEY:  None\n"


def test_queue_clears(posts: Queue) -> None:
    posts.push("Subject: one\n\nhello\n")
    lamsonq("queue", "-clear", "-name", "run/posts")
    assert posts.count() == 0


def test_delayed_messages_are_listed_counted_and_cleared(posts: Queue) -> None:
    key = posts.push("Subject: one\n\nhello\n")
    (job,) = posts.backend.reserve(1)
    posts.backend.settle(job, Later("not now", at=time.time() + 3600))
    assert lamsonq("queue", "run/posts", "-delayed").stdout.splitlines()[1:] == [key]
    assert lamsonq("queue", "run/posts", "-delayed", "-count").stdout.endswith("contains 1 delayed messages\n")
    lamsonq("queue", "run/posts", "--delayed", "--clear")
    assert posts.backend.counts()["delayed"] == 0


@pytest.mark.parametrize("wish", ["-get", "-remove", "-kick", "-report"])
def test_a_key_that_is_not_there_is_one_line(here: Path, wish: str) -> None:
    done = lamsonq("queue", wish, "nobody", code=1)
    assert done.stdout == "Using queue: 'run/queue'\n"
    assert done.stderr.splitlines()[-1] == "ERROR: queue run/queue has no message 'nobody' for that"


def test_what_is_no_queue_is_not_an_empty_one(here: Path) -> None:
    Path("app").mkdir()
    assert refused("queue", "app", "-count") == (
        "ERROR: app is not a queue: a queue is a maildir, with the directories new, cur and tmp"
    )
    assert lamsonq("queue", "run/psots", "-count").stderr == "There is no run/psots yet.\n"


def test_count_names_what_is_not_ready_too(here: Path) -> None:
    queue = Queue("run/posts")
    store = queue.backend
    store.put([Put(store, job_of(b"x", store.new_key()), Dead("no")), Put(store, job_of(b"y", store.new_key()))])
    shown = lamsonq("queue", "run/posts", "-count").stdout.splitlines()
    assert shown[1:] == ["Queue run/posts contains 1 messages", "  and besides: 1 dead"]


def test_clear_with_dead_deletes_the_dead_and_no_others(here: Path) -> None:
    queue = Queue("run/posts")
    store = queue.backend
    store.put([Put(store, job_of(b"x", store.new_key()), Dead("no")), Put(store, job_of(b"y", store.new_key()))])
    lamsonq("queue", "run/posts", "-dead", "-clear")
    assert (store.counts()["ready"], store.counts()["dead"]) == (1, 0)
    assert refused("queue", "run/posts", "-dead", "-pop").startswith("ERROR: -dead goes with")


def test_queue_wants_one_queue(posts: Queue) -> None:
    assert refused("queue", "run/posts", "-name", "run/queue", "-count").startswith("ERROR: give one queue")


def test_a_message_is_printed_as_it_is(posts: Queue) -> None:
    key = posts.push(b"Subject: \xe4\n\n\xff\x00\n")
    command = [sys.executable, "-m", "lamsonq", "queue", "run/posts", "-get", key]
    shown = subprocess.run(command, env=ENVIRON, capture_output=True, check=True, timeout=30).stdout
    assert shown == b"Using queue: 'run/posts'\nSubject: \xe4\n\n\xff\x00\n"


def test_queue_wants_one_thing_to_do(here: Path) -> None:
    assert refused("queue") == "ERROR: Give something to do.  Try lamsonq help -for queue to find out what."
    assert refused("queue", "-pop", "-count").startswith("ERROR: Give one thing to do, not more.")


def test_dead_letters_are_listed_explained_and_kicked(posts: Queue) -> None:
    from lamsonq.errors import Dead

    key = posts.push("Subject: one\n\nhello\n")
    (job,) = posts.backend.reserve(1)
    posts.backend.settle(job, Dead("nobody wants it"))
    assert lamsonq("queue", "run/posts", "--dead").stdout.splitlines()[1:] == [key]
    assert lamsonq("queue", "run/posts", "--dead", "--count").stdout.endswith("contains 1 dead messages\n")
    assert "nobody wants it" in lamsonq("queue", "run/posts", "--report", key).stdout
    lamsonq("queue", "run/posts", "--kick", key)
    counts = json.loads(lamsonq("queue", "run/posts", "--count", "--json").stdout)
    assert (counts["ready"], counts["dead"]) == (1, 0)


def test_a_queue_of_an_unknown_kind_ends_with_3(here: Path) -> None:
    assert "nosuch" in refused("queue", "nosuch:posts", "--count", code=3)


# ---- routes ----------------------------------------------------------------------------------------------------

HANDLERS = """
from lamsonq.routing import route, stateless

@route("(to)@(host)", to=".+", host="example[.]com")
@stateless
def START(message, to=None, host=None):
    pass
"""

TABLE = """\
Routing ORDER: ['(?P<to>.+)@(?P<host>example[.]com)']
Routing TABLE:
---
'(?P<to>.+)@(?P<host>example[.]com)': myhandlers.START\x20
---
"""


@pytest.fixture
def handlers(here: Path) -> Path:
    (here / "myhandlers.py").write_text(HANDLERS)
    return here


def test_routes_shows_the_table(handlers: Path) -> None:
    assert lamsonq("routes", "myhandlers").stdout == TABLE


def test_path_is_where_the_modules_are(handlers: Path) -> None:
    Path("elsewhere").mkdir()
    Path("myhandlers.py").rename("elsewhere/myhandlers.py")
    assert refused("routes", "myhandlers", code=2).startswith("ERROR: there is no module myhandlers in ")
    assert lamsonq("routes", "-path", "elsewhere", "--", "myhandlers").stdout == TABLE


def test_routes_tests_an_address(handlers: Path) -> None:
    match = """
TEST address 'joe@example.com' matches:
  '(?P<to>.+)@(?P<host>example[.]com)' myhandlers.START
  -  {'to': 'joe', 'host': 'example.com'}
"""
    assert lamsonq("routes", "-test", "joe@example.com", "--", "myhandlers").stdout == TABLE + match


def test_an_address_that_matches_nothing_ends_with_1(handlers: Path) -> None:
    done = lamsonq("routes", "myhandlers", "--test", "joe@example.org", code=1)
    assert done.stdout == TABLE + "\nTEST address 'joe@example.org' didn't match anything.\n"


def test_routes_as_json(handlers: Path) -> None:
    found = json.loads(lamsonq("routes", "myhandlers", "--test", "joe@example.com", "--json").stdout)
    assert found["routes"][0]["functions"] == ["myhandlers.START"]
    assert found["matches"][0]["captures"] == {"to": "joe", "host": "example.com"}


def test_a_module_that_is_not_there_or_has_no_routes_is_named(handlers: Path) -> None:
    assert refused("routes", "nosuchmodule", code=2).startswith("ERROR: there is no module nosuchmodule in ")
    (handlers / "empty.py").touch()
    assert refused("routes", "empty", code=2) == "ERROR: empty imported, but no function is registered"


def test_routes_of_a_boot_without_handlers_or_of_no_boot_at_all_says_so(project: Path) -> None:
    line = "ERROR: config.boot imported, but no function is registered; a boot that loads no handlers has no routes"
    assert refused("routes", "config.boot", code=2) == f"{line}, and takes every recipient"
    line = "ERROR: there is no config/testing.py to show the routes of: name a boot or a handler module"
    assert refused("routes", "-test", "a@b", code=2) == line


def test_a_capture_that_nothing_defines_names_the_route(handlers: Path) -> None:
    (handlers / "broken.py").write_text(HANDLERS.replace('to=".+", ', ""))
    line = refused("routes", "broken", code=2)
    assert "broken.py:4: @route('(to)@(host)') uses (to), which neither the route nor Router.defaults" in line


# ---- fsck ------------------------------------------------------------------------------------------------------


def test_fsck_misses_one_of_several_recipients(posts: Queue) -> None:
    posts.push(MailRequest("here", "s@x.org", ["a@x.org", "B@x.org"], b"Message-ID: <1@x>\r\n\r\nhello"))
    Path("accepted").write_text("<1@x> a@x.org\n<1@x> b@x.org\n<1@x> lost@x.org\n")
    shown = lamsonq("fsck", "--accepted", "accepted", code=1).stdout
    assert re.findall("missing: (.*)", shown) == ["<1@x> lost@x.org"]


def test_fsck_accounts_for_every_accepted_message(posts: Queue) -> None:
    posts.push("Message-ID: <1@x>\n\nhello\n")
    posts.push("Message-ID: <2@x>\n\nhello\n")
    posts.backend.reserve(1)
    Path("accepted").write_text("<1@x>\n<2@x>\n<3@x>\n")
    Path("handled").write_text("<3@x>\n")
    good = lamsonq("fsck", "run", "--accepted", "accepted", "--handled", "handled").stdout
    assert good == (
        "run/posts: ready 1, delayed 0, reserved 1, dead 0; left over: held 0, tmp 0; broken 0\nAll is accounted for.\n"
    )
    Path("handled").write_text("")
    assert "missing: <3@x>\n" in lamsonq("fsck", "--accepted", "accepted", "--handled", "handled", code=1).stdout


def test_fsck_names_a_file_that_is_no_job(posts: Queue) -> None:
    posts.push("Message-ID: <1@x>\n\nhello\n")
    Path("run/posts/new/1.M1P1Q1.host,LQ=1b50").write_text("X-Lamsonq-Job: {}\n\nforged\n")
    Path("run/posts/new/2.M1P1Q1.foreign,S=5").write_text("Message-ID: <2@x>\n\n")
    found = json.loads(lamsonq("fsck", "--json", code=1).stdout)
    assert found["queues"]["run/posts"]["ready"] == 3
    assert list(found["queues"]["run/posts"]["broken"]) == ["new/1.M1P1Q1.host,LQ=1b50"]


def test_fsck_of_no_directory_is_refused(here: Path) -> None:
    assert refused("fsck") == "ERROR: run is not a directory: give the one that holds the queues"
