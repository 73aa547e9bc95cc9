"""What the blog keeps: one SQLite file."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

from lamsonq.settings import DatabaseTable

_SCHEMA = """
create table if not exists post (
    name text primary key,
    author text not null,
    title text not null,
    body text not null
)
"""


class Database:
    """The blog's database. Every use opens a connection of its own, so threads and processes may share this."""

    def __init__(self, path: str) -> None:
        self.path = path

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        connection = sqlite3.connect(self.path, timeout=30)
        try:
            with connection:
                yield connection
        finally:
            connection.close()


def configure_database(config: DatabaseTable, also_create: bool) -> Database:
    """The database of a boot; `also_create` makes its tables, which one boot of several has to do."""
    database = Database(config.path)
    if also_create:
        with database.transaction() as connection:
            connection.execute(_SCHEMA)
    return database
