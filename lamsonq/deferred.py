"""Functions that are called later, by another process: deferred calls, commands, schedules, and requests by name.

    @deferrable(error_classes=[ConnectionError], max_attempts=8)
    def run_some_stats(team_id: int) -> None:
        ...

    run_some_stats.later(42)        # a job in run/jobs; a QueueReceiver("run/jobs") runs it
    run_some_stats(42)              # still a plain call

Rules:

1. A deferred call is a job as a message is: its target is the function's name (its request type), its body a JSON
   object of the arguments by name (lamsonq.arguments). One pipeline runs both.
2. Only functions that a decorator has marked, in modules that are imported, can be called by a job.
3. Inside a handler or another deferred call, what is put leaves with its success; see lamsonq.queue.
4. The decorators return the function that they were given, with `.later` and its like on it; `queue_command` alone
   returns something else, whose call enqueues.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import hashlib
import importlib.util
import inspect
import json
import logging
import os
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Generic, ParamSpec, Protocol, TypeVar, cast, overload

from lamsonq import arguments, attempt, clock, events
from lamsonq.arguments import carries
from lamsonq.errors import Dead, Later, UsageError, reason_of
from lamsonq.jobs import Debounce, Done, Gate, Job, exponential
from lamsonq.keys import new_key
from lamsonq.mail import MailRequest
from lamsonq.marks import MODULES, mark, marks_of
from lamsonq.modules import load
from lamsonq.policy import DEFAULT, Policy, Seconds, at_once, deferrable_backoff, priority_of, seconds
from lamsonq.queue import Moment, Queue, moment

__all__ = [
    "Dead",
    "Later",
    "Message",
    "autodiscover",
    "carries",
    "current_job",
    "deferrable",
    "deferrable_backoff",
    "eager",
    "find",
    "periodic",
    "publish",
    "queue_command",
    "request_types",
]

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)

DEFAULT_QUEUE = "run/jobs"
"""Where deferred calls go that name no queue, unless the environment's LAMSONQ_QUEUE does."""


class Deferrable(Protocol[P, R_co]):
    """A function that can also be called later."""

    __name__: str
    __module__: str

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co: ...

    def later(self, *args: P.args, **kwargs: P.kwargs) -> str | None:
        """Put a job that makes this call; its key, or None where unique or debounce let it go.

        Raises TypeError for arguments that do not fit or cannot travel, QueueError when it could not be kept.
        """

    async def later_async(self, *args: P.args, **kwargs: P.kwargs) -> str | None:
        """`later`, for an event loop that must not wait for a disk."""

    def using(
        self,
        *,
        queue: Queue | str | None = None,
        conn: object = None,
        delay: Moment | None = None,
        expires: Moment | None = None,
        priority: int | None = None,
        now: bool = False,
    ) -> Using[P]:
        """The same for one call, with other wishes than the function's own: `f.using(delay=60).later(1)`.

        `conn` is a connection to the queue's own database: the job exists when its transaction has committed.
        """


class Using(Generic[P]):
    """How one call is put. What is None is as the function's policy says."""

    def __init__(
        self,
        function: Callable[..., Any],
        own_queue: Queue | str | None,
        *,
        queue: Queue | str | None = None,
        conn: object = None,
        delay: Moment | None = None,
        expires: Moment | None = None,
        priority: int | None = None,
        now: bool = False,
    ) -> None:
        self._function = function
        self._queue = queue if queue is not None else own_queue
        self._conn = conn
        self._delay = delay
        self._expires = expires
        self._priority = priority
        self._now = now

    def later(self, *args: P.args, **kwargs: P.kwargs) -> str | None:
        """See Deferrable.later."""
        function = self._function
        if marks_of(function).routes:
            raise TypeError(f"{_name(function)} has a route: push a message into the queue of its process")
        body = arguments.encode(function, args, kwargs)
        if _is_eager():
            _call_now(function, body)
            return None
        job, gate = self._job(body)
        return queue_of(self._queue).enqueue(job, gate=gate, now=self._now, conn=self._conn)

    async def later_async(self, *args: P.args, **kwargs: P.kwargs) -> str | None:
        """See Deferrable.later_async."""
        return await asyncio.to_thread(self.later, *args, **kwargs)

    def job(self, *args: P.args, **kwargs: P.kwargs) -> Job:
        """The job that makes this call, not put anywhere."""
        return self._job(arguments.encode(self._function, args, kwargs))[0]

    def _job(self, body: bytes) -> tuple[Job, Gate | None]:
        policy, at = marks_of(self._function).policy or DEFAULT, clock.now()
        target = request_type_of(self._function)
        meant = find(target)
        if meant is not None and _name(meant) != _name(self._function):
            raise TypeError(f"{target!r} means {_name(meant)}: give {_name(self._function)} another name=")
        delay, ttl = seconds(policy.delay), seconds(policy.ttl)
        due = at + delay if delay else None
        same = hashlib.sha256(f"{target}\n".encode() + _in_order(body)).hexdigest()
        gate = _debounce(policy, f"{target}:{same}", Job(key="", body=body, target=target))
        due = due if self._delay is None else moment(self._delay, at)
        expires = (at + ttl if ttl else None) if self._expires is None else moment(self._expires, at)
        job = Job(
            key=queue_of(self._queue).new_key(),
            body=body,
            target=target,
            received=at,
            due=due,
            expires=expires,
            priority=priority_of(policy.priority if self._priority is None else self._priority),
            unique=f"{target}:{same}" if policy.unique else None,
            metadata=events.produced(),
        )
        return job, gate


def _debounce(policy: Policy, key: str, job: Job) -> Gate | None:
    if not policy.debounce:
        return None
    try:
        window = seconds(policy.debounce)
    except Exception as error:  # a function of the user's: the job is put all the same, as Deferrable does
        logging.error("the debounce window of %s cannot be computed: %s", job.target, reason_of(error))
        events.tell("debounce_error", job)
        return None
    return Debounce(f"debounce:{key}", window, policy.debounce_always_delay) if window else None


def _in_order(body: bytes) -> bytes:
    """The arguments in one order, however they were given."""
    return json.dumps(json.loads(body), sort_keys=True).encode("ascii")


@overload
def deferrable(function: Callable[P, R], /) -> Deferrable[P, R]: ...
@overload
def deferrable(
    *,
    error_classes: Iterable[type[BaseException]] | None = ...,
    max_attempts: int | None = ...,
    ttl_seconds: Seconds = ...,
    delay_seconds: Seconds = ...,
    debounce_seconds: Seconds = ...,
    debounce_always_delay: bool = ...,
    use_exponential_backoff: bool = ...,
    backoff: Callable[[int], float | timedelta] | None = ...,
    priority: int = ...,
    timeout: float | None = ...,
    unique: bool = ...,
    queue: Queue | str | None = ...,
    name: str | None = ...,
) -> Callable[[Callable[P, R]], Deferrable[P, R]]: ...
def deferrable(
    function: Callable[..., Any] | None = None,
    /,
    *,
    error_classes: Iterable[type[BaseException]] | None = None,
    max_attempts: int | None = None,
    ttl_seconds: Seconds = 0,
    delay_seconds: Seconds = 0,
    debounce_seconds: Seconds = 0,
    debounce_always_delay: bool = False,
    use_exponential_backoff: bool = True,
    backoff: Callable[[int], float | timedelta] | None = None,
    priority: int = 0,
    timeout: float | None = None,
    unique: bool = False,
    queue: Queue | str | None = None,
    name: str | None = None,
) -> Any:
    """Decorator: this function can be called later, under this policy (see lamsonq.policy.Policy).

    Of a plain function it makes a Deferrable; on a state function, with `@route`, it sets what becomes of messages that
    it fails at. `error_classes` None means every Exception, () none. Times are seconds, timedeltas, or functions that
    are asked at each `later`. `queue` is where the calls go, `name` the request type, instead of the function's name.
    Raises TypeError and ValueError for what contradicts itself.

    Source: Deferrable's `deferrable`, with its names.
    """
    if backoff is not None and not use_exponential_backoff:
        raise ValueError("backoff=... and use_exponential_backoff=False contradict each other")
    policy = Policy(
        error_classes=(Exception,) if error_classes is None else _classes(error_classes),
        max_attempts=max_attempts,
        backoff=backoff or (exponential if use_exponential_backoff else at_once),
        timeout=timeout,
        delay=delay_seconds,
        ttl=ttl_seconds,
        debounce=debounce_seconds,
        debounce_always_delay=debounce_always_delay,
        priority=priority_of(priority),
        unique=unique,
    )

    def decorate(function: Callable[..., Any]) -> Any:
        return _deferrable(function, policy, queue, name)

    return decorate if function is None else decorate(function)


def _classes(error_classes: Iterable[type[BaseException]]) -> tuple[type[BaseException], ...]:
    if isinstance(error_classes, type):
        raise TypeError(f"error_classes takes several: write [{error_classes.__name__}]")
    return tuple(error_classes)


def _deferrable(
    function: Callable[..., Any], policy: Policy, queue: Queue | str | None, name: str | None, **more: Any
) -> Any:
    if not inspect.isfunction(function) or "." in function.__qualname__.rpartition("<locals>.")[2]:
        raise TypeError(f"{function!r}: deferred calls are of functions of a module, not of methods or objects")
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise TypeError(f"{_name(function)} is a generator: nobody would run it")
    mark(function, policy=policy, name=name, **more)
    using = functools.partial(Using, function, queue)
    deferred = cast(Any, function)
    deferred.queue = queue
    deferred.using = using
    deferred.later = using().later
    deferred.later_async = using().later_async
    return deferred


class Command(Generic[P, R]):
    """What `queue_command` makes of a function: a call puts a job; `run` is the plain call."""

    __name__: str

    def __init__(self, function: Deferrable[P, R]) -> None:
        functools.update_wrapper(self, function)
        self.run = function
        self.later = function.later
        self.later_async = function.later_async
        self.using = function.using

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> str | None:
        return self.later(*args, **kwargs)


@overload
def queue_command(function: Callable[P, R], /) -> Command[P, R]: ...
@overload
def queue_command(**policy: Any) -> Callable[[Callable[P, R]], Command[P, R]]: ...
def queue_command(function: Callable[..., Any] | None = None, /, **policy: Any) -> Any:
    """Decorator: calling this function puts a job that runs it, and returns its key. Takes what `deferrable` does.

    `command.run(...)` is the plain call, for tests and for whoever is in the right process already.

    Source: djutils' `queue_command`.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        return Command(deferrable(**policy)(function))

    return decorate if function is None else decorate(function)


def periodic(schedule: str, **policy: Any) -> Callable[[Callable[P, R]], Deferrable[P, R]]:
    """Decorator: a job for this function is put at each moment of the schedule, by whichever process works its queue.

    `schedule` has the five fields of crontab(5), in local time; the function is called without arguments. However many
    processes there are, each moment has one job. Takes what `deferrable` does. Raises ValueError for a bad schedule.

    Source: djutils' `periodic_command`; the schedule is read by cronsim.
    """
    from lamsonq.schedule import check

    check(schedule)

    def decorate(function: Callable[..., Any]) -> Any:
        arguments_of = inspect.signature(function).parameters.values()
        any_number = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        needed = [p for p in arguments_of if p.default is p.empty and p.kind not in any_number]
        if needed:
            raise TypeError(f"@periodic: {_name(function)} is called without arguments, and needs {needed[0].name}")
        decorated = deferrable(**policy)(function)
        mark(function, schedule=schedule)
        return decorated

    return decorate


# -- which function a job means ------------------------------------------------------------------------------------

_request_types: dict[str, str] = {}


def request_types(names: Mapping[str, str]) -> None:
    """Say which function each request type means: `{"send_email": "app.jobs.send_email"}`, as in settings.

    Raises UsageError when a module cannot be imported, or has no such deferrable function.
    """
    for request_type, dotted in names.items():
        module = dotted.rpartition(".")[0]
        load(module)
        other = _named(request_type)
        if other is not None and _name(other) != dotted:
            raise UsageError(f"request_types: {request_type!r} is the name= of {_name(other)} already, not {dotted}")
        if _marked(dotted) is None:
            raise UsageError(f"request_types: {request_type!r} means {dotted}, which is no @deferrable function")
        _request_types[request_type] = dotted


def request_type_of(function: Callable[..., Any]) -> str:
    """The target of jobs that call this function."""
    return marks_of(function).name or _name(function)


def find(request_type: str) -> Callable[..., Any] | None:
    """The function that this request type means; None when no imported module has one."""
    return _marked(_request_types.get(request_type, request_type)) or _named(request_type)


def _marked(dotted: str) -> Callable[..., Any] | None:
    module, _, name = dotted.rpartition(".")
    marked = MODULES.get(module)
    candidates: list[Callable[..., Any]] = list(marked.functions) if marked else []
    return next((f for f in reversed(candidates) if f.__name__ == name and is_deferrable(f)), None)


def _named(request_type: str) -> Callable[..., Any] | None:
    for function in functions():
        if marks_of(function).name == request_type:
            return function
    return None


def functions() -> Iterator[Callable[..., Any]]:
    """All deferrable functions of imported modules."""
    for module in list(MODULES.values()):
        yield from filter(is_deferrable, list(module.functions))


def is_deferrable(function: Callable[..., Any]) -> bool:
    """Whether deferred calls of this function can be made: it has a policy, and no route."""
    marks = marks_of(function)
    return marks.policy is not None and not marks.routes


def periodic_functions() -> list[Callable[..., Any]]:
    """The functions with a schedule."""
    return [function for function in functions() if marks_of(function).schedule is not None]


def schedule_of(function: Callable[..., Any]) -> str:
    """When a periodic function is to run."""
    return marks_of(function).schedule or ""


def queue_of_function(function: Callable[..., Any]) -> Queue:
    """Where the calls of a deferrable function go."""
    return queue_of(cast(Any, function).queue)


def job_of_call(function: Callable[..., Any]) -> Job:
    """The job of a call without arguments, as its policy says; its gate, a Tick, makes it due at once."""
    return cast("Deferrable[[], Any]", function).using().job()


def targets() -> set[str]:
    """All request types that this process can run."""
    return {request_type_of(function) for function in functions()} | {_name(f) for f in functions()} | {*_request_types}


def queue_of(queue: Queue | str | None) -> Queue:
    """The queue of a function that names this one."""
    if isinstance(queue, Queue):
        return queue
    return Queue(queue or os.environ.get("LAMSONQ_QUEUE") or DEFAULT_QUEUE)


def autodiscover(*packages: str) -> list[str]:
    """Import the `commands` modules of these packages and of their subpackages; their names.

    Raises UsageError for a package that is none, or a module that cannot be imported.

    Source: djutils' `queue.autodiscover`.
    """
    found = []
    for package in packages:
        paths = getattr(load(package), "__path__", None)
        if paths is None:
            raise UsageError(f"autodiscover: {package} is a module, and no package that could have a commands module")
        below = [info.name for info in pkgutil.walk_packages(paths, f"{package}.") if info.ispkg]
        for name in (package, *below):
            if importlib.util.find_spec(f"{name}.commands") is not None:
                load(f"{name}.commands")
                found.append(f"{name}.commands")
    return found


# -- requests from those who do not have the code --------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Message:
    """A request as it was published: `id` is the job's key (None where it was let go), `body` the arguments by name.

    Source: pulpo-messaging's Message.
    """

    id: str | None
    header: Mapping[str, Any] = field(default_factory=dict)
    body: Mapping[str, Any] = field(default_factory=dict)

    @property
    def request_type(self) -> str:
        return str(self.header["request_type"])

    @property
    def payload(self) -> Any:
        """The body's only value, where the request has a single one."""
        return self.body.get("payload")


def publish(
    queue: Queue | str,
    request_type: str,
    body: Mapping[str, Any] | None = None,
    *,
    payload: Any = None,
    priority: int = 0,
    expiration: Moment | None = None,
    delay: Moment | None = None,
    header: Mapping[str, str] | None = None,
    unique: str | None = None,
    now: bool = False,
    conn: object = None,
) -> Message:
    """Put a request for whichever function this type means, where it is run: the code need not be here.

    `body` is the arguments by name; `payload` is short for `{"payload": ...}`. `expiration` and `delay` are seconds
    from now, timedeltas or moments (datetime); `header` is text that travels along, in `current_job().metadata`. Raises
    TypeError for what JSON cannot tell, ValueError for what would expire before it is due, QueueError when it could not
    be kept.

    Source: pulpo-messaging's `publish`.
    """
    if not isinstance(request_type, str) or not request_type:
        raise TypeError(f"publish: a request type is a text, not {request_type!r}")
    for name, value in (("body", body), ("header", header)):
        if not isinstance(value, Mapping | None):
            raise TypeError(f"publish({request_type!r}): {name} is a dict, not {type(value).__name__}")
    told = dict(body or {}) | ({} if payload is None else {"payload": payload})
    try:
        text = json.dumps(told, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TypeError(f"publish({request_type!r}): the body cannot be told in JSON: {error}") from error
    wrong = [name for name, value in (header or {}).items() if not (isinstance(name, str) and isinstance(value, str))]
    if wrong:
        raise TypeError(f"publish({request_type!r}): the header {wrong[0]!r} is no text")
    target, at = queue_of(queue), clock.now()
    job = Job(
        key=target.new_key(),
        body=text.encode("ascii"),
        target=request_type,
        received=at,
        due=None if delay is None else moment(delay, at),
        expires=None if expiration is None else moment(expiration, at),
        priority=priority_of(priority),
        unique=unique,
        metadata=events.produced(header),
    )
    key = target.enqueue(job, now=now, conn=conn)
    sent: dict[str, Any] = {**job.metadata, "request_type": request_type, "priority": job.priority, "attempts": 0}
    sent |= {name: value for name, value in (("delay", job.due), ("expiration", job.expires)) if value is not None}
    return Message(key, sent, told)


# -- running ---------------------------------------------------------------------------------------------------------


def call_for(job: Job) -> attempt.Call | None:
    """The call that a job asks for; None when this process does not know its target. Raises Dead for bad arguments."""
    function = find(job.target or "")
    if function is None:
        return None
    return _call(function, job.body, job.target or "")


def _call(function: Callable[..., Any], body: bytes, name: str) -> attempt.Call:
    try:
        args, kwargs = arguments.decode(function, body)
    except ValueError as error:
        raise Dead(str(error)) from error

    def call(_message: MailRequest) -> Any:
        return function(*args, **kwargs)

    return attempt.Call(call, "", name, policy=marks_of(function).policy or DEFAULT)


@dataclass(frozen=True, slots=True)
class CurrentJob:
    """The job that the calling code belongs to. `attempts` counts its failures so far."""

    key: str
    attempts: int
    deliveries: int
    metadata: Mapping[str, str]
    _attempt: attempt.Attempt

    def touch(self) -> None:
        """Say that this is still at work: its time-out begins anew. Raises LeaseLost when it was given up."""
        self._attempt.touch()


def current_job() -> CurrentJob | None:
    """The job that is being run; None outside of one, and for mail straight from SMTP."""
    running = attempt.current()
    while running is not None and running.job is None:
        running = running.outer
    if running is None or running.job is None:
        return None
    job = running.job
    return CurrentJob(job.key, job.attempts, job.deliveries, job.metadata, running)


_eager: contextvars.ContextVar[bool] = contextvars.ContextVar("lamsonq_eager", default=False)


@contextlib.contextmanager
def eager() -> Iterator[None]:
    """In this block `later` runs the function at once, with arguments that have travelled; what it raises comes out.

    The environment's LAMSONQ_EAGER=1 does it everywhere. Source: djutils' QUEUE_ALWAYS_EAGER.
    """
    token = _eager.set(True)
    try:
        yield
    finally:
        _eager.reset(token)


def _is_eager() -> bool:
    return _eager.get() or os.environ.get("LAMSONQ_EAGER", "").lower() in ("1", "true", "yes")


def _call_now(function: Callable[..., Any], body: bytes) -> None:
    message = MailRequest("eager", None, [], b"")
    name = request_type_of(function)
    job = Job(key=new_key(), body=body, target=name, received=clock.now(), metadata=events.produced())
    call = _call(function, body, name)
    outcome = attempt.run_here(
        lambda settle: attempt.Attempt(call, message, key="", settle=settle, job=job, unkept=Later)
    )
    if not isinstance(outcome, Done):
        assert isinstance(outcome, Later | Dead)
        raise outcome.__cause__ or outcome


def _name(function: Callable[..., Any]) -> str:
    return f"{function.__module__}.{function.__name__}"
