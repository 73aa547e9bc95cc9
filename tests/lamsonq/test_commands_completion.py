"""completion: what bash, zsh and fish offer when TAB is pressed."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import time
from pathlib import Path

import pytest

from lamsonq.commands.completion import queues_of
from lamsonq.queue import Queue

from .cli import ENVIRON, lamsonq, launcher, program, refused
from .waiting import PATIENCE


@pytest.fixture
def project(here: Path) -> Path:
    """A project, and a `lamsonq` that the shell finds."""
    for name in (
        "config/__init__.py",
        "config/boot.py",
        "config/queue.py",
        "config/settings.py",
        "app/handlers/post.py",
    ):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    Queue("run/posts").push("Subject: hi\n\nhello\n")
    Path("bin").mkdir()
    launcher(here / "bin")
    return here


BASH = """
{script}
COMP_WORDS=({line} "")
[[ "{line}" == *" " ]] || unset "COMP_WORDS[-1]"
COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
_lamsonq_completion lamsonq 2>/dev/null
printf '%s\\n' "${{COMPREPLY[@]}}"
"""

ZSH = """
compdef() {{ : }}
compadd() {{ print -l -- $completions }}
_describe() {{ print -l -- $completions_with_descriptions }}
{script}
words=({line} "")
[[ "{line}" == *" " ]] || words[-1]=()
CURRENT=$#words
_lamsonq_completion
"""

FISH = """
{script}
complete -C "{line}"
"""


def offered(project: Path, line: str, shell: str = "bash") -> list[str]:
    """What a shell offers at the end of this line, asked for in its own language."""
    script = lamsonq("completion", shell).stdout
    Path("asked").write_text({"bash": BASH, "zsh": ZSH, "fish": FISH}[shell].format(script=script, line=line))
    done = subprocess.run(
        [program(shell), *(["-f"] if shell == "zsh" else []), "asked"],
        env={**ENVIRON, "PATH": f"{project}/bin:{os.environ['PATH']}", "HOME": str(project)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    return [found.split("\t")[0].split(":")[0] for found in done.stdout.splitlines()]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("lamsonq sta", {"start", "status"}),
        ("lamsonq start -b", {"-boot"}),
        ("lamsonq start --b", {"--boot"}),
        ("lamsonq stop -A", {"-ALL"}),
        ("lamsonq start -boot ", {"config.boot", "config.queue"}),
        ("lamsonq routes ", {"config.boot", "config.queue", "app.handlers.post"}),
        ("lamsonq routes config.b", {"config.boot"}),
        ("lamsonq queue ru", {"run/posts"}),
        ("lamsonq queue p", {"pause", "purge"}),
        ("lamsonq queue ls ru", {"run/posts"}),
        ("lamsonq queue ls -st", {"-state"}),
        ("lamsonq queue ls -state de", {"delayed", "dead"}),
        ("lamsonq queue move run/posts ru", {"run/posts"}),
        ("lamsonq queue -name run/", {"run/posts"}),
        ("lamsonq help -for sendm", {"sendmail"}),
        ("lamsonq help bl", {"blast"}),
        ("lamsonq completion ", {"bash", "zsh", "fish"}),
    ],
)
def test_bash_offers_both_spellings_and_what_there_is(project: Path, line: str, expected: set[str]) -> None:
    assert set(offered(project, line)) == expected


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_other_shells_offer_the_same(project: Path, shell: str) -> None:
    assert "config.boot" in offered(project, "lamsonq start -boot ", shell)
    assert {"start", "status"} <= set(offered(project, "lamsonq sta", shell))


def test_queues_in_databases_are_offered_and_other_files_are_not(project: Path) -> None:
    Queue("sqlite:run/q.db?queue=posts").push("Subject: hi\n\nhello\n")
    Path("run/notes.db").write_bytes(b"SQLite format 3\0 or so")
    assert queues_of("run") == ["run/posts", "sqlite:run/q.db?queue=posts"]
    assert set(offered(project, "lamsonq queue ls ", "fish")) == {"run/posts", "sqlite"}  # up to the colon


def test_a_tab_completes_at_a_terminal(project: Path) -> None:
    Path("rc").write_text(f'PATH="{project}/bin:$PATH"\neval "$(lamsonq completion bash)"\nPS1="ready> "\n')
    child, screen = pty.fork()
    if not child:
        os.execve(program("bash"), ["bash", "--noprofile", "--rcfile", "rc", "-i"], {**ENVIRON, "TERM": "dumb"})
    try:
        _until(screen, b"ready> ")
        os.write(screen, b"echo lamsonq; lamsonq blas\t")
        _until(screen, b"blast ")
        os.write(screen, b"-inp\t")
        _until(screen, b"-input ")
    finally:
        os.close(screen)  # which hangs up, and ends the shell
        os.waitpid(child, 0)


def _until(screen: int, wanted: bytes) -> None:
    shown, deadline = b"", time.monotonic() + PATIENCE
    while wanted not in shown:
        ready, _, _ = select.select([screen], [], [], max(0, deadline - time.monotonic()))
        assert ready, shown
        shown += os.read(screen, 4096)


def test_an_unknown_shell_is_refused(here: Path) -> None:
    assert "'bash', 'zsh', 'fish'" in refused("completion", "tcsh", code=2)
