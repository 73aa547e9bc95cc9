"""The blog, as its writers see it. Runs the real handlers; no server is needed."""

import time

from lamsonq import settings
from lamsonq.mail import MailRequest
from lamsonq.routing import Router
from lamsonq.testing import RouterConversation, assert_in_state, clear_queue, delivered, queue

settings.boot("config.testing")

HOST = "test.com"
BLOG = f"test.blog.{int(time.time())}@osb.{HOST}"


def a_sender(name: str) -> RouterConversation:
    sender = RouterConversation(f"{name}-{time.time():.2f}@sender.com", "A test post")
    sender.begin()
    return sender


def test_the_first_mail_is_welcomed_and_posted() -> None:
    sender = a_sender("first")
    sender.say(BLOG, "This is my post.", expect="Subject: Welcome")
    assert delivered("Subject: Your page is ready")
    assert_in_state("app.handlers.post", BLOG, sender.From, "POSTING")


def test_who_has_written_before_is_not_welcomed_again() -> None:
    sender = a_sender("second")
    sender.say(BLOG, "This is my post.")
    clear_queue()
    sender.say(BLOG, "This is a better one.", expect="Your page is ready")
    assert not delivered("Subject: Welcome")


def test_what_was_posted_can_be_read() -> None:
    from app.model import post

    name = f"test.blog.{time.time():.0f}.read"
    a_sender("third").say(f"{name}@osb.{HOST}", "Something to read.")
    found = post.find(name)
    assert found is not None
    assert found.title == "A test post"
    assert "Something to read." in found.body


def test_a_post_waits_in_the_queue_for_the_index() -> None:
    sender = a_sender("fourth")
    sender.say(BLOG, "This is for the index.")
    assert delivered("This is for the index", to_queue=queue("run/posts"))


def test_a_from_header_that_is_none_keeps_nothing_from_being_posted_and_answered() -> None:
    from app.model import post

    name = f"test.blog.{time.time():.0f}.strange"
    message = MailRequest(None, "stranger@sender.com", [f"{name}@osb.{HOST}"], b"From: " + b"(" * 50 + b"\n\nHi")
    clear_queue()
    Router.deliver(message)
    assert post.find(name) is not None
    assert delivered("Subject: Your page is ready")


def test_a_bounce_is_not_answered() -> None:
    sender = a_sender("fifth")
    sender.From = ""
    sender.say(BLOG, "Your mail could not be delivered.")
    assert len(queue()) == 0
