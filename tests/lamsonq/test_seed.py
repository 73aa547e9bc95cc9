"""The tutorial in the README, word by word: every command, edit, file name, log line and output that it shows."""

import os
import re
import smtplib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lamsonq import commands

from .ports import free_port
from .waiting import PATIENCE, until

README = (Path(__file__).parents[2] / "README.md").read_text()
BLOCKS = re.findall(r"```\w*\n(.*?)```", README, re.DOTALL)


def _shown(part: str) -> str:
    """The block of the README in which this stands."""
    (block,) = (block for block in BLOCKS if part in block)
    return str(block)


POSTING = _shown("parseaddr(message['from'])")
QUEUE_LINES = _shown("settings.receiver = QueueReceiver(settings.queue_config['queue'],\n")
SETTINGS_LINES = _shown("queue_handlers = ['app.handlers.index']")
INDEX = _shown('logging.debug("Got message from %s", message[')
SENDER = "sender-1244080328.22@sender.com"
TO = "test.blog.1244080328@osb.test.com"


class Shell:
    """A reader at his terminal, in the project's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port, self.relay_port = free_port(), free_port()
        self.environment = os.environ | {
            "LAMSONQ_RECEIVER__PORT": str(self.port),
            "LAMSONQ_RELAY__PORT": str(self.relay_port),
        }

    def __call__(self, *command: str, code: int = 0) -> str:
        module = "lamsonq" if command[0] == "lamsonq" else "pytest"
        done = subprocess.run(
            [sys.executable, "-m", module, *command[1:]],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == code, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def send(self, sender: str = SENDER) -> None:
        with smtplib.SMTP("127.0.0.1", self.port, timeout=PATIENCE) as client:
            client.sendmail(sender, [TO], f"From: {sender}\r\nTo: {TO}\r\nSubject: a post\r\n\r\nHello\r\n")

    def log(self) -> str:
        return (self.folder / "logs/lamsonq.log").read_text()

    def edit_as_the_tutorial_says(self) -> None:
        """`cp config/boot.py config/queue.py`, and the edits shown."""
        boot = (self.folder / "config/boot.py").read_text()
        first, last = boot.index("# where to listen for incoming messages"), boot.index("Router.RELOAD = True\n")
        queue = boot[:first] + QUEUE_LINES + boot[last:].partition("\n")[2]
        (self.folder / "config/queue.py").write_text(queue)
        with (self.folder / "config/settings.py").open("a") as settings:
            settings.write(SETTINGS_LINES)
        (self.folder / "app/handlers/index.py").write_text(INDEX)

    def stop_all(self) -> str:
        return self("lamsonq", "stop", "-ALL", "run")


@pytest.fixture(
    params=[("gen", "osb"), pytest.param(("gen", "-project", "osb"), marks=pytest.mark.slow)],
    ids=["gen osb", "gen -project osb"],
)
def shell(request: pytest.FixtureRequest, here: Path) -> Iterator[Shell]:
    Shell(here)("lamsonq", *request.param)
    shell = Shell(here / "osb")
    yield shell
    if list((here / "osb/run").glob("*.pid")):
        shell.stop_all()


def test_the_tutorial_runs_word_by_word(shell: Shell) -> None:
    shell.edit_as_the_tutorial_says()
    shell("lamsonq", "log", "-port", str(shell.relay_port))
    shell("lamsonq", "start")

    assert re.search(r"\d+ passed", shell("pytest"))
    new = shell.folder / "run/posts/new"
    assert any(new.iterdir()), "the project's own tests leave what POSTING pushed"
    shell.send()
    names = [path.name for path in new.iterdir()]
    assert all(re.match(r"\d+\.M\d+P\d+Q\d+\.[^,]+(,|$)", name) for name in names)
    keys = [name.partition(",")[0] for name in names]

    shell("lamsonq", "start", "-boot", "config.queue", "-pid", "run/queue.pid")
    handled = f"DEBUG:root:Message to {TO} was handled by app.handlers.index.START"
    until(lambda: handled in shell.log(), log=shell.log)
    until(lambda: not any(new.iterdir()))
    until(lambda: "DEBUG:root:Sleeping for 10 seconds..." in shell.log(), log=shell.log)
    log = shell.log()
    assert all(f"DEBUG:root:Pulled message with key: '{key}' off" in log for key in keys)
    assert f"DEBUG:root:Message received from Peer: 'run/posts', From: '{SENDER}', to To ['{TO}']." in log
    assert f"DEBUG:root:Got message from {SENDER}" in log

    pids = [(shell.folder / f"run/{name}.pid").read_text().strip() for name in ("log", "queue", "smtp")]
    assert shell.stop_all().splitlines() == [
        "Stopping processes with the following PID files:",
        "['run/log.pid', 'run/queue.pid', 'run/smtp.pid']",
        *(f"Attempting to stop lamsonq at pid {pid}" for pid in pids),
    ]
    assert not list((shell.folder / "run").glob("*.pid"))
    assert not [pid for pid in pids if _runs(pid)]


def test_the_handler_of_the_tutorial_runs_word_by_word(here: Path) -> None:
    Shell(here)("lamsonq", "gen", "osb")
    handler = here / "osb/app/handlers/post.py"
    generated = handler.read_text()
    first, last = generated.index("@route("), generated.index("@route_like(")
    handler.write_text(generated[:first] + POSTING + "\n\n" + generated[last:])
    assert re.search(r"\d+ passed", Shell(here / "osb")("pytest"))


def test_the_readme_names_the_commands_that_there_are() -> None:
    rows = re.findall(r"^\| (`.*?) \|", README.partition("## Commands")[2], re.MULTILINE)
    named = {word for row in rows for word in re.findall(r"`(\w+)", row)}
    assert named == set(commands.lamsonq.commands)


def test_the_example_of_a_test_in_the_readme_passes(here: Path) -> None:
    Shell(here)("lamsonq", "gen", "osb")
    (here / "osb/tests/test_example.py").write_text(
        "from lamsonq import settings\n\nsettings.boot('config.testing')\n\n" + _shown("alice.begin()")
    )
    assert "1 passed" in Shell(here / "osb")("pytest", "tests/test_example.py")


@pytest.mark.slow
def test_of_three_queue_receivers_on_one_queue_one_handles_each_message(here: Path) -> None:
    Shell(here)("lamsonq", "gen", "osb")
    shell = Shell(here / "osb")
    shell.edit_as_the_tutorial_says()
    shell("lamsonq", "log", "-port", str(shell.relay_port))
    shell("lamsonq", "start")
    senders = [f"sender{number}@example.com" for number in range(40)]
    try:
        for sender in senders[:20]:
            shell.send(sender)
        for number in range(3):
            shell("lamsonq", "start", "-boot", "config.queue", "-pid", f"run/queue{number}.pid")
        for sender in senders[20:]:
            shell.send(sender)
        until(lambda: shell.log().count("handled by app.handlers.index.START") >= len(senders))
    finally:
        shell.stop_all()
    got = re.findall(r"DEBUG:root:Got message from (\S+)", shell.log())
    assert sorted(got) == sorted(senders)


@pytest.mark.slow
def test_the_tutorials_lines_pass_the_strict_type_check(here: Path) -> None:
    Shell(here)("lamsonq", "gen", "osb")
    shell = Shell(here / "osb")
    shell.edit_as_the_tutorial_says()
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "config"],
        cwd=shell.folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def _runs(pid: str) -> bool:
    """Whether there is such a process, and not only what is left of it until its parent looks."""
    try:
        return ") Z " not in Path("/proc", pid, "stat").read_text()
    except FileNotFoundError:
        return False
