"""Who is let into a maildir queue: one job of each `unique`, and what its gate lets through.

    guards/lock         locked (flock) while such a put is decided
    guards/<hash>.u     a second name (hard link) of the job that has this `unique`
    guards/<hash>.n     a gate's number, and the staged file of the put that made it so

Rules:

1. Only puts with a `unique` or a gate come here, and puts of a key that this process has not made; others wait for no
   lock. Of those that do, one at a time is decided, written, renamed and synced.
2. Renames keep a file's second name, and deleting a job leaves one name: so a `unique` is taken exactly as long as its
   file has two. Who settles a job as done or dead takes the second name away first; if it is killed then, the job comes
   again and a like one may run beside it. One that is kicked out of the dead letters is not unique any more.
3. A put stages its file under a name that never comes again, then takes the guard, then writes the number, then renames
   the file into the queue. A guard or a number whose file is still staged in tmp/ is void: its put never happened. One
   that is staged in held/ belongs to a committed settle, which is certain to come.
4. A number is replaced, never changed, and synced before the job has its name: no crash makes a gate let through twice
   what it has let through once. When it may be forgotten, it is.
5. A forked child drops its copy of the lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import secrets
from collections.abc import Collection, Iterator, Sequence

import msgspec

from lamsonq.backends.durable import remove_file, sync_folder, write_file
from lamsonq.backends.maildir_files import DELAYED, READY, Folders, Place
from lamsonq.jobs import Gate, Passage
from lamsonq.records import make_ready

VERSION = 1
_UNDOABLE = 8
"""How many puts through one gate a single call can undo."""


class Number(msgspec.Struct, frozen=True):
    """A gate's number: `staged` is the file of the put that it stands for, `before` what it was without that put, and
    so on, because all puts of one call may have to be undone. After `until` it may be forgotten."""

    last: float
    until: float | None = None
    staged: str = ""
    before: Number | None = None
    version: int = VERSION


make_ready(Number)


class _Newer(OSError):
    """A newer version has written it."""


class Guards:
    """The guards of one queue. Raises OSError."""

    def __init__(self, folders: Folders) -> None:
        self.folders = folders

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else is let in meanwhile."""
        fd = self._open_lock()
        _locks.add(fd)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            _locks.discard(fd)
            # A child that was forked in the wrong moment has a copy: closing ours alone would not end the lock.
            with contextlib.suppress(OSError):
                fcntl.flock(fd, fcntl.LOCK_UN)
            os.close(fd)

    def _open_lock(self) -> int:
        path, flags = self.folders.at("guards", "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            return os.open(path, flags, 0o600)
        except FileNotFoundError:
            self.folders.make(again=True)
            return os.open(path, flags, 0o600)

    def staging(self, place: Place, *, alone: bool = True) -> str:
        """Where to stage the file of a new job; not `alone` if another of the same put may have its name."""
        # A number names the file; were there another of that name one day, what has happened would be void.
        marked = place.guarded or not alone
        name = place.name._replace(mark=secrets.randbits(48) | 1) if marked else place.name
        return self.folders.free("tmp", name)

    # -- putting -----------------------------------------------------------------------------------------------

    def publish(self, staged: str, place: Place) -> str | None:
        """Give a staged file its name in the queue: its path, "" where that is there already, None when it is kept out.

        A guarded place needs the lock, until it is synced.
        """
        if place.guarded:
            if os.path.lexists(self.folders.at(place.folder, place.name.text())):
                return ""
            let_in = self._let_in(staged, place)
            if let_in is None:
                return None
            place = let_in
        path = self.folders.at(place.folder, place.name.text())
        if os.path.lexists(path):
            self._withdraw(staged, place)
            return ""
        reported = place.report + place.entry
        if reported:
            self.folders.set_report(place.name.key, reported)
        try:
            self.folders.rename(staged, path)
        except OSError:
            if reported:
                self.folders.drop_report(place.name.key)
            raise
        return path

    def sync(self, places: Sequence[tuple[Place, str | None]]) -> None:
        """Make durable what `publish` has done with these. What keeps a job out was synced by whoever did it."""
        for folder in {
            os.path.dirname(path) or self.folders.at(place.folder) for place, path in places if path is not None
        }:
            sync_folder(folder)
        if any(place.guarded and path for place, path in places):
            sync_folder(self.folders.at("guards"))

    def retract(self, staged: str, place: Place, path: str | None) -> None:
        """Undo a put that failed, as far as that is possible; of several the last one first."""
        if path and (place.report or place.entry):
            self.folders.drop_report(place.name.key)
        if not place.guarded:
            remove_file(path or staged)
            return
        with contextlib.suppress(OSError):
            if path:
                os.rename(path, staged)
            self._withdraw(staged, place)
            remove_file(staged)
        # A staged file that is left says that the put never happened.

    def _let_in(self, staged: str, place: Place) -> Place | None:
        """Where the job goes whose guards are now this file's; None when another has them or the gate is shut."""
        now = self.folders.now()
        guard = None if place.unique is None else self._guard(mark_of(place.unique))
        if guard is not None and not self._is_free(guard, staged):
            return None
        passage: Passage | None = None
        if place.gate is not None:
            before = self._known(self._number(place.gate.key))
            passage = place.gate.passage(None if before is None else before.last, now)
            if passage is None:
                self._withdraw(staged, place)
                return None
        if guard is not None and place.folder in (READY, DELAYED) and not os.path.lexists(guard):
            os.link(staged, guard)
        if place.gate is not None and passage is not None:
            self._write(self._number(place.gate.key), _after(place.gate, passage, before, self._short(staged)))
            place = place.due_at(passage.due, now) if place.open_end else place
        return place

    def _withdraw(self, staged: str, place: Place) -> None:
        """Give back what this staged file has of the guards."""
        if not place.guarded or not os.path.lexists(staged):
            return
        if place.unique is not None:
            self.release(mark_of(place.unique), staged)
        if place.gate is not None:
            file = self._number(place.gate.key)
            with contextlib.suppress(_Newer):
                number = self._read(file)
                if number is not None and number.staged == self._short(staged):
                    self._restore(file, number)

    # -- who is unique -----------------------------------------------------------------------------------------

    def _is_free(self, guard: str, staged: str) -> bool:
        try:
            found = os.lstat(guard)
        except FileNotFoundError:
            return True
        if os.path.samestat(found, os.lstat(staged)):
            return True  # an earlier try of the same settle
        if found.st_nlink > 1 and not self._is_staged(found.st_ino):
            return False
        os.unlink(guard)
        return True

    def _is_staged(self, inode: int) -> bool:
        with os.scandir(self.folders.at("tmp")) as found:
            return any(entry.inode() == inode for entry in found)

    def release(self, mark: str, path: str) -> bool:
        """The job in this file is no longer in the way of like ones; whether it was. Raises FileNotFoundError when the
        file is gone. Needs no lock: while the file is there, nobody else touches its guard."""
        own = os.lstat(path)
        guard = self._guard(mark)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.lstat(guard), own):
                os.unlink(guard)
                return True
        return False

    def retake(self, mark: str, path: str) -> None:
        """Undo a `release`, if nobody was faster."""
        with contextlib.suppress(OSError):
            os.link(path, self._guard(mark))

    # -- when a gate opens -------------------------------------------------------------------------------------

    def _known(self, path: str) -> Number | None:
        number = self._read(path)
        while number is not None and self._is_void(number):
            number = number.before
        return number

    def _is_void(self, number: Number) -> bool:
        return bool(number.staged) and os.path.lexists(self.folders.at(number.staged))

    def _read(self, path: str) -> Number | None:
        try:
            with open(path, "rb") as file:
                found = json.loads(file.read())
            if isinstance(found, dict) and found.get("version") != VERSION:
                raise _Newer(0, f"{path!r} is of version {found.get('version')!r}, and this lamsonq reads {VERSION}")
            return msgspec.convert(found, Number)
        except FileNotFoundError:
            return None
        except (ValueError, RecursionError) as error:
            logging.warning("%r is no number of a gate, and is passed over: %s", path, error)
            return None

    def _write(self, path: str, number: Number) -> None:
        part = f"{path}.part"
        remove_file(part)
        # json, not msgspec, because a path may hold undecodable bytes.
        write_file(part, json.dumps(msgspec.to_builtins(number)).encode("ascii"))
        if number.until is not None:
            os.utime(part, (number.until, number.until))  # so that a sweep need not read it
        os.rename(part, path)

    def _restore(self, path: str, number: Number) -> None:
        if number.before is not None:
            self._write(path, number.before)
        else:
            os.unlink(path)

    # -- tidying -----------------------------------------------------------------------------------------------

    def sweep(self) -> None:
        """Forget what is of no use any more."""
        with contextlib.suppress(FileNotFoundError):
            old = [path for path in self._paths() if self._is_over(path)]
            if old:
                with self.locked():
                    for path in old:
                        if self._is_over(path):
                            remove_file(path)

    def _is_over(self, path: str) -> bool:
        try:
            facts = os.lstat(path)
            if path.endswith(".u"):
                return facts.st_nlink == 1
            number = self._read(path) if path.endswith(".n") and facts.st_mtime < self.folders.now() else None
        except OSError:
            return False
        return number is not None and number.until is not None and number.until < self.folders.now()

    def clear_away(self, abandoned: Collection[str]) -> None:
        """Remove files that were staged in tmp/ and never put: first the numbers that are void while they lie there."""
        with self.locked():
            staged = {self._short(path) for path in abandoned}
            for path in self._paths():
                with contextlib.suppress(OSError):
                    number = self._read(path) if path.endswith(".n") else None
                    if number is not None and number.staged in staged and self._is_void(number):
                        self._restore(path, number)
            for path in abandoned:
                remove_file(path)

    def _paths(self) -> list[str]:
        folder = self.folders.at("guards")
        return [os.path.join(folder, name) for name in os.listdir(folder)]

    # -- names -------------------------------------------------------------------------------------------------

    def _guard(self, mark: str) -> str:
        return self.folders.at("guards", f"{mark}.u")

    def _number(self, key: str) -> str:
        return self.folders.at("guards", f"{mark_of(key)}.n")

    def _short(self, path: str) -> str:
        """A path within the queue as it is from there, so that the queue may be moved."""
        return path.removeprefix(self.folders.path + os.sep)


def mark_of(text: str) -> str:
    """What stands for a text of any length in the name of a file."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _after(gate: Gate, passage: Passage, before: Number | None, staged: str) -> Number:
    until = passage.last + gate.memory
    return Number(passage.last, until if until < float("inf") else None, staged, _cut(before, _UNDOABLE))


def _cut(number: Number | None, depth: int) -> Number | None:
    """The number without the oldest of those before it."""
    if number is None or depth == 0:
        return None if number is None else msgspec.structs.replace(number, staged="", before=None)
    return msgspec.structs.replace(number, before=_cut(number.before, depth - 1))


_locks: set[int] = set()


def _forget_locks() -> None:
    """In a forked child: the locks are the parent's."""
    while _locks:
        os.close(_locks.pop())


os.register_at_fork(after_in_child=_forget_locks)
