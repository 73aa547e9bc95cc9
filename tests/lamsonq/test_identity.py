"""Users, root directories and modes, seen from outside: real servers that root starts, in a system of their own."""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import random
import signal
import smtplib
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lamsonq import identity
from lamsonq.commands.project import generate
from lamsonq.errors import UsageError

from .servers import Server
from .waiting import PATIENCE, until

PACKAGE = Path(identity.__file__).parent
UID, GID, CERTS = 4242, 4243, 4244
USERS = f"root:x:0:0::/root:/bin/sh\nblog:x:{UID}:{GID}::/srv/blog:/bin/sh\n"
GROUPS = f"root:x:0:\nblog:x:{GID}:\ncerts:x:{CERTS}:blog\n"

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")


# ---- what is asked for -----------------------------------------------------------------------------------------

OWN = pwd.getpwuid(os.geteuid())


def test_a_user_comes_with_his_own_group_and_all_others_of_his() -> None:
    found = identity.find(OWN.pw_name, None)
    assert found is not None
    assert (found.uid, found.gid, found.home) == (OWN.pw_uid, OWN.pw_gid, OWN.pw_dir)
    assert set(found.groups) == set(os.getgrouplist(OWN.pw_name, OWN.pw_gid))
    assert found == identity.find(str(OWN.pw_uid), None)
    assert found == identity.find(OWN.pw_name, grp.getgrgid(OWN.pw_gid).gr_name)


def test_a_number_that_the_system_does_not_know_has_the_given_group_alone() -> None:
    found = identity.find("3999999", "4000000")
    assert found == identity.User("3999999", 3999999, 4000000, (4000000,), None)


@pytest.mark.parametrize(
    ("uid", "gid", "line"),
    [
        (None, "5", "-gid 5 without -uid: say which user the server is to be"),
        ("3999999", None, "the system does not know the user 3999999, and so no group of his: give -gid too"),
        ("no such", None, "-uid no such: there is no such user"),
        ("", None, "-uid : there is no such user"),
        ("-1", "5", "-uid -1: there is no such user"),
        ("0", "no such", "-gid no such: there is no such group"),
        ("4294967295", "5", "-uid 4294967295 is too large for an id"),
        ("0", "9" * 5000, "-gid " + "9" * 5000 + " is too large for an id"),
    ],
)
def test_what_makes_no_sense_is_one_line(uid: str | None, gid: str | None, line: str) -> None:
    with pytest.raises(UsageError) as caught:
        identity.find(uid, gid)
    assert str(caught.value) == line


@pytest.mark.parametrize("umask", ["18", "0x12", "-7", "1000", "", "٣", "2 7"])
def test_a_umask_that_is_not_octal_is_refused(umask: str) -> None:
    with pytest.raises(UsageError, match="is no octal number"):
        identity.assume(umask=umask)


def test_without_options_nothing_but_the_umask_changes() -> None:
    before = os.umask(0o22)
    try:
        identity.assume()
        with identity.as_root():
            pass
        identity.give_up_root()
        assert os.umask(0o22) == 0o27
    finally:
        os.umask(before)


# ---- a system of its own ---------------------------------------------------------------------------------------


class System:
    """A root directory with this Python in it, seen in a mount namespace that `holder` keeps."""

    def __init__(self, root: Path, holder: int) -> None:
        self.root = root
        self.holder = holder
        self.project = root / "srv" / "blog"
        self.port = 0
        self.relay = Server()

    def run(self, *command: str, inside: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a program as root, in this root directory or only with it in sight."""
        enter = ["nsenter", "-m", "-t", str(self.holder)]
        enter += ["chroot", str(self.root)] if inside else ["--wd=" + str(self.root)]
        place = [] if not inside else ["env", "-C", "/srv/blog"]
        return subprocess.run(
            [*enter, *place, *command],
            env=self.environ(),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def environ(self) -> dict[str, str]:
        ports = {"LAMSONQ_RECEIVER__PORT": str(self.port), "LAMSONQ_RELAY__PORT": str(self.relay.port)}
        return {"PATH": PATH, "PYTHONPATH": str(PACKAGE.parent), **ports}

    def lamsonq(self, *args: str, inside: bool = True) -> subprocess.CompletedProcess[str]:
        return self.run(sys.executable, "-m", "lamsonq", *args, inside=inside)

    def start(self, *args: str, inside: bool = True) -> list[int]:
        """Start a server that has to come up; the pids of its parent and its child."""
        for _ in range(20):
            done = self.lamsonq("start", *args, inside=inside)
            if "Address already in use" not in done.stderr:
                break
            self.port = privileged_port()  # somebody was quicker: the port was free, and is not any more
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        return self.family()

    def family(self) -> list[int]:
        parent = int((self.project / "run/smtp.pid").read_text())
        return [parent, *children(parent)]

    def refused(self, *args: str, inside: bool = True) -> tuple[int, str]:
        done = self.lamsonq("start", *args, inside=inside)
        assert done.stdout == ""
        assert done.stderr.count("\n") == 1, done.stderr
        assert not (self.project / "run/smtp.pid").exists()
        return done.returncode, done.stderr.removeprefix("ERROR: ").rstrip("\n")

    def log(self) -> str:
        return (self.project / "logs/lamsonq.log").read_text()

    def send(self) -> None:
        with smtplib.SMTP("127.0.0.1", self.port, timeout=PATIENCE) as client:
            client.sendmail(
                "a@example.com", ["test.blog.1@osb.localhost"], "From: a@example.com\r\nSubject: x\r\n\r\nhi\r\n"
            )


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def identities(pid: int) -> dict[str, list[int]]:
    """Real, effective, saved and file system ids of a process, its groups and its capabilities."""
    return identities_in(Path(f"/proc/{pid}/status"))


def identities_in(status: Path) -> dict[str, list[int]]:
    lines = dict(line.split(":\t", 1) for line in status.read_text().splitlines() if ":\t" in line)
    ids = {name: [int(number) for number in lines[name].split()] for name in ("Uid", "Gid", "Groups")}
    return ids | {name: [int(lines[name], 16)] for name in ("CapPrm", "CapEff")}


PATH = "/usr/bin:/bin:/usr/sbin:/sbin"
AS_BLOG = {"Uid": [UID] * 4, "Gid": [GID] * 4, "Groups": [GID, CERTS], "CapPrm": [0], "CapEff": [0]}


def mounts(root: Path) -> Iterator[str]:
    """The shell commands that put this Python into a root directory."""
    taken: set[str] = set()
    for place in ("/usr", "/lib", "/lib64", "/bin", "/dev", "/proc", sys.base_prefix, sys.prefix, str(PACKAGE)):
        real, inside = os.path.abspath(place), root / place.lstrip("/")
        if any(f"{real}/".startswith(f"{parent}/") for parent in taken) or not os.path.exists(real):
            continue
        if os.path.islink(real):
            inside.symlink_to(os.readlink(real))
            continue
        taken.add(real)
        inside.mkdir(parents=True)
        yield f"mount --rbind {real} {inside}"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, int]]:
    """A root directory, and the process that keeps its mounts."""
    root = tmp_path_factory.mktemp("system")
    root.chmod(0o755)
    (root / "etc").mkdir()
    (root / "etc/passwd").write_text(USERS)
    (root / "etc/group").write_text(GROUPS)
    for folder in ("srv", "tmp"):
        (root / folder).mkdir(exist_ok=True)
    script = " && ".join([*mounts(root), "echo ready", "exec sleep 600"])
    with subprocess.Popen(["unshare", "-m", "sh", "-c", script], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        try:
            if holder.stdout.readline() != "ready\n":
                message = "this root may not mount anything"
                pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
            yield root, holder.pid
        finally:
            holder.kill()


@pytest.fixture
def system(place: tuple[Path, int]) -> Iterator[System]:
    made = System(*place)
    made.port = privileged_port()
    for _ in generate(made.project):
        pass
    subprocess.run(["chown", "-R", f"{UID}:{GID}", str(made.project)], check=True)
    yield made
    made.relay.close()
    if (made.project / "run/smtp.pid").exists():
        os.killpg(made.family()[0], signal.SIGKILL)
    subprocess.run(["rm", "-r", str(made.project)], check=True)


def privileged_port() -> int:
    for port in random.sample(range(700, 1023), 323):  # another run of these tests must not choose the same one
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("no port below 1024 is free")


# ---- a user ----------------------------------------------------------------------------------------------------


@as_root
def test_a_server_takes_the_port_as_root_and_what_it_writes_is_its_users_and_nobody_elses(system: System) -> None:
    for pid in system.start("-uid", "blog"):
        assert identities(pid) == AS_BLOG
    system.send()
    until(lambda: "was handled by app.handlers.post.START" in system.log())
    found = [path for folder in ("run", "logs") for path in (system.project / folder).rglob("*")]
    assert {path.name for path in found} >= {"smtp.pid", "state.db", "lamsonq.log", "lamsonq.err", "posts", "new"}
    assert {(path.lstat().st_uid, path.lstat().st_gid) for path in found} == {(UID, GID)}

    run, logs = system.project / "run", system.project / "logs"
    written = [path for path in (*run.rglob("*"), *logs.rglob("*")) if path.name != ".gitignore"]
    modes = {str(path.relative_to(system.project)): stat.S_IMODE(path.lstat().st_mode) for path in written}
    assert [name for name, mode in modes.items() if mode & 0o027] == []
    queues = {name: mode for name, mode in modes.items() if name.startswith(("run/posts", "run/undeliverable"))}
    assert {mode for name, mode in queues.items() if (system.project / name).is_dir()} == {0o700}
    assert {mode for name, mode in queues.items() if (system.project / name).is_file()} == {0o600}
    assert modes["run/smtp.pid"] == modes["logs/lamsonq.log"] == modes["logs/lamsonq.err"] == 0o640


@as_root
def test_ids_and_a_umask_of_ones_own_and_no_umask_opens_a_queue(system: System) -> None:
    subprocess.run(["chown", "-R", "5151:5252", str(system.project)], check=True)
    for pid in system.start("--uid=5151", "--gid", "5252", "-umask", "002"):
        found = identities(pid)
        assert (found["Uid"], found["Gid"], found["Groups"]) == ([5151] * 4, [5252] * 4, [5252])
    system.send()
    assert stat.S_IMODE((system.project / "logs/lamsonq.log").stat().st_mode) == 0o664
    assert stat.S_IMODE((system.project / "run/posts").stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in (system.project / "run/posts/new").iterdir()} == {0o600}


@pytest.mark.slow
@as_root
def test_in_the_foreground_too(system: System) -> None:
    command = [sys.executable, "-m", "lamsonq", "start", "-uid", "blog", "--no-daemon"]
    enter = ["nsenter", "-m", "-t", str(system.holder), "chroot", str(system.root), "env", "-C", "/srv/blog"]
    with subprocess.Popen([*enter, *command], env=system.environ()) as one:
        try:
            until(lambda: (system.project / "logs/lamsonq.log").exists() and "1 process(es)" in system.log())
            assert [identities(pid) for pid in system.family()] == [AS_BLOG, AS_BLOG]
            one.terminate()
            assert one.wait(PATIENCE) == 0
        finally:
            one.kill()


@as_root
def test_without_the_option_a_server_stays_who_it_was_started_as(system: System) -> None:
    before = identities(os.getpid())
    for pid in system.start():
        assert identities(pid)["Uid"] == before["Uid"]


@pytest.mark.slow
@as_root
def test_a_reload_goes_on_as_the_user_and_keeps_the_port(system: System) -> None:
    parent, child = system.start("-uid", "blog")
    os.kill(parent, signal.SIGHUP)
    until(lambda: "Loaded anew" in system.log() and child not in system.family())
    assert system.family()[0] == parent
    assert [identities(pid) for pid in system.family()] == [AS_BLOG, AS_BLOG]
    system.send()


@as_root
def test_a_pid_file_that_is_written_anew_is_the_users(system: System) -> None:
    parent, _ = system.start("-uid", "blog")
    pid_file = system.project / "run/smtp.pid"
    pid_file.unlink()
    os.kill(parent, signal.SIGHUP)
    try:
        until(lambda: "Loaded anew" in system.log())
        assert pid_file.read_text() == f"{parent}\n"
    except BaseException:
        os.killpg(parent, signal.SIGKILL)  # nothing else tells of it
        raise
    status = pid_file.stat()
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (UID, GID, 0o640)


FORGERY = """
import fcntl, json, os, sys
pid_file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT | os.O_TRUNC)
os.write(pid_file, b"%d\\n" % os.getpid())
fcntl.flock(pid_file, fcntl.LOCK_EX)
fds = [*os.pipe(), pid_file]
for fd in fds:
    os.set_inheritable(fd, True)
record = {"role": "successor", "lifeline": fds[:2], "pid_file": pid_file}
os.environ["LAMSONQ_RELOAD"] = json.dumps([record, [os.fstat(fd).st_ino for fd in fds]])
os.execv(sys.executable, [sys.executable, "-m", "lamsonq", "start", *sys.argv[2:]])
"""
"""A program that starts a server as if it had been that server before, with a pid file of its own."""


@as_root
def test_nobody_stays_root_by_saying_that_he_is_a_fresh_image_already(system: System) -> None:
    done = system.run(sys.executable, "-c", FORGERY, "/tmp/forged.pid", "-uid", "blog")
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == "LAMSONQ_RELOAD in the environment is ignored: it is lamsonq's own.\n"
    assert [identities(pid) for pid in system.family()] == [AS_BLOG, AS_BLOG]


@pytest.mark.slow
@as_root
def test_a_restart_becomes_the_user_again(system: System) -> None:
    parent, _ = system.start("-uid", "blog")
    done = system.lamsonq("restart", "-uid", "blog")
    assert (done.returncode, done.stdout) == (0, f"Attempting to stop lamsonq at pid {parent}\n")
    assert parent not in system.family()
    assert [identities(pid) for pid in system.family()] == [AS_BLOG, AS_BLOG]


@pytest.mark.slow
@as_root
def test_the_log_file_is_made_anew_when_it_was_moved_away_also_by_a_user(system: System) -> None:
    system.start("-uid", "blog")
    log = system.project / "logs/lamsonq.log"
    log.rename(log.with_suffix(".1"))
    system.send()
    until(lambda: log.exists() and "was handled by app.handlers.post.START" in system.log())
    assert (log.stat().st_uid, stat.S_IMODE(log.stat().st_mode)) == (UID, 0o640)
    assert "was handled by" not in log.with_suffix(".1").read_text()


@as_root
@pytest.mark.parametrize("folder", ["run", "logs"])
def test_a_folder_that_the_user_cannot_write_is_named_with_what_to_do(system: System, folder: str) -> None:
    os.chown(system.project / folder, 0, 0)
    line = f"{folder} is not writable for the user blog: chown -R blog {folder}"
    assert system.refused("-uid", "blog") == (1, line)
    subprocess.run(["rm", "-r", str(system.project / folder)], check=True)
    os.chown(system.project, 0, 0)
    line = f"the user blog cannot make {folder} in /srv/blog: make it and chown it to blog"
    assert system.refused("-uid", "blog") == (1, line)


@pytest.mark.slow
@as_root
def test_what_a_server_of_root_has_left_behind_is_named(system: System) -> None:
    system.start()
    system.send()
    assert system.lamsonq("stop").returncode == 0
    code, line = system.refused("-uid", "blog")
    assert code == 1
    assert line.startswith("run/")
    assert line.endswith(" is not writable for the user blog: chown -R blog run")


@as_root
def test_a_python_that_the_user_cannot_read_is_named(system: System) -> None:
    above = system.root / sys.executable.split("/")[1]
    if above.is_symlink() or str(above.stat().st_dev) != str(system.root.stat().st_dev):
        pytest.skip("this Python lies in a part of the system that is not to be changed")
    above.chmod(0o700)
    try:
        line = f"the user blog has no access to {sys.executable}, which a server needs"
        assert system.refused("-uid", "blog") == (1, line)
    finally:
        above.chmod(0o755)


@pytest.mark.slow
@as_root
def test_a_user_can_start_a_server_as_himself_and_as_nobody_else(system: System) -> None:
    as_blog = ["setpriv", "--reuid", str(UID), "--regid", str(GID), "--groups", f"{GID},{CERTS}"]
    start = [*as_blog, sys.executable, "-m", "lamsonq", "start"]
    for options, line in (
        (["-uid", "root"], "-uid root takes root, and this is blog: start as root, or without -uid"),
        (["-uid", "blog", "-gid", "certs"], "-uid blog takes root, and this is blog: start as root, or without -uid"),
        (["-chroot", "/tmp"], "-chroot /tmp takes root: start as root, or without it"),
    ):
        done = system.run(*start, *options)
        assert (done.returncode, done.stderr) == (1, f"ERROR: {line}\n")
    done = system.run(*start, "-uid", "blog")
    assert "a port below 1024 takes root" in done.stderr
    system.port += 10_000
    assert system.run(*start, "-uid", "blog", "-gid", str(GID)).returncode == 0
    assert [identities(pid) for pid in system.family()] == [AS_BLOG, AS_BLOG]


@pytest.mark.slow
@as_root
def test_a_program_that_the_boot_starts_has_no_way_back_to_root(system: System) -> None:
    with (system.project / "config/boot.py").open("a") as boot:
        boot.write('import os\nos.system("cp /proc/self/status run/program")\n')
    system.start("-uid", "blog")
    assert identities_in(system.project / "run/program") == AS_BLOG


@as_root
def test_a_failed_start_leaves_its_line_and_nothing_of_root(system: System) -> None:
    with socket.create_server(("127.0.0.1", system.port)):
        code, line = system.refused("-uid", "blog")
    assert (code, line.partition(";")[0]) == (1, f"cannot listen on 127.0.0.1:{system.port}: Address already in use")
    assert {path.lstat().st_uid for path in system.project.rglob("*")} == {UID}


# ---- a root directory ------------------------------------------------------------------------------------------


@pytest.mark.slow
@as_root
def test_a_server_lives_in_its_root_directory_with_all_its_paths(system: System) -> None:
    users = ["-uid", str(UID), "-gid", str(GID)]
    parent, child = system.start("-chroot", str(system.root), "-chdir", "/srv/blog", *users, inside=False)
    for pid in (parent, child):
        assert os.readlink(f"/proc/{pid}/root") == str(system.root)
        assert identities(pid) == AS_BLOG | {"Groups": [GID]}
    system.send()
    until(lambda: "was handled by app.handlers.post.START" in system.log())
    os.kill(parent, signal.SIGHUP)
    until(lambda: "Loaded anew" in system.log() and child not in system.family())
    assert system.family()[0] == parent
    for pid in system.family():
        assert os.readlink(f"/proc/{pid}/root") == str(system.root)
        assert identities(pid) == AS_BLOG | {"Groups": [GID]}
    system.send()


@pytest.mark.slow
@as_root
def test_a_restart_finds_the_pid_file_in_the_root_directory(system: System) -> None:
    options = ["-chroot", str(system.root), "-chdir", "/srv/blog"]
    parent, _ = system.start(*options, inside=False)
    done = system.lamsonq("restart", *options, inside=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"Attempting to stop lamsonq at pid {parent}\n", "")
    assert parent not in system.family()
    assert os.readlink(f"/proc/{system.family()[0]}/root") == str(system.root)


@as_root
def test_a_root_directory_without_python_is_refused_with_what_is_missing(system: System) -> None:
    code, line = system.refused("-chroot", str(system.project), inside=False)
    assert code == 1
    need = "a server needs its Python inside of the chroot: bind-mount"
    assert line == f"{system.project} has no {sys.executable}: {need} {sys.prefix}"
    code, line = system.refused("-chroot", "/no such", inside=False)
    assert (code, line) == (1, "cannot change the root directory to /no such: No such file or directory")


def test_the_pid_file_of_a_root_directory_as_others_see_it() -> None:
    assert identity.seen_from_outside(None, "x/run/smtp.pid") == "x/run/smtp.pid"
    assert identity.seen_from_outside("/jail", "./run/smtp.pid") == "/jail/run/smtp.pid"
    assert identity.seen_from_outside("/jail", "/srv/../../blog/run/smtp.pid") == "/jail/blog/run/smtp.pid"
