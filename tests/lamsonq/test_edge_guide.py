"""docs/edge.md: every attack has a test, and the limits are those that there are."""

from __future__ import annotations

import asyncio
import re
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lamsonq.errors import SMTPError
from lamsonq.limits import STRANGERS, Limits
from lamsonq.session import Dialogue
from lamsonq.settings import machine

from .pages import Page
from .servers import Dns

PAGE = Page("edge.md")
TESTS = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))


def test_every_attack_names_a_test_that_exists() -> None:
    rows = PAGE.rows("Attacks")
    assert len(rows) >= 15
    for *_, test in rows:
        assert re.search(rf"^def {test.strip('`')}\(", TESTS, re.MULTILINE), test


def test_the_limits_have_the_defaults_that_the_page_says() -> None:
    shown = {name: float(default) for name, default in PAGE.rows("Limits")}
    assert shown == {field.name: float(getattr(STRANGERS, field.name)) for field in fields(Limits)}


def test_the_settings_are_known(here: Path) -> None:
    [block] = PAGE.of("TLS, logins and a load balancer", "toml")
    (here / "config").mkdir()
    (here / "config" / "settings.toml").write_text(block.source)
    assert machine(environ={}).receiver.tls == "required"


@pytest.fixture
def checks(here: Path) -> dict[str, Any]:
    """What the examples define."""
    (here / "run").mkdir(exist_ok=True)
    names: dict[str, Any] = {}
    for block in PAGE.of("Checks of your own", "python")[1:]:
        exec(block.source, names)
    return names


def test_the_deny_list_refuses_whom_it_names(checks: dict[str, Any]) -> None:
    checks["denied"](Dialogue("192.0.2.1", sender="joe@example.org"))
    checks["denied"](Dialogue("192.0.2.1", sender=""))
    with pytest.raises(SMTPError, match="from there"):
        checks["denied"](Dialogue("192.0.2.1", sender="joe@Evil.Example"))


def test_greylisting_lets_in_who_comes_again_after_five_minutes(
    checks: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1_000_000.0]
    monkeypatch.setitem(checks, "time", SimpleNamespace(time=lambda: now[0]))
    new = Dialogue("192.0.2.1", sender="joe@example.org", recipient="desk@y.test")
    for _ in range(2):
        with pytest.raises(SMTPError, match="Greylisted"):
            checks["greylisted"](new)
        now[0] += 149
    now[0] += 10
    checks["greylisted"](new)
    checks["greylisted"](replace(new, login="joe", sender="other@example.org"))


def test_the_block_list_refuses_the_addresses_that_it_has(checks: dict[str, Any]) -> None:
    names = Dns("2.2.0.192.zen.example.net. 60 IN A 127.0.0.2")
    checks["RESOLVER"].nameservers, checks["RESOLVER"].port = names.resolver.nameservers, names.resolver.port
    try:
        asyncio.run(checks["listed"](Dialogue("192.0.2.1")))
        asyncio.run(checks["listed"](Dialogue("")))
        with pytest.raises(SMTPError, match="listed at"):
            asyncio.run(checks["listed"](Dialogue("192.0.2.2")))
    finally:
        names.close()
