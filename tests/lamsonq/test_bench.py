"""`make bench`: its arithmetic, its tables, and what it reads from the kernel."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.bench.__main__ import main
from tests.bench.contest import CPU, RATE, SHORT, Contest, Entry, Sample, Target, hold, markdown
from tests.bench.processes import cpu, memory, running, tree, until
from tests.bench.rows import ROWS
from tests.lamsonq.pages import DOCS


def figures(*rates: float) -> Callable[[], Sample]:
    """An entry that measures these, one a round."""
    waiting = list(rates)
    return lambda: {"rate": waiting.pop(0)}


def broken() -> Sample:
    raise RuntimeError("no port\nand a long log")


def contest(*entries: Entry, targets: tuple[Target, ...] = ()) -> Contest:
    return Contest("A race", entries, targets)


def test_a_ratio_is_the_median_of_the_ratios_within_a_round() -> None:
    target = Target("us", "them", RATE, least=2)
    result = hold(contest(Entry("us", "", figures(30, 10, 80)), Entry("them", "", figures(10, 10, 20))), 3)
    assert result.ratios(target) == [3, 1, 4]
    lines = list(markdown(hold(contest(*_two(), targets=(target,)), 3)))
    assert "| per second: us / them | 3.00 (1.00..4.00) | ≥ 2 | met |" in lines


def _two() -> tuple[Entry, Entry]:
    return Entry("us", "synced", figures(30, 10, 80)), Entry("them", "not synced", figures(10, 10, 20))


def test_entries_take_turns_within_each_round() -> None:
    order: list[str] = []

    def entry(name: str) -> Entry:
        return Entry(name, "", lambda: order.append(name) or {"rate": 1.0})  # type: ignore[func-returns-value]

    hold(contest(entry("a"), entry("b")), 2)
    assert order == ["a", "b", "a", "b"]


def test_a_table_has_the_median_with_its_spread_and_what_was_promised() -> None:
    lines = list(markdown(hold(contest(*_two()), 3)))
    assert "| us | synced | 30 (10..80) |" in lines
    assert "| them | not synced | 10 (10..20) |" in lines


def test_a_missed_target_is_said_to_be_missed() -> None:
    targets = (Target("us", "them", RATE, least=3.5), Target("us", None, RATE, most=29))
    lines = list(markdown(hold(contest(*_two(), targets=targets), 3)))
    assert [line for line in lines if line.endswith("| missed |")] == [
        "| per second: us / them | 3.00 (1.00..4.00) | ≥ 3.5 | missed |",
        "| per second: us | 30 (10..80) | ≤ 29 | missed |",
    ]


def test_what_is_missing_or_fails_is_named_and_left_out() -> None:
    entries = (Entry("us", "", figures(1)), Entry("gone", "", broken, "it is not installed"), Entry("ill", "", broken))
    targets = (Target("us", "gone", RATE), Target("us", "ill", RATE))
    lines = list(markdown(hold(contest(*entries, targets=targets), 1)))
    assert "Left out: gone; it is not installed." in lines
    assert "Left out: ill; it failed: RuntimeError: no port." in lines
    assert not [line for line in lines if line.startswith("| ") and ("gone" in line or "ill" in line)]


def test_an_entry_without_a_measure_leaves_its_ratio_out() -> None:
    result = hold(contest(*_two()), 1)
    assert result.ratios(Target("us", "them", CPU)) == []


def test_cpu_and_memory_are_those_of_the_children_too(tmp_path: Path) -> None:
    busy = (
        "import os, time\n"
        "if os.fork() == 0:\n"
        "    held = b'x' * 30_000_000\n"
        "    while time.process_time() < 0.3: pass\n"
        "    open('done', 'w').close()\n"
        "time.sleep(60)\n"
    )
    with running([sys.executable, "-c", busy], tmp_path) as program:
        until((tmp_path / "done").exists, "the child's work", program)
        family = tree(program.pid)
        assert len(family) == 2
        assert cpu([program.pid]) >= 0.25
        assert memory([program.pid]) > 30
    until(lambda: not any(map(_lives, family)), "the end of all of them")


def _lives(pid: int) -> bool:
    """Whether it has not ended; who is only not waited for yet has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("kind", ["Maildir", "SQLite", "RawMaildir", "RawSQLite"])
def test_a_store_is_filled_and_drained_by_two_processes(kind: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.bench.stores", kind, str(tmp_path), "50", "5", "2"]
    done = subprocess.run(command, cwd=DOCS.parent, env={**os.environ}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert '"take"' in done.stdout


def test_every_row_is_on_the_page_and_in_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    page = (DOCS / "speed.md").read_text()
    assert [name for name in ROWS if f"\n| `{name}` | " not in page] == []
    assert main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(ROWS)


def test_an_unknown_row_is_refused_with_the_names_of_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["engin"]) == 2
    assert "no such row: engin; there are engine, spool" in capsys.readouterr().err


def test_every_target_names_entries_of_its_contest(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("installed", "peers.aiosmtpd", "peers.salmon", "peers.tasks", "rows.queues", "rows.matching"):
        monkeypatch.setattr(f"tests.bench.{module}.python", lambda: None)
    monkeypatch.setattr("tests.bench.peers.haraka.haraka", lambda: None)
    monkeypatch.setattr("tests.bench.peers.postfix.program", lambda _: None)
    for contests in ROWS.values():
        for each in contests(SHORT):
            names = {entry.name for entry in each.entries}
            for target in each.targets:
                assert target.ours in names
                assert target.peer is None or target.peer in names
