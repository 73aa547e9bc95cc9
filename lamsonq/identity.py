"""Who a server is: its user and groups, its root directory, and the mode of what it writes.

Rules:

1. Everything but taking a port is done as that user, from the first file on: what a server needs, he must be able to
   read, and what it writes is his.
2. Until the ports are taken, root can be taken back (`as_root`). Then `give_up_root` lets go of it for good, before
   any child is forked and any connection is accepted.
3. A user alone comes with the group that the system gives him; a group alone is refused. His other groups come with
   him, and none of root's.
4. Users and groups are looked up before the root directory changes. Every other path is one inside of it.
5. `assume` is for the first image of a server: what a reload executes is all of this already.

A umask is octal. Lamson and Salmon read it as a decimal number, and changed no user when only one of -uid and -gid was
given.
"""

from __future__ import annotations

import contextlib
import grp
import importlib
import os
import pwd
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lamsonq.errors import Refusal, UsageError

UMASK = "027"

_ID_MAX = 2**32 - 2  # (uid_t) -1 means "leave it" to the kernel


@dataclass(frozen=True, slots=True)
class User:
    """Who a server is to be: `groups` are all of his, `home` is None for a number that the system does not know."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str | None


_assumed: list[User] = []  # whom this process works as while it could still be root again


def assume(uid: str | None = None, gid: str | None = None, chroot: str | None = None, umask: str = UMASK) -> None:
    """Be this user (number or name) in this root directory; `umask` is octal. Root can be taken back for a port.

    Raises UsageError for what makes no sense, Refusal for what cannot be.
    """
    mask = _octal(umask)
    user = find(uid, gid)
    if chroot is not None:
        _change_root(chroot)
    if user is not None:
        _work_as(user)
    if chroot is not None or user is not None:
        _check_installation(chroot, user)
    os.umask(mask)


def find(uid: str | None, gid: str | None) -> User | None:
    """The user that these options ask for, None when they ask for none. Raises UsageError."""
    if uid is None:
        if gid is not None:
            raise UsageError(f"-gid {gid} without -uid: say which user the server is to be")
        return None
    entry = _entry(uid)
    number = entry.pw_uid if entry else _number("-uid", uid)
    if gid is None and entry is None:
        raise UsageError(f"the system does not know the user {uid}, and so no group of his: give -gid too")
    group = _group(gid) if gid is not None else entry.pw_gid if entry else 0
    name = entry.pw_name if entry else uid
    groups = os.getgrouplist(name, group) if entry else [group]
    return User(name, number, group, tuple(groups), entry.pw_dir if entry else None)


@contextlib.contextmanager
def as_root() -> Iterator[None]:
    """In this block, what the process was before `assume`: for what only root can have."""
    if not _assumed:
        yield
        return
    os.seteuid(0)
    try:
        yield
    finally:
        os.seteuid(_assumed[0].uid)


def give_up_root() -> None:
    """Be nobody but the assumed user from now on. Raises Refusal when root could still be taken back."""
    if not _assumed:
        return
    user = _assumed.pop()
    os.setresuid(user.uid, user.uid, user.uid)
    if user.uid == 0:
        return
    with contextlib.suppress(PermissionError):
        os.seteuid(0)
        raise Refusal(f"this system does not let go of root for {user.name}: nothing is started")


def check_writable(*folders: str) -> None:
    """See that the assumed user can write in these folders, or make them. Raises Refusal."""
    for folder in folders if _assumed else ():
        name = _assumed[0].name
        if not os.path.lexists(folder):
            if not _allowed(os.path.dirname(os.path.abspath(folder)), os.W_OK | os.X_OK):
                raise Refusal(f"the user {name} cannot make {folder} in {os.getcwd()}: make it and chown it to {name}")
            continue
        for path in _with_content(folder):
            if not _allowed(path, os.W_OK | os.X_OK if os.path.isdir(path) else os.W_OK):
                raise Refusal(f"{path} is not writable for the user {name}: chown -R {name} {folder}")


def seen_from_outside(chroot: str | None, path: str) -> str:
    """The path of a file that a server in this root directory calls `path`."""
    return path if chroot is None else os.path.join(chroot, os.path.normpath(f"/{path}").lstrip("/"))


# ---- what was asked for ----------------------------------------------------------------------------------------


def _octal(text: str) -> int:
    if not re.fullmatch(r"(0o)?[0-7]{1,4}", text) or int(text, 8) > 0o777:
        raise UsageError(f"-umask {text} is no octal number up to 777: 027 leaves the group its right to read")
    return int(text, 8)


def _entry(uid: str) -> pwd.struct_passwd | None:
    with contextlib.suppress(KeyError):
        return pwd.getpwuid(_number("-uid", uid)) if _is_number(uid) else pwd.getpwnam(uid)
    if _is_number(uid):
        return None
    raise UsageError(f"-uid {uid}: there is no such user")


def _group(gid: str) -> int:
    if _is_number(gid):
        return _number("-gid", gid)
    try:
        return grp.getgrnam(gid).gr_gid
    except KeyError:
        raise UsageError(f"-gid {gid}: there is no such group") from None


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _number(option: str, text: str) -> int:
    if len(text) > 10 or int(text) > _ID_MAX:
        raise UsageError(f"{option} {text} is too large for an id")
    return int(text)


# ---- becoming it -----------------------------------------------------------------------------------------------


def _change_root(chroot: str) -> None:
    try:
        os.chroot(os.path.expanduser(chroot))
        os.chdir("/")
    except PermissionError as error:
        raise Refusal(f"-chroot {chroot} takes root: start as root, or without it") from error
    except OSError as error:
        raise Refusal(f"cannot change the root directory to {chroot}: {error.strerror}") from error
    importlib.invalidate_caches()


def _work_as(user: User) -> None:
    if os.getresuid() == (user.uid,) * 3 and os.getresgid() == (user.gid,) * 3:
        return
    if os.geteuid() != 0:
        raise Refusal(f"-uid {user.name} takes root, and this is {_own_name()}: start as root, or without -uid")
    try:
        os.setgroups(user.groups)
        os.setresgid(user.gid, user.gid, user.gid)
        os.setresuid(user.uid, user.uid, 0)  # the saved 0 does not pass to a program that the boot starts
    except OSError as error:
        raise Refusal(f"cannot become the user {user.name}: {error.strerror}") from error
    _assumed[:] = [user]
    if user.home is not None:
        os.environ |= {"HOME": user.home, "USER": user.name, "LOGNAME": user.name}


def _own_name() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return f"the user {os.geteuid()}"


def _check_installation(chroot: str | None, user: User | None) -> None:
    """Python goes on to import from where it was found, and a reload executes it again."""
    package = Path(__file__).parent
    needed = {
        sys.executable: (sys.prefix, os.X_OK),
        os.__file__: (os.path.dirname(os.__file__), os.R_OK),
        str(package / "process.py"): (str(package), os.R_OK),
        os.devnull: (os.devnull, os.R_OK),
    }
    for path, (whole, right) in needed.items():
        if chroot is not None and not os.path.exists(path):
            raise Refusal(f"{chroot} has no {path}: a server needs its Python inside of the chroot: bind-mount {whole}")
        if user is not None and not _allowed(path, right):
            raise Refusal(f"the user {user.name} has no access to {path}, which a server needs")


def _allowed(path: str, right: int) -> bool:
    return os.access(path, right, effective_ids=True)


def _with_content(folder: str) -> list[str]:
    with contextlib.suppress(OSError):
        return [folder, *sorted(entry.path for entry in os.scandir(folder) if not entry.is_symlink())]
    return [folder]
