"""The tables of a sqlite: queue, version 1. One file holds any number of queues, and may hold tables of yours.

A program in any language puts a job with one INSERT, into a file that lamsonq has made:

    insert into jobs (queue, target, body) values ('jobs', 'send_email', '{"to": "joe@example.org"}')

Every other column has a default. Those that are of use to it:

    queue       which queue; the name in `sqlite:run/q.db?queue=posts`, "jobs" without one
    key         unique in its queue; jobs of one priority are worked in the order of their keys. The default rises with
                the time (to the millisecond, and within it in the order of this connection's INSERTs)
    target      the function or request type that is to run; NULL: route by address
    body        text or blob, handed out as bytes (at most 128 KiB; what is larger belongs into a file)
    sender      the envelope's reverse-path; '' is the null sender, NULL: not known
    recipients  the envelope's recipients, a JSON array: '["joe@example.org"]'
    metadata    a JSON object of texts
    due         not before this moment; moments are seconds since the epoch
    expires     not after this moment
    priority    0 (first) to 4294967295
    uniq        of the jobs of one queue with the same one waits: for a second one the INSERT fails

Rules:

1. `state` is ready, delayed (until `due`), parked (ready, but `lane` is full: sqlite_lanes.py), reserved (by `token`,
   which begins with the worker's id), dead or done. `since` is when it came into it.
2. The order, the due moments, the claims and the uniqueness stand in partial indexes, so that a claim costs the same
   among ten jobs and a million. Jobs whose worker has died have an index of their own: they run one at a time.
3. Columns are strict: a program that puts something else gets the error, not the queue. Text that is no Unicode is kept
   as a blob.
4. The version stands in the table `lamsonq`, because the file's user_version may be yours. A newer one is left alone.
"""

from __future__ import annotations

import sqlite3

from lamsonq.errors import QueueError

VERSION = 1

_KEY = (
    "strftime('%s.M', 'now') || substr(strftime('%f', 'now'), -3) || '000P0Q'"
    " || printf('%010d', last_insert_rowid()) || '.' || lower(hex(randomblob(8)))"
)
_NOW = "(julianday('now') - 2440587.5) * 86400.0"

_SCHEMA = f"""
create table jobs (
    id         integer primary key,
    queue      text    not null default 'jobs',
    key        any     not null default ({_KEY}),
    state      text    not null default 'ready'
               check (state in ('ready', 'delayed', 'parked', 'reserved', 'dead', 'done')),
    priority   integer not null default 0 check (priority between 0 and 4294967295),
    deliveries integer not null default 0 check (deliveries >= 0),   -- claims that were never settled
    attempts   integer not null default 0,   -- failures
    received   real    not null default ({_NOW}),
    since      real    not null default ({_NOW}),
    due        real,
    expires    real,
    token      text    not null default '',  -- <worker>/<number of the claim>[:<state before>].<id>, or room for it
    lane       text,                         -- where it is parked
    sender     any,
    recipients text    not null default '[]',
    peer       any,
    target     any,
    uniq       any,
    metadata   text    not null default '{{}}',
    report     text    not null default '',
    file       text,                         -- a large body, in the folder beside the database
    body       any
) strict;
create unique index jobs_key on jobs (queue, key);
create unique index jobs_uniq on jobs (queue, uniq)
    where uniq is not null and state in ('ready', 'delayed', 'parked', 'reserved');
create index jobs_fresh on jobs (queue, priority, key, received) where state = 'ready' and deliveries = 0;
create index jobs_suspect on jobs (queue, priority, key, received) where state = 'ready' and deliveries > 0;
create index jobs_target on jobs (queue, target, priority, key, deliveries)
    where state = 'ready' and target is not null;
create index jobs_delayed on jobs (queue, due, key) where state = 'delayed';
create index jobs_parked on jobs (queue, lane, priority, key, received) where state = 'parked';
create index jobs_reserved on jobs (token, queue) where state = 'reserved';
create index jobs_dead on jobs (queue, since) where state = 'dead';
create index jobs_done on jobs (queue, since) where state = 'done';
create index jobs_file on jobs (file) where file is not null;

create table lamsonq_queues (name text primary key, paused integer not null default 0) strict, without rowid;

create table lamsonq_gates (
    queue text not null, key any not null, last real not null, until real not null, primary key (queue, key)
) strict, without rowid;
create index lamsonq_gates_until on lamsonq_gates (until);

create table lamsonq_lanes (  -- who has a place in a lane
    queue text not null, lane text not null, job integer not null, primary key (queue, lane, job)
) strict, without rowid;
create index lamsonq_lanes_job on lamsonq_lanes (job);

create table lamsonq_rates (  -- when the next job of a lane may begin
    queue text not null, lane text not null, next real not null, primary key (queue, lane)
) strict, without rowid;

create table lamsonq_outgoing (  -- what settled jobs have put into other stores and is not there yet
    id integer primary key, worker text not null, store text not null, record blob not null, body blob not null
) strict;

create table lamsonq_doomed (file text primary key) strict, without rowid;  -- bodies without a job, to be unlinked
create trigger lamsonq_doom after delete on jobs when old.file is not null
    begin insert or ignore into lamsonq_doomed values (old.file); end;

create table lamsonq (version integer not null) strict;
"""


def check(database: sqlite3.Connection, path: str) -> bool:
    """Whether our tables are there. Raises QueueError where they are a newer version's or somebody else's."""
    cursor = database.cursor()
    cursor.row_factory = None
    names = {
        str(name, "utf-8", "replace") if isinstance(name, bytes) else name
        for (name,) in cursor.execute("select name from sqlite_master where name in ('jobs', 'lamsonq')")
    }
    if "lamsonq" in names:
        [version] = cursor.execute("select max(version) from lamsonq").fetchone()
        if version is not None and version > VERSION:
            raise QueueError(f"{path} was written by a newer lamsonq (schema {version}); it is left untouched")
        return True
    if names:
        raise QueueError(f"{path} has a table `jobs` that is not lamsonq's; name another file for the queue")
    return False


def create(database: sqlite3.Connection) -> None:
    """Make the tables, in the transaction that is open."""
    for statement in _statements(_SCHEMA):
        database.execute(statement)
    database.execute("insert into lamsonq values (?)", (VERSION,))


def _statements(script: str) -> list[str]:
    """The statements one by one, because `executescript` would commit."""
    statements, current = [], ""
    for line in script.splitlines(keepends=True):
        current += line
        if sqlite3.complete_statement(current):
            statements.append(current)
            current = ""
    return statements
