"""Keeps every message in the queue run/queue, for tests and for looking at what a relay was given."""

import logging

from lamsonq.handlers import log
from lamsonq.mail import MailRequest
from lamsonq.queue import Queue
from lamsonq.routing import nolocking, route_like, stateless

LOG = logging.getLogger()


@route_like(log.START)
@stateless
@nolocking
def START(message: MailRequest, to: str, host: str) -> None:
    """Put the message into run/queue."""
    LOG.debug("MESSAGE to %s@%s added to queue.", to, host)
    Queue("run/queue").push(message)
