"""What is imported makes a start slow and a process large: what few servers need comes when it is needed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from .projects import ENVIRON

RECEIVERS = "from lamsonq.server import LMTPReceiver, QueueReceiver, Relay, SMTPReceiver"
SQLITE = "from lamsonq.queue import Queue; Queue('sqlite:run/q.db?queue=posts').count()"
MAILDIR = "from lamsonq.queue import Queue; Queue('run/posts').count()"


def loaded(code: str, here: Path) -> set[str]:
    """The modules that are there after this code, in a process of its own."""
    (here / "run").mkdir(exist_ok=True)
    command = [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules)"]
    done = subprocess.run(command, cwd=here, env=ENVIRON, capture_output=True, text=True, timeout=60, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("code", "unwanted"),
    [
        ("import lamsonq.commands", {"asyncio", "difflib", "lamsonq.jobs", "concurrent.futures", "email.message"}),
        (RECEIVERS, {"asyncinotify", "difflib", "html", "importlib.metadata", "jinja2", "logging.config", "zoneinfo"}),
        (RECEIVERS, {"lamsonq.bounce", "lamsonq.mx", "lamsonq.schedule", "lamsonq.suppression", "tempfile"}),
        (SQLITE, {"asyncinotify", "importlib.metadata", "lamsonq.backends.maildir", "lamsonq.backends.memory"}),
        (MAILDIR, {"asyncinotify", "importlib.metadata", "lamsonq.backends.sqlite", "lamsonq.backends.memory"}),
    ],
)
def test_what_is_not_needed_is_not_loaded(tmp_path: Path, code: str, unwanted: set[str]) -> None:
    found = loaded(code, tmp_path)
    assert "lamsonq" in found
    assert found & unwanted == set()
