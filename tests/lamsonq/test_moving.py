"""An application in the style of Lamson moves in by what docs/coming-from-lamson.md says, and goes on where it was."""

from __future__ import annotations

import json
import mailbox
import os
import re
import shelve
import smtplib
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from email.message import EmailMessage
from pathlib import Path

import pytest

import lamsonq
from lamsonq import testing
from lamsonq.mail import MailRequest, MailResponse
from lamsonq.queue import Queue
from lamsonq.routing import ROUTE_FIRST_STATE, RoutingBase
from lamsonq.server import QueueReceiver
from lamsonq.state import SQLiteStorage, StateStorage
from lamsonq.testing import TestConversation

from .waiting import PATIENCE, until

ROOT = Path(lamsonq.__file__).parents[1]
PAGE = (ROOT / "docs" / "coming-from-lamson.md").read_text()
ENVIRON = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}

# A club to which people subscribe by mail: they confirm, they post, a second process keeps the archive.
SOURCES = {
    "app/__init__.py": "",
    "app/handlers/__init__.py": "",
    "app/handlers/club.py": """
        import logging
        from lamson.routing import route, stateless, nolocking, state_key_generator, Router
        from lamson.server import SMTPError
        from lamson import view, queue
        from config.settings import relay, CONFIRM, members


        @state_key_generator
        def club_of(module_name, message):
            return module_name + ":" + message['to'].split("@")[0].split("-")[0]


        @route("(club)-subscribe@(host)")
        def START(message, club=None, host=None):
            CONFIRM.send(relay, club, message, "confirm.msg", locals())
            return CONFIRMING


        @route("(club)-confirm-(id_number)@(host)")
        def CONFIRMING(message, club=None, id_number=None, host=None):
            original = CONFIRM.verify(club, message['from'], id_number)
            if original is None:
                logging.warning("%s cannot confirm", message['from'])
                return CONFIRMING
            members.append(original['from'])
            relay.deliver(view.respond(locals(), Body="welcome.txt", From="%(club)s@%(host)s",
                                       To=message['from'], Subject="Welcome to %(club)s"))
            return POSTING


        @route("(club)@(host)")
        @route("(club)-post@(host)")
        def POSTING(message, club=None, host=None):
            if "forbidden" in (message['subject'] or ""):
                raise SMTPError(554, "That word is forbidden here")
            relay.reply(message, "%s@%s" % (club, host), "Taken", "Your post is on its way.")
            q = queue.Queue("run/posts")
            q.push(message)
            return POSTING


        @route("(club)-post@(host)")
        @stateless
        @nolocking
        def COUNT(message, club=None, host=None):
            logging.info("one more for %s", club)
    """,
    "app/handlers/bounces.py": """
        import logging
        from lamson.routing import route, Router
        from lamson.bounce import bounce_to


        def SOFT(message):
            logging.warning("soft bounce from %s", message.bounce.final_recipient)
            return BOUNCE


        def HARD(message):
            report = message.bounce
            logging.warning("hard bounce from %s: %s", report.final_recipient, report.error_for_humans())
            return BOUNCE


        @route("bounces@(host)")
        @bounce_to(soft=SOFT, hard=HARD)
        def START(message, host=None):
            logging.warning("no bounce at all")
            return BOUNCE


        @route("bounces@(host)")
        @bounce_to(soft=SOFT, hard=HARD)
        def BOUNCE(message, host=None):
            return BOUNCE
    """,
    "app/handlers/archive.py": """
        import os
        from lamson.routing import route, stateless


        @route("(club)(rest)@(host)", rest="(?:-post)?")
        @stateless
        def START(message, club=None, rest=None, host=None):
            with open("archive.txt", "a") as archive:
                archive.write("%s|%s|%s\\n" % (message['subject'], message.route_from, message.body().strip()))
    """,
    "app/templates/confirm.msg": "Please answer this mail to join {{ club }}.\n",
    "app/templates/welcome.txt": "You are in, {{ message['from'] }}.\n",
    "config/__init__.py": "",
    "config/settings.py": """
        relay_config = {'host': 'localhost', 'port': RELAY_PORT}
        receiver_config = {'host': 'localhost', 'port': PORT}
        handlers = ['app.handlers.club', 'app.handlers.bounces']
        router_defaults = {'host': 'clubs\\\\.example\\\\.com', 'club': '[a-z]+', 'id_number': '[a-z0-9]+'}
        template_config = {'dir': 'app', 'module': 'templates'}
        queue_config = {'queue': 'run/posts', 'sleep': 1}
        queue_handlers = ['app.handlers.archive']
        members = []
    """,
    "config/boot.py": """
        from config import settings
        from lamson.routing import Router, ShelveStorage
        from lamson.server import Relay, SMTPReceiver, QueueReceiver
        from lamson.confirm import ConfirmationEngine, ConfirmationStorage
        from lamson import view, queue
        import logging
        import logging.config
        import shelve
        import jinja2

        logging.config.fileConfig("config/logging.conf")

        settings.relay = Relay(host=settings.relay_config['host'], port=settings.relay_config['port'], debug=0)

        settings.receiver = SMTPReceiver(settings.receiver_config['host'], settings.receiver_config['port'])

        settings.CONFIRM = ConfirmationEngine('run/pending', ConfirmationStorage(db=shelve.open('run/confirmations')))

        Router.defaults(**settings.router_defaults)
        Router.load(settings.handlers)
        Router.RELOAD = True
        Router.STATE_STORE = ShelveStorage("run/states")
        Router.UNDELIVERABLE_QUEUE = queue.Queue("run/undeliverable")

        view.LOADER = jinja2.Environment(loader=jinja2.PackageLoader(settings.template_config['dir'],
                                                                     settings.template_config['module']))
    """,
    "config/logging.conf": """
        [loggers]
        keys=root

        [handlers]
        keys=fileHandler

        [formatters]
        keys=simple

        [logger_root]
        level=DEBUG
        handlers=fileHandler

        [handler_fileHandler]
        class=FileHandler
        level=DEBUG
        formatter=simple
        args=("logs/lamson.log",)

        [formatter_simple]
        format=%(asctime)s - %(name)s - %(levelname)s - %(message)s
    """,
}


class Moved:
    """The old application in a folder of its own, and what its users do."""

    def __init__(self, path: Path, relay_port: int, port: int) -> None:
        self.path = path
        self.port = port
        for name, source in SOURCES.items():
            file = path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            text = textwrap.dedent(source).lstrip()
            file.write_text(text.replace("RELAY_PORT", str(relay_port)).replace("PORT", str(port)))
        for folder in ("run", "logs"):
            (path / folder).mkdir()

    def run(self, *command: str) -> str:
        done = subprocess.run(
            command, cwd=self.path, env=ENVIRON, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def lamsonq(self, *arguments: str) -> str:
        return self.run(sys.executable, "-m", "lamsonq", *arguments)

    def script(self, first_line: str) -> str:
        """Run a script of the page as its first line says; what it printed."""
        name, _, arguments = first_line.partition(" ")
        source = re.search(rf"```python\n# python {re.escape(first_line)}.*?\n(.*?)```", PAGE, re.DOTALL)
        assert source, first_line
        (self.path / name).write_text(source[1])
        return self.run(sys.executable, name, arguments)

    def replace(self, name: str, old: str, new: str) -> None:
        text = (self.path / name).read_text()
        assert old in text, old
        (self.path / name).write_text(text.replace(old, new))

    def says(self, sender: str, to: str, subject: str, body: str = "hello") -> None:
        message = EmailMessage()
        message["From"], message["To"], message["Subject"] = sender, to, subject
        message.set_content(body)
        self.sends(sender, to, message.as_bytes())

    def sends(self, sender: str, to: str, message: bytes) -> None:
        with smtplib.SMTP("localhost", self.port, timeout=PATIENCE) as client:
            client.sendmail(sender, [to], message)

    def answer(self, to: str, subject: str) -> str:
        """The body of the answer that was sent, once it is there."""
        sent = Queue(self.path / "run" / "queue")

        def found() -> str | None:
            mails = [mail for mail in map(sent.get, sent.keys()) if mail is not None]
            return next(
                (str(m.body()) + str(m["from"]) for m in mails if m["to"] == to and subject in str(m["subject"])), None
            )

        return until(found)

    def log(self) -> str:
        return (self.path / "logs" / "lamsonq.log").read_text()


def left_by_the_old_one(path: Path) -> None:
    """What Lamson had in run/ when it was stopped: states, a confirmation that is waited for, mail in queues."""
    with shelve.open(str(path / "run" / "states")) as states:
        states[repr([b"app.handlers.club:chess", "bob@example.com"])] = "POSTING"
        states[repr([b"app.handlers.club:chess", "carol@example.com"])] = "CONFIRMING"
        states[repr(["app.handlers.club:go", "eve@example.com"])] = "ERROR"
    pending = mailbox.Maildir(str(path / "run" / "pending"))
    key = pending.add(b"From: carol@example.com\nTo: chess-subscribe@clubs.example.com\nSubject: let me in\n\nplease\n")
    with shelve.open(str(path / "run" / "confirmations")) as confirmations:
        confirmations["chess:carol@example.com"] = ("0123456789abcdef", key)
    posts = mailbox.Maildir(str(path / "run" / "posts"))
    for number in (1, 2):
        headers = f"From: Bob <bob@example.com>\nTo: Chess <chess@clubs.example.com>\nSubject: old {number}\n"
        posts.add(f"{headers}\nhello\n".encode())


@pytest.fixture
def moved(tmp_path: Path, free_port: Callable[[], int]) -> Iterator[Moved]:
    relay_port = free_port()
    application = Moved(tmp_path / "club", relay_port, free_port())
    left_by_the_old_one(application.path)
    application.lamsonq("log", "-port", str(relay_port))
    yield application
    application.lamsonq("stop", "-ALL", "run")


def move(moved: Moved) -> None:
    """Do what the page says, step by step."""
    rename = re.search(r"### 1\. Rename.*?```\n(.*?)```", PAGE, re.DOTALL)
    assert rename
    moved.run("bash", "-c", rename[1])
    moved.replace("config/boot.py", "import Router, ShelveStorage", "import Router")
    moved.replace("config/boot.py", "import jinja2", "import jinja2\nfrom lamsonq.state import SQLiteStorage")
    moved.replace("config/boot.py", 'ShelveStorage("run/states")', 'SQLiteStorage("run/state.db")')
    moved.replace(
        "config/boot.py",
        "import ConfirmationEngine, ConfirmationStorage",
        "import ConfirmationEngine, SQLiteConfirmationStorage",
    )
    moved.replace(
        "config/boot.py",
        "ConfirmationStorage(db=shelve.open('run/confirmations'))",
        "SQLiteConfirmationStorage('run/confirm.db')",
    )
    (moved.path / "states.jsonl").write_text(moved.script("export_states.py run/states"))
    moved.script("import_states.py states.jsonl")
    (moved.path / "confirmations.jsonl").write_text(moved.script("export_confirmations.py run/confirmations"))
    moved.script("import_confirmations.py confirmations.jsonl")


def test_a_waiting_mail_without_envelope_is_handled_for_us_and_no_stranger_gets_a_copy(
    router: RoutingBase, module: Callable[..., str]
) -> None:
    name = module(
        """
        @route("list@ours.example")
        @stateless
        def START(message):
            CALLS.append(message.To)
        """
    )
    router.load([name])
    router.UNDELIVERABLE_QUEUE = Queue("run/undeliverable")
    Path("run").mkdir(exist_ok=True)
    posts = mailbox.Maildir("run/posts")
    posts.add(b"From: a@x.example\nTo: list@ours.example, bob@other.example\nCc: eve@other.example\n\nhello\n")
    QueueReceiver("run/posts", router=router).start(one_shot=True)
    assert sys.modules[name].CALLS == ["list@ours.example"]
    assert router.UNDELIVERABLE_QUEUE.count() == 0


def test_a_storage_of_ones_own_may_say_none_and_use_the_old_names(
    router: RoutingBase, module: Callable[..., str]
) -> None:
    class Storage(StateStorage):
        def __init__(self) -> None:
            self.kept: dict[tuple[str, str], str] = {}

        def get(self, key: str, sender: str) -> str:
            return self.kept.get((key, sender))  # type: ignore[return-value]

        def set(self, key: str, sender: str, state: str) -> None:
            self.kept[key, sender] = state

    name = module(
        """
        @route("desk@ours.example")
        def START(message):
            CALLS.append("START")
            return NEXT

        @route_like(START)
        def NEXT(message):
            CALLS.append("NEXT")
        """
    )
    router.load([name])
    router.STATE_STORE = Storage()
    for _ in range(2):
        router.deliver(MailRequest("p", "a@x.example", "desk@ours.example", b"\n"))
    assert sys.modules[name].CALLS == [ROUTE_FIRST_STATE, "NEXT"]


def test_attach_all_parts_of_a_plain_mail_is_its_text() -> None:
    response = MailResponse(To="c@d", From="a@b", Subject="Re: x")
    response.attach_all_parts(MailRequest("p", None, None, b"Subject: x\n\nh\xc3\xa9llo\n"))
    assert (response.Body, response.attachments) == ("héllo\n", [])


def test_a_conversation_needs_a_server_that_answers() -> None:
    with pytest.raises(ValueError, match=r"relay\(port=8823\), or use RouterConversation"):
        TestConversation(testing.relay(), "a@b", "hello")


def test_an_application_of_lamson_moves_in_with_its_conversations_confirmations_and_waiting_mail(moved: Moved) -> None:
    move(moved)
    boot = (moved.path / "config" / "boot.py").read_text()
    receiver = "SMTPReceiver(settings.receiver_config['host'], settings.receiver_config['port'])"
    behind = boot.replace(receiver, "QueueReceiver(settings.queue_config['queue'], settings.queue_config['sleep'])")
    (moved.path / "config" / "queue.py").write_text(behind.replace("settings.handlers", "settings.queue_handlers"))
    assert "app.handlers.club.CONFIRMING" in moved.lamsonq(
        "routes", "config.boot", "-test", "chess-confirm-a1@clubs.example.com"
    )
    moved.lamsonq("start")
    moved.lamsonq("start", "-boot", "config.queue", "-pid", "run/queue.pid")

    moved.says("bob@example.com", "chess-post@clubs.example.com", "my move")  # he is where he was: POSTING
    assert "on its way" in moved.answer("bob@example.com", "Taken")
    with pytest.raises(smtplib.SMTPDataError, match="forbidden"):
        moved.says("bob@example.com", "chess@clubs.example.com", "a forbidden word")

    moved.says("carol@example.com", "chess-confirm-0123456789abcdef@clubs.example.com", "Re: Confirmation")
    assert "You are in" in moved.answer("carol@example.com", "Welcome to chess")

    moved.says("dan@example.com", "go-subscribe@clubs.example.com", "let me in")
    asked = moved.answer("dan@example.com", "Confirmation required")
    confirm = re.search(r"go-confirm-[0-9a-f]+@clubs\.example\.com", asked)
    assert confirm, asked
    moved.says("dan@example.com", confirm[0], "Re: Confirmation required")
    assert "You are in" in moved.answer("dan@example.com", "Welcome to go")

    moved.sends("", "bounces@clubs.example.com", BOUNCE)
    until(lambda: "hard bounce from nobody@example.org" in moved.log())

    archive = moved.path / "archive.txt"
    until(lambda: archive.exists() and len(archive.read_text().splitlines()) >= 3)
    assert sorted(archive.read_text().splitlines()) == [
        "my move|bob@example.com|hello",
        "old 1|bob@example.com|hello",
        "old 2|bob@example.com|hello",
    ]
    assert SQLiteStorage(str(moved.path / "run" / "state.db")).get("app.handlers.club:go", "eve@example.com") == "ERROR"
    moved.says("eve@example.com", "go-subscribe@clubs.example.com", "once more")  # ERROR is no function here: START
    assert "go-confirm-" in moved.answer("eve@example.com", "Confirmation required")
    assert json.loads(moved.lamsonq("fsck", "run", "-json"))


BOUNCE = (
    b"From: MAILER-DAEMON@mx.example.org\r\nTo: bounces@clubs.example.com\r\n"
    b"Subject: Undelivered Mail Returned to Sender\r\n"
    b"MIME-Version: 1.0\r\nContent-Type: multipart/report; report-type=delivery-status; boundary=b\r\n\r\n"
    b"--b\r\n\r\nI am sorry.\r\n\r\n"
    b"--b\r\nContent-Type: message/delivery-status\r\n\r\nReporting-MTA: dns; mx.example.org\r\n\r\n"
    b"Final-Recipient: rfc822; nobody@example.org\r\nAction: failed\r\nStatus: 5.7.26\r\n"
    b"Diagnostic-Code: smtp; 550-5.7.26 not accepted\r\n\r\n--b--\r\n"
)
