"""A settle that publishes: the outcome of a job and what came of it, as one.

    1. stage    every put is written to held/, and a manifest that tells where each belongs; all of it synced
    2. commit   the claimed file is renamed to a name with the field `c`; from here on the job is settled
    3. publish  each staged file is renamed into its queue, the queues' folders are synced
    4. finish   the claimed file goes where its outcome says, then the manifest is removed

Rules:

1. Nothing is visible before 2, and the handler never runs again after it. Whoever finds a committed file of a dead
   worker does 3 and 4, and may do so again and again: a staged file that is not there has gone out already.
2. The manifest goes last: a committed file whose manifest is gone was damaged by hand, and becomes a dead letter.
3. Between maildirs on one file system a put leaves exactly once. To another file system, or a store of another kind,
   a crash in the moment of handing over can make it leave twice, under one key; it is never lost.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec

from lamsonq import backends
from lamsonq.backends.durable import remove_file, sync_folder, write_file
from lamsonq.backends.maildir_files import DEAD, DELAYED, READY, Folders, Place, read_job
from lamsonq.backends.maildir_names import Name, parse_name
from lamsonq.errors import Dead, Later
from lamsonq.jobs import Put

VERSION = 1


class Fate(msgspec.Struct, frozen=True):
    """What becomes of the settled job itself: `folder` is "" when it is gone. `reported`: it has failed before."""

    folder: str = ""
    name: str = ""
    report: str = ""
    reported: bool = False


class Publication(msgspec.Struct, frozen=True):
    """One put: the staged file's name, and the queue (a path, or another store's URL), folder and name it gets."""

    staged: str
    queue: str
    folder: str
    name: str
    report: str = ""
    foreign: bool = False


class Manifest(msgspec.Struct, frozen=True):
    """What a committed job has still to do."""

    fate: Fate
    publications: tuple[Publication, ...]
    version: int = VERSION


class Target(NamedTuple):
    """A put, the queue that it goes to, whether that is another kind of store, and its place there."""

    put: Put
    queue: str
    foreign: bool
    place: Place


def stage(home: Folders, token: str, fate: Fate, targets: Sequence[Target]) -> Manifest:
    """Step 1. On an OSError nothing is left."""
    publications: list[Publication] = []
    try:
        for number, (put, queue, foreign, place) in enumerate(targets):
            staged = f"{token}.{number}"
            publications.append(Publication(staged, queue, place.folder, place.name.text(), place.report, foreign))
            write_file(home.at("held", staged), place.block, put.job.body)
        manifest = Manifest(fate, tuple(publications))
        # json, not msgspec, because file names may hold undecodable bytes.
        write_file(_manifest_path(home, token), json.dumps(msgspec.to_builtins(manifest)).encode("ascii"))
        sync_folder(home.at("held"))
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
    version = found.get("version") if isinstance(found, dict) else None
    if version != VERSION:
        raise ValueError(f"the manifest {token} is of version {version!r}; this lamsonq reads version {VERSION}")
    return msgspec.convert(found, Manifest)


def _manifest_path(home: Folders, token: str) -> str:
    return home.at("held", f"{token}.json")


def publish(home: Folders, committed: str, manifest: Manifest, live: Mapping[str, Put]) -> None:
    """Step 3, as often as needed. `live` has the puts of this process by staged name. Raises OSError, QueueError."""
    touched: dict[str, None] = {}
    for publication in manifest.publications:
        staged = home.at("held", publication.staged)
        if not os.path.lexists(staged):
            touched[os.path.join(publication.queue, publication.folder)] = None
        elif publication.foreign:
            _hand_over(staged, publication, live.get(publication.staged))
        else:
            _move_out(staged, committed, publication)
            touched[os.path.join(publication.queue, publication.folder)] = None
    for folder in touched:
        if os.path.isdir(folder):
            sync_folder(folder)


def _move_out(staged: str, committed: str, publication: Publication) -> None:
    target = Folders(publication.queue)
    name = _name(publication)
    if publication.report:
        target.set_report(name.key, publication.report)
    # On another file system the message must not be there before the commit is certain.
    target.adopt(staged, publication.folder, name, first=os.path.dirname(committed))


def _hand_over(staged: str, publication: Publication, put: Put | None) -> None:
    """Give a staged job to a store of another kind."""
    if put is None:
        name = _name(publication)
        job = read_job(staged, name)
        outcome = {
            READY: None,
            DELAYED: Later(publication.report.strip(), at=job.due),
            DEAD: Dead(publication.report.strip()),
        }[publication.folder]
        put = Put(backends.open_backend(publication.queue), job, outcome)
    put.store.put([put])
    os.unlink(staged)


def _name(publication: Publication) -> Name:
    name = parse_name(publication.name)
    if name is None:
        raise ValueError(f"{publication.name!r} has a name of a newer version")
    return name


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
