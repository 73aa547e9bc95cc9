"""The front page's index, which is too slow to be made while a writer waits: it works the queue run/posts off."""

import logging

from lamsonq.mail import MailRequest
from lamsonq.routing import route, stateless


@route("(post_name)@osb\\.(host)")
@stateless
def START(message: MailRequest, post_name: str, host: str) -> None:
    logging.debug("Got message from %s", message["from"])
