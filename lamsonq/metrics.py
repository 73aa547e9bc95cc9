"""Figures for Prometheus over HTTP, and whether the servers of a directory live and listen.

    /metrics    what waits, what was handled, what is up       (Prometheus text format)
    /live       200 while every server that has a pid file runs, else 503 and which does not
    /ready      200 when there are servers, all of them listen and the disk has room, else 503 and why not

Rules:

1. A process of its own, which reads what the servers and queues leave on disk. It changes nothing, and no server waits
   for it or notices that it is gone.
2. Bounded: so many requests at once, a time limit for each client, and a look at the disk serves all requests that come
   within a second, or within ten times what the look took.
3. Nothing that lies there ends it: what cannot be read is a metric too (`lamsonq_trouble`).
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any

from lamsonq import survey
from lamsonq.errors import Refusal, UsageError, reason_of

try:
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
except ImportError as error:
    raise UsageError("lamsonq metrics needs prometheus_client: pip install 'lamsonq[metrics]'") from error

AT_ONCE = 8
"""Requests that are answered at the same time; more are hung up on."""

CLIENT_TIMEOUT = 5.0
"""Seconds that a client has to say what it wants, and to take the answer."""

QUEUES_MAX = 1000
"""Queues that are told of: each is some lines, and a series in the database of who asks."""

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(slots=True)
class View:
    """What one look has found."""

    servers: list[dict[str, Any]] = field(default_factory=list)
    queues: dict[str, dict[str, Any]] = field(default_factory=dict)
    trouble: list[str] = field(default_factory=list)
    space: survey.Space = field(default_factory=lambda: survey.Space(None, None))

    def dead(self) -> list[str]:
        """Why not everything lives that should."""
        return [_reason(told) for told in self.servers if not told["running"]]

    def not_ready(self) -> list[str]:
        """Why not everything listens."""
        if not self.servers and not self.trouble:
            return ["no server has been started here"]
        silent = [told["pid_file"] for told in self.servers if told["running"] and not told["workers"]]
        full = [f"mail is put off: {self.space.free} bytes are free, the mark is {self.space.min_free} (min_free)"]
        waits = [f"{path}: it does not listen yet" for path in silent]
        return [*self.trouble, *self.dead(), *waits, *(full if self.space.lacks else [])]


def _reason(told: dict[str, Any]) -> str:
    return told.get("trouble") or f"{told['pid_file']}: its server has ended"


class Views:
    """Looks at a directory, at most as often as rule 2 says."""

    def __init__(self, run: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._run = run
        self._clock = clock
        self._lock = threading.Lock()
        self._view = View()
        self._until: float | None = None

    def now(self) -> View:
        with self._lock:
            begun = self._clock()
            if self._until is None or begun >= self._until:
                self._view = self._look()
                ended = self._clock()
                self._until = ended + max(1.0, 10 * (ended - begun))
            return self._view

    def _look(self) -> View:
        view = View()
        try:
            view.space = survey.space(self._run)
            view.servers = survey.servers(self._run)
            view.queues = dict(list(survey.queues(self._run).items())[:QUEUES_MAX])
        except Exception as error:  # whatever lies there, the next look may find it gone
            view.trouble.append(reason_of(error) if not isinstance(error, Refusal) else str(error))
        return view


class Collector:
    """The figures as Prometheus knows them."""

    def __init__(self, views: Views) -> None:
        self._views = views

    def collect(self) -> Iterator[Metric]:
        view = self._views.now()
        yield from _of_servers(view)
        yield from _of_queues(view)
        yield from _of_space(view.space)
        broken = [told for told in (*view.servers, *view.queues.values()) if "trouble" in told]
        trouble = GaugeMetricFamily("lamsonq_trouble", "Servers, queues and directories that cannot be read.")
        trouble.add_metric([], len(broken) + len(view.trouble))
        yield trouble


_SERVER_FIGURES = (
    (GaugeMetricFamily, "lamsonq_up", "Whether the server runs.", "running"),
    (GaugeMetricFamily, "lamsonq_workers", "Worker processes that are ready.", "workers"),
    (GaugeMetricFamily, "lamsonq_started_timestamp_seconds", "When the server was started.", "started"),
    (CounterMetricFamily, "lamsonq_handled_total", "Attempts that succeeded since the server was started.", "handled"),
    (CounterMetricFamily, "lamsonq_failed_total", "Attempts that failed since the server was started.", "failed"),
    (GaugeMetricFamily, "lamsonq_last_settled_timestamp_seconds", "When an attempt was settled last.", "last_settled"),
    (GaugeMetricFamily, "lamsonq_last_claim_timestamp_seconds", "When a job was claimed last.", "last_claim"),
)


def _of_servers(view: View) -> Iterator[Metric]:
    for kind, name, text, figure in _SERVER_FIGURES:
        family = kind(name, text, labels=["pid_file", "boot"])
        for told in view.servers:
            value = told.get(figure)
            if value is not None:
                family.add_metric([_label(told["pid_file"]), _label(told["boot"] or "")], float(value))
        yield family


def _of_queues(view: View) -> Iterator[Metric]:
    depth = GaugeMetricFamily("lamsonq_queue_jobs", "Jobs in a queue, by state.", labels=["queue", "state"])
    age = GaugeMetricFamily("lamsonq_queue_oldest_seconds", "Age of the oldest ready job; 0: none.", labels=["queue"])
    paused = GaugeMetricFamily("lamsonq_queue_paused", "Whether the queue is paused.", labels=["queue"])
    for name, told in view.queues.items():
        if "trouble" in told:
            continue
        for state in survey.NOTHING:
            depth.add_metric([_label(name), state], told[state])
        age.add_metric([_label(name)], told["oldest"] or 0.0)
        if told["paused"] is not None:
            paused.add_metric([_label(name)], float(told["paused"]))
    yield depth
    yield age
    yield paused


def _of_space(space: survey.Space) -> Iterator[Metric]:
    figures = (
        ("lamsonq_free_bytes", "Free space where the queues are.", space.free),
        ("lamsonq_min_free_bytes", "Below so much free space mail is put off.", space.min_free),
        ("lamsonq_mail_put_off", "Whether mail is put off, because space is short.", space.lacks),
    )
    for name, text, value in figures:
        if value is not None:
            yield GaugeMetricFamily(name, text, value=float(value))


def _label(text: str) -> str:
    """A name that is no Unicode (a directory's may be anything) as one that is."""
    return text.encode("utf-8", "backslashreplace").decode()


class Server(ThreadingHTTPServer):
    """Answers for one directory."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 32

    def __init__(self, address: tuple[str, int], run: str) -> None:
        self.views = Views(run)
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(Collector(self.views))
        self._free = threading.BoundedSemaphore(AT_ONCE)
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(address, Handler)

    @property
    def url(self) -> str:
        host, port = self.server_address[:2]
        name = host.decode() if isinstance(host, bytes | bytearray) else str(host)
        return f"http://{f'[{name}]' if ':' in name else name}:{port}/"

    def server_bind(self) -> None:
        # HTTPServer would look the host's name up, which may take long, and nobody needs it.
        TCPServer.server_bind(self)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002 - socketserver's
        logging.debug("a client of the metrics has gone", exc_info=True)


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Server
    timeout = CLIENT_TIMEOUT
    server_version = "lamsonq"
    sys_version = ""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/metrics":
            self._answer(200, generate_latest(self.server.registry), CONTENT_TYPE)
        elif path == "/live":
            self._verdict(self.server.views.now().dead())
        elif path == "/ready":
            self._verdict(self.server.views.now().not_ready())
        else:
            self._answer(404, b"there are /metrics, /live and /ready\n")

    do_HEAD = do_GET

    def _verdict(self, reasons: list[str]) -> None:
        text = "".join(f"{reason}\n" for reason in reasons) or "ok\n"
        self._answer(503 if reasons else 200, text.encode("utf-8", "backslashreplace"))

    def _answer(self, code: int, body: bytes, kind: str = "text/plain; charset=utf-8") -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: who asks every few seconds is no news."""


def bound(host: str, port: int, run: str) -> Server:
    """A server that has its port. Raises Refusal."""
    if not os.path.isdir(run):
        raise Refusal(f"{run} is not a directory: give the one that holds the pid files and queues (-run)")
    try:
        return Server((host, port), run)
    except OSError as error:
        raise Refusal(f"cannot listen on {host}:{port}: {error.strerror or error}") from error


def serve(server: Server) -> None:
    """Answer until TERM or INT."""
    signals = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # before there is a thread that could get them
    threading.Thread(target=server.serve_forever, name="lamsonq-metrics", daemon=True).start()
    signal.sigwait(signals)
    server.shutdown()
    server.server_close()
