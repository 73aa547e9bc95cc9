"""The generated project with Postfix in front and behind, started and stopped by its commands, as docs/behind-postfix.md
has it."""

from __future__ import annotations

import os
import smtplib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lamsonq import fsck
from lamsonq.routing import RoutingBase
from lamsonq.server import Receiver, SMTPReceiver

from .conftest import Handled, free_port_of, mail_named
from .postfix import Postfix
from .programs import open_folder, until

MAIN = """\
relay_domains = osb.test.com
transport_maps = inline:{{ {{ osb.test.com = {way} }} {{ x.test = smtp:[127.0.0.1]:{sink} }} }}
"""


class Project:
    """A generated project, which listens where its environment says."""

    def __init__(self, folder: Path, **settings: object) -> None:
        self.folder = folder / "blog"
        self.environment = os.environ | {f"LAMSONQ_{name}": str(value) for name, value in settings.items()}
        self.lamsonq("gen", str(self.folder), cwd=folder)

    def lamsonq(self, *words: str, cwd: Path | None = None) -> None:
        command = [sys.executable, "-m", "lamsonq", *words]
        done = subprocess.run(
            command, cwd=cwd or self.folder, env=self.environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def receive_by_lmtp(self) -> None:
        """What the page says to change in config/boot.py."""
        boot = self.folder / "config/boot.py"
        text = boot.read_text()
        assert "SMTPReceiver(" in text
        boot.write_text(text.replace("SMTPReceiver", "LMTPReceiver"))


@pytest.mark.parametrize("by", ["smtp", "lmtp"])
def test_the_blog_is_posted_to_through_postfix_and_answers_through_it(
    by: str, handled: Handled, serve: Callable[[Receiver], None]
) -> None:
    sink = SMTPReceiver("127.0.0.1", 0, deliver=handled, router=RoutingBase())
    serve(sink)
    port = free_port_of()
    with open_folder() as folder:
        way = f"smtp:[127.0.0.1]:{port}" if by == "smtp" else "lmtp:unix:lamsonq/lmtp.sock"
        postfix = Postfix(folder, free_port_of(), MAIN.format(way=way, sink=sink.port))
        try:
            project = Project(folder, RECEIVER__PORT=port, RELAY__PORT=postfix.port)
            if by == "lmtp":
                project.receive_by_lmtp()
                (folder / "queue/lamsonq").mkdir()
                project.environment["LAMSONQ_RECEIVER__SOCKET"] = str(folder / "queue/lamsonq/lmtp.sock")
            project.lamsonq("start")
            try:
                with smtplib.SMTP("127.0.0.1", postfix.port) as client:
                    client.sendmail("ann@x.test", ["my.blog@osb.test.com"], mail_named("post"), ["BODY=8BITMIME"])
                subjects = sorted(message["subject"] or "" for message in handled.wait(2))
                until(lambda: not postfix.queue(), "Postfix's queue empty", postfix.log)
            finally:
                project.lamsonq("stop", "-ALL", "run")
        finally:
            postfix.close()
        assert {message.To for message in handled.messages} == {"ann@x.test"}
        assert "Your page is ready" in subjects
        report = fsck.check(project.folder / "run", ["<post@x.test>"])
        assert report.good, report
        assert not list((project.folder / "run").glob("*.pid"))
