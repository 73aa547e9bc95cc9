"""systemd: the units that a project gets, sockets that are passed, and what the manager is told."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import smtplib
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lamsonq import sockets, systemd
from lamsonq.child import GRACE, MARGIN
from lamsonq.errors import Refusal
from lamsonq.sockets import Listener, Listeners

from .projects import ENVIRON, MailProject, children_of, gone
from .waiting import PATIENCE, until

CONFIG = Path(sockets.__file__).parents[1] / "config"


# ---- the units -------------------------------------------------------------------------------------------------


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """The units of a project, with the paths filled in as their comments ask for."""
    if shutil.which("systemd-analyze") is None:
        message = "systemd-analyze is not installed"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    for kind in ("service", "socket"):
        text = (CONFIG / f"lamsonq@.{kind}").read_text()
        text = text.replace("/srv/lamsonq/.venv/bin/lamsonq", sys.executable).replace("/srv/lamsonq", str(tmp_path))
        for name in ("", "boot"):
            (tmp_path / f"lamsonq@{name}.{kind}").write_text(text)
    return tmp_path


def analyze(*args: str) -> str:
    done = subprocess.run(["systemd-analyze", *args], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_units_are_what_systemd_understands(units: Path) -> None:
    for kind in ("service", "socket"):
        assert analyze("verify", f"{units}/lamsonq@boot.{kind}") == ""


def test_the_service_may_do_little_besides_its_work(units: Path) -> None:
    report = analyze("security", "--offline=yes", f"{units}/lamsonq@boot.service")
    (exposure,) = re.findall(r"Overall exposure level .*: ([0-9.]+) ", report)
    assert float(exposure) <= 3.0


def test_the_service_waits_longer_for_the_end_than_handlers_may_take() -> None:
    (seconds,) = re.findall(r"^TimeoutStopSec=([0-9]+)$", (CONFIG / "lamsonq@.service").read_text(), re.MULTILINE)
    assert int(seconds) > GRACE + 2 * MARGIN


# ---- a server that systemd runs --------------------------------------------------------------------------------

ACTIVATE = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.set_inheritable(3, True)
os.environ |= {"LISTEN_FDS": "1", "LISTEN_PID": str(os.getpid()), "LISTEN_FDNAMES": "smtp"}
os.execv(sys.executable, [sys.executable, "-m", "lamsonq", *sys.argv[2:]])
"""


@contextlib.contextmanager
def activated(project: MailProject, listener: socket.socket) -> Iterator[tuple[int, socket.socket]]:
    """A server as systemd starts one: its pid, and the socket that the manager reads."""
    manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    manager.bind(str(project.path / "notify"))
    manager.settimeout(PATIENCE)
    command = [sys.executable, "-c", ACTIVATE, str(listener.fileno()), "start", "--no-daemon"]
    environ = {**ENVIRON, "NOTIFY_SOCKET": str(project.path / "notify")}
    with manager, subprocess.Popen(command, cwd=project.path, env=environ, pass_fds=[listener.fileno()]) as server:
        try:
            yield server.pid, manager
            server.terminate()
            assert manager.recv(256) == b"STOPPING=1"
            assert server.wait(PATIENCE) == 0
        finally:
            server.kill()


@pytest.fixture
def project(tmp_path: Path, free_port: Callable[[], int]) -> Iterator[MailProject]:
    made = MailProject(tmp_path, free_port())
    yield made
    made.clean_up()


def send(port: int, name: str) -> None:
    with smtplib.SMTP("127.0.0.1", port, timeout=PATIENCE) as client:
        client.sendmail("alice@example.com", ["desk@example.com"], f"Message-ID: {name}\r\n\r\nhello\r\n")


def test_a_passed_socket_is_served_told_of_and_kept_through_a_reload(project: MailProject) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert port != project.port
        with activated(project, listener) as (pid, manager):
            assert manager.recv(256) == b"READY=1"
            assert project.pid() == pid
            assert f"INFO: Listening on 127.0.0.1:{port}, which was passed to this process." in project.log()
            send(port, "<a>")
            project.version(2)
            old = children_of(pid)
            os.kill(pid, signal.SIGHUP)
            reloading = manager.recv(256).decode()
            assert re.fullmatch(r"RELOADING=1\nMONOTONIC_USEC=[1-9][0-9]+", reloading)
            assert manager.recv(256) == b"READY=1"
            until(lambda: all(gone(child) for child in old))
            send(port, "<b>")
            assert project.handled() == [(1, "<a>"), (2, "<b>")]


def test_programs_that_handlers_start_are_told_of_no_sockets(project: MailProject) -> None:
    with (project.path / "handlers.py").open("a") as handlers:
        handlers.write(
            "    import subprocess\n    subprocess.run('env > run/env; ls -l /proc/self/fd >> run/env', shell=True)\n"
        )
    with socket.create_server(("127.0.0.1", 0)) as listener, activated(project, listener) as (_, manager):
        assert manager.recv(256) == b"READY=1"
        send(listener.getsockname()[1], "<a>")
        told = (project.path / "run" / "env").read_text()
    assert "NOTIFY_SOCKET" in told
    assert "LISTEN_" not in told
    assert "socket:" not in told


def test_a_reload_that_fails_is_over_for_the_manager_too(project: MailProject) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, activated(project, listener) as (pid, manager):
        assert manager.recv(256) == b"READY=1"
        (project.path / "config" / "boot.py").write_text("nonsense\n")
        os.kill(pid, signal.SIGHUP)
        assert manager.recv(256).startswith(b"RELOADING=1")
        assert manager.recv(256) == b"READY=1"
        send(listener.getsockname()[1], "<a>")


# ---- sockets that are passed -----------------------------------------------------------------------------------


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Listeners]]:
    """`kept(*listeners)` makes these the ones that `listen` takes from."""
    made: list[Listeners] = []

    def keep(*found: Listener) -> Listeners:
        made.append(Listeners(found))
        monkeypatch.setattr(sockets, "_kept", made[-1])
        return made[-1]

    yield keep
    for listeners in made:
        listeners.close()


def passed(address: tuple[str, int] | str) -> Listener:
    """A listening socket, as the service manager passes it."""
    if isinstance(address, str):
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(address)
        listener.listen()
    else:
        listener = socket.create_server(address)
    return Listener(listener.detach())


def name(listener: socket.socket) -> object:
    with listener:
        return listener.getsockname()


def test_the_socket_of_the_asked_address_is_taken_first_and_each_only_once(kept: Callable[..., Listeners]) -> None:
    one, two = passed(("127.0.0.1", 0)), passed(("127.0.0.1", 0))
    ports = [socket.socket(fileno=os.dup(each.fd)).getsockname()[1] for each in (one, two)]
    kept(one, two)
    assert name(sockets.listen("127.0.0.1", ports[1])) == ("127.0.0.1", ports[1])
    assert name(sockets.listen("127.0.0.1", 25)) == ("127.0.0.1", ports[0])
    third = name(sockets.listen("127.0.0.1", 0))
    assert isinstance(third, tuple)
    assert third[1] not in ports


def test_a_unix_socket_is_taken_for_a_path_and_a_port_for_an_address(
    kept: Callable[..., Listeners], tmp_path: Path
) -> None:
    path = str(tmp_path / "passed")
    kept(passed(path), passed(("127.0.0.1", 0)))
    tcp = name(sockets.listen("127.0.0.1", 24))
    assert isinstance(tcp, tuple)
    assert tcp[0] == "127.0.0.1"
    assert name(sockets.listen("127.0.0.1", 24, str(tmp_path / "asked"))) == path
    assert not (tmp_path / "asked").exists()


def test_what_we_have_opened_is_handed_on_only_for_its_own_address(
    kept: Callable[..., Listeners], free_port: Callable[[], int]
) -> None:
    first = kept()
    port = sockets.listen("127.0.0.1", 0).getsockname()[1]
    first.settle()
    second = kept(*first.to_hand_over())
    free = free_port()
    assert name(sockets.listen("127.0.0.1", free)) == ("127.0.0.1", free)
    assert name(sockets.listen("127.0.0.1", 0)) == ("127.0.0.1", port)
    second.undo()
    assert [each.taken for each in second.found] == [False]
    second.settle()
    assert second.found == []
    first.found.clear()


def test_sockets_for_another_process_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LISTEN_FDS", "1")
    monkeypatch.setenv("LISTEN_PID", "1")
    assert systemd.passed() == []
    assert "LISTEN_FDS" not in os.environ


@pytest.mark.parametrize("count", ["-1", "x", "99999"])
def test_a_number_of_sockets_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, count: str) -> None:
    monkeypatch.setenv("LISTEN_FDS", count)
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
    with pytest.raises(Refusal, match="is no number of sockets"):
        sockets.passed()


def test_a_socket_that_does_not_listen_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagrams:
        monkeypatch.setattr(systemd, "_FIRST", datagrams.fileno())
        monkeypatch.setenv("LISTEN_FDS", "1")
        monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
        with pytest.raises(Refusal, match="the unit needs ListenStream= and Accept=no"):
            sockets.passed()


def test_without_a_manager_nobody_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    systemd.notify("READY=1")


def test_a_manager_in_the_abstract_namespace_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"\0lamsonq-{os.getpid()}")
        manager.settimeout(PATIENCE)
        monkeypatch.setenv("NOTIFY_SOCKET", f"@lamsonq-{os.getpid()}")
        systemd.notify("READY=1")
        assert manager.recv(64) == b"READY=1"
