"""What receives and what sends, under the names that Lamson's users import.

from lamsonq.server import SMTPReceiver, LMTPReceiver, QueueReceiver, Relay, SMTPError
"""

from __future__ import annotations

from typing import Protocol

from lamsonq.errors import SMTPError
from lamsonq.lmtp import LMTPReceiver
from lamsonq.relay import Relay
from lamsonq.settings import QueueConfig
from lamsonq.smtp import SMTPReceiver
from lamsonq.worker import QueueReceiver

__all__ = ["LMTPReceiver", "QueueConfig", "QueueReceiver", "Receiver", "Relay", "SMTPError", "SMTPReceiver"]


class Receiver(Protocol):
    """What a boot puts into `settings.receiver`.

    One that ends by itself may have `worn_out`, because it has done enough and another process is to take its place,
    and `retired`, because it had nothing to do and nobody is. One that has limits may have `processes`: it is
    told there how many of its kind the boot runs.
    """

    @property
    def stuck(self) -> bool:
        """Whether a handler hangs, so that this process should be replaced once it has drained."""

    def bind(self) -> None:
        """Take the port or check the queue, before children are forked. Idempotent. Raises Refusal."""

    def start(self) -> None:
        """Receive; returns when it listens, or works a queue until `stop`."""

    def stop(self, grace: float = 30.0) -> None:
        """Take no more and give what runs `grace` seconds. From any thread or signal handler; returns at once."""

    def join(self) -> None:
        """Wait until everything that was taken is settled."""

    def listening(self) -> str:
        """One line for the log."""
