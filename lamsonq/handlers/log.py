"""Logs every message: what `lamsonq log` runs."""

import logging

from lamsonq.mail import MailRequest
from lamsonq.routing import route, stateless

LOG = logging.getLogger()


@route("(to)@(host)", to=".+", host=".+")
@stateless
def START(message: MailRequest, to: str, host: str) -> None:
    """Write the message as it came into the log."""
    LOG.debug("MESSAGE to %s@%s:\n%s", to, host, message)
