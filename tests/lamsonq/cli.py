"""The commands as users run them: arguments, standard input, and what comes out."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from lamsonq import commands

ROOT = str(Path(commands.__file__).parents[2])
ENVIRON = {**os.environ, "PYTHONPATH": ROOT, "PYTHONDONTWRITEBYTECODE": "1"}

Done = subprocess.CompletedProcess[str]

_APART = {"start", "restart", "log", "metrics", "routes", "demo"}
"""Commands that fork or import a project. All others run in this process, which is quicker."""


def lamsonq(*args: str, code: int = 0, stdin: str | bytes = b"", env: Mapping[str, str] | None = None) -> Done:
    """Run a command in the current directory; it has to end with this code, and never with a traceback."""
    data = stdin.encode() if isinstance(stdin, str) else stdin
    if not _APART.intersection(args[:1]) and env is None:
        result = CliRunner().invoke(commands.lamsonq, args, input=data, prog_name="lamsonq")
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
        done = Done(args, result.exit_code, result.stdout, result.stderr)
    else:
        command = [sys.executable, "-m", "lamsonq", *args]
        ran = subprocess.run(
            command, env={**ENVIRON, **(env or {})}, input=data, capture_output=True, timeout=60, check=False
        )
        done = Done(args, ran.returncode, ran.stdout.decode(), ran.stderr.decode())
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def refused(*args: str, code: int = 1, stdin: str | bytes = b"") -> str:
    """The one line that a command ends with."""
    done = lamsonq(*args, code=code, stdin=stdin)
    assert len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr.removesuffix("\n")


def every_command() -> dict[str, click.Command]:
    """All commands, and behind each its verbs, as `queue ls`."""
    found: dict[str, click.Command] = {}
    for name, command in commands.lamsonq.commands.items():
        found[name] = command
        found |= {f"{name} {verb}": each for verb, each in getattr(command, "verbs", {}).items()}
    return found


def parsed(command: str, *args: str) -> dict[str, Any]:
    """What a command understands."""
    return commands.lamsonq.commands[command].make_context(command, list(args)).params


def program(name: str) -> str:
    """A program of the system; without it the test is skipped, and fails in CI."""
    path = shutil.which(name)
    if path is None:
        message = f"{name} is not installed"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return path


def launcher(folder: Path) -> Path:
    """A program `lamsonq` in this folder, for others to call."""
    path = folder / "lamsonq"
    path.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m lamsonq "$@"\n')
    path.chmod(0o755)
    return path
