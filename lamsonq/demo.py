"""`lamsonq demo`: the whole way of a message through this project, in the processes that would run for real.

It starts what an operator would start, by the commands that he would type, sends mail to it over SMTP, and shows what
can be seen of each hop. It ends with everything stopped, and with exit code 0 only if every hop was seen.
"""

from __future__ import annotations

import os
import smtplib
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from email.message import EmailMessage
from pathlib import Path

import click

from lamsonq.errors import Refusal
from lamsonq.mail import MailRequest
from lamsonq.queue import Queue
from lamsonq.settings import machine
from lamsonq.state import SQLiteStorage

SENDERS = ("alice@example.com", "bob@example.com")
TO = "my.blog@osb.test.com"
PATIENCE = 20.0
"""Seconds that a hop may take before the demo says that it was not seen."""


def run() -> int:
    """Run the demo in the project in the current folder. Raises Refusal when a hop is not seen."""
    if not Path("config/queue.py").exists():
        raise Refusal("lamsonq demo runs the blog of lamsonq's own repository: no config/queue.py in this folder")
    Demo().run()
    return 0


class Demo:
    """One run: where the servers listen, and how much of the log was shown already."""

    def __init__(self) -> None:
        settings = machine("config/settings.toml")
        self.port = _free(settings.receiver.port)
        self.relay_port = _free(settings.relay.port)
        self.environment = os.environ | {
            "LAMSONQ_RECEIVER__PORT": str(self.port),
            "LAMSONQ_RELAY__PORT": str(self.relay_port),
        }
        self.posts = Queue("run/posts")
        self.relayed = Queue("run/queue")
        self.old = {*self.posts.keys(), *self.relayed.keys()}
        self.log = Path("logs/lamsonq.log")
        self.log_start = self.log.stat().st_size if self.log.exists() else 0

    def run(self) -> None:
        _step("Three servers: one to relay to, the SMTP receiver, and later the queue receiver")
        self._command("log", "-port", str(self.relay_port))
        try:
            self._command("start")
            self._mail_comes_in()
            self._mail_was_relayed()
            self._queue_is_worked()
        finally:
            _step("Stop everything")
            self._command("stop", "-ALL", "run")
        left = sorted(str(path) for path in Path("run").glob("*.pid"))
        if left:
            raise Refusal(f"these were not stopped: {left}")
        click.echo("\nEvery hop was seen.")

    def _mail_comes_in(self) -> None:
        _step(f"Real mail, over SMTP, to port {self.port}")
        states = SQLiteStorage("run/state.db")
        for sender in SENDERS:
            before = states.get("app.handlers.post", sender)
            self._send(sender)
            after = states.get("app.handlers.post", sender)
            _show(f"state of {sender} in app.handlers.post: {before} -> {after}")
            _expect(after == "POSTING", f"{sender} should be in POSTING")
        _step("What the handler pushed lies in the queue, a file for each message")
        click.echo("  $ ls run/posts/new/")
        files = sorted(name for name in os.listdir("run/posts/new") if name.partition(",")[0] not in self.old)
        for name in files:
            _show(name)
        _expect(len(files) == len(SENDERS), f"there should be {len(SENDERS)} new files")

    def _send(self, sender: str) -> None:
        message = EmailMessage()
        message["From"], message["To"], message["Subject"] = sender, TO, "A first post"
        message.set_content("Hello, world.\n")
        with smtplib.SMTP("127.0.0.1", self.port, timeout=PATIENCE) as client:
            client.ehlo()
            _show(f"MAIL FROM:<{sender}>  -> {_reply(client.docmd(f'MAIL FROM:<{sender}>'))}")
            _show(f"RCPT TO:<nobody@elsewhere.org>  -> {_reply(client.docmd('RCPT TO:<nobody@elsewhere.org>'))}")
            _show(f"RCPT TO:<{TO}>  -> {_reply(client.docmd(f'RCPT TO:<{TO}>'))}")
            code, text = client.data(message.as_bytes())
            _show(f"DATA  -> {_reply((code, text))}")
            _expect(code == 250, "the message should have been taken with 250")

    def _mail_was_relayed(self) -> None:
        _step("What the relay got from the handler")
        _expect(
            _until(lambda: {m.To for m in self._relayed()} >= set(SENDERS)), "each sender should have had an answer"
        )
        for message in self._relayed():
            _show(f"To: {message['To']}  Subject: {message['Subject']}")

    def _relayed(self) -> list[MailRequest]:
        new = [self.relayed.get(key) for key in self.relayed.keys() if key not in self.old]  # noqa: SIM118 - no mapping
        return [message for message in new if message is not None]

    def _queue_is_worked(self) -> None:
        _step("A second process takes them out of the queue")
        self._command("start", "-boot", "config.queue", "-pid", "run/queue.pid")
        handled = "was handled by app.handlers.index.START"
        _expect(_until(lambda: self._logged().count(handled) >= len(SENDERS)), "the index handler should have run")
        _expect(_until(lambda: sum(self.posts.backend.counts().values()) == 0), "the queue should be empty")
        shown = ("Sleeping for", "Pulled", "received from Peer: 'run/posts'", "Got message from", handled)
        for line in self._logged().splitlines():
            if any(part in line for part in shown):
                _show(line)

    def _logged(self) -> str:
        with self.log.open("rb") as log:
            log.seek(self.log_start)
            return log.read().decode("utf-8", "replace")

    def _command(self, *arguments: str) -> None:
        click.echo(f"  $ lamsonq {' '.join(arguments)}")
        done = subprocess.run([sys.executable, "-m", "lamsonq", *arguments], env=self.environment, check=False)
        _expect(done.returncode == 0, f"lamsonq {arguments[0]} ended with exit code {done.returncode}")


def _step(text: str) -> None:
    click.secho(f"\n{text}", bold=True)


def _show(text: str) -> None:
    click.echo(f"    {text}")


def _reply(reply: tuple[int, bytes]) -> str:
    return f"{reply[0]} {reply[1].decode('ascii', 'replace')}"


def _expect(seen: bool, what: str) -> None:
    if not seen:
        raise Refusal(f"not seen: {what}; look into logs/lamsonq.log")


def _until(condition: Callable[[], bool]) -> bool:
    give_up_at = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > give_up_at:
            return False
        time.sleep(0.02)
    return True


def _free(port: int) -> int:
    """This port, or any free one when it is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            probe.bind(("127.0.0.1", 0))
        found: int = probe.getsockname()[1]
        return found
