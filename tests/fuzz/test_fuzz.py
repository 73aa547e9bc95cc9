"""What fuzzing has found once is tried always; and a little fuzzing."""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TARGETS = ("session", "mail")
SEEDS = sorted((HERE / "seeds").glob("*/*"))


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Nobody reads what is logged of thousands of sessions."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def check_of(target: str) -> Callable[[bytes], None]:
    specification = importlib.util.spec_from_file_location(f"fuzz_{target}", HERE / f"{target}.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    check: Callable[[bytes], None] = module.check
    return check


@pytest.mark.parametrize("seed", SEEDS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_what_must_hold_holds_for_each_seed(seed: Path) -> None:
    check_of(seed.parent.name)(seed.read_bytes())


@pytest.mark.slow
@pytest.mark.parametrize("cut", [0, 1, 15, 255])
def test_it_holds_with_other_flags_and_cuts_too(cut: int) -> None:
    check = check_of("session")
    for seed in (HERE / "seeds/session").iterdir():
        for flags in range(256):
            check(bytes([flags, cut]) + seed.read_bytes()[2:402])


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_a_little_fuzzing_finds_nothing(target: str, tmp_path: Path) -> None:
    if importlib.util.find_spec("atheris") is None:
        if os.environ.get("CI"):
            pytest.fail("atheris is not installed: pip install -e '.[fuzz]'")
        pytest.skip("atheris is not installed")
    command = [sys.executable, str(HERE / "run.py"), target, "20"]
    environment = os.environ | {"CORPUS": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    assert "stat::number_of_executed_units" in done.stderr
