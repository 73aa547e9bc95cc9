"""Hands every message to the relay. Only for boots that work a queue, such as run/undeliverable: behind an open
SMTP port this is an open relay."""

import logging

from lamsonq import settings
from lamsonq.handlers import log
from lamsonq.mail import MailRequest
from lamsonq.routing import route_like, stateless

LOG = logging.getLogger()


@route_like(log.START)
@stateless
def START(message: MailRequest, to: str, host: str) -> None:
    """Relay the message, with its own envelope, through `settings.relay` of the booted project."""
    LOG.debug("MESSAGE to %s@%s forwarded to the relay host.", to, host)
    settings.booted().relay.deliver(message)
