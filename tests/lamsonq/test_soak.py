"""A small soak: a whole project under load, restarted and reloaded, loses nothing and does not grow.

The long ones are `python tests/bench/soak.py 200000`, and the test of the mixed load with SOAK=200000 set.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).parents[1] / "bench" / "soak.py"


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("workers", ["1", "2"])
def test_restarts_and_reloads_under_load_lose_nothing_and_leave_nothing(
    workers: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["3000", "-restarts", "1", "-reloads", "1", "-workers", workers]
    done = subprocess.run([sys.executable, SOAK, *options], cwd=tmp_path, capture_output=True, text=True, check=False)
    with capsys.disabled():
        print("\n" + "\n".join(line for line in done.stdout.splitlines() if line[:1].isdigit()))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_mixed_load_with_hostile_clients_and_killed_processes_loses_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    messages = int(os.environ.get("SOAK", "2000"))
    often = str(max(1, messages // 20_000))
    options = [
        str(messages),
        "-mixed",
        "-workers",
        "2",
        "-restarts",
        often,
        "-reloads",
        often,
        "-kills",
        often,
        "-faults",
        often,
    ]
    done = subprocess.run([sys.executable, SOAK, *options], cwd=tmp_path, capture_output=True, text=True, check=False)
    with capsys.disabled():
        print("\n" + "\n".join(line for line in done.stdout.splitlines() if line[:1].isdigit()))
    assert done.returncode == 0, done.stdout + done.stderr
