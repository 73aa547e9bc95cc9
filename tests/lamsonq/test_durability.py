"""No 250 before the message is on disk: read off the system calls of a real receiver, with strace."""

import os
import re
import shutil
import signal
import smtplib
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

PROGRAM = """
from lamsonq.queue import Queue
from lamsonq.routing import RoutingBase, route
from lamsonq.server import SMTPReceiver
from lamsonq.state import SQLiteStorage
import signal, sys

router = RoutingBase()
router.STATE_STORE = SQLiteStorage("run/state.db")
router.UNDELIVERABLE_QUEUE = Queue("run/undeliverable")

@route("desk@example.com")
def START(message):
    if message["subject"] == "fail":
        raise RuntimeError("boom")
    Queue("run/posts").push(message)
    return AGAIN

@route("desk@example.com")
def AGAIN(message):
    return START(message)

for function in (START, AGAIN):
    router.register_route("desk@example.com", function)
deliver = Queue("run/posts").push if sys.argv[1] == "spool" else None
receiver = SMTPReceiver("127.0.0.1", 0, router=router, deliver=deliver)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # a traced process may get it in any of its threads
receiver.start()
print(receiver.port, flush=True)
signal.sigwait([signal.SIGTERM])
receiver.stop()
receiver.join()
"""

CALL = re.compile(r"^(\d+) +(\w+)\((.*)")
RESUMED = re.compile(r"^(\d+) +<\.\.\. (\w+) resumed>(.*)")


@pytest.fixture(params=["handle", "spool"])
def traced(request: pytest.FixtureRequest, here: Path) -> Iterator[tuple[int, Path, str]]:
    """A receiver under strace: its port, and the trace."""
    if shutil.which("strace") is None:
        message = "strace is not installed"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    (here / "receiver.py").write_text(textwrap.dedent(PROGRAM))
    trace = here / "trace"
    command = ["strace", "-f", "-y", "-qq", "-s", "32", "-o", str(trace)]
    calls = ["-e", "trace=fsync,fdatasync,rename,renameat,renameat2,link,sendto,sendmsg,write"]
    server = subprocess.Popen(
        [*command, *calls, sys.executable, "receiver.py", request.param],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdout is not None
    yield int(server.stdout.readline()), trace, request.param
    for child in Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split():
        os.kill(int(child), signal.SIGTERM)
    server.wait(30)


def test_250_is_said_only_after_file_and_directory_are_synced(traced: tuple[int, Path, str]) -> None:
    port, trace, way = traced
    with smtplib.SMTP("127.0.0.1", port, timeout=30) as client:
        for subject in ("one", "two", "fail", "three") if way == "handle" else ("one", "two", "three"):
            sender = f"{subject}@example.com"
            client.sendmail(sender, ["desk@example.com"], f"Subject: {subject}\r\n\r\nhello\r\n")
    accepted = _checked(trace.read_text(errors="replace").splitlines())
    assert accepted == (4 if way == "handle" else 3)


def _checked(lines: list[str]) -> int:
    """How many messages were answered 250; fails when one was before what it stands for was on disk."""
    pending: dict[str, str] = {}
    synced: set[str] = set()
    published: list[str] = []  # files that were renamed into a queue since the last 250
    dirty: set[str] = set()  # queue folders that were renamed into and not synced since
    accepted = 0
    for line in lines:
        call, arguments, begins, ends = _read(line, pending)
        path = _path(arguments)
        if call in ("write", "sendto", "sendmsg") and begins and "250 2.0.0" in arguments:
            accepted += 1
            assert published, f"250 without a file: {line}"
            assert not dirty, f"250 before the directory was synced: {dirty}"
            published.clear()
        elif call in ("fsync", "fdatasync") and ends:
            synced.add(path)
            dirty.discard(path)
        elif call.startswith("rename") and begins:
            source, target = re.findall(r'"([^"]*)"', arguments)[:2]
            if os.path.basename(os.path.dirname(source)) in ("tmp", "held"):
                assert os.path.abspath(source) in {os.path.abspath(p) for p in synced}, f"renamed unsynced: {line}"
                published.append(target)
                dirty.add(os.path.abspath(os.path.dirname(target)))
    return accepted


def _read(line: str, pending: dict[str, str]) -> tuple[str, str, bool, bool]:
    """(call, arguments, whether it begins here, whether it ends well here)."""
    resumed = RESUMED.match(line)
    if resumed:
        return resumed[2], pending.pop(resumed[1], ""), False, "= -1" not in resumed[3]
    found = CALL.match(line)
    if not found:
        return "", "", False, False
    unfinished = "<unfinished ...>" in found[3]
    if unfinished:
        pending[found[1]] = found[3]
    return found[2], found[3], True, not unfinished and "= -1" not in found[3]


def _path(arguments: str) -> str:
    found = re.match(r"\d+<([^>]*)>", arguments)
    return found[1] if found else ""
