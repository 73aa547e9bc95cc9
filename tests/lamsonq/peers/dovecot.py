"""A Dovecot of one's own: IMAP and LMTP on free ports of the loopback, everything else in one folder."""

from __future__ import annotations

import imaplib
import os
import pwd
import subprocess
from pathlib import Path

from ..waiting import until
from .programs import listens, need

CONFIG = """\
base_dir = {folder}/base
state_dir = {folder}/state
log_path = {folder}/log
protocols = imap lmtp
listen = 127.0.0.1
ssl = no
disable_plaintext_auth = no
auth_mechanisms = plain
auth_verbose = yes
first_valid_uid = 1
mail_fsync = never
default_vsz_limit = 0
passdb {{
  driver = passwd-file
  args = {folder}/users
}}
userdb {{
  driver = passwd-file
  args = {folder}/users
}}
service imap-login {{
  chroot =
  inet_listener imap {{
    port = {imap}
  }}
  inet_listener imaps {{
    port = 0
  }}
}}
service anvil {{
  chroot =
}}
service auth {{
  unix_listener {folder}/auth.sock {{
    mode = 0666
  }}
}}
service lmtp {{
  inet_listener lmtp {{
    port = {lmtp}
  }}
  unix_listener {folder}/lmtp.sock {{
    mode = 0666
  }}
}}
"""

PASSWORD = "secret"
OWNER = "nobody"
"""Who the mailboxes belong to: Dovecot opens none of root's."""


class Dovecot:
    """Serves the maildirs `mailboxes`, by user, from a folder that the user nobody can reach."""

    def __init__(self, folder: Path, imap: int, lmtp: int, mailboxes: dict[str, Path]) -> None:
        dovecot = need("dovecot", root=True)
        need("imap"), need("lmtp")
        self.folder, self.imap, self.lmtp = folder, imap, lmtp
        self.socket = str(folder / "lmtp.sock")
        self.auth = str(folder / "auth.sock")
        """Where a Postfix asks about passwords."""
        owner = pwd.getpwnam(OWNER)
        lines = [
            f"{user}:{{PLAIN}}{PASSWORD}:{owner.pw_uid}:{owner.pw_gid}::{folder}::userdb_mail=maildir:{path}\n"
            for user, path in mailboxes.items()
        ]
        (folder / "users").write_text("".join(lines))
        (folder / "dovecot.conf").write_text(CONFIG.format(folder=folder, imap=imap, lmtp=lmtp))
        self._master = subprocess.Popen([dovecot, "-F", "-c", str(folder / "dovecot.conf")], stderr=subprocess.DEVNULL)
        try:
            until(lambda: listens(imap) and listens(lmtp), "Dovecot's greeting", self.log)
        except AssertionError:
            self.close()
            raise

    def log(self) -> str:
        path = self.folder / "log"
        return path.read_text("utf-8", "replace") if path.exists() else ""

    def login(self, user: str) -> imaplib.IMAP4:
        client = imaplib.IMAP4("127.0.0.1", self.imap, 20)
        client.login(user, PASSWORD)
        return client

    def close(self) -> None:
        """End it, with all its processes."""
        self._master.terminate()
        self._master.wait(20)


def give_to_dovecot(folder: Path) -> None:
    """Let Dovecot read and write what root has made."""
    owner = pwd.getpwnam(OWNER)
    for path, folders, files in os.walk(folder):
        for each in (path, *(os.path.join(path, name) for name in (*folders, *files))):
            os.chown(each, owner.pw_uid, owner.pw_gid)
