"""A settle that publishes: the outcome of a job and what came of it, as one.

    1. stage    every put is written to held/, and a manifest that tells where each belongs; all of it synced
    2. commit   the claimed file is renamed to a name with the field `c`; from here on the job is settled
    3. publish  each staged file is renamed into its queue, the queues' folders are synced
    4. finish   the claimed file goes where its outcome says, then the manifest is removed

Rules:

1. Nothing is visible before 2, and the handler never runs again after it. Whoever finds a committed file of a dead
   worker does 3 and 4, and may do so again and again: a staged file that is not there has gone out already.
2. The manifest goes last: a committed file whose manifest is gone was damaged by hand, and becomes a dead letter.
3. `unique` and gates decide when a put is published; one that they keep out is dropped then.
4. Between maildirs on one file system a put leaves exactly once. To another file system, or a store of another kind,
   a crash in the moment of handing over can make it leave twice, under one key; it is never lost.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import msgspec

from lamsonq import backends
from lamsonq.backends.durable import remove_file, sync_folder, write_files
from lamsonq.backends.maildir_files import DEAD, DELAYED, DONE, Folders, Place, read_job
from lamsonq.backends.maildir_guards import Guards
from lamsonq.backends.maildir_names import parse_name
from lamsonq.backends.rounds import Round
from lamsonq.errors import Dead, Later, QueueError
from lamsonq.jobs import KEPT, Debounce, Gate, Put, Tick
from lamsonq.records import make_ready
from lamsonq.reports import entries

VERSION = 1
_GATES: dict[str, type[Debounce | Tick]] = {"debounce": Debounce, "tick": Tick}


class Fate(msgspec.Struct, frozen=True):
    """What becomes of the settled job itself: `folder` is "" when it is gone. `reported`: it has failed before.
    `unique` marks what like jobs need no longer wait for."""

    folder: str = ""
    name: str = ""
    report: str = ""
    reported: bool = False
    unique: str = ""


class Publication(msgspec.Struct, frozen=True):
    """One put: the staged file's name, where the queue is (a path, or another store's URL), its place there."""

    staged: str
    queue: str
    folder: str
    name: str
    report: str = ""
    foreign: bool = False
    entry: str = ""
    unique: str | None = None
    gate: dict[str, Any] | None = None
    open_end: bool = True

    def place(self) -> Place:
        """Raises ValueError for one that a newer version has made."""
        name = parse_name(self.name)
        if name is None:
            raise ValueError(f"{self.name!r} has a name of a newer version")
        gate = None if self.gate is None else _gate_of(self.gate)
        return Place(self.folder, name, b"", self.report, self.entry, self.unique, gate, self.open_end)


class Manifest(msgspec.Struct, frozen=True):
    """What a committed job has still to do."""

    fate: Fate
    publications: tuple[Publication, ...]
    version: int = VERSION


make_ready(Manifest)


class Target(NamedTuple):
    """A put, the queue that it goes to, whether that is another kind of store, and its place there."""

    put: Put
    queue: str
    foreign: bool
    place: Place


def _kept_gate(gate: Gate | None) -> dict[str, Any] | None:
    for kind, known in _GATES.items():
        if isinstance(gate, known):
            return {"kind": kind, **asdict(gate)}
    if gate is not None:
        raise ValueError(f"what a settle puts may have Debounce and Tick as a gate, not {type(gate).__name__}")
    return None


def _gate_of(kept: Mapping[str, Any]) -> Gate:
    fields = dict(kept)
    kind = fields.pop("kind", None)
    try:
        return _GATES[kind](**fields)
    except (KeyError, TypeError):
        raise ValueError(f"this lamsonq knows no gate as {kept!r}") from None


def _publication(staged: str, target: Target) -> Publication:
    put, queue, foreign, place = target
    gate = _kept_gate(put.gate)
    return Publication(
        staged,
        queue,
        place.folder,
        place.name.text(),
        place.report,
        foreign,
        place.entry,
        place.unique,
        gate,
        place.open_end,
    )


def stage(home: Folders, token: str, fate: Fate, targets: Sequence[Target]) -> Manifest:
    """Step 1. On an OSError nothing is left. Raises ValueError for a gate that cannot be kept."""
    publications = [_publication(f"{token}.{number}", target) for number, target in enumerate(targets)]
    try:
        files: dict[str, Sequence[bytes]] = {}
        for publication, target in zip(publications, targets, strict=True):
            files[home.at("held", publication.staged)] = (target.place.block, target.put.job.body)
        manifest = Manifest(fate, tuple(publications))
        # json, not msgspec, because file names may hold undecodable bytes.
        files[_manifest_path(home, token)] = (json.dumps(msgspec.to_builtins(manifest)).encode("ascii"),)
        write_files(files.items(), home.at("held"))
    except OSError:
        discard(home, token, publications)
        raise
    return manifest


def discard(home: Folders, token: str, publications: Sequence[Publication]) -> None:
    """Remove what was staged and not committed."""
    for path in (_manifest_path(home, token), *(home.at("held", p.staged) for p in publications)):
        remove_file(path)


def read_manifest(home: Folders, token: str) -> Manifest | None:
    """None when there is none. Raises ValueError for one of a newer version, or that cannot be read."""
    try:
        with open(_manifest_path(home, token), "rb") as file:
            found = json.loads(file.read())
    except FileNotFoundError:
        return None
    except RecursionError as error:
        raise ValueError(f"the manifest {token} cannot be read: {error}") from error
    version = found.get("version") if isinstance(found, dict) else None
    if version != VERSION:
        raise ValueError(f"the manifest {token} is of version {version!r}; this lamsonq reads version {VERSION}")
    return msgspec.convert(found, Manifest)


def _manifest_path(home: Folders, token: str) -> str:
    return home.at("held", f"{token}.json")


def publish(
    home: Folders,
    committed: str,
    manifest: Manifest,
    live: Mapping[str, Put],
    results: list[bool] | None = None,
    this_round: Round | None = None,
) -> None:
    """Step 3, as often as needed. `live` has the puts of this process by staged name; `results`, in the order of the
    publications, become False where something is kept out. One that does not go out holds up no other; after all of
    them the first such error is raised: OSError, QueueError, ValueError."""
    this_round = this_round or Round()
    touched: dict[str, None] = {}
    failure: Exception | None = None
    for number, publication in enumerate(manifest.publications):
        staged = home.at("held", publication.staged)
        let_in = True
        try:
            if not os.path.lexists(staged):
                touched[os.path.join(publication.queue, publication.folder)] = None
            elif publication.foreign:
                with this_round.asking(publication.queue):
                    let_in = _hand_over(staged, publication, live.get(publication.staged))
            else:
                let_in = _move_out(home, staged, committed, publication)
                touched[os.path.join(publication.queue, publication.folder)] = None
        except (OSError, QueueError, ValueError) as error:
            failure = failure or error
        if results is not None:
            results[number] = let_in
    for folder in touched:
        if os.path.isdir(folder):
            sync_folder(folder)
    if failure is not None:
        raise failure


def _move_out(home: Folders, staged: str, committed: str, publication: Publication) -> bool:
    place = publication.place()
    guards = Guards(Folders(publication.queue, home.now))
    with guards.locked() if place.guarded else contextlib.nullcontext():
        try:
            path = guards.publish(staged, place)
            moved = bool(path)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            path, moved = _copy_out(staged, committed, place, guards), False
        if place.guarded:
            guards.sync([(place, path)])
    if not moved:  # it is kept out, there already, or on another file system
        os.unlink(staged)
    return path is not None


def _copy_out(staged: str, committed: str, place: Place, guards: Guards) -> str | None:
    sync_folder(os.path.dirname(committed))  # before the commit is certain, nothing must be there
    copy = guards.folders.copy_in(staged)
    path: str | None = None
    try:
        path = guards.publish(copy, place)
        guards.sync([(place, path)])
    except OSError:
        guards.retract(copy, place, path)
        raise
    if not path:
        remove_file(copy)
    return path


def _hand_over(staged: str, publication: Publication, put: Put | None) -> bool:
    """Give a staged job to a store of another kind; whether it is kept there."""
    put = put or _put_of(staged, publication)
    [kept] = put.store.put([put])
    os.unlink(staged)
    return kept


def _put_of(staged: str, publication: Publication) -> Put:
    """The put that another process had staged."""
    place = publication.place()
    job = read_job(staged, place.name)
    store = backends.open_backend(publication.queue)
    if place.folder == DONE:
        return Put(store, job, KEPT, place.gate, place.report)
    if not (place.entry or place.folder == DEAD):
        return Put(store, job, None, place.gate, place.report)
    failure = entries(place.entry)[-1:]
    reason = failure[0].reason if failure else ""
    outcome = (
        Later(reason, at=job.due)
        if place.folder == DELAYED
        else Dead(reason)
        if place.folder == DEAD
        else Later(reason)
    )
    if failure and failure[0].details:
        outcome.add_note(failure[0].details)
    return Put(store, job, outcome, place.gate, place.report)


def finish(home: Folders, committed: str, key: str, fate: Fate, token: str) -> None:
    """Step 4."""
    try:
        apply_fate(home, committed, key, fate)
    except FileNotFoundError:
        if os.path.lexists(committed):
            raise
    remove_file(_manifest_path(home, token))


def sweep(home: Folders, worker: str, kept: Sequence[str]) -> None:
    """Remove what a dead worker had staged and never committed; `kept` are the tokens that are still needed."""
    held = home.at("held")
    for name in os.listdir(held):
        if name.startswith(f"{worker}.") and name.rpartition(".")[0] not in kept:
            remove_file(os.path.join(held, name))


def apply_fate(home: Folders, path: str, key: str, fate: Fate) -> None:
    """Let a settled job go where its outcome says. Raises FileNotFoundError when its file has been taken away."""
    guards = Guards(home)
    released = bool(fate.unique) and guards.release(fate.unique, path)
    try:
        _apply_fate(home, path, key, fate)
    except OSError:
        if released:
            guards.retake(fate.unique, path)
        raise


def _apply_fate(home: Folders, path: str, key: str, fate: Fate) -> None:
    if not fate.folder:
        os.unlink(path)
        if fate.reported:
            home.drop_report(key)
        return
    if fate.report and os.path.lexists(path):
        home.add_report(key, fate.report)
    name = parse_name(fate.name)
    assert name is not None, "fates are written by this version"
    home.move(path, fate.folder, name)
