"""`lamsonq gen`, and the project that it writes."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tomli
from click.testing import CliRunner

from lamsonq import commands, pidfile
from lamsonq.commands import project as template

from .ports import free_port
from .waiting import until

ROOT = Path(template.__file__).parents[2]
ENVIRON = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}

Done = subprocess.CompletedProcess[str]


def lamsonq(*args: str, code: int = 0) -> Done:
    """Run a command, in this process where it neither forks nor imports the project: that is quicker."""
    if args[0] in ("start", "log", "routes"):
        return python("-m", "lamsonq", *args, code=code)
    result = CliRunner().invoke(commands.lamsonq, args, prog_name="lamsonq")
    assert result.exit_code == code, result.output
    return Done(args, result.exit_code, result.stdout, result.stderr)


def python(*args: str, code: int = 0) -> Done:
    command = [sys.executable, *args]
    done = subprocess.run(command, env=ENVIRON, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def files(directory: Path) -> dict[str, str]:
    return {str(p.relative_to(directory)): p.read_text() for p in sorted(directory.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("spelling", [("osb",), ("-project", "osb"), ("--project", "osb")])
def test_gen_writes_the_repositorys_own_project_without_what_the_tutorials_reader_writes(
    here: Path, spelling: tuple[str, ...]
) -> None:
    lines = lamsonq("gen", *spelling).stdout.splitlines()
    written = files(here / "osb")
    assert set(written) == {"README.md", *template.PROJECT_FILES}
    assert lines[0] == "mkdir: osb"
    assert "mkdir: osb/app/handlers" in lines
    assert "copy: osb/config/boot.py" in lines
    for name in template.PROJECT_FILES:
        if name != "config/settings.py":
            assert written[name] == (ROOT / name).read_text()


def test_the_generated_settings_end_where_the_tutorials_reader_goes_on(here: Path) -> None:
    lamsonq("gen", "osb")
    begun = (here / "osb/config/settings.py").read_text()
    whole = (ROOT / "config/settings.py").read_text()
    assert whole.removeprefix(begun) == (
        "\n# this is for when you run the config.queue boot\n"
        'queue_config = {"queue": "run/posts", "sleep": 10}\n\n'
        'queue_handlers = ["app.handlers.index"]\n'
    )


def test_the_wheel_has_the_files_that_gen_writes() -> None:
    build = tomli.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    included = build["targets"]["wheel"]["force-include"]
    assert included == {name: f"lamsonq/project/{name}" for name in template.PROJECT_FILES}


def test_a_project_that_exists_is_not_touched(here: Path) -> None:
    (here / "osb").mkdir()
    assert lamsonq("gen", "osb", code=1).stderr == "ERROR: Project osb exists, delete it first.\n"
    assert list((here / "osb").iterdir()) == []


@pytest.mark.parametrize("force", [("-FORCE",), ("-FORCE", "True"), ("--force",), ("-f",)])
def test_force_adds_files_and_never_writes_over_one(here: Path, force: tuple[str, ...]) -> None:
    (here / "osb" / "config").mkdir(parents=True)
    (here / "osb" / "config" / "boot.py").write_text("mine")
    (here / "osb" / "config" / "testing.py").symlink_to(here / "elsewhere")
    lines = lamsonq("gen", "-project", "osb", *force).stdout.splitlines()
    assert "exists: osb/config/boot.py" in lines
    assert (here / "osb" / "config" / "boot.py").read_text() == "mine"
    assert not (here / "elsewhere").exists()
    assert (here / "osb" / "app" / "handlers" / "post.py").exists()


def test_gen_wants_one_name(here: Path) -> None:
    assert "lamsonq gen NAME" in lamsonq("gen", code=2).stderr
    assert "lamsonq gen NAME" in lamsonq("gen", "a", "-project", "b", code=2).stderr


def test_a_place_that_cannot_be_written_is_one_line(here: Path) -> None:
    (here / "file").touch()
    line = lamsonq("gen", "file/osb", code=1).stderr
    assert line == "ERROR: cannot write file: File exists\n"


# ---- the tutorial ----------------------------------------------------------------------------------------------

QUEUE_BOOT = """\
# where to listen for incoming messages
settings.receiver = QueueReceiver(settings.queue_config['queue'],
                                  settings.queue_config['sleep'])

settings.database = configure_database(settings.database_config, also_create=False)

"""

QUEUE_ROUTER = """\
Router.defaults(**settings.router_defaults)
# NOTE: this is using a different handlers variable in settings
Router.load(settings.queue_handlers)
Router.RELOAD=True
"""

QUEUE_SETTINGS = """
# this is for when you run the config.queue boot
queue_config = {'queue': 'run/posts', 'sleep': 10}

queue_handlers = ['app.handlers.index']
"""

INDEX = """\
from lamsonq import queue
from lamsonq.routing import route, stateless
import logging


@route("(post_name)@osb\\\\.(host)")
@stateless
def START(message, post_name=None, host=None):
    logging.debug("Got message from %s", message['from'])
"""


def edit(path: Path, *changes: tuple[str, str]) -> None:
    """Replace in a file what each expression matches, which has to be there once."""
    text = path.read_text()
    for expression, replacement in changes:
        literal = replacement.replace("\\", "\\\\")
        text, count = re.subn(expression, literal, text, flags=re.DOTALL | re.MULTILINE)
        assert count == 1, expression
    path.write_text(text)


@pytest.fixture
def osb(here: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A generated project that is the current directory, on ports of its own; what runs in it is ended."""
    lamsonq("gen", "osb")
    monkeypatch.chdir("osb")
    for table in ("RECEIVER", "RELAY"):
        monkeypatch.setitem(ENVIRON, f"LAMSONQ_{table}__PORT", str(free_port()))
    yield Path.cwd()
    for path in Path("run").glob("*.pid"):
        running = pidfile.find(str(path))
        if running is not None:
            running.signal(9)
            running.wait(5)
            running.close()


def follow_the_tutorial(osb: Path) -> None:
    """The reader's copy and edits."""
    (osb / "config/queue.py").write_text((osb / "config/boot.py").read_text())
    edit(
        osb / "config/queue.py",
        (r"^# where to listen.*also_create=True\)\n\n", QUEUE_BOOT),
        (r"^Router\.defaults.*RELOAD = True\n", QUEUE_ROUTER),
    )
    with (osb / "config/settings.py").open("a") as settings:
        settings.write(QUEUE_SETTINGS)
    (osb / "app/handlers/index.py").write_text(INDEX)


def test_a_mail_goes_the_whole_way(osb: Path) -> None:
    follow_the_tutorial(osb)
    lamsonq("log", "-port", ENVIRON["LAMSONQ_RELAY__PORT"])
    lamsonq("start", "-workers", "2")
    message = ("-sender", "you@example.com", "-to", "my.post@osb.localhost", "-subject", "Hello", "-body", "It works.")
    sent = lamsonq("send", "-port", ENVIRON["LAMSONQ_RECEIVER__PORT"], *message)
    assert sent.stdout + sent.stderr == ""
    until(lambda: "contains 2 messages" in lamsonq("queue", "-count").stdout)
    assert "Subject: Welcome" in lamsonq("queue", "-pop").stdout
    assert 'your post "Hello" is up' in lamsonq("queue", "-pop").stdout
    assert lamsonq("queue", "run/posts", "--count").stdout.endswith("Queue run/posts contains 1 messages\n")
    lamsonq("stop", "--all")


def test_a_stranger_is_refused_by_the_generated_settings(osb: Path) -> None:
    lamsonq("start")
    message = ("-sender", "you@example.com", "-to", "you@elsewhere.org", "-subject", "x", "-body", "x")
    line = lamsonq("send", "-port", ENVIRON["LAMSONQ_RECEIVER__PORT"], *message, code=1).stderr
    assert len(line.splitlines()) == 1
    assert "550" in line
    lamsonq("stop")


def test_a_port_in_use_is_one_line(osb: Path) -> None:
    with socket.create_server(("127.0.0.1", int(ENVIRON["LAMSONQ_RECEIVER__PORT"]))):
        line = lamsonq("start", code=1).stderr
    assert re.fullmatch(rf"ERROR: .*{ENVIRON['LAMSONQ_RECEIVER__PORT']}.* in use.*\n", line)
    assert not Path("run/smtp.pid").exists()


@pytest.mark.parametrize(
    ("path", "change", "code", "told"),
    [
        ("config/settings.toml", (r"port = 8823", 'prot = "88x"'), 5, "receiver.prot: there is no such setting"),
        ("app/handlers/post.py", (r"^from app.model import post$", "import nosuch"), 2, "app/handlers/post.py:5"),
        ("app/handlers/post.py", (r"^def START", "def START("), 2, "SyntaxError"),
        ("app/handlers/post.py", (r"osb\\\\\.", r"(blog)@"), 2, "uses (blog), which neither the route nor"),
        ("config/boot.py", (r"^settings\.receiver.*?\n", ""), 2, "config.boot sets no settings.receiver"),
    ],
)
def test_a_mistake_in_the_project_is_one_line_with_its_code(
    osb: Path, path: str, change: tuple[str, str], code: int, told: str
) -> None:
    edit(osb / path, change)
    line = lamsonq("start", code=code).stderr
    assert len(line.splitlines()) == 1
    assert told in line
    assert not Path("run/smtp.pid").exists()


def test_routes_shows_what_takes_an_address_of_the_blog(osb: Path) -> None:
    shown = lamsonq("routes", "-test", "my.first.post@osb.localhost").stdout
    assert "app.handlers.post.POSTING app.handlers.post.START" in shown
    assert "{'post_name': 'my.first.post', 'host': 'localhost'}" in shown
