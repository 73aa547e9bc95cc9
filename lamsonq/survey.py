"""Who works, and what waits, under a directory: what `status`, `queue stats` and `metrics` tell.

Rules:

1. Nothing is changed, nothing is claimed, and what runs does not notice.
2. What cannot be read is told as `trouble` of that one server or queue: it hides no other.
3. A pid file that is left behind tells of a server that should run and does not.
"""

from __future__ import annotations

import contextlib
import glob
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lamsonq import databases, fsck, pidfile, settings, tally
from lamsonq.errors import PidFileError, Refusal, SettingsError

NOTHING = {"ready": 0, "delayed": 0, "reserved": 0, "dead": 0, "done": 0}
_UNKNOWN = {"oldest": None, "paused": None}


def pid_files(run: str) -> list[str]:
    """The pid files of a directory. Raises PidFileError when it is none."""
    if not os.path.isdir(run):
        raise PidFileError(f"{run} is not a directory: give the one that holds the PID files")
    return sorted(glob.glob(os.path.join(glob.escape(run), "*.pid")))


def servers(run: str) -> list[dict[str, Any]]:
    """What is known of each server that has a pid file here; no directory has no servers."""
    return [server_or_trouble(path) for path in pid_files(run)] if os.path.isdir(run) else []


def server(pid_file: str) -> dict[str, Any]:
    """Whether a server runs, and its figures (tally.FIGURES). Raises PidFileError for what is no pid file."""
    running = pidfile.find(pid_file)
    if running is None:
        return {"pid_file": pid_file, "running": False, "pid": None} | tally.figures(pid_file, -1)
    running.close()
    return {"pid_file": pid_file, "running": True, "pid": running.pid} | tally.figures(pid_file, running.pid)


def server_or_trouble(pid_file: str) -> dict[str, Any]:
    """One file that is no pid file must not hide the others."""
    try:
        return server(pid_file)
    except Refusal as refusal:
        return {"pid_file": pid_file, "running": False, "pid": None, "trouble": str(refusal)} | tally.figures(
            pid_file, -1
        )


def line(told: dict[str, Any]) -> str:
    """A server's figures for people."""
    if "trouble" in told:
        return str(told["trouble"])
    if not told["running"]:
        return f"{told['pid_file']}: not running"
    if told["boot"] is None:
        return f"{told['pid_file']}: running, no figures yet"
    figures = f"{told['handled']} handled, {told['failed']} failed, {told['per_minute']:g} a minute"
    workers = f"{told['workers']} worker{'' if told['workers'] == 1 else 's'}"
    return f"{told['pid_file']}: {told['boot']}, {workers}, {figures}"


def queues(run: str) -> dict[str, dict[str, Any]]:
    """Of every queue under a directory how many jobs are in each state, `oldest` (the age of the oldest ready one, in
    seconds), whether it is `paused` (None: not known) and `trouble` where it cannot be read. Reads names and indexes
    only. No directory has no queues."""
    if not os.path.isdir(run):
        return {}
    now = time.time()
    found = {str(path): _looked_at(lambda path=path: _maildir(path, now)) for path in fsck.queues(run)}  # type: ignore[misc]
    for path in databases.found(run):
        found |= _database(path, now)
    return found


def _maildir(path: Path, now: float) -> dict[str, Any]:
    return {**fsck.counts(path)[path], "oldest": fsck.oldest(path, now), "paused": os.path.lexists(path / "paused")}


def _database(path: Path, now: float) -> dict[str, dict[str, Any]]:
    database = databases.Database(path)

    def look(queue: str) -> dict[str, Any]:
        born = database.oldest(queue)
        age = None if born is None else round(max(0.0, now - born), 1)
        return {**database.counts(queue), "oldest": age, "paused": database.paused(queue)}

    try:
        names = database.queues()
    except Refusal as refusal:
        return {f"sqlite:{path}": {**NOTHING, **_UNKNOWN, "trouble": str(refusal)}}
    return {databases.url_of(path, queue): _looked_at(lambda queue=queue: look(queue)) for queue in names}  # type: ignore[misc]


def _looked_at(look: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return NOTHING | look()
    except (Refusal, OSError) as error:
        return {**NOTHING, **_UNKNOWN, "trouble": str(error)}


@dataclass(frozen=True, slots=True)
class Space:
    """The free bytes of a disk, and below how many the project puts mail off; None is not known."""

    free: int | None
    min_free: int | None

    @property
    def lacks(self) -> bool | None:
        return None if self.free is None or self.min_free is None else self.free < self.min_free


def space(run: str) -> Space:
    """The disk of a run/ directory, and the mark in the settings of the project that it is in (lamsonq/space.py)."""
    free = min_free = None
    with contextlib.suppress(OSError):
        found = os.statvfs(run)
        free = found.f_bavail * found.f_frsize
    with contextlib.suppress(SettingsError):
        min_free = settings.machine(str(Path(os.path.realpath(run)).parent / "config/settings.toml")).receiver.min_free
    return Space(free, min_free)
