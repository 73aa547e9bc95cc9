"""docs/queues.md: every block runs, in every store, and what its tables and sentences claim is asserted."""

from __future__ import annotations

import asyncio
import inspect
import json
import re
import shlex
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lamsonq import events, policy
from lamsonq.deferred import current_job, deferrable, deferrable_backoff, publish, request_types
from lamsonq.errors import QueueError, SettingsError
from lamsonq.jobs import Limit, exponential
from lamsonq.mail import MailRequest
from lamsonq.policy import priority_of
from lamsonq.queue import Queue
from lamsonq.reports import entries
from lamsonq.testing import FrozenClock, drain
from lamsonq.worker import QueueReceiver

from .cli import lamsonq
from .pages import DOCS, STORES, Page, Run
from .waiting import until

PAGE = Page("queues.md")
SOURCES = "".join(path.read_text() for path in Path(events.__file__).parent.glob("*.py"))
TRACING = "OpenTelemetry"  # its block needs a library that is no dependency of ours


@pytest.fixture(autouse=True)
def nobody_listens() -> Iterator[None]:
    yield
    events.clear_event_consumers()
    events.clear_metadata_producer_consumers()


@pytest.fixture
def read(here: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Run]]:
    """`read("sqlite")` begins a session."""
    monkeypatch.syspath_prepend(str(here))
    runs: list[Run] = []

    def begin(store: str) -> Run:
        runs.append(Run(PAGE, store))
        monkeypatch.setenv("LAMSONQ_QUEUE", runs[-1].url("jobs"))
        return runs[-1]

    yield begin
    for run in runs:
        run.close()


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("section", [section for section in PAGE.sections() if section != TRACING])
def test_the_blocks_run(section: str, store: str, read: Callable[[str], Run]) -> None:
    read(store).section(section)


@pytest.mark.parametrize("section", ["Testing", "A store of your own"])
def test_the_tests_that_it_shows_pass(section: str, here: Path, read: Callable[[str], Run]) -> None:
    [path] = [block.path for block in PAGE.of(section) if block.path]
    read("memory").section(section)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--basetemp=tmp", path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("store", STORES)
def test_the_section_in_the_readme_runs_and_is_short(
    store: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = Page("../README.md")
    run = Run(page, store)
    try:
        monkeypatch.setenv("LAMSONQ_QUEUE", run.url("jobs"))
        run.section("Deferred calls and queues")
    finally:
        run.close()
    assert capsys.readouterr().out == "joe@example.org is reminded\n"
    text = page.text_of("Deferred calls and queues")
    assert text.count("\n") <= 25
    assert all((DOCS.parent / link).exists() for link in re.findall(r"\]\((docs/[^)]+)\)", text))


@pytest.mark.parametrize("path", sorted(DOCS.glob("*.md")), ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for link in re.findall(r"\]\(([^):]+)\)", path.read_text()):
        target, _, part = link.partition("#")
        text = (path.parent / target).read_text() if target else path.read_text()
        titles = [
            re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-")
            for title in re.findall(r"^#+ (.*)$", text, re.M)
        ]
        assert not part or part in titles


# ---- a process ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("store", ["maildir", "sqlite"])
def test_the_boot_that_it_shows_runs_what_waits(store: str, read: Callable[[str], Run], here: Path) -> None:
    session = read(store)
    [boot] = [block for block in PAGE.of("Calling a function later") if block.path]
    session.block(boot)
    settings = "from lamsonq.server import Receiver\n\nreceiver: Receiver | None\n"
    (here / "config/settings.py").write_text(settings)
    shutil.copy(DOCS.parent / "config/logging.toml", here / "config")
    (here / "blog").mkdir()
    (here / "blog/jobs.py").write_text(
        "from lamsonq.deferred import deferrable\n\n@deferrable\ndef write(name: str) -> None:\n"
        "    open(name, 'w').write('done')\n"
    )
    path = here / str(boot.path)
    source = path.read_text()
    assert source.count(f'"{session.url("jobs")}")') == 1
    ending = ", sleep=0.1, shutdown_after_number_of_empty_iterations=2)"
    path.write_text(source.replace(f'"{session.url("jobs")}")', f'"{session.url("jobs")}"{ending}'))
    publish(session.url("jobs"), "blog.jobs.write", {"name": "proof.txt"})
    command = "start -boot config.jobs -pid run/jobs.pid"
    assert command in PAGE.text_of("Calling a function later")
    lamsonq(*command.split(), "-debug")
    assert (here / "proof.txt").read_text() == "done"
    assert list((here / "logs").iterdir())  # what load_logging is there for


# ---- producers in any language -----------------------------------------------------------------------------------

PRODUCERS = "Producers in any language"
GOT: list[tuple[str, dict[str, str]]] = []


@pytest.fixture
def worker(read: Callable[[str], Run]) -> None:
    """A process that knows one request type, send_email."""
    session = read("memory")
    GOT.clear()

    def send_email(to: str) -> None:
        job = current_job()
        assert job is not None
        GOT.append((to, dict(job.metadata)))

    send_email.__module__ = session.module.__name__
    deferrable(name="send_email")(send_email)


def test_a_shell_puts_a_job_into_a_maildir(worker: None) -> None:
    queue = Queue("run/jobs")
    QueueReceiver(queue).bind()
    [script] = [block.source for block in PAGE.of(PRODUCERS, "sh")]
    for _ in range(2):
        subprocess.run(["sh", "-euc", script], check=True)
    waiting = list(map(queue.backend.get, queue.keys()))
    assert [job is not None and abs(job.received - time.time()) < 100 for job in waiting] == [True, True]
    assert drain(queue) == 2
    assert GOT == [("joe@example.org", {})] * 2


@pytest.mark.parametrize(("fields", "runs"), [("p5x4102444800000", 1), ("x1000000000000", 0)])
def test_the_fields_of_a_files_name_and_line_are_those_that_it_lists(worker: None, fields: str, runs: int) -> None:
    queue = Queue("run/jobs")
    QueueReceiver(queue).bind()
    told = dict.fromkeys(name for row in fields_of("Into a maildir") for name in row)
    assert list(told) == ["target", "metadata", "sender", "recipients", "received"]
    record = {"target": "send_email", "metadata": {"source": "c"}, "received": 1.0}
    line = f"X-Lamsonq-Job: {json.dumps(record)}\n".encode()
    name = f"1244080328.M408474P3147Q4.host,LQ=1b{len(line)}o1{fields}"
    Path("run/jobs/new", name).write_bytes(line + b'{"to": "c"}')
    [key] = queue.keys()
    job = queue.backend.get(key)
    assert job is not None
    assert (job.priority, job.received) == (5 if "p5" in fields else 0, 1.0)
    drain(queue)
    assert [("c", {"source": "c"})] * runs == GOT


def test_a_receiver_that_sleeps_wakes_for_a_file_of_another_program(worker: None) -> None:
    [script] = [block.source for block in PAGE.of(PRODUCERS, "sh")]
    receiver = QueueReceiver("run/jobs", sleep=60)
    receiver.bind()
    thread = threading.Thread(target=receiver.start)
    thread.start()
    try:
        time.sleep(0.2)
        subprocess.run(["sh", "-euc", script], check=True)
        until(lambda: GOT)
    finally:
        receiver.stop()
        thread.join()
    assert GOT == [("joe@example.org", {})]


def test_a_message_with_its_envelope_is_a_file_too(here: Path) -> None:
    queue = Queue("run/posts")
    QueueReceiver(queue).bind()
    line = b'X-Lamsonq-Job: {"sender": "a@b.example", "recipients": ["c@d.example"]}\n'
    Path("run/posts/new", f"1.M1P1Q1.host,LQ=1b{len(line)}").write_bytes(line + b"Subject: x\n\n")
    seen: list[MailRequest] = []
    assert drain(queue, deliver=seen.append) == 1
    assert (seen[0].From, seen[0].To, seen[0]["subject"]) == ("a@b.example", "c@d.example", "x")


def fields_of(part: str) -> list[list[str]]:
    """The words in the first column of the table below a heading of third order."""
    text = PAGE.text.partition(f"\n### {part}\n")[2].partition("\n#")[0]
    return [re.findall(r"`(\w+)`", line.split("|")[1]) for line in text.splitlines() if line.startswith("| `")]


def test_a_statement_puts_a_job_into_a_sqlite_file(worker: None, time_now: FrozenClock) -> None:
    queue = Queue("sqlite:run/q.db?queue=jobs")
    assert queue.count() == 0
    [statement] = [block.source for block in PAGE.of(PRODUCERS, "sql")]
    with sqlite3.connect("run/q.db") as database:
        database.execute(statement)
        columns = {row[1] for row in database.execute("pragma table_info(jobs)")}
        assert {name for row in fields_of("Into an SQLite file") for name in row} <= columns
    assert drain(queue) == 1
    assert GOT == [("joe@example.org", {})]
    GOT.clear()
    insert = "insert into jobs (queue, target, body, metadata, due, expires, priority, uniq) values (?,?,?,?,?,?,?,?)"
    body, source = '{"to": "%s"}', '{"source": "%s"}'
    now = time_now.now
    with sqlite3.connect("run/q.db") as database:
        database.execute(insert, ("jobs", "send_email", body % "late", source % 1, now + 60, None, 0, "u"))
        database.execute(insert, ("jobs", "send_email", body % "gone", source % 2, None, now - 1, 0, None))
        database.execute(insert, ("jobs", "send_email", body % "second", source % 3, None, None, 9, None))
        database.execute(insert, ("jobs", "send_email", body % "first", source % 4, None, None, 1, None))
        with pytest.raises(sqlite3.IntegrityError):
            database.execute(insert, ("jobs", "send_email", body % "like", source % 5, None, None, 0, "u"))
    drain(queue)
    assert GOT == [("first", {"source": "4"}), ("second", {"source": "3"})]
    time_now.tick(61)
    drain(queue)
    assert GOT[2:] == [("late", {"source": "1"})]


# ---- from a shell ------------------------------------------------------------------------------------------------


def shown(section: str) -> list[str]:
    """The command lines of a section."""
    return [
        line.removeprefix("$ lamsonq ")
        for block in PAGE.of(section, "")
        for line in block.source.splitlines()
        if line.startswith("$ ")
    ]


@pytest.mark.parametrize("store", ["maildir", "sqlite"])
def test_the_commands_do_what_it_says(store: str, read: Callable[[str], Run]) -> None:
    session = read(store)
    queue, divide = Queue(session.url("jobs")), vars(session.section("Dead letters"))["divide"]
    stands_for = {"run/jobs": queue.dir}
    for line in shown("Dead letters"):
        if not queue.backend.keys("dead"):
            divide.later(0)
            drain(queue, raising=False)
        if not queue.backend.keys("delayed"):
            divide.using(delay=60).later(0)
        state = "delayed" if line.startswith("queue bury") else "dead"
        stands_for["1244080328.M408474P3147Q4.mycomputer.local"] = queue.backend.keys(state)[0]
        stands_for["417552bbf3da"] = entries(queue.backend.report(queue.backend.keys("dead")[0]))[-1].fingerprint
        words = [stands_for.get(word, word) for word in shlex.split(line.partition(" >")[0])]
        before = queue.backend.counts()
        lamsonq(*words)
        _, verb, *_ = words
        after = queue.backend.counts()
        if verb in ("stats", "ls", "dead", "show", "export", "pause", "resume"):
            assert after == before
            assert queue.backend.paused() == (verb == "pause")
        else:
            emptied = {"retry": "dead", "kick": "delayed", "bury": "delayed", "purge": "dead", "move": "dead"}[verb]
            assert after[emptied] == 0 or line.endswith("-older 30d -yes")
    assert sum(queue.backend.counts().values()) == 0
    assert sum(Queue("sqlite:run/q.db?queue=jobs").backend.counts().values()) > 0


# ---- tables and sentences ----------------------------------------------------------------------------------------


def test_the_table_of_policies_has_every_parameter_and_its_default() -> None:
    rows = {row[0].strip("`"): row[1] for row in PAGE.rows("Policies")}
    parameters = {name: p for name, p in inspect.signature(deferrable).parameters.items() if name != "function"}
    assert rows.keys() == parameters.keys()
    for name in ("delay_seconds", "ttl_seconds", "debounce_seconds", "priority"):
        assert rows[name][0] == "0" == str(parameters[name].default)
    for name in ("debounce_always_delay", "use_exponential_backoff", "unique"):
        assert rows[name] == f"`{parameters[name].default}`"
    assert rows["max_attempts"] == str(policy.MAX_ATTEMPTS)
    assert rows["timeout"].endswith(f"{inspect.signature(QueueReceiver).parameters['timeout'].default:g} s")
    assert policy.GIVE_UP_AFTER == 5 * 86400
    assert policy.DEFAULT.error_classes == (Exception,)
    assert [deferrable_backoff(n) for n in (1, 2, 3, 4, 5, 20)] == [4, 6, 10, 18, 34, 900]
    spans = [[exponential(failures) for _ in range(100)] for failures in (1, 2, 50)]
    assert [(min(span) >= 2, max(span) <= top) for span, top in zip(spans, (4, 8, 3600), strict=True)] == [
        (True, True)
    ] * 3
    assert "to 4294967295" in PAGE.text
    assert priority_of(2**40) == 4294967295


def test_the_table_of_events_has_every_event() -> None:
    named = {name for row in PAGE.rows("Events and metadata") for name in re.findall(r"`(\w+)`", row[0])}
    told = set(re.findall(r'tell\("(\w+)"', SOURCES)) | {
        name for pair in re.findall(r'tell\("(\w+)" if \w+ else "(\w+)"', SOURCES) for name in pair
    }
    assert named == told


def test_the_table_of_stores_says_what_each_can() -> None:
    heads = re.search(r"^\| \| (`.*`) \|$", PAGE.text_of("Choosing a store"), re.MULTILINE)
    assert heads
    urls = [url.strip(" `") for url in heads[1].split("|")]
    rows = {row[0]: row[1:] for row in PAGE.rows("Choosing a store")}
    for number, url in enumerate(urls):
        able = Queue(url).backend.capabilities
        assert (rows["limits per key"][number] == "yes") == ("limits" in able)
        assert (rows["in your transaction (`conn`)"][number] == "yes") == ("transactions" in able)
        assert (rows["worked by"][number] == "this process") == ("processes" not in able)


def test_the_options_of_the_table_are_refused_where_a_store_cannot(here: Path) -> None:
    for url in ("memory:posts", "run/posts"):
        with pytest.raises(SettingsError, match="sqlite"):
            QueueReceiver(url, deliver=print, limits=[Limit("sender", rate=1)]).bind()
        with pytest.raises(QueueError, match="conn"):
            Queue(url).push("x", conn=object())


def test_spans_of_a_job_stand_under_the_span_that_put_it(read: Callable[[str], Run], jobs: Queue) -> None:
    trace = pytest.importorskip("opentelemetry.trace", reason="the block is for those who have OpenTelemetry")
    sdk = pytest.importorskip("opentelemetry.sdk.trace")
    names = vars(read("memory").section(TRACING))
    assert isinstance(names["OpenTelemetry"].NAMESPACE, str)
    tracer = sdk.TracerProvider().get_tracer("test")
    spans = []

    @deferrable
    def work() -> None:
        spans.append(trace.get_current_span().get_span_context())
        with tracer.start_as_current_span("inner") as span:
            spans.append(span.get_span_context())

    with tracer.start_as_current_span("outer") as outer:
        work.using(queue=jobs).later()
    assert drain(jobs) == 1
    assert {span.trace_id for span in spans} == {outer.get_span_context().trace_id}
    assert spans[0].span_id == outer.get_span_context().span_id


# ---- sentences ---------------------------------------------------------------------------------------------------

SEEN: list[Any] = []


@deferrable
def note(value: Any) -> None:
    SEEN.append(value)


@deferrable(unique=True)
def only_one(value: int) -> None: ...


@deferrable(error_classes=[])
def puts_and_fails(how: str) -> None:
    if how == "thread":
        thread = threading.Thread(target=note.later, args=[how])
        thread.start()
        thread.join()
    elif how == "to_thread":
        asyncio.run(asyncio.to_thread(note.later, how))
    elif how == "unique":
        SEEN.append((only_one.later(1), only_one.later(1)))
        return
    elif how == "exit":
        raise SystemExit(how)
    raise RuntimeError(how)


@pytest.mark.parametrize(("how", "left"), [("thread", 1), ("to_thread", 0)])
def test_only_what_a_raw_thread_puts_leaves_with_a_failure(jobs: Queue, how: str, left: int) -> None:
    puts_and_fails.later(how)
    QueueReceiver(jobs).run_once()
    assert (jobs.backend.counts()["ready"], jobs.backend.counts()["dead"]) == (left, 1)


def test_inside_of_a_job_a_put_has_a_key_and_whether_it_is_let_go_is_known_later(jobs: Queue) -> None:
    SEEN.clear()
    puts_and_fails.later("unique")
    QueueReceiver(jobs).run_once()
    [keys] = SEEN
    assert isinstance(keys, tuple)
    assert all(keys)
    assert jobs.keys() == [keys[0]]


def test_an_exit_in_a_function_is_its_failure(jobs: Queue) -> None:
    key = puts_and_fails.later("exit")
    assert QueueReceiver(jobs).run_once()
    assert jobs.backend.state(key or "") == "dead"


def test_metadata_is_not_consumed_for_what_came_too_late(jobs: Queue, time_now: FrozenClock) -> None:
    class Producer:
        NAMESPACE = "n"

        def produce_metadata(self) -> str:
            return "x"

        def consume_metadata(self, metadata: Any) -> None:
            SEEN.append(metadata)

    SEEN.clear()
    events.register_metadata_producer_consumer(Producer())
    note.using(expires=10).later(1)
    time_now.tick(11)
    note.later(2)
    assert drain(jobs) == 2
    assert SEEN == ["x", 2]


def test_a_message_and_a_request_exist_if_the_transaction_has_committed(here: Path) -> None:
    queue = Queue("sqlite:q.db?queue=posts")
    assert queue.count() == 0
    database = sqlite3.connect("q.db")
    for error in (None, ZeroDivisionError()):
        try:
            with database:
                queue.push("Subject: x\n\n", conn=database)
                publish(queue, "send_email", conn=database)
                if error:
                    raise error
        except ZeroDivisionError:
            pass
        assert queue.count() == 2


def test_a_policy_that_contradicts_itself_ends_the_import() -> None:
    with pytest.raises(ValueError, match="do not go together"):
        deferrable(delay_seconds=1, debounce_seconds=1)


def test_a_function_gets_its_request_types_from_a_table(jobs: Queue) -> None:
    SEEN.clear()
    request_types({"note_it": f"{__name__}.note"})
    publish(jobs, "note_it", {"value": 1})
    publish(jobs, f"{__name__}.note", {"value": 2})
    drain(jobs)
    assert SEEN == [1, 2]
