"""Spam: scanners that are small servers on the loopback, and the real ones where they are installed."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lamsonq.errors import Later, SettingsError, Undelivered
from lamsonq.mail import Envelope, MailRequest
from lamsonq.queue import Queue
from lamsonq.routing import RoutingBase
from lamsonq.spam import Filter, SpamConfig, Verdict

from .waiting import PATIENCE

Free = Callable[[], int]
Module = Callable[..., str]

LETTER = b"From: a@example.org\r\nTo: desk@example.com\r\nSubject: hi\r\n\r\nhello \xff\x00\r\n"
JUNK = LETTER.replace(b"hello", b"XJS*C4JDBQADN1.NSBN3*2IDNEN*GTUBE-STANDARD-ANTI-UBE-TEST-EMAIL*C.34X")


def letter(data: bytes = LETTER, sender: str = "a@example.org", peer: object = ("192.0.2.7", 4242)) -> MailRequest:
    return MailRequest(peer, sender, "desk@example.com", data)


class Rspamd(http.server.ThreadingHTTPServer):
    """As much of rspamd as is asked: GTUBE is spam. `asked` is (path, headers, body) of each request."""

    daemon_threads = True

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any, bytes]] = []
        self.answer: Callable[[bytes], tuple[int, object]] = self.judge
        self.running = self.most = 0
        self.lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), _Rspamd)

    def judge(self, body: bytes) -> tuple[int, object]:
        spam = b"GTUBE" in body
        return 200, {
            "score": 15.0 if spam else 1,
            "required_score": 12.0,
            "action": "reject" if spam else "no action",
            "symbols": {"GTUBE": {"score": 15.0}, "A_B": {}} if spam else {},
        }

    @property
    def url(self) -> str:
        return f"rspamd://127.0.0.1:{self.server_address[1]}"


class _Rspamd(http.server.BaseHTTPRequestHandler):
    server: Rspamd

    def do_POST(self) -> None:
        with self.server.lock:
            self.server.running += 1
            self.server.most = max(self.server.most, self.server.running)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append((self.path, self.headers, body))
        status, answer = self.server.answer(body)
        octets = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        with self.server.lock:
            self.server.running -= 1
        self.send_response(status)
        self.send_header("Content-Length", str(len(octets)))
        self.end_headers()
        self.wfile.write(octets)

    def log_message(self, *_: object) -> None:
        pass


class _Spamd(socketserver.StreamRequestHandler):
    """spamd, as far as SYMBOLS and TELL go."""

    def handle(self) -> None:
        command = self.rfile.readline().decode().split()[0]
        headers = {}
        while line := self.rfile.readline().decode().strip():
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        body = self.rfile.read(int(headers["content-length"]))
        assert self.rfile.read() == b""  # spamd waits for the end of the connection
        self.server.asked.append((command, headers, body))  # type: ignore[attr-defined]
        answer: bytes = self.server.answer(command, body)  # type: ignore[attr-defined]
        self.wfile.write(answer)


def spamd_answer(command: str, body: bytes) -> bytes:
    if command == "TELL":
        return b"SPAMD/1.1 0 EX_OK\r\nDidSet: local\r\n\r\n"
    spam, names = (b"True ; 1003.3 / 5.0", b"GTUBE,NO_RELAYS") if b"GTUBE" in body else (b"False ; -0.0 / 5.0", b"")
    return b"SPAMD/1.1 0 EX_OK\r\nContent-length: %d\r\nSpam: %s\r\n\r\n%s" % (len(names), spam, names)


@contextmanager
def serving(server: Any) -> Iterator[Any]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def rspamd() -> Iterator[Rspamd]:
    with serving(Rspamd()) as server:
        yield server


@pytest.fixture(params=["tcp", "unix"])
def spamd(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    if request.param == "tcp":
        server: Any = socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Spamd)
        server.url = f"spamassassin://127.0.0.1:{server.server_address[1]}"
    else:
        server = socketserver.ThreadingUnixStreamServer(str(tmp_path / "spamd.sock"), _Spamd)
        server.url = f"spamassassin://{tmp_path}/spamd.sock"
    server.daemon_threads = True
    server.asked = []
    server.answer = spamd_answer
    with serving(server):
        yield server


# Asking.


def test_rspamd_gets_the_bytes_with_the_envelope_and_says_what_it_thinks(rspamd: Rspamd) -> None:
    verdict = Filter(rspamd.url, {"password": "sesame"}).check(letter(JUNK, "jö@example.org"))
    assert verdict == Verdict(True, 15.0, ("A_B", "GTUBE"), 12.0, "reject", True, "score 15 of 12: A_B, GTUBE")
    [(path, headers, body)] = rspamd.asked
    assert (path, body) == ("/checkv2", JUNK)
    assert (headers["IP"], headers["Rcpt"], headers["Password"]) == ("192.0.2.7", "desk@example.com", "sesame")
    assert headers["From"].encode("latin-1").decode() == "jö@example.org"
    assert not Filter(rspamd.url).check(letter()).spam


@pytest.mark.parametrize(
    ("action", "spam"),
    [
        *(("no action", False), ("greylist", False), ("soft reject", False)),
        *(("add header", True), ("rewrite subject", True), ("quarantine", True), ("discard", True), ("reject", True)),
    ],
)
def test_the_actions_of_rspamd_that_mean_spam(rspamd: Rspamd, action: str, spam: bool) -> None:
    rspamd.answer = lambda _: (200, {"action": action, "score": 5})
    verdict = Filter(rspamd.url).check(letter())
    assert (verdict.spam, verdict.action, verdict.scanned) == (spam, action, True)


def test_a_queue_knows_the_peer_as_text(rspamd: Rspamd) -> None:
    for peer in ("192.0.2.7:4242", "[2001:db8::1]:25", "run/posts", None):
        envelope = Envelope("a@example.org", ("desk@example.com",), peer)
        Filter(rspamd.url).check(
            MailRequest("run/posts", "a@example.org", "desk@example.com", LETTER, envelope=envelope)
        )
    assert [headers["IP"] for _, headers, _ in rspamd.asked] == ["192.0.2.7", "2001:db8::1", None, None]


def test_spamd_is_asked_over_tcp_and_over_a_unix_socket(spamd: Any) -> None:
    scanner = Filter(spamd.url, {"user": "desk"})
    verdict = scanner.check(letter(JUNK))
    assert (verdict.spam, verdict.score, verdict.required) == (True, 1003.3, 5.0)
    assert verdict.symbols == ("GTUBE", "NO_RELAYS")
    assert scanner.check(letter()) == Verdict(False, 0.0, (), 5.0, reason="score 0 of 5")
    command, headers, body = spamd.asked[0]
    assert (command, headers["user"], body) == ("SYMBOLS", "desk", JUNK)


def test_a_threshold_of_ones_own_decides(rspamd: Rspamd) -> None:
    rspamd.answer = lambda _: (200, {"action": "no action", "score": 5, "required_score": 15})
    assert not Filter(rspamd.url).check(letter()).spam
    assert Filter(rspamd.url, {"threshold": 5}).check(letter()).spam
    assert Filter(rspamd.url, SpamConfig(threshold=5.1)).filter(letter()) is False


def test_a_message_over_the_limit_is_not_scanned(rspamd: Rspamd) -> None:
    verdict = Filter(rspamd.url, {"size_limit": len(JUNK) - 1}).check(letter(JUNK))
    assert (verdict.spam, verdict.scanned, rspamd.asked) == (False, False, [])
    assert Filter(rspamd.url, {"size_limit": len(JUNK)}).check(letter(JUNK)).spam


def test_both_are_trained(rspamd: Rspamd, spamd: Any) -> None:
    rspamd.answer = lambda _: (200, {"success": True})
    scanner = Filter("rspamd://127.0.0.1:1", {"controller": rspamd.url, "password": "sesame"})
    assert (scanner.train_spam(letter(JUNK)), scanner.train_ham(letter())) == (True, True)
    assert [(path, headers["Password"], body) for path, headers, body in rspamd.asked] == [
        ("/learnspam", "sesame", JUNK),
        ("/learnham", "sesame", LETTER),
    ]
    rspamd.answer = lambda _: (208, {"error": "has been already learned as spam"})
    assert scanner.train_spam(letter(JUNK)) is False
    assert Filter(spamd.url).train_ham(letter()) is True
    assert (spamd.asked[0][0], spamd.asked[0][1]["message-class"], spamd.asked[0][1]["set"]) == ("TELL", "ham", "local")


def test_what_is_not_learned_is_a_later(rspamd: Rspamd, spamd: Any) -> None:
    rspamd.answer = lambda _: (403, {"error": "Unauthorized"})
    with pytest.raises(Later, match="does not learn: it answers 403"):
        Filter("rspamd://127.0.0.1:1", {"controller": rspamd.url}).train_ham(letter())
    spamd.answer = lambda *_: b"SPAMD/1.0 69 Service Unavailable: TELL commands are not enabled\r\n\r\n"
    with pytest.raises(Later, match="TELL commands are not enabled"):
        Filter(spamd.url).train_ham(letter())


# Trouble.


def test_a_scanner_that_is_down_lets_mail_pass_or_wait(free_port: Free, caplog: pytest.LogCaptureFixture) -> None:
    url = f"rspamd://:sesame@127.0.0.1:{free_port()}"
    verdict = Filter(url).check(letter(JUNK))
    assert (verdict.spam, verdict.scanned) == (False, False)
    assert "gives no verdict: connection refused; the message from 'a@example.org'" in caplog.text
    assert "sesame" not in caplog.text
    with pytest.raises(Later, match="gives no verdict: connection refused"):
        Filter(url, {"on_error": "later"}).check(letter())


@pytest.mark.parametrize(
    "nonsense",
    [
        (200, b"no json"),
        (200, b"[1]"),
        (200, b"[" * 100_000),
        (200, b'"' + b"x" * 2_000_000 + b'"'),
        (500, {"error": "x"}),
        (200, {}),
        (200, {"error": "x"}),
        (200, {"action": "no action"}),
        (200, {"score": 1.0}),
        (200, {"action": 7, "score": 1.0}),
        (200, b"\xff\xfe\x00binary"),
    ],
    ids=["no json", "a list", "deep", "large", "500", "empty", "error", "no score", "no action", "7", "binary"],
)
def test_nonsense_of_rspamd_is_no_verdict(rspamd: Rspamd, nonsense: tuple[int, object]) -> None:
    rspamd.answer = lambda _: nonsense
    assert Filter(rspamd.url).check(letter(JUNK)).scanned is False


NO_NUMBERS = ["9" * 400, "-" + "9" * 400, "9" * 5000, "1e999", "NaN", "Infinity", "-Infinity", "true", '"5"', "null"]


@pytest.mark.parametrize("score", NO_NUMBERS, ids=lambda score: score[:8] + str(len(score)))
def test_a_score_of_rspamd_that_is_no_number_is_no_verdict_and_no_crash(rspamd: Rspamd, score: str) -> None:
    rspamd.answer = lambda _: (200, b'{"action": "no action", "score": %s}' % score.encode())
    verdict = Filter(rspamd.url, {"threshold": 5}).check(letter())
    assert (verdict.spam, verdict.scanned) == (False, False)
    assert "gives no verdict" in verdict.reason
    with pytest.raises(Later, match="gives no verdict"):
        Filter(rspamd.url, {"threshold": 5, "on_error": "later"}).check(letter())


@pytest.mark.parametrize("score", NO_NUMBERS, ids=lambda score: score[:8] + str(len(score)))
def test_a_score_of_spamd_that_is_no_number_is_no_verdict_and_no_crash(spamd: Any, score: str) -> None:
    for spam in (f"False ; {score} / 5", f"False ; 5 / {score}"):
        answer = f"SPAMD/1.1 0 EX_OK\r\nSpam: {spam}\r\n\r\n".encode()
        spamd.answer = lambda *_, answer=answer: answer
        with pytest.raises(Later, match="gives no verdict"):
            Filter(spamd.url, {"on_error": "later"}).check(letter())


def test_an_answer_of_spamd_that_is_cut_off_anywhere_is_no_verdict(spamd: Any) -> None:
    whole = b"SPAMD/1.1 0 EX_OK\r\nContent-length: 5\r\nSpam: False ; 1.0 / 5.0\r\n\r\nA,B,C"
    scanner = Filter(spamd.url)
    for length in range(len(whole) + 1):
        spamd.answer = lambda *_, length=length: whole[:length]
        assert scanner.check(letter()).scanned is (length == len(whole)), whole[:length]


def test_what_a_scanner_says_writes_no_lines_of_its_own_into_the_log(
    rspamd: Rspamd, spamd: Any, caplog: pytest.LogCaptureFixture
) -> None:
    rspamd.answer = lambda _: (200, {"action": "no action", "score": 7, "symbols": {"A\r\nforged: \x1b[2Jx": 1}})
    verdict = Filter(rspamd.url).check(letter())
    assert (verdict.symbols, verdict.reason) == (("A forged: ?[2Jx",), "score 7 of 0: A forged: ?[2Jx")
    spamd.answer = lambda *_: b"SPAMD/1.1 0 EX_OK\r\nSpam: False ; 7 / 9\r\n\r\nA\nforged,\x1b[2J\r\n"
    assert Filter(spamd.url).check(letter()).symbols == ("A forged", "?[2J")
    spamd.answer = lambda *_: b"\x1b[2J\nforged"
    rspamd.answer = lambda _: (500, b"\x1b[2J\nforged")
    for url in (spamd.url, rspamd.url):
        Filter(url).check(letter())
    assert caplog.text.count("gives no verdict") == 2
    assert all(record.message.isprintable() for record in caplog.records)


def test_each_address_of_a_scanner_is_tried_within_one_deadline(
    rspamd: Rspamd, free_port: Free, monkeypatch: pytest.MonkeyPatch
) -> None:
    ports = [free_port(), rspamd.server_address[1]]
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda *_, **__: [(socket.AF_INET, 0, 0, "", ("127.0.0.1", port)) for port in ports]
    )
    scanner = Filter("rspamd://scanner.example", {"timeout": 5})
    assert scanner.check(letter(JUNK)).spam
    ports.pop()
    assert "connection refused" in scanner.check(letter(JUNK)).reason
    ports.clear()
    assert "scanner.example has no address" in scanner.check(letter(JUNK)).reason


@pytest.mark.parametrize(
    "nonsense",
    [
        b"",
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"SPAMD/1.1 0 EX_OK\r\n\r\n",
        b"SPAMD/1.1 0 EX_OK\r\nSpam: True ; 1.2.3 / 4\r\n\r\n",
    ],
)
def test_nonsense_of_spamd_is_no_verdict(spamd: Any, nonsense: bytes) -> None:
    spamd.answer = lambda *_: nonsense
    assert Filter(spamd.url).check(letter(JUNK)).scanned is False


def test_an_answer_that_never_ends_is_cut_off(spamd: Any) -> None:
    spamd.answer = lambda *_: b"SPAMD/1.1 0 EX_OK\r\nSpam: True ; 9 / 5\r\n\r\n" + b"x" * 2_000_000
    assert "longer than 1048576 octets" in Filter(spamd.url).check(letter()).reason


@pytest.mark.parametrize("scheme", ["rspamd", "spamassassin"])
def test_a_scanner_that_drips_is_given_up_after_the_timeout_in_all(scheme: str) -> None:
    ended = threading.Event()

    class Drips(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            while not ended.wait(0.05):
                try:
                    self.request.sendall(b"H" if scheme == "rspamd" else b"S")
                except OSError:
                    return

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Drips) as server, serving(server):
        began = time.monotonic()
        verdict = Filter(f"{scheme}://127.0.0.1:{server.server_address[1]}", {"timeout": 0.3}).check(letter())
        ended.set()
    assert verdict.reason.endswith("gives no verdict: timed out")
    assert 0.25 < time.monotonic() - began < PATIENCE / 2


def test_only_so_many_scans_run_at_a_time(rspamd: Rspamd) -> None:
    both = threading.Barrier(2)

    def slow(body: bytes) -> tuple[int, object]:
        both.wait(PATIENCE)  # two run together,
        return rspamd.judge(body)

    rspamd.answer = slow
    scanner = Filter(rspamd.url, {"connections": 2})
    threads = [threading.Thread(target=scanner.check, args=(letter(),)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (rspamd.most, len(rspamd.asked)) == (2, 6)  # and never three


def test_who_finds_no_free_connection_gives_up_after_the_timeout(rspamd: Rspamd) -> None:
    scanner = Filter(rspamd.url, {"connections": 1, "timeout": 0.05})
    with scanner._slot():
        assert scanner.check(letter()).reason.endswith("1 scans are running")
    assert scanner.check(letter()).scanned


@pytest.mark.parametrize(
    ("url", "config", "message"),
    [
        (
            "http://127.0.0.1",
            None,
            r"'http://127.0.0.1' is none that we know; it is rspamd://host:port or spamassassin",
        ),
        ("run/spamdb", None, "is none that we know"),
        ("rspamd://", None, "is none that we know"),
        ("rspamd://x:99999", None, "is no URL: Port out of range"),
        ("rspamd://x", {"treshold": 5}, "unknown field `treshold`; it has threshold, timeout"),
        ("rspamd://x", {"timeout": 0}, "timeout"),
        ("rspamd://x", {"timeout": float("inf")}, "timeout"),
        ("rspamd://x", SpamConfig(timeout=float("nan")), "timeout"),
        ("rspamd://x", SpamConfig(threshold=float("nan")), "threshold"),
        ("rspamd://x", {"on_error": "maybe"}, "on_error"),
        ("rspamd://x", {"controller": "http://x"}, "it is rspamd://host:port"),
        ("rspamd://x", 5, "config"),
    ],
)
def test_a_setting_that_cannot_be_meant_is_refused_at_once(url: str, config: Any, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        Filter(url, config)


@pytest.mark.parametrize("password", ["sesame", "se@same", "ses:ame"])
def test_no_error_shows_a_password(password: str, free_port: Free) -> None:
    url = f"rspamd://:{password}@127.0.0.1:{free_port()}"
    assert Filter(url).check(letter()).reason.startswith("rspamd://127.0.0.1:")
    for bad in (f"http://:{password}@x", f"rspamd://:{password}@x:99999"):
        with pytest.raises(SettingsError) as found:
            Filter(bad)
        assert "ame" not in str(found.value)


# The decorator.

HANDLERS = """
    from lamsonq.spam import spam_filter

    @route("desk@example.com")
    def SPAMMING(message):
        CALLS.append("spamming")
        return START

    @route("desk@example.com")
    @spam_filter({url!r}, {config!r}, "run/spam", next_state=SPAMMING)
    {kind} START(message):
        CALLS.append(message["subject"])
"""


def load(router: RoutingBase, module: Module, url: str, kind: str = "def", config: Any = None) -> str:
    name = module(HANDLERS.format(url=url, config=config, kind=kind))
    router.load([name])
    return name


def state(router: RoutingBase, name: str) -> str:
    return router.get_state(name, letter())


@pytest.mark.parametrize("kind", ["def", "async def"])
def test_spam_goes_into_the_spam_queue_with_the_reason(
    rspamd: Rspamd, router: RoutingBase, module: Module, kind: str
) -> None:
    name = load(router, module, rspamd.url, kind)
    router.deliver(letter())
    assert (sys.modules[name].CALLS, state(router, name)) == (["hi"], "START")
    router.deliver(letter(JUNK))
    spam = Queue("run/spam")
    [key] = spam.keys()
    job = spam.backend.get(key)
    assert job is not None
    assert (job.body, dict(job.metadata)) == (JUNK, {"spam": "score 15 of 12: A_B, GTUBE"})
    assert (job.sender, job.recipients) == ("a@example.org", ("desk@example.com",))
    assert (sys.modules[name].CALLS, state(router, name)) == (["hi"], "SPAMMING")
    router.deliver(letter(JUNK))
    assert (sys.modules[name].CALLS, state(router, name), spam.count()) == (["hi", "spamming"], "START", 1)


def test_a_stateless_function_is_protected_too(rspamd: Rspamd, router: RoutingBase, module: Module) -> None:
    name = module(
        f"""
        from lamsonq.spam import spam_filter

        @route("desk@example.com")
        @stateless
        @spam_filter({rspamd.url!r}, None, "run/spam")
        def START(message):
            CALLS.append(message["subject"])
        """
    )
    router.load([name])
    router.deliver(letter(JUNK))
    router.deliver(letter())
    assert (sys.modules[name].CALLS, Queue("run/spam").count()) == (["hi"], 1)


def test_a_scan_that_is_to_be_repeated_fails_the_call_with_later(
    free_port: Free, router: RoutingBase, module: Module
) -> None:
    name = load(router, module, f"rspamd://127.0.0.1:{free_port()}", config={"on_error": "later"})
    with pytest.raises(Undelivered) as found:
        router.deliver(letter())
    assert isinstance(found.value.failures[0].outcome(), Later)
    assert (sys.modules[name].CALLS, Queue("run/spam").count()) == ([], 0)


def test_an_async_function_is_scanned_beside_the_loop(rspamd: Rspamd, router: RoutingBase, module: Module) -> None:
    """While one scan waits, another function runs on the same loop and lets it go on."""
    go_on = threading.Event()

    def slow(body: bytes) -> tuple[int, object]:
        assert go_on.wait(PATIENCE)
        return rspamd.judge(body)

    rspamd.answer = slow
    name = module(
        f"""
        from lamsonq.spam import spam_filter

        @route("desk@example.com")
        @spam_filter({rspamd.url!r}, None, "run/spam")
        async def START(message):
            CALLS.append("scanned")

        @route("free@example.com")
        @stateless
        async def FREE(message):
            CALLS.append("free")
        """
    )
    router.load([name])
    scanned = threading.Thread(target=router.deliver, args=(letter(),))
    scanned.start()
    router.deliver(MailRequest("peer", "b@example.org", "free@example.com", LETTER))
    go_on.set()
    scanned.join(PATIENCE)
    assert sys.modules[name].CALLS == ["free", "scanned"]


# The real ones.


def needs(program: str) -> str:
    found = shutil.which(program)
    if found is None and os.environ.get("CI"):
        pytest.fail(f"{program} is not installed")
    return found or pytest.skip(f"{program} is not installed")


@contextmanager
def running(command: list[str], ready: Callable[[], object]) -> Iterator[None]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        give_up_at = time.monotonic() + 90
        while not ready():
            assert process.poll() is None, f"{command[0]} ended with {process.returncode}"
            assert time.monotonic() < give_up_at, f"{command[0]} is not ready"
            time.sleep(0.2)  # another program's start cannot be injected
        yield
    finally:
        process.terminate()
        process.wait(30)


def answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


HAM = (
    b"From: a@example.org\r\nTo: desk@example.com\r\nSubject: Tuesday\r\nDate: Tue, 24 Nov 2026 03:31:20 +0000\r\n"
    b"Message-ID: <tuesday@example.org>\r\n\r\nSee you at four, about the budget and the new printer.\r\n"
)


@pytest.mark.slow
def test_a_real_rspamd_knows_spam_from_other_mail(tmp_path: Path, free_port: Free) -> None:
    program = needs("rspamd")
    port, controller = free_port(), free_port()
    (tmp_path / "rspamd.conf").write_text(f"""
        options {{
            filters = ""; disable_hyperscan = true; pidfile = "{tmp_path}/rspamd.pid";
            url_tld = "/usr/share/rspamd/effective_tld_names.dat"; dns {{ nameserver = ["127.0.0.1:1"]; }}
        }}
        logging {{ type = "console"; }}
        lua = "/usr/share/rspamd/rules/rspamd.lua";
        actions {{ reject = 15; add_header = 6; greylist = 4; }}
        worker "normal" {{ bind_socket = "127.0.0.1:{port}"; count = 1; }}
        worker "controller" {{ bind_socket = "127.0.0.1:{controller}"; count = 1; password = "sesame"; }}
    """)
    folders = [option for name in ("DBDIR", "RUNDIR", "LOGDIR") for option in ("--var", f"{name}={tmp_path}")]
    as_root = ["-i"] if os.geteuid() == 0 else []
    command = [program, "-f", *as_root, "-c", f"{tmp_path}/rspamd.conf", *folders]
    scanner = Filter(
        f"rspamd://127.0.0.1:{port}", {"password": "sesame", "controller": f"rspamd://127.0.0.1:{controller}"}
    )
    with running(command, lambda: scanner.check(letter(HAM)).scanned and answers(controller)):
        spam, ham = scanner.check(letter(JUNK)), scanner.check(letter(HAM))
        assert (spam.spam, spam.action, spam.symbols) == (True, "reject", ("GTUBE",))
        assert (ham.spam, ham.action) == (False, "no action")
        wrong = Filter("rspamd://127.0.0.1:1", {"password": "x", "controller": f"rspamd://127.0.0.1:{controller}"})
        with pytest.raises(Later, match="does not learn"):
            wrong.train_ham(letter(HAM))


@pytest.mark.slow
def test_a_real_spamd_knows_spam_from_other_mail_and_learns(tmp_path: Path, free_port: Free) -> None:
    program = needs("spamd")
    port = free_port()
    tmp_path.chmod(0o777)
    for parent in tmp_path.parents[:2]:
        parent.chmod(0o755)
    user = ["-u", "nobody"] if os.geteuid() == 0 else []
    command = [program, "-L", "-x", "--allow-tell", "-i", "127.0.0.1", "-p", str(port), "-m", "1", *user]
    own = [
        "-r",
        str(tmp_path / "pid"),
        "-H",
        str(tmp_path),
        f"--cf=bayes_path {tmp_path}/bayes",
        "--cf=bayes_auto_learn 0",
    ]
    with running([*command, *own], lambda: answers(port)):
        scanner = Filter(f"spamassassin://127.0.0.1:{port}")
        spam, ham = scanner.check(letter(JUNK)), scanner.check(letter(HAM))
        assert (spam.spam, "GTUBE" in spam.symbols, spam.required) == (True, True, 5.0)
        assert (ham.spam, ham.scanned) == (False, True)
        assert [scanner.train_ham(letter(HAM)), scanner.train_ham(letter(HAM))] == [True, False]
