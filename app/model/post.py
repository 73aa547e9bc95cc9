"""Posts: a name, who wrote it, a title and a text."""

from dataclasses import dataclass

from config import settings
from lamsonq.mail import MailRequest


@dataclass
class Post:
    name: str
    author: str
    title: str
    body: str


def post(name: str, author: str, message: MailRequest) -> None:
    """Keep a message as the post of this name, in place of an older one: posting it twice changes nothing."""
    body = message.body()
    text = body if isinstance(body, str) else body.decode("utf-8", "replace")
    with settings.database.transaction() as connection:
        connection.execute(
            "insert or replace into post values (?, ?, ?, ?)",
            (name, author, message["subject"] or name, text),
        )


def find(name: str) -> Post | None:
    """The post of this name."""
    with settings.database.transaction() as connection:
        row = connection.execute("select * from post where name = ?", (name,)).fetchone()
    return None if row is None else Post(*row)
