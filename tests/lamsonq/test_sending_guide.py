"""docs/sending.md: every block runs, and what its tables say is asserted."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import tomli

from lamsonq import outbound, suppression
from lamsonq.mail import MailResponse
from lamsonq.outbound import Outbox
from lamsonq.queue import Queue
from lamsonq.relay import Relay
from lamsonq.routing import RoutingBase
from lamsonq.settings import Machine, _Check
from lamsonq.suppression import Suppressions
from lamsonq.verp import VERP

from .cli import lamsonq
from .pages import DOCS, Page, Run
from .servers import Server
from .test_verp import bounce

PAGE = Page("sending.md")


@pytest.fixture
def run(here: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    monkeypatch.syspath_prepend(str(here))
    run = Run(PAGE, "maildir")
    yield run
    run.close()


@pytest.mark.parametrize("section", PAGE.sections())
def test_the_blocks_run(section: str, run: Run) -> None:
    run.section(section)


def test_the_defaults_are_those_that_it_shows() -> None:
    text = PAGE.text_of("The outbound queue")
    assert f'retry="{outbound.RETRY}"' in text
    assert f"per_domain={outbound.PER_DOMAIN}" in text
    box = Outbox(Relay("127.0.0.1"))
    assert (box.policy.give_up_after, box.warn_after) == (5 * 86400, 4 * 3600)
    assert outbound.TIMEOUT == 30 * 60
    assert suppression.SOFT_SECONDS == 3 * 86400


def test_the_settings_that_it_shows_are_settings(here: Path) -> None:
    (block,) = [block for block in PAGE.blocks if block.language == "toml"]
    machine = _Check("x", {}).record(Machine, tomli.loads(block.source), ())
    assert [(key.domain, key.selector) for key in machine.relay.dkim] == [
        ("example.org", "r2026"),
        ("example.org", "e2026"),
    ]


def test_its_handler_learns_from_a_bounce(run: Run, here: Path) -> None:
    run.section("Addresses that have bounced")
    router = RoutingBase()
    router.load(["app.bounces"])
    verp = VERP("bounces@example.org", secret="a secret of the application: 16 octets or more")
    router.deliver(bounce(verp.address("cat@y.test"), "cat@y.test"))
    assert "cat@y.test" in [one.address for one in Suppressions("run/suppressed.db").all()]


def test_the_mail_of_the_first_block_waits_in_the_queue(run: Run) -> None:
    run.section("The outbound queue")
    queue = Queue("run/outbox")
    assert [queue.get(key).To for key in list(queue.keys())] == ["joe@y.test"]  # type: ignore[union-attr]


def test_the_boot_that_it_shows_sends_what_waits(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lamsonq("gen", "osb")
    monkeypatch.chdir(here / "osb")
    Queue("run/outbox").push(MailResponse(From="news@example.org", To="joe@y.test", Subject="Hi", Body="How are you?"))
    [boot] = [block for block in PAGE.of("The outbound queue") if block.path]
    ending = ", sleep=0.1, shutdown_after_number_of_empty_iterations=2, deliver="
    Path(str(boot.path)).write_text(boot.source.replace(", deliver=", ending))
    command = "start -boot config.outbox -pid run/outbox.pid"
    assert command in PAGE.text_of("The outbound queue")
    with contextlib.closing(Server()) as server:
        lamsonq(*command.split(), "-debug", env={"LAMSONQ_RELAY__PORT": str(server.port)})
    [message] = server.messages
    assert b"How are you?" in message


def test_its_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\(([^):#]+)\)", PAGE.text):
        assert (DOCS / link).exists()
