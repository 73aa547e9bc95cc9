"""A Postfix of one's own: configuration, queue and log in one folder, listening on a free port of the loopback."""

from __future__ import annotations

import grp
import json
import os
import pwd
import signal
import subprocess
from pathlib import Path

from ..waiting import until
from .programs import listens, need, run

MAIN = """\
compatibility_level = 3.6
queue_directory = {folder}/queue
data_directory = {folder}/data
daemon_directory = {daemons}
command_directory = {commands}
mail_owner = postfix
setgid_group = postdrop
maillog_file = {folder}/log
maillog_file_prefixes = {folder}
inet_interfaces = 127.0.0.1
inet_protocols = ipv4
mynetworks = 127.0.0.0/8
myhostname = front.test
mydestination =
alias_maps =
local_recipient_maps =
relayhost =
smtpd_relay_restrictions = permit_mynetworks, reject
smtp_host_lookup = native
disable_dns_lookups = yes
smtpd_peername_lookup = no
minimal_backoff_time = 300s
{more}
"""

MASTER = """\
127.0.0.1:{port} inet n - n - - smtpd
pickup unix n - n 60 1 pickup
cleanup unix n - n - 0 cleanup
qmgr unix n - n 300 1 qmgr
rewrite unix - - n - - trivial-rewrite
bounce unix - - n - 0 bounce
defer unix - - n - 0 bounce
trace unix - - n - 0 bounce
verify unix - - n - 1 verify
flush unix n - n 1000? 0 flush
proxymap unix - - n - - proxymap
smtp unix - - n - - smtp
lmtp unix - - n - - lmtp
relay unix - - n - - smtp
showq unix n - n - - showq
error unix - - n - - error
retry unix - - n - - error
virtual unix - n n - - virtual
anvil unix - - n - 1 anvil
scache unix - - n - 1 scache
postlog unix-dgram n - n - 1 postlogd
tlsmgr unix - - n 1000? 1 tlsmgr
"""

_PRIVATE = (
    "active",
    "bounce",
    "corrupt",
    "defer",
    "deferred",
    "flush",
    "hold",
    "incoming",
    "private",
    "saved",
    "trace",
)


class Postfix:
    """`more` are lines of main.cf. Give it a folder that the user postfix can reach."""

    def __init__(self, folder: Path, port: int, more: str = "") -> None:
        master = need("master", root=True)
        self.folder = folder
        self.port = port
        values = {"folder": folder, "daemons": Path(master).parent, "commands": Path(need("postqueue")).parent}
        (folder / "main.cf").write_text(MAIN.format(more=more, **values))
        (folder / "master.cf").write_text(MASTER.format(port=port))
        self._make_folders()
        # It ends its children through their process group, which has to be its own.
        command = [master, "-c", str(folder), "-d"]
        self._master = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
        self.pid = self._master.pid
        try:
            until(lambda: listens(port), "Postfix's greeting", self.log)
        except AssertionError:
            self.close()
            raise

    def _make_folders(self) -> None:
        """What the installation of a package does for the queue of the system's Postfix."""
        owner, group = pwd.getpwnam("postfix").pw_uid, grp.getgrnam("postdrop").gr_gid
        queue = self.folder / "queue"
        for path in (queue, queue / "pid"):
            path.mkdir()
        modes = dict.fromkeys(_PRIVATE, 0o700) | {"maildrop": 0o1730, "public": 0o2710}
        for path, mode in [(self.folder / "data", 0o700), *((queue / name, mode) for name, mode in modes.items())]:
            path.mkdir()
            os.chown(path, owner, group if mode != 0o700 else -1)
            path.chmod(mode)  # after chown, which clears the set-group-id bit

    def log(self) -> str:
        path = self.folder / "log"
        return path.read_text("utf-8", "replace") if path.exists() else ""

    def logged(self, *words: str) -> int:
        """How many lines of the log have all these words."""
        return sum(all(word in line for word in words) for line in self.log().splitlines())

    def queue(self) -> list[dict[str, object]]:
        """What waits, as postqueue tells it."""
        return [json.loads(line) for line in run(["postqueue", "-c", str(self.folder), "-j"]).splitlines()]

    def flush(self) -> None:
        """Try everything again that was put off."""
        # The log says so before the file is where a flush looks for it.
        until(lambda: all(each["queue_name"] == "deferred" for each in self.queue()), "deferred", self.log)
        run(["postqueue", "-c", str(self.folder), "-f"])

    def forget(self) -> None:
        """Drop everything that waits."""
        run(["postsuper", "-c", str(self.folder), "-d", "ALL"])

    def close(self) -> None:
        """End it, with all its processes."""
        if self._master.poll() is None:
            self._master.send_signal(signal.SIGTERM)
        self._master.wait(20)
