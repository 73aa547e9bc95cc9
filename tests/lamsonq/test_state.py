"""States and conversations: who is where, and who may move him."""

import os
import sqlite3
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lamsonq import state
from lamsonq.errors import Refusal
from lamsonq.state import Conversations, MemoryStorage, SQLiteStorage, StateStorage

from .waiting import PATIENCE

WHO = ("app.handlers.post", "alice@example.com")


@pytest.fixture(params=["memory", "sqlite"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> StateStorage:
    return MemoryStorage() if request.param == "memory" else SQLiteStorage(tmp_path / "state.db")


def test_a_sender_who_was_never_seen_is_in_start(store: StateStorage) -> None:
    assert store.get(*WHO) == "START"


def test_a_state_is_kept_per_key_and_sender(store: StateStorage) -> None:
    store.set(*WHO, "POSTING")
    assert store.get(*WHO) == "POSTING"
    assert store.get("app.handlers.other", WHO[1]) == "START"
    assert store.get(WHO[0], "bob@example.com") == "START"


def test_clear_forgets_everything(store: StateStorage) -> None:
    store.set(*WHO, "POSTING")
    store.clear()
    assert store.get(*WHO) == "START"


def test_a_job_that_comes_again_before_it_was_settled_finds_what_it_found(store: StateStorage) -> None:
    store.set(*WHO, "CONFIRMING")
    store.commit({WHO: "POSTING"}, "job-1")
    assert store.get(*WHO) == "POSTING"
    assert store.found_by(*WHO, "job-1") == "CONFIRMING"
    assert store.found_by(*WHO, "job-2") is None
    store.commit({WHO: "POSTING"}, "job-1")  # it ran again, after a crash
    assert store.found_by(*WHO, "job-1") == "CONFIRMING"


def test_a_settled_job_is_forgotten_and_its_state_stays(store: StateStorage) -> None:
    store.commit({WHO: "POSTING"}, "job-1")
    store.forget({WHO: "POSTING"}, "job-1")
    assert store.found_by(*WHO, "job-1") is None
    assert store.get(*WHO) == "POSTING"


def test_a_job_that_came_to_nothing_leaves_the_state_that_it_found(store: StateStorage) -> None:
    store.set(*WHO, "CONFIRMING")
    store.commit({WHO: "POSTING"}, "job-1")
    store.undo({WHO: "POSTING"}, "job-1")
    assert store.get(*WHO) == "CONFIRMING"
    assert store.found_by(*WHO, "job-1") is None
    store.undo({WHO: "POSTING"}, "job-1")
    assert store.get(*WHO) == "CONFIRMING"


def test_a_job_undoes_nothing_that_another_one_has_made(store: StateStorage) -> None:
    store.commit({WHO: "CONFIRMING"}, "job-1")
    store.commit({WHO: "POSTING"}, "job-2")
    store.undo({WHO: "CONFIRMING"}, "job-1")
    assert store.get(*WHO) == "POSTING"


def test_states_survive_a_restart_and_are_shared_by_processes(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    program = (
        "from lamsonq.state import SQLiteStorage; import sys\n"
        "SQLiteStorage(sys.argv[1]).set('app.handlers.post', 'alice@example.com', 'POSTING')"
    )
    reader = SQLiteStorage(path)
    assert reader.get(*WHO) == "START"
    subprocess.run([sys.executable, "-c", program, str(path)], check=True)
    assert reader.get(*WHO) == "POSTING"


def test_a_conversation_that_ended_leaves_no_row(tmp_path: Path) -> None:
    store = SQLiteStorage(tmp_path / "state.db")
    store.commit({WHO: "POSTING"}, "1")
    store.commit({WHO: "START"}, "2")
    store.forget({WHO: "START"}, "2")
    with sqlite3.connect(tmp_path / "state.db") as database:
        assert database.execute("select count(*) from conversations").fetchone() == (0,)


def test_a_conversation_that_came_to_nothing_leaves_no_row(tmp_path: Path) -> None:
    store = SQLiteStorage(tmp_path / "state.db")
    store.commit({WHO: "POSTING"}, "1")
    store.undo({WHO: "POSTING"}, "1")
    with sqlite3.connect(tmp_path / "state.db") as database:
        assert database.execute("select count(*) from conversations").fetchone() == (0,)


def test_a_state_file_of_a_newer_version_is_left_untouched(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "state.db") as database:
        database.execute("pragma user_version = 99")
    with pytest.raises(Refusal, match="newer lamsonq"):
        SQLiteStorage(tmp_path / "state.db").get(*WHO)


class Contended(sqlite3.Connection):
    """Of a file that others are just making, too: SQLite says so at once, however long it is to wait."""

    refusals = 0

    def execute(self, statement: str, *values: Any) -> sqlite3.Cursor:
        if "journal_mode" in statement and Contended.refusals:
            Contended.refusals -= 1
            error = sqlite3.OperationalError("database is locked")
            error.sqlite_errorname = "SQLITE_BUSY"
            raise error
        return super().execute(statement, *values)


def test_servers_that_start_at_once_in_a_new_project_wait_for_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite3, "connect", partial(sqlite3.connect, factory=Contended))
    monkeypatch.setattr(Contended, "refusals", 3)
    store = SQLiteStorage(tmp_path / "state.db")
    store.set(*WHO, "POSTING")
    assert store.get(*WHO) == "POSTING"
    monkeypatch.setattr(Contended, "refusals", 1000)
    monkeypatch.setattr(state, "BUSY_TIMEOUT", 0.05)
    with pytest.raises(Refusal, match=r"cannot open the state file .*: database is locked"):
        SQLiteStorage(tmp_path / "other.db").get(*WHO)


def test_a_state_file_of_version_1_is_read(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "state.db") as database:
        database.executescript(
            """create table conversations (key text not null, sender text not null, state text not null,
               job text not null default '', found text not null default 'START', primary key (key, sender))
               without rowid;
               insert into conversations (key, sender, state)
               values ('app.handlers.post', 'alice@example.com', 'POSTING');
               pragma user_version = 1;"""
        )
    assert SQLiteStorage(tmp_path / "state.db").get(*WHO) == "POSTING"


def test_a_storage_needs_get_set_and_clear() -> None:
    storage = StateStorage()
    with pytest.raises(NotImplementedError, match="get"):
        storage.get(*WHO)
    with pytest.raises(NotImplementedError, match="set"):
        storage.set(*WHO, "POSTING")
    with pytest.raises(NotImplementedError, match="clear"):
        storage.clear()


def test_turns_in_a_conversation_come_in_order_of_arrival() -> None:
    conversations = Conversations(None)
    order: list[int] = []
    assert conversations.enter(WHO, lambda: None)
    for n in range(5):
        assert not conversations.enter(WHO, partial(order.append, n))
    for _ in range(5):
        conversations.leave(WHO)
    assert order == [0, 1, 2, 3, 4]
    conversations.leave(WHO)
    assert conversations.enter(WHO, lambda: None)


def test_other_conversations_do_not_wait() -> None:
    conversations = Conversations(None)
    assert conversations.enter(WHO, lambda: None)
    assert conversations.enter((WHO[0], "bob@example.com"), lambda: None)


def test_who_gave_up_waiting_is_not_called() -> None:
    conversations = Conversations(None)
    called: list[str] = []

    def resume() -> None:
        called.append("resumed")

    assert conversations.enter(WHO, resume)
    assert not conversations.enter(WHO, resume)
    assert conversations.withdraw(WHO, resume)
    assert not conversations.withdraw(WHO, resume)
    conversations.leave(WHO)
    assert called == []


def test_another_process_is_locked_out_until_this_one_leaves_or_dies(tmp_path: Path) -> None:
    path = str(tmp_path / "run" / "lock")
    program = (
        "from lamsonq.state import Conversations; import sys\n"
        "c = Conversations(sys.argv[1]); w = ('app.handlers.post', 'alice@example.com')\n"
        "assert c.enter(w, lambda: None) and c.lock(w); print('locked', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", program, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "locked\n"
    conversations = Conversations(path)
    assert conversations.enter(WHO, lambda: None)
    assert not conversations.lock(WHO)
    other.kill()
    other.wait()
    assert conversations.lock(WHO)


def test_a_forked_child_does_not_keep_its_parents_lock_alive(tmp_path: Path) -> None:
    path = str(tmp_path / "lock")
    program = (
        "from lamsonq.state import Conversations; import os, sys, time\n"
        "c = Conversations(sys.argv[1]); w = ('app.handlers.post', 'alice@example.com')\n"
        "assert c.enter(w, lambda: None) and c.lock(w)\n"
        "if os.fork() == 0: print('forked', flush=True); sys.stdin.read(); os._exit(0)\n"
        "os._exit(0)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    assert parent.stdout.readline() == "forked\n"
    parent.wait()
    conversations = Conversations(path)
    assert conversations.enter(WHO, lambda: None)
    assert conversations.lock(WHO)
    assert parent.stdin is not None
    parent.stdin.close()
    parent.stdout.read()


def test_threads_of_one_process_are_never_in_a_conversation_together(tmp_path: Path) -> None:
    conversations = Conversations(str(tmp_path / "lock"))
    inside, most, done = [0], [0], threading.Event()
    left = [200]

    def work() -> None:
        assert conversations.lock(WHO)
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        os.sched_yield()
        inside[0] -= 1
        left[0] -= 1
        if not left[0]:
            done.set()
        conversations.leave(WHO)

    def come() -> None:
        for _ in range(50):
            if conversations.enter(WHO, work):
                work()

    threads = [threading.Thread(target=come) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert done.wait(PATIENCE)
    assert most == [1]
