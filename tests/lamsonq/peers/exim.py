"""Exim as a client, which sends a message by BDAT (RFC 3030) wherever that is offered."""

from __future__ import annotations

import os
from pathlib import Path

from .programs import need, run

CONFIG = """\
primary_hostname = front.test
exim_path = {program}
spool_directory = {folder}/spool
log_file_path = {folder}/log/%s
log_selector = +smtp_confirmation
exim_user = mail
exim_group = mail
never_users =
keep_environment =
smtputf8_advertise_hosts = *
allow_utf8_domains = true
bounce_return_body = false
begin routers
all:
  driver = manualroute
  route_list = * 127.0.0.1
  transport = out
  self = send
begin transports
out:
  driver = smtp
  port = {port}
  protocol = {protocol}
  allow_localhost
  {more}
begin authenticators
plain:
  driver = plaintext
  public_name = PLAIN
  client_send = ^{name}^{password}
begin retry
* * F,2h,1s
"""


class Exim:
    """It sends to one port. `more` are lines of its transport."""

    def __init__(
        self, folder: Path, port: int, protocol: str, name: str = "", password: str = "", more: str = ""
    ) -> None:
        self._program = need("exim4", root=True)
        self.folder = folder
        values = {
            "program": self._program,
            "folder": folder,
            "port": port,
            "protocol": protocol,
            "name": name,
            "password": password,
        }
        (folder / "exim.conf").write_text(CONFIG.format(more=more, **values))
        for name in ("spool", "log"):
            (folder / name).mkdir()
            os.chmod(folder / name, 0o777)

    def send(self, message: bytes, *recipients: str) -> None:
        """Send a message, and wait for what came of it."""
        command = [self._program, "-C", str(self.folder / "exim.conf"), "-odf", "-oi", "-f", "ann@x.test"]
        run([*command, *recipients], message.replace(b"\r\n", b"\n"))

    def try_again(self) -> None:
        """Send again what was put off."""
        run([self._program, "-C", str(self.folder / "exim.conf"), "-qff"])

    def log(self) -> list[str]:
        return (self.folder / "log/main").read_text("utf-8", "replace").splitlines()
