"""Mail to NAME@osb.HOST is posted under NAME. Who writes for the first time is told how it works."""

from collections.abc import Callable

from app.model import post
from config.settings import relay
from lamsonq import queue, view
from lamsonq.mail import MailRequest, parseaddr
from lamsonq.routing import route, route_like

State = Callable[..., object]  # where the conversation goes on: a state function


@route("(post_name)@osb\\.(host)")
def POSTING(message: MailRequest, post_name: str, host: str) -> State:
    # do the regular posting to blog thing
    name, address = parseaddr(message["from"])
    post.post(post_name, address, message)
    msg = view.respond("page_ready.msg", locals())
    relay.deliver(msg)

    # drop the message off into the 'posts' queue for later
    index_q = queue.Queue("run/posts")
    index_q.push(message)

    return POSTING


@route_like(POSTING)
def START(message: MailRequest, post_name: str, host: str) -> State | None:
    if not message.From:
        return None  # a bounce: nobody waits for an answer

    name, address = parseaddr(message["from"])
    relay.deliver(view.respond("welcome.msg", locals()))

    return POSTING(message, post_name=post_name, host=host)
