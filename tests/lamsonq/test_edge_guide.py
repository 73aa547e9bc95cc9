"""docs/edge.md: every attack has a test, and the limits are those that there are."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

from lamsonq.limits import STRANGERS, Limits
from lamsonq.settings import machine

from .pages import Page

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
