"""Mail on its way in: `SMTPReceiver` listens, and gives every message to the router or to one callable.

`lmtp` derives LMTPReceiver from it.

Rules:

1. The port or unix socket is taken by `bind`, in the parent, before any thread runs and any child is forked; `start`
   uses it.
2. One thread of its own talks to the clients (`session`); functions run in `workers` others (`commit`). So no handler,
   however slow, delays a greeting.
3. Work that has begun is finished, also when its client has gone. `stop` waits for it, up to its grace.
4. The same process works off what it had to keep: the bound jobs of the UNDELIVERABLE_QUEUE.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from socket import gethostname
from socket import socket as Socket

from lamsonq import mail
from lamsonq.commit import LOG, Committer, trouble
from lamsonq.errors import QueueError, SettingsError
from lamsonq.queue import Queue
from lamsonq.routing import Router, RoutingBase
from lamsonq.session import Session
from lamsonq.sockets import BACKLOG, listen
from lamsonq.space import MIN_FREE, Space
from lamsonq.worker import TROUBLE_PAUSE, QueueReceiver

ACCEPTED_AT_ONCE = 16
"""Connections that are accepted in one turn of the event loop."""

LEAVE_AFTER = 0.5
"""Seconds without a transaction and without a word after which a client is sent away by a server that ends: who has
just come, as clients do while a server is reloaded, still gets his message through."""

_GOODBYE = "421 4.3.2 Service shutting down"


class SMTPReceiver:
    """Listens on `host`:`port` and gives each message to the router; with `deliver=`, to that callable instead.

    `socket` is the path of a unix socket to listen on, instead of host and port. `workers` is how many functions run at
    once (and as many again for what is worked off), `timeout` how many seconds one may take, `size_limit` how many
    octets a message may have, `hostname` what it greets as (None: this host's name). Mail is put off while fewer than
    `min_free` bytes of the disk are free (0: never). Port 0 takes any free one; `port` tells it after `bind`.

    Source: Lamson's and Salmon's `server.SMTPReceiver`.
    """

    protocol = "SMTP"
    session: type[Session] = Session
    """What is spoken with each client."""

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 8825,
        socket: str | None = None,
        *,
        deliver: Callable[[mail.MailRequest], object] | None = None,
        router: RoutingBase = Router,
        workers: int = 10,
        timeout: float = 300.0,
        size_limit: int = 33_554_432,
        hostname: str | None = None,
        min_free: int = MIN_FREE,
    ) -> None:
        if workers < 1:
            raise ValueError(f"workers={workers}: an {self.protocol}Receiver needs at least one")
        self.host = host
        self.port = port
        self.socket = socket or None
        self.deliver = deliver
        self.router = router
        self.workers = workers
        self.timeout = timeout
        self.size_limit = size_limit
        self.hostname = hostname or gethostname()
        self.space = Space(min_free)
        self.draining = False
        self._stuck = False
        self._listener: Socket | None = None
        self._undeliverable: QueueReceiver | None = None
        self._threads: list[threading.Thread] = []
        self._listens = threading.Event()
        self._failure: BaseException | None = None
        self._stopping = asyncio.Event()
        self._deadline = float("inf")
        self._sessions: set[Session] = set()
        self._commits: set[asyncio.Task[None]] = set()

    # -- the receiver's life -----------------------------------------------------------------------------------

    @property
    def stuck(self) -> bool:
        """Whether a handler hangs, so that this process should be replaced."""
        return self._stuck or (self._undeliverable is not None and self._undeliverable.stuck)

    def bind(self) -> None:
        """Take the port or unix socket.

        Raises Refusal when it cannot be had, and SettingsError for a router without a queue.
        """
        if self._listener is not None:
            return
        if self.deliver is None:
            self._undeliverable_queue().count()
            self.router.check()
        self._listener = listen(self.host, self.port, self.socket)
        address = self._listener.getsockname()
        if isinstance(address, tuple):
            self.port = address[1]
        else:
            self.socket = os.fsdecode(address)  # it may be one that was passed to us

    @property
    def where(self) -> str:
        """What a client connects to: the path of a unix socket, or host:port."""
        return self.socket or f"{self.host}:{self.port}"

    def listening(self) -> str:
        return f"listening for {self.protocol} on {self.where}"

    def start(self) -> None:
        """Listen, in threads of its own; returns when it does. Raises what `bind` raises."""
        self.bind()
        mail_log = logging.getLogger("mail.log")
        if mail_log.level == logging.NOTSET:
            mail_log.setLevel(logging.ERROR)  # aiosmtpd tells every line, and at DEBUG every mail
        self._spawn(self._serve)
        self._listens.wait()
        if self._failure is not None:
            raise self._failure
        LOG.info("%sReceiver started on %s.", self.protocol, self.where)
        if self.deliver is None:
            self._undeliverable = QueueReceiver(
                self._undeliverable_queue(), workers=self.workers, router=self.router, timeout=self.timeout, bound=True
            )
            if self._deadline < float("inf"):  # told to stop before there was anything to stop
                self._undeliverable.stop(0.0)
            self._spawn(self._work_off)

    def stop(self, grace: float = 30.0) -> None:
        """Take no more; what has begun may finish for `grace` seconds. Returns at once; `join` waits.

        A receiver that is just being started ends as soon as it listens.
        """
        self._deadline = min(self._deadline, time.monotonic() + grace)
        if self._undeliverable is not None:
            self._undeliverable.stop(grace)
        if self._listens.is_set():
            with contextlib.suppress(RuntimeError):  # it has stopped already
                self._loop.call_soon_threadsafe(self._stopping.set)

    def join(self) -> None:
        """Wait until everything that was taken is answered."""
        for thread in list(self._threads):
            thread.join()

    def _undeliverable_queue(self) -> Queue:
        queue = self.router.UNDELIVERABLE_QUEUE
        if queue is None:
            raise SettingsError(
                f"{self.protocol}Receiver gives mail to the router, which has no place for what fails: add"
                ' `Router.UNDELIVERABLE_QUEUE = queue.Queue("run/undeliverable")` to the boot module'
            )
        return queue

    def _spawn(self, target: Callable[[], None]) -> None:
        thread = threading.Thread(target=target, name=f"lamsonq-smtp{target.__name__}", daemon=True)
        thread.start()
        self._threads.append(thread)

    def _work_off(self) -> None:
        assert self._undeliverable is not None
        try:
            while not self._begin_working_off(self._undeliverable):
                time.sleep(TROUBLE_PAUSE)
        except Exception:  # whatever it is, nothing may be kept where nobody works: the process is replaced
            LOG.exception("Working off the undeliverable queue failed.")
            self._ask_to_be_replaced()

    def _begin_working_off(self, worker: QueueReceiver) -> bool:
        """False while the queue cannot be used: mail is answered 451 then, but answered."""
        try:
            worker.start()
        except QueueError as error:
            LOG.error("%s; trying on", error)
            return self._deadline < float("inf")
        return True

    def _ask_to_be_replaced(self) -> None:
        self._stuck = True
        self.stop()

    # -- the event loop's thread -------------------------------------------------------------------------------

    def _serve(self) -> None:
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="lamsonq-smtp")
        self._lookups = ThreadPoolExecutor(2, thread_name_prefix="lamsonq-rcpt")
        try:
            asyncio.run(self._listen(pool))
        except BaseException as error:  # start() raises it, where it waits
            self._failure = error
        finally:
            self._listens.set()
            pool.shutdown(wait=False, cancel_futures=True)
            self._lookups.shutdown(wait=False)

    async def _listen(self, pool: ThreadPoolExecutor) -> None:
        self._loop = loop = asyncio.get_running_loop()
        self._committer = Committer(loop, pool, self.router, self.deliver, self.timeout, self._ask_to_be_replaced)
        assert self._listener is not None
        # To asyncio this is how often it tries to accept in one turn: with no descriptor left, so many errors.
        server = await loop.create_server(
            lambda: self.session(self, loop), sock=self._listener, backlog=ACCEPTED_AT_ONCE
        )
        self._listener.listen(BACKLOG)
        self._listens.set()
        if self._deadline < float("inf"):  # told to stop before it listened
            self._stopping.set()
        await self._stopping.wait()
        loop.remove_reader(self._listener)
        for _ in range(10):
            await asyncio.sleep(0)  # when asyncio's server closes, it drops whom it has accepted without a session yet
        server.close()
        await self._drain()

    async def _drain(self) -> None:
        """Let what has begun finish; send everybody else away."""
        self.draining = True
        while (self._sessions or self._commits) and time.monotonic() < self._deadline:
            for session in [session for session in self._sessions if session.idle_for > LEAVE_AFTER]:
                session.dismiss(_GOODBYE)
            await asyncio.sleep(0.02)
        if cut := [f"{run.call.name or 'deliver'} for {run.call.recipient}" for run in self._committer.running]:
            LOG.warning(
                "%d function(s) have not finished in time and are cut; their clients send the message again: %s",
                len(cut),
                ", ".join(sorted(cut)),
            )
        self._committer.give_up()
        for session in list(self._sessions):
            session.dismiss(_GOODBYE)
        await asyncio.sleep(0.02)  # what was written last goes out

    # -- what the sessions need --------------------------------------------------------------------------------

    def opened(self, session: Session) -> None:
        self._sessions.add(session)

    def closed(self, session: Session) -> None:
        self._sessions.discard(session)

    async def takes(self, address: str) -> bool:
        """Whether a route's expression matches; where no handlers are loaded everything is taken."""
        if not self.router.table.routes:
            return True
        return await self._loop.run_in_executor(self._lookups, self.router.takes, address)

    def full(self, size: int) -> bool:
        return self.space.lacks(size)

    def trouble(self, error: BaseException) -> str:
        return trouble(error)

    def commit(
        self, envelope: mail.Envelope, content: bytes, groups: Sequence[tuple[str, ...]]
    ) -> Sequence[asyncio.Future[str]]:
        """Take a message; the task goes on when nobody waits for the replies any more."""
        replies: list[asyncio.Future[str]] = [self._loop.create_future() for _ in groups]
        context = contextvars.copy_context()  # the task's, so that the line about a refusal has the message's id
        committing = self._committer.commit(envelope, content, groups, replies)
        task = self._loop.create_task(committing, context=context)
        self._commits.add(task)
        task.add_done_callback(self._commits.discard)
        for group, reply in zip(groups, replies, strict=True):
            reply.add_done_callback(partial(_log_refusal, envelope, group), context=context)
        return replies


def _log_refusal(envelope: mail.Envelope, group: tuple[str, ...], reply: asyncio.Future[str]) -> None:
    """One line when these recipients' message was not taken: for who reads the log, it is not there otherwise."""
    if not reply.cancelled() and not reply.result().startswith("2"):
        told = (envelope.peer, envelope.mail_from, list(group), reply.result())
        LOG.info("Refused message from Peer: %r, From: %r, to To %r: %r", *told)
