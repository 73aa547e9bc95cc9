"""Mail on its way in: `SMTPReceiver` listens, and gives every message to the router or to one callable.

`lmtp` derives LMTPReceiver from it.

Rules:

1. The port or unix socket is taken by `bind`, in the parent, before any thread runs and any child is forked; `start`
   uses it.
2. One thread of its own talks to the clients (`session`); functions run in `workers` others (`commit`). So no handler,
   however slow, delays a greeting.
3. Work that has begun is finished, also when its client has gone. `stop` waits for it, up to its grace.
4. The same process works off what it had to keep: the bound jobs of the UNDELIVERABLE_QUEUE.
5. Nobody relays for strangers: whom mail is taken for, the routes say, or `hosts`. A receiver that has neither takes
   mail for everybody, and so it listens to this machine alone, or to who has logged in.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import ipaddress
import logging
import os
import resource
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from socket import gethostname
from socket import socket as Socket
from ssl import SSLContext

from msgspec import structs

from lamsonq import mail
from lamsonq.address import is_domain
from lamsonq.authentication import Verifier, authentication_results, without_forged
from lamsonq.commit import LOG, Committer, trouble
from lamsonq.content import Content
from lamsonq.delivery import Reports, report_of
from lamsonq.errors import QueueError, SettingsError, SMTPError
from lamsonq.limits import Limits, Network, Traffic, within
from lamsonq.queue import Queue
from lamsonq.routing import Router, RoutingBase
from lamsonq.session import Check, Dialogue, Session
from lamsonq.sockets import BACKLOG, is_this_machine, listen
from lamsonq.space import MIN_FREE, Space
from lamsonq.tally import TALLY
from lamsonq.threads import Threads
from lamsonq.tls import TLS
from lamsonq.trace import received_field
from lamsonq.verdicts import Auth, Verdict
from lamsonq.worker import TROUBLE_PAUSE, QueueReceiver

ACCEPTED_AT_ONCE = 16
"""Connections that are accepted in one turn of the event loop."""

LEAVE_AFTER = 0.5
"""Seconds without a transaction and without a word after which a client is sent away by a server that ends: who has
just come, as clients do while a server is reloaded, still gets his message through."""

CHECK_TIMEOUT = 30.0
"""Seconds that a check of the user's own may take; then the client is asked to come again."""

GIVE_WAY_AFTER = 10.0
"""Seconds without a transaction after which a connection goes when there are too many."""

_GOODBYE = "421 4.3.2 Service shutting down"
_GIVE_WAY = "421 4.7.0 Too many connections, and you have been silent the longest"
_UNDELIVERABLE_LOOK_EVERY = 60.0
"""Seconds between two looks into a queue that tells by itself when something comes."""

_SPARE_FILES = 256
"""Descriptors that are needed besides those of the clients."""


class SMTPReceiver:
    """Listens on `host`:`port` and gives each message to the router; with `deliver=`, to that callable instead.

    `socket` is the path of a unix socket to listen on, instead of host and port. `workers` is how many functions run at
    once (and as many again for what is worked off), `timeout` how many seconds one may take, `size_limit` how many
    octets a message may have, `hostname` what it greets as (None: this host's name). Mail is put off while fewer than
    `min_free` bytes of the disk are free (0: never). Port 0 takes any free one; `port` tells it after `bind`.

    `tls` is the certificate, and when it is used. `logins` tells whether a name and a password belong together, as
    `Logins` does; with `login_required` nobody else may send. `hosts` are the domains that strangers may send to, on
    top of what the routes say. `limits` hold per client and for all; the networks of `trusted` ("10.0.0.0/8") have none
    of their own. Those of `proxies` tell by the PROXY protocol whom they connect for. `refuse_bare` refuses a message
    with a bare CR or LF, or with a NUL, which otherwise is carried as it is. `on_connect`, `on_mail` and `on_rcpt` are
    checks of your own: they get a `Dialogue`, and raise SMTPError to refuse. With `verify` SPF, DKIM, DMARC and ARC are
    looked at before a handler runs (`message.auth`), in the name of `authserv_id` (None: `hostname`). `reports` takes
    the report that a message was delivered, where its sender asks for one (RFC 3461): with it, or with `deliver`, DSN
    is offered.

    Raises ValueError for arguments that cannot be.

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
        tls: TLS | None = None,
        logins: Callable[[str, str], bool] | None = None,
        login_required: bool = False,
        hosts: Sequence[str] | None = None,
        limits: Limits | None = None,
        trusted: Sequence[str] = (),
        proxies: Sequence[str] = (),
        refuse_bare: bool = False,
        on_connect: Check | None = None,
        on_mail: Check | None = None,
        on_rcpt: Check | None = None,
        verify: bool | Verifier = False,
        authserv_id: str | None = None,
        reports: Reports | None = None,
    ) -> None:
        if workers < 1:
            raise ValueError(f"workers={workers}: an {self.protocol}Receiver needs at least one")
        if isinstance(hosts, str):
            raise ValueError(f"hosts={hosts!r}: a list of domains is wanted, hosts=[{hosts!r}]")
        for domain in hosts or ():
            if not is_domain(domain):
                raise ValueError(f"hosts: {domain!r} is no domain; one is written as example.org")
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
        self.tls = tls
        self.logins = logins
        self.login_required = login_required
        self.hosts = None if hosts is None else frozenset(host.lower() for host in hosts)
        self.limits = limits or Limits()
        self.traffic = Traffic(self.limits)
        self.trusted = _networks("trusted", trusted)
        self.proxies = _networks("proxies", proxies)
        self.carries_bare = not refuse_bare
        self.on_connect = on_connect
        self.on_mail = on_mail
        self.on_rcpt = on_rcpt
        self.authserv_id = authserv_id or self.hostname
        self.verifier = Verifier(self.hostname) if verify is True else verify or None
        self.reports = reports
        self.processes = 1
        """How many of these the boot runs: each has its share of the limits."""
        self.draining = False
        self._stuck = False
        self._look_for_room = 0.0
        self._listener: Socket | None = None
        self._undeliverable: QueueReceiver | None = None
        self._threads: list[threading.Thread] = []
        self._listens = threading.Event()
        self._failure: BaseException | None = None
        self._stopping = asyncio.Event()
        self._deadline = float("inf")
        self._sessions: set[Session] = set()
        self._reporting: set[Future[object]] = set()

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
        self._check_logins()
        self._check_relaying()
        if self.deliver is None:
            self._undeliverable_queue().count()
            self.router.check()
        self._listener = listen(self.host, self.port, self.socket)
        address = self._listener.getsockname()
        if isinstance(address, tuple):
            self.port = address[1]
        else:
            self.socket = os.fsdecode(address)  # it may be one that was passed to us

    def _check_logins(self) -> None:
        if self.login_required and self.logins is None:
            raise SettingsError(f"{self.protocol}Receiver: login_required, and nobody can log in: give logins, too")
        if self.logins is not None and self.tls is None:
            raise SettingsError(
                f"{self.protocol}Receiver: passwords go through TLS only (RFC 4954): give tls, too (in settings.toml:"
                " receiver.certificate_file)"
            )

    def _check_relaying(self) -> None:
        """Rule 5."""
        public = self.socket is None and not is_this_machine(self.host)
        limited = self.hosts is not None or self.login_required or self.router.table.routes
        if public and self.deliver is not None and not limited:
            raise SettingsError(
                f"{self.protocol}Receiver on {self.host} would take mail for everybody, from everybody: name the"
                " domains that you take mail for, hosts=[...] (in settings.toml: receiver.hosts), or load the handlers,"
                " or ask for a login (login_required=True)"
            )

    @property
    def where(self) -> str:
        """What a client connects to: the path of a unix socket, or host:port."""
        return self.socket or f"{self.host}:{self.port}"

    def listening(self) -> str:
        return f"listening for {self.protocol} on {self.where}"

    def start(self) -> None:
        """Listen, in threads of its own; returns when it does. Raises what `bind` raises."""
        self.bind()
        self.traffic = Traffic(self.limits, self.trusted, self.processes)
        _allow_files(2 * self.traffic.limits.connections)  # each may bring a message that goes to a file
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
                self._undeliverable_queue(),
                sleep=_UNDELIVERABLE_LOOK_EVERY,
                workers=self.workers,
                router=self.router,
                timeout=self.timeout,
                bound=True,
                reports=self.reports,
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
        TALLY.news()
        self.stop()

    # -- the event loop's thread -------------------------------------------------------------------------------

    def _serve(self) -> None:
        pool = Threads(self.workers, "lamsonq-smtp")
        self._lookups = ThreadPoolExecutor(2, thread_name_prefix="lamsonq-rcpt")
        self._checks = ThreadPoolExecutor(10, thread_name_prefix="lamsonq-check")
        self._passwords = ThreadPoolExecutor(2, thread_name_prefix="lamsonq-login")
        try:
            asyncio.run(self._listen(pool))
        except BaseException as error:  # start() raises it, where it waits
            self._failure = error
        finally:
            self._listens.set()
            pool.drop()
            for own in (self._lookups, self._checks, self._passwords):
                own.shutdown(wait=False, cancel_futures=True)

    async def _listen(self, pool: Threads) -> None:
        self._loop = loop = asyncio.get_running_loop()
        self._committer = Committer(
            loop,
            pool,
            self.router,
            self.deliver,
            self.timeout,
            self._ask_to_be_replaced,
            self._inspected,
            None if self.verifier is None else self._checks,
            self._report,
        )
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
        while (self._sessions or self._committer.open or self._reporting) and time.monotonic() < self._deadline:
            for session in [session for session in self._sessions if session.idle_for > LEAVE_AFTER]:
                session.dismiss(_GOODBYE)
            await asyncio.sleep(0.02)
        if cut := [f"{run.call.name or 'deliver'} for {run.call.recipient}" for run in list(self._committer.running)]:
            LOG.warning(
                "%d function(s) have not finished in time and are cut; their clients send the message again: %s",
                len(cut),
                ", ".join(sorted(cut)),
            )
        if unsent := len(self._reporting):
            LOG.warning("%d report(s) of deliveries have not been sent in time", unsent)
        self._committer.give_up()
        for session in list(self._sessions):
            session.dismiss(_GOODBYE)
        await asyncio.sleep(0.02)  # what was written last goes out
        self._committer.close()

    # -- what the sessions need --------------------------------------------------------------------------------

    def opened(self, session: Session) -> None:
        self._sessions.add(session)

    def closed(self, session: Session) -> None:
        self._sessions.discard(session)

    def is_proxy(self, address: str) -> bool:
        return bool(self.proxies) and within(address, self.proxies)

    @property
    def certificate(self) -> Callable[[], SSLContext] | None:
        return None if self.tls is None else self.tls.context

    @property
    def tls_required(self) -> bool:
        return self.tls is not None and self.tls.required

    @property
    def tls_implicit(self) -> bool:
        return self.tls is not None and self.tls.implicit

    @property
    def has_logins(self) -> bool:
        return self.logins is not None

    @property
    def offers_dsn(self) -> bool:
        """RFC 3461: who offers this answers for the reports. Without it, the mail system before us does.

        `deliver=` gets the sender's wishes with the message, and with them the duty: an outbound queue fulfils it.
        """
        return self.reports is not None or self.deliver is not None

    def make_room(self) -> None:
        """Send away who has been silent for the longest time: many who only wait do not keep out one who sends."""
        now = time.monotonic()
        if now < self._look_for_room:
            return
        placed = (session for session in self._sessions if session.has_place)
        idlest = max(placed, key=lambda session: session.idle_for, default=None)
        if idlest is not None and idlest.idle_for > GIVE_WAY_AFTER:
            idlest.give_way(_GIVE_WAY)
        else:
            self._look_for_room = now + 0.1  # looking costs, and a flood of connections must not

    def takes(self, address: str) -> bool | asyncio.Future[bool]:
        """Whether a route's expression matches; where no handlers are loaded everything is taken.

        Where that may take its time, it is asked in a thread, so that others have their turn between two expressions;
        during one of them nobody has, because `re` does not let go of the interpreter.
        """
        if not self.router.table.routes:
            return True
        taken = self.router.takes_at_once(address)
        return self._loop.run_in_executor(self._lookups, self.router.takes, address) if taken is None else taken

    async def asks(self, check: Check, dialogue: Dialogue) -> str | None:
        try:
            async with asyncio.timeout(CHECK_TIMEOUT):
                answer: object
                if inspect.iscoroutinefunction(check):
                    answer = check(dialogue)
                else:
                    answer = await self._loop.run_in_executor(self._checks, check, dialogue)
                if inspect.isawaitable(answer):  # also of an object whose __call__ is async
                    await answer
        except SMTPError as refusal:
            return f"{refusal.code} {refusal.message}" if 400 <= refusal.code < 600 else trouble(refusal)
        except Exception as error:  # a check that fails is no reason to lose mail: the client comes again
            return trouble(error)
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is not None and task.cancelling():  # the session ends
                raise
            return trouble(error)  # something of the check's own was cancelled
        return None

    async def logs_in(self, name: str, password: str) -> bool | None:
        assert self.logins is not None
        try:
            return bool(await self._loop.run_in_executor(self._passwords, self.logins, name, password))
        except Exception:
            LOG.exception("Nobody can log in")
            return None

    def full(self, size: int) -> bool:
        return self.space.lacks(size)

    def trouble(self, error: BaseException) -> str:
        return trouble(error)

    def _report(self, message: mail.MailRequest, handled: Sequence[str]) -> None:
        """Tell a sender who asked for it that these recipients have the message (RFC 3461 section 4.1)."""
        if self.reports is None:
            return
        report = report_of(message.envelope, message.Data, handled, self.hostname)
        if report is not None:
            sending = self._checks.submit(self.reports, report)
            self._reporting.add(sending)
            sending.add_done_callback(self._reported)

    def _reported(self, sending: Future[object]) -> None:
        self._reporting.discard(sending)
        if not sending.cancelled() and sending.exception() is not None:
            LOG.error("The report of a delivery could not be sent", exc_info=sending.exception())

    def _inspected(self, envelope: mail.Envelope, content: bytes, id: str) -> tuple[mail.Envelope, bytes]:
        """The envelope with our trace fields and verdicts (RFC 5321 section 4.4, RFC 8601)."""
        trace = received_field(envelope, self.hostname, id, envelope.protocol or self.protocol)
        if self.verifier is None:
            return structs.replace(envelope, trace=trace.decode()), content
        auth, content = _checked(envelope, content, self.verifier, self.authserv_id)
        trace = authentication_results(auth, self.authserv_id) + trace
        return structs.replace(envelope, auth=auth, trace=trace.decode()), content

    def commit(
        self, envelope: mail.Envelope, content: Content, groups: Sequence[tuple[str, ...]], tell: Callable[[str], None]
    ) -> None:
        """Take a message; it is gone on with when nobody waits for the replies any more."""
        octets = len(content)
        self.traffic.memory += octets  # it is in memory, or soon will be, also when its client has gone
        owed = iter(groups)
        left = len(groups)

        def told(reply: str) -> None:
            nonlocal left
            left -= 1
            if not left:
                self.traffic.memory -= octets
            if not reply.startswith("2"):
                _log_refusal(envelope, next(owed), reply)
            else:
                next(owed)
            tell(reply)

        self._committer.commit(envelope, content, groups, told)


def _checked(envelope: mail.Envelope, content: bytes, verifier: Verifier, authserv_id: str) -> tuple[Auth, bytes]:
    """Who wrote this; and the message without what somebody else says of that in our name."""
    if envelope.login:  # RFC 8601 section 2.7.4: it comes from a user of ours, wherever that one is
        verdict = Verdict("auth", "pass", properties={"smtp.auth": envelope.login})
        return Auth((verdict,)), without_forged(content, authserv_id)
    return verifier.verify(envelope, content), without_forged(content, authserv_id)


def _log_refusal(envelope: mail.Envelope, group: tuple[str, ...], reply: str) -> None:
    """One line when these recipients' message was not taken: for who reads the log, it is not there otherwise."""
    told = (envelope.peer, envelope.mail_from, list(group), reply)
    LOG.info("Refused message from Peer: %r, From: %r, to To %r: %r", *told)


def _networks(name: str, texts: Sequence[str]) -> tuple[Network, ...]:
    try:
        return tuple(ipaddress.ip_network(text) for text in texts)
    except ValueError as error:
        raise ValueError(f"{name}: {error}; a network is written as 10.0.0.0/8, an address as 192.0.2.1") from error


def _allow_files(count: int) -> None:
    """Raise the soft limit of open files to so many and some, as far as the hard one allows it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + _SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        wanted = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
