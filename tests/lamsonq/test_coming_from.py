"""docs/coming-from-*.md: what they show runs, in every store, and what their tables call ours is there.

The blocks of `py` are in the other library's style. They are compiled, and not run: Deferrable and djutils are for
Python 2, pulpo-messaging is in no package index, Celery is no dependency of ours.
"""

from __future__ import annotations

import ast
import builtins
import functools
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, cast

import pytest

import lamsonq
from lamsonq import commands, deferred, events
from lamsonq.attempt import Attempt
from lamsonq.deferred import Message, Using, current_job, deferrable, queue_command
from lamsonq.jobs import DONE, Job, Put
from lamsonq.queue import Queue
from lamsonq.routing import Router
from lamsonq.testing import FrozenClock
from lamsonq.worker import QueueReceiver

from .pages import STORES, Page, Run, is_python

ROOT = Path(__file__).parents[2]
PAGES = [Page(f"coming-from-{name}.md") for name in ("deferrable", "djutils-queue", "pulpo-messaging", "celery")]
IDS = [page.name for page in PAGES]


@pytest.fixture(autouse=True)
def nobody_listens() -> Iterator[None]:
    yield
    events.clear_event_consumers()
    events.clear_metadata_producer_consumers()


@pytest.fixture
def read(here: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Page, str], Run]]:
    """`read(page, store)` begins a session."""
    monkeypatch.syspath_prepend(str(here))
    runs: list[Run] = []

    def begin(page: Page, store: str) -> Run:
        runs.append(Run(page, store))
        monkeypatch.setenv("LAMSONQ_QUEUE", runs[-1].url("jobs"))
        return runs[-1]

    yield begin
    for run in runs:
        run.close()


# ---- the applications --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_the_application_runs(page: Page, store: str, read: Callable[[Page, str], Run]) -> None:
    read(page, store).section("An application, before and after")


def test_its_periodic_functions_run_once_a_moment(read: Callable[[Page, str], Run], time_now: FrozenClock) -> None:
    midnight = datetime(2026, 3, 2).timestamp()
    for name, module, in_queue in (("djutils-queue", "gallery", "gallery"), ("celery", "shop", "jobs")):
        page = next(page for page in PAGES if name in page.name)
        session = read(page, "memory")
        session.section("An application, before and after")
        receivers = [QueueReceiver(session.url(in_queue)) for _ in range(3)]
        for moment in (midnight - 300, midnight + 1, midnight + 2):
            time_now.now = moment
            for receiver in receivers * 2:
                receiver.run_once()
        if module == "shop":
            assert sys.modules["shop.tasks"].BOOKS == ["closed"]
        else:
            photo = sys.modules["gallery.models"].Photo
            photo.get(7).deleted = True
            time_now.now = midnight + 15 * 60
            assert receivers[2].run_once()
            assert photo.kept == {}
        session.close()


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_what_was_there_before_is_python(page: Page) -> None:
    sources = [block.source for block in page.blocks if block.language == "py"]
    assert sources
    assert all(map(is_python, sources))
    assert {block.language for block in page.blocks} == {"python", "py"}


# ---- the tables --------------------------------------------------------------------------------------------------


@deferrable
def f(number: int) -> None: ...


@queue_command
def command(number: int) -> None: ...


def sample_job() -> Job:
    return Job(key="k", body=b"{}", target="t", claim="c")


def names_of(page: Page) -> dict[str, Any]:
    """What a reader of a table has: what the page imports, and one of each."""
    names: dict[str, Any] = {"lamsonq": lamsonq, "f": f, "command": command, "Router": Router, "Decimal": Decimal}
    first = next(block for block in page.blocks if block.language == "python")
    exec(first.source, names)
    queue, job = Queue("memory:table"), sample_job()
    names |= {"queue": queue, "job": job, "receiver": QueueReceiver(queue), "put": Put(queue.backend, job)}
    names |= {"key": "k", "report": "", "message": Message("k", {"request_type": "lower"}, {"payload": 1})}
    names |= {"consumer": object(), "producer": object(), "DONE": DONE}
    return names


SOURCES = "".join(path.read_text() for path in sorted((Path(lamsonq.__file__).parent).rglob("*.py")))


class Fits:
    """Resolves a piece of code without running it: each name is there, the arguments of each call fit."""

    def __init__(self, names: dict[str, Any]) -> None:
        self.names = names

    def check(self, code: str) -> None:
        """Raises whatever is wrong."""
        for statement in ast.parse(_as_statements(code)).body:
            for node in ast.iter_child_nodes(statement):
                if isinstance(node, ast.FunctionDef):
                    continue
                if isinstance(node, ast.withitem):
                    self.value(node.context_expr)
                elif isinstance(node, ast.expr):
                    self.value(node)

    def value(self, node: ast.expr) -> Any:
        """What an expression is, as far as nothing has to be called for it."""
        if isinstance(node, ast.Name):
            return self.names[node.id] if node.id in self.names else getattr(builtins, node.id)
        if isinstance(node, ast.Attribute):
            return getattr(self.value(node.value), node.attr)
        if isinstance(node, ast.Subscript):
            return self.value(node.value)[ast.literal_eval(node.slice)]
        if isinstance(node, ast.Call):
            return self.call(node)
        if not isinstance(node, ast.Lambda):
            for child in ast.iter_child_nodes(node):
                if isinstance(child, ast.expr):
                    self.value(child)
        return None

    def call(self, node: ast.Call) -> Any:
        function = self.value(node.func)
        for argument in [*node.args, *(keyword.value for keyword in node.keywords)]:
            self.value(argument)
        keywords = {keyword.arg: None for keyword in node.keywords if keyword.arg}
        if function is functools.partial:
            inspect.signature(self.value(node.args[0])).bind_partial(**keywords)
        elif not isinstance(function, type) or function.__module__ != "datetime":  # which have no signature
            inspect.signature(function).bind(*(None for _ in node.args), **keywords)
        if function is current_job:
            return deferred.CurrentJob("k", 0, 0, {}, cast(Attempt, None))
        return Using(f, None) if function == f.using else Queue("memory:made") if function is Queue else None


def _as_statements(code: str) -> str:
    """`@decorator(...)`, `with x:` and `return` are no statements by themselves."""
    if code.startswith("@"):
        return code[1:]
    if code.startswith("with "):
        return f"{code}\n    pass"
    return code


def as_command(line: str) -> None:
    """Raises UsageError for what is no command of ours."""
    _, name, *words = line.split()
    commands.lamsonq.commands[name].make_context(name, words)


def is_ours(span: str, names: dict[str, Any]) -> bool:
    """Whether what a table calls ours is there: a command, code whose names and arguments fit, a file of a project,
    or a word of ours (an event, a state, a variable of the environment)."""
    if span.startswith("lamsonq "):
        as_command(span)
        return True
    if re.fullmatch(r"[\w./]+|LAMSONQ_\.\.\.", span) and (span.strip(".") in SOURCES or (ROOT / span).exists()):
        return True
    if span == "async def":
        return True
    if re.fullmatch(r"on_\w+", span):
        return f" {span[3:]} " in str(events.__doc__) or f" {span[3:]}," in str(events.__doc__)
    Fits(names).check(span)
    return True


def ours(page: Page) -> list[str]:
    """The code in the last column of a page's table."""
    rows = page.rows("Name by name")
    return [span for row in rows for span in re.findall(r"`([^`]+)`", row[-1])]


@pytest.mark.parametrize(("page", "span"), [(page, span) for page in PAGES for span in dict.fromkeys(ours(page))])
def test_what_the_table_calls_ours_is_there(page: Page, span: str) -> None:
    assert is_ours(span, names_of(page))


@pytest.mark.parametrize(
    "span",
    [
        "deferrable(max_retries=3)",
        "queue.flush()",
        "lamsonq purge",
        "current_job().id",
        "@later",
        "events.nothing",
        "on_x",
    ],
)
def test_what_is_not_there_is_noticed(span: str) -> None:
    with pytest.raises((AssertionError, TypeError, AttributeError, KeyError)):
        assert is_ours(span, names_of(PAGES[0]))


INVENTORY = {
    "coming-from-deferrable.md": """
        Deferrable redis_client default_error_classes default_max_attempts error_classes max_attempts delay_seconds
        debounce_seconds debounce_always_delay ttl_seconds use_exponential_backoff later run_once process backend
        register_metadata_producer_consumer clear_metadata_producer_consumers register_event_consumer
        clear_event_consumers MetadataProducerConsumer NAMESPACE produce_metadata consume_metadata on_push on_pop
        on_empty on_complete on_expire on_retry on_error on_debounce_hit on_debounce_miss on_debounce_error push
        push_batch pop pop_batch touch complete complete_batch flush stats available in_flight delayed FIFO
        SUPPORTS_DELAY RECLAIMS_TO_BACK_OF_QUEUE MAX_PUSH_BATCH_SIZE MAX_POP_BATCH_SIZE
        MAX_COMPLETE_BATCH_SIZE envelope item Backend
        group error_queue BackendFactory create_backend_for_group SQSBackendFactory visibility_timeout wait_time
        name_suffix DocketsBackendFactory InMemoryBackendFactory method args kwargs attempts first_push_time
        last_push_time original_delay_seconds original_debounce_seconds original_debounce_always_delay
        item_queued_timestamp delay original_delay metadata debounce_skip error error_type error_text traceback hostname
        ts id object MAXIMUM_DELAY_SECONDS ValueError
    """,
    "coming-from-djutils-queue.md": """
        queue_command QueueCommand get_data set_data execute PeriodicQueueCommand validate_datetime periodic_command
        crontab registry register unregister get_message_for_command get_command_for_message get_periodic_commands
        QueueException invoker write read enqueue dequeue flush enqueue_periodic_commands autodiscover QUEUE_CLASS
        QUEUE_BACKEND QUEUE_CONNECTION QUEUE_NAME QUEUE_ALWAYS_EAGER BaseQueue __len__ blocking DatabaseQueue RedisQueue
        RedisBlockingQueue start stop restart -f -d -b -m -p -l -n -t queue_consumer gevent
    """,
    "coming-from-pulpo-messaging.md": """
        Message body payload request_type delay expiration header priority attempts delayInSeconds enqueue dequeue
        commit rollback peek delete HandlerRegistry PayloadHandler handle echo lower upper success fail RequestResult
        success_factory fatal_factory transient_factory isSuccess isFatal isTransient response_message_list error Pulpo
        initialize_queue_adapter publish start handle_message print_banner queue_adapter_type FileQueueAdapter
        BeanstalkdQueueAdapter shutdown_after_number_of_empty_iterations sleep_duration enable_output_buffering
        enable_banner banner_name banner_font enable_statman_reporting base_path message_format
        skip_random_messages_range enable_archive max_number_of_attempts host port default_tube encoding reserve_timeout
        lookup_message_state $ENV.NAME pulpo-cli.py queue.put queue.pop queue.peek
        queue.delete pulpo-runner.py launch-pulpo-runners.sh publish_sample_messages.py
        beanstalk-stats.py SIGTERM initialize
    """,
    "coming-from-celery.md": """
        app.task shared_task delay apply_async countdown eta expires queue priority retry autoretry_for acks_late
        time_limit soft_time_limit rate_limit beat_schedule crontab chain group chord link AsyncResult task_prerun
        task_failure -c --max-tasks-per-child task_always_eager inspect bind send_task max_retries pickle
    """,
}


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_the_table_has_every_name_of_theirs(page: Page) -> None:
    theirs = " ".join(row[0] for row in page.rows("Name by name"))
    assert [
        name for name in INVENTORY[page.name].split() if not re.search(rf"(?<!\w){re.escape(name)}(?!\w)", theirs)
    ] == []
