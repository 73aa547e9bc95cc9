"""The blog's database."""

from lamsonq import settings
from lamsonq.mail import MailRequest

settings.boot("config.testing")


def a_message(subject: str, body: str) -> MailRequest:
    return MailRequest("testing", "joe@example.com", "x@osb.test.com", f"Subject: {subject}\n\n{body}\n")


def test_a_post_is_found_by_its_name() -> None:
    from app.model import post

    post.post("model.one", "joe@example.com", a_message("Title", "Text"))
    assert post.find("model.one") == post.Post("model.one", "joe@example.com", "Title", "Text\n")
    assert post.find("model.never.written") is None


def test_a_post_of_the_same_name_replaces_the_older_one() -> None:
    from app.model import post

    post.post("model.two", "joe@example.com", a_message("Title", "Old"))
    post.post("model.two", "joe@example.com", a_message("Title", "New"))
    found = post.find("model.two")
    assert found is not None
    assert found.body == "New\n"
