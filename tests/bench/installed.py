"""What the peers need, installed where it disturbs nobody: programs by apt-get where we are root, libraries of PyPI in
a virtual environment and those of npm in a folder, both under the user's cache, where the next run finds them.

What cannot be had is named, and left out of the tables.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lamsonq-bench"

LIBRARIES = (
    "aiosmtpd==1.4.6",
    "salmon-mail==3.3.0",
    "huey==3.5.4",
    "persist-queue==1.1.0",
    "litequeue==0.9",
    "taskiq==0.13.0",
    "taskiq-redis==1.2.4",
    "celery[redis]==5.7.0",
    "dramatiq[redis]==2.2.1",
    "rq==3.0.0",
)
PACKAGES = {"smtp-source": "postfix", "postqueue": "postfix", "redis-server": "redis-server", "strace": "strace"}
"""Program -> Debian's package."""

HARAKA = "Haraka@3.3.4"
PATH = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/usr/lib/postfix/sbin"))


@functools.cache
def program(name: str) -> str | None:
    """Where a program is, installed if need be; None: not to be had here."""
    found = shutil.which(name, path=PATH)
    if found is None and name in PACKAGES and os.geteuid() == 0 and shutil.which("apt-get"):
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        _done(["apt-get", "update", "-qq"], environment)
        _done(["apt-get", "install", "-qq", "-y", "--no-install-recommends", PACKAGES[name]], environment)
        found = shutil.which(name, path=PATH)
    return found


@functools.cache
def python() -> str | None:
    """The interpreter that has the peers' libraries."""
    folder = CACHE / f"python{sys.version_info.major}.{sys.version_info.minor}"
    wanted, have = "\n".join(LIBRARIES), folder / "installed"
    interpreter = folder / "bin" / "python"
    if have.exists() and have.read_text() == wanted:
        return str(interpreter)
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = _done([sys.executable, "-m", "venv", "--clear", str(folder)])
    if made and _done([str(interpreter), "-m", "pip", "install", "-q", "--disable-pip-version-check", *LIBRARIES]):
        have.write_text(wanted)
        return str(interpreter)
    return None


@functools.cache
def haraka() -> str | None:
    """Haraka's program."""
    found = CACHE / "haraka" / "node_modules" / ".bin" / "haraka"
    if not found.exists() and shutil.which("npm"):
        found.parents[2].mkdir(parents=True, exist_ok=True)
        _done(["npm", "install", "--silent", "--prefix", str(found.parents[2]), HARAKA])
    return str(found) if found.exists() else None


def versions() -> list[str]:
    """What is measured, each with its version."""
    said = [*(LIBRARIES if python() else ()), *([HARAKA] if haraka() else ())]
    for package in sorted(set(PACKAGES.values())):
        command = ["dpkg-query", "-W", "-f", "${Package} ${Version}", package]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        said += [done.stdout] if done.returncode == 0 else []
    return said


def _done(command: list[str], environment: dict[str, str] | None = None) -> bool:
    print(f"installing: {' '.join(command)}", file=sys.stderr, flush=True)
    done = subprocess.run(command, env=environment, stdout=sys.stderr, stdin=subprocess.DEVNULL, check=False)
    return done.returncode == 0
