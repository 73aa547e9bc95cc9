"""The mail that the blog sends."""

import pytest

from lamsonq import settings, view
from lamsonq.mail import MailRequest

settings.boot("config.testing")


@pytest.mark.parametrize("template", ["welcome.msg", "page_ready.msg"])
def test_a_mail_is_addressed_to_the_writer_and_comes_from_us(template: str) -> None:
    message = MailRequest("testing", "joe@example.com", "x@osb.test.com", "Subject: Hello\n\n")
    known = {"address": "joe@example.com", "name": "Joe", "host": "test.com", "post_name": "x", "message": message}
    sent = view.respond(template, known)
    assert sent["to"] == "joe@example.com"
    assert sent["from"] == "noreply@osb.test.com"
    assert "Joe" in str(sent.Body)
