"""A disk that is nearly full: mail is put off before it is accepted, and taken again when there is room."""

from __future__ import annotations

import logging
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lamsonq.lmtp import LMTPReceiver
from lamsonq.routing import RoutingBase
from lamsonq.smtp import SMTPReceiver
from lamsonq.space import MIN_FREE, Space

from .clients import MESSAGE, Client

REFUSED = "452 4.3.1 Insufficient system storage, try again later"


class Disk:
    """A file system of 4096-byte blocks, and a clock."""

    def __init__(self, free: int) -> None:
        self.free = free
        self.now = 100.0
        self.asked: list[str] = []

    def statvfs(self, path: str) -> os.statvfs_result:
        self.asked.append(path)
        if self.free < 0:
            raise OSError(5, "Input/output error")
        return os.statvfs_result((512, 4096, 1 << 20, 1 << 20, self.free // 4096, 0, 0, 0, 0, 255))

    def space(self, min_free: int = MIN_FREE) -> Space:
        return Space(min_free, statvfs=self.statvfs, clock=lambda: self.now)


@pytest.fixture
def start(router: RoutingBase) -> Iterator[Callable[..., SMTPReceiver]]:
    """`start(kind, disk)` starts a receiver on this disk."""
    started: list[SMTPReceiver] = []

    def begin(kind: type[SMTPReceiver], disk: Disk, min_free: int = MIN_FREE) -> SMTPReceiver:
        receiver = kind(port=0, deliver=lambda _: None, router=router, min_free=min_free)
        receiver.space = disk.space(min_free)
        receiver.start()
        started.append(receiver)
        return receiver

    yield begin
    for receiver in started:
        receiver.stop(0)
        receiver.join()


@pytest.mark.parametrize(("kind", "greeting"), [(SMTPReceiver, "EHLO me"), (LMTPReceiver, "LHLO me")])
def test_mail_is_put_off_below_the_mark_and_taken_again_above(start: Any, kind: Any, greeting: str) -> None:
    disk = Disk(MIN_FREE - 4096)
    with Client(start(kind, disk), greet=False) as client:
        client.say(greeting)
        assert client.say("MAIL FROM:<a@x.test>") == REFUSED
        assert client.say("RCPT TO:<b@x.test>").startswith("503")
        disk.free, disk.now = MIN_FREE, disk.now + 1
        assert client.mail().startswith("250")


def test_a_message_that_would_not_fit_is_put_off_and_a_smaller_one_is_not(start: Any) -> None:
    with Client(start(SMTPReceiver, Disk(MIN_FREE + 8192))) as client:
        assert client.say("MAIL FROM:<a@x.test> SIZE=8193") == REFUSED
        assert client.say("MAIL FROM:<a@x.test> SIZE=99999999").startswith("552 5.3.4")
        assert client.say("MAIL FROM:<a@x.test> SIZE=8192") == "250 2.1.0 Ok"


def test_zero_asks_nothing(start: Any) -> None:
    disk = Disk(0)
    with Client(start(SMTPReceiver, disk, 0)) as client:
        assert client.mail().startswith("250")
    assert disk.asked == []


def test_the_disk_is_asked_at_most_once_a_second_where_the_queues_are(here: Path) -> None:
    disk = Disk(0)
    space = disk.space()
    assert [space.lacks() for _ in range(5)] == [True] * 5
    assert disk.asked == ["."]
    Path("run").mkdir()
    disk.now += 1.0
    disk.free = MIN_FREE
    assert not space.lacks()
    assert disk.asked == [".", "run"]


def test_a_change_is_logged_once(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    disk = Disk(1 << 20)
    space = disk.space()
    for free in (1 << 20, 1 << 20, MIN_FREE, MIN_FREE):
        disk.free, disk.now = free, disk.now + 1
        space.lacks()
    told = [(record.levelno, record.message.partition(":")[0]) for record in caplog.records]
    assert told == [(logging.ERROR, "No mail is taken"), (logging.WARNING, "Mail is taken again")]
    assert "1 MiB are free" in caplog.text


def test_a_disk_that_cannot_be_asked_has_room(here: Path) -> None:
    assert not Disk(-1).space().lacks(1 << 40)


@pytest.mark.parametrize("kind", [SMTPReceiver, LMTPReceiver])
def test_a_mark_below_zero_is_refused(kind: Any) -> None:
    with pytest.raises(ValueError, match="min_free=-1"):
        kind(min_free=-1)


def test_a_real_disk_fills_and_empties(router: RoutingBase) -> None:
    if os.getuid():
        pytest.skip("only root can mount a small disk")
    Path("run").mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "lamsonq", "run"], check=False).returncode:
        pytest.skip("this machine lets nobody mount")
    receiver = SMTPReceiver(port=0, deliver=lambda _: None, router=router, min_free=1 << 20)
    receiver.start()
    try:
        with Client(receiver) as client:
            assert client.mail(data=MESSAGE).startswith("250")
            Path("run/filler").write_bytes(bytes(1_500_000))
            receiver.space._asked = None
            assert client.say("MAIL FROM:<a@x.test>") == REFUSED
            Path("run/filler").unlink()
            receiver.space._asked = None
            assert client.mail(data=MESSAGE).startswith("250")
    finally:
        receiver.stop(0)
        receiver.join()
        subprocess.run(["umount", "run"], check=True)
