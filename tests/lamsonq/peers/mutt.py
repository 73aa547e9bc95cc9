"""mutt on a terminal of its own: keys go in, and what it shows is read."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
import threading
import time
from pathlib import Path

from ..waiting import until
from .programs import need

CONFIG = """\
set folder = {home}
set spoolfile = {home}/none
set mbox_type = Maildir
set quit = yes
set move = no
set delete = yes
set wait_key = no
set beep = no
set sort = date-received
set index_format = "%Z [%s]"
set mail_check = 1
set timeout = 1
unset mark_old
ignore *
unignore subject
"""


class Mutt:
    """mutt with one mailbox open. `home` is a folder for its files."""

    def __init__(self, mailbox: Path, home: Path) -> None:
        program = need("mutt")
        (home / "muttrc").write_text(CONFIG.format(home=home))
        self._terminal, its = pty.openpty()
        fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 100, 0, 0))
        environment = {"HOME": str(home), "TERM": "xterm", "PATH": os.environ["PATH"], "LANG": "C.UTF-8"}
        command = [program, "-n", "-F", str(home / "muttrc"), "-f", str(mailbox)]
        self._mutt = subprocess.Popen(
            command, stdin=its, stdout=its, stderr=its, env=environment, start_new_session=True
        )
        os.close(its)
        self._shown = b""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # its end of the terminal is closed
            while select.select([self._terminal], [], []) and (data := os.read(self._terminal, 65536)):
                self._shown += data

    def press(self, keys: str, shows: str = "") -> None:
        """Press keys, and wait until this is shown anew; without `shows` until mutt has come to rest."""
        before = len(self._shown)
        os.write(self._terminal, keys.encode())
        if shows:
            self.see(shows, before)
        seen = -1
        while seen != len(self._shown):
            seen = len(self._shown)
            time.sleep(0.3)  # there is no other sign of a program that waits for the next key

    def see(self, text: str, since: int = 0) -> None:
        def shown() -> bytes:
            return self._shown[since:]

        until(lambda: text.encode() in shown(), f"{text!r} on the screen", lambda: repr(shown()))

    def close(self) -> None:
        """Quit, which writes back what has changed."""
        os.set_blocking(self._terminal, False)  # nobody may be left to read the key
        try:
            until(self._has_quit, "mutt's end", lambda: repr(self._shown[-2000:]))
        finally:
            self._mutt.kill()
            self._mutt.wait()
            self._reader.join()
            os.close(self._terminal)

    def _has_quit(self) -> bool:
        with contextlib.suppress(OSError):
            os.write(self._terminal, b"q")  # again and again: what it shows as an error discards the keys before
        try:
            self._mutt.wait(0.3)
        except subprocess.TimeoutExpired:
            return False
        return True
