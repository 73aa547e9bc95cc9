"""The generated project with Postfix in front and behind, set up as docs/behind-postfix.md has it."""

from __future__ import annotations

import os
import re
import smtplib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lamsonq import fsck
from lamsonq.routing import RoutingBase
from lamsonq.server import Receiver, SMTPReceiver

from ..ports import free_port
from ..waiting import until
from .conftest import Handled, mail_named
from .postfix import Postfix
from .programs import open_folder

PAGE = Path(__file__).parents[3] / "docs/behind-postfix.md"


def configuration(ending: str) -> str:
    """The page's lines of main.cf that name `ending`."""
    blocks = re.findall(r"```\n# main\.cf\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (found,) = [block for block in blocks if ending in block]
    return str(found)


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


@pytest.fixture
def sink(handled: Handled, serve: Callable[[Receiver], None]) -> int:
    """The port of a receiver that stands for the rest of the world."""
    receiver = SMTPReceiver("127.0.0.1", 0, deliver=handled, router=RoutingBase())
    serve(receiver)
    return receiver.port


@pytest.mark.slow
@pytest.mark.parametrize("way", ["smtp:[127.0.0.1]:8823", "lmtp:inet:127.0.0.1:8823", "lmtp:unix:lamsonq/lmtp.sock"])
def test_the_blog_is_posted_to_through_postfix_and_answers_through_it(way: str, sink: int, handled: Handled) -> None:
    port = free_port()
    lines = configuration(way) + configuration("reject_unverified_recipient")
    elsewhere = f"default_transport = smtp:[127.0.0.1]:{sink}\naddress_verify_poll_delay = 1\n"
    with open_folder() as folder:
        postfix = Postfix(folder, free_port(), lines.replace("8823", str(port)) + elsewhere)
        try:
            project = Project(folder, RECEIVER__PORT=port, RELAY__PORT=postfix.port)
            if "lmtp" in way:
                project.receive_by_lmtp()
            if "unix" in way:
                (folder / "queue/lamsonq").mkdir()
                project.environment["LAMSONQ_RECEIVER__SOCKET"] = str(folder / "queue/lamsonq/lmtp.sock")
            project.lamsonq("start")
            try:
                _post(postfix)
                subjects = {message["subject"] for message in handled.wait(2)}
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


def _post(postfix: Postfix) -> None:
    """One post; and another one, to an address of no route, which Postfix itself has to refuse."""
    with smtplib.SMTP("127.0.0.1", postfix.port) as client:
        client.sendmail("ann@x.test", ["my.blog@osb.test.com"], mail_named("post"), ["BODY=8BITMIME"])
        client.mail("ann@x.test")
        code, words = client.rcpt("!@osb.test.com")
        assert code == 550, words
        assert b"No such recipient here" in words
