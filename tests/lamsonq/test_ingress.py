"""Mail over HTTP: what is posted is on disk when 200 is said, and nothing else is taken."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import pytest
import uvicorn

from lamsonq.errors import Later, SettingsError, SMTPError
from lamsonq.ingress import Ingress
from lamsonq.mail import MailRequest
from lamsonq.queue import Queue
from lamsonq.routing import RoutingBase

from .waiting import PATIENCE

TOKEN = "a token of thirty characters.."
MESSAGE = b"Received: from a by b; now\r\nFrom: joe@example.org\r\nSubject: hi\r\n\r\n.body\r\n\xff\x00\r\n"
PAGE = Path(__file__).parents[2] / "docs" / "mail-over-http.md"

Post = Callable[..., tuple[int, dict[str, str]]]


class _Server:
    """A real server in a thread. Its start and its end take a while, so that several applications may take turns on
    one, without being told of them."""

    def __init__(self, *, lifespan: Literal["on", "off"]) -> None:
        self.application: Any = None
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.listener.getsockname()[1]
        self.server = uvicorn.Server(
            uvicorn.Config(self.serve, interface="asgi3", log_level="error", lifespan=lifespan)
        )
        self.thread = threading.Thread(target=self.server.run, args=([self.listener],), daemon=True)

    def start(self) -> None:
        self.thread.start()

    async def serve(self, scope: Any, receive: Any, send: Any) -> None:
        await self.application(scope, receive, send)

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join(PATIENCE)


class _Posts:
    """A client of an application."""

    def __init__(self, server: _Server, application: Any) -> None:
        self.port = server.port
        server.application = application

    def __call__(
        self,
        query: str = "from=joe@example.org&to=desk@y.test",
        body: Any = MESSAGE,
        *,
        token: str | None = TOKEN,
        method: str = "POST",
        headers: dict[str, str] | None = None,
    ) -> tuple[int, dict[str, str]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        sent = {**({} if token is None else {"Authorization": f"Bearer {token}"}), **(headers or {})}
        connection.request(method, f"/?{query}", body, sent)
        response = connection.getresponse()
        told = json.loads(response.read())
        connection.close()
        return response.status, told


@pytest.fixture(scope="module")
def server() -> Iterator[_Server]:
    running = _Server(lifespan="off")
    running.start()
    yield running
    running.close()


@pytest.fixture
def serve(server: _Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., _Posts]:
    monkeypatch.chdir(tmp_path)

    def begin(deliver: Callable[[MailRequest], object], **options: Any) -> _Posts:
        options.setdefault("router", RoutingBase())
        return _Posts(server, Ingress(deliver, TOKEN, hostname="mx.test", **options))

    return begin


def test_a_message_is_on_disk_when_200_is_said(serve: Callable[..., _Posts]) -> None:
    queue = Queue("run/incoming")
    status, told = serve(queue.push)()
    assert status == 200
    assert queue.keys() == [told["id"]]
    _, message = queue.pop()
    assert message is not None
    assert message.Data == MESSAGE
    assert message.envelope.mail_from == "joe@example.org"
    assert message.envelope.rcpt_tos == ("desk@y.test",)
    assert message.envelope.trace.startswith("Received: from unknown ([127.0.0.1])\r\n by mx.test with HTTP id ")


def test_several_recipients_are_one_message_and_an_empty_sender_is_the_null_sender(
    serve: Callable[..., _Posts],
) -> None:
    taken: list[MailRequest] = []
    post = serve(taken.append)
    assert post(f"from=&to=A@y.test&to={quote('b+c@y.test')}&to=postmaster")[0] == 200
    assert taken[0].From == ""
    assert taken[0].envelope.rcpt_tos == ("A@y.test", "b+c@y.test", "postmaster")


@pytest.mark.parametrize("token", [None, "", "wrong", TOKEN[:-1], TOKEN + "x"])
def test_nobody_posts_without_the_token(serve: Callable[..., _Posts], token: str | None) -> None:
    taken: list[MailRequest] = []
    assert serve(taken.append)(token=token)[0] == 401
    assert taken == []


def test_a_token_that_can_be_guessed_is_refused_at_boot() -> None:
    with pytest.raises(SettingsError, match="can be guessed"):
        Ingress(print, "secret")


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ("", 400),
        ("from=a@x.test", 400),
        ("to=a@x.test", 400),
        ("from=a@x.test&from=b@x.test&to=c@y.test", 400),
        ("from=%ff&to=c@y.test", 400),
        ("from=a@x.test&to=", 422),
        ("from=a@x.test&to=c", 422),
        ("from=a@x.test&to=" + quote("c@y.test> SIZE=3"), 422),
        ("from=a@x.test&to=" + quote("c@y.test\r\nBcc: d@y.test"), 422),
        ("from=nobody&to=c@y.test", 422),
        ("from=a@x.test" + "&to=c@y.test" * 1001, 422),
        ("from=a@x.test" + "&to=c@y.test" * 3000, 422),
    ],
)
def test_an_envelope_that_is_none_is_refused(serve: Callable[..., _Posts], query: str, status: int) -> None:
    taken: list[MailRequest] = []
    found, told = serve(taken.append)(query)
    assert found == status, told
    assert taken == []


def test_what_is_no_post_or_holds_no_message_is_refused(serve: Callable[..., _Posts]) -> None:
    post = serve(lambda _: None)
    assert post(method="GET", body=None)[0] == 405
    assert post(body=b"")[0] == 400


@pytest.mark.parametrize("chunked", [False, True])
def test_a_message_that_is_too_large_is_refused(serve: Callable[..., _Posts], chunked: bool) -> None:
    taken: list[MailRequest] = []
    post = serve(taken.append, size_limit=1000)
    assert post(body=iter([b"x" * 600] * 2) if chunked else b"x" * 1001)[0] == 413
    assert post(body=b"x" * 1000)[0] == 200
    assert len(taken) == 1


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (SMTPError(550, "5.7.1 no"), 422, "550 5.7.1 no"),
        (SMTPError(450, "4.7.1 later"), 503, "450 4.7.1 later"),
        (Later("the disk rests"), 503, "451"),
        (OSError(28, "secret"), 503, "451"),
    ],
)
def test_what_deliver_raises_is_the_status(
    serve: Callable[..., _Posts], error: Exception, status: int, words: str
) -> None:
    def fail(_message: MailRequest) -> None:
        raise error

    found, told = serve(fail)()
    assert found == status
    assert told["error"].startswith(words)
    assert "secret" not in told["error"]


def test_a_message_that_goes_round_in_circles_is_refused(serve: Callable[..., _Posts]) -> None:
    taken: list[MailRequest] = []
    status, told = serve(taken.append)(body=b"Received: x\r\n" * 101 + MESSAGE)
    assert (status, taken) == (422, [])
    assert told["error"].startswith("554 5.4.6")


def test_a_recipient_that_no_route_takes_is_refused(
    serve: Callable[..., _Posts], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ingress_handlers.py").write_text(
        "from lamsonq.routing import route, stateless\n@route('desk@y.test')\n@stateless\ndef DESK(m): pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    router = RoutingBase()
    router.load(["ingress_handlers"])
    taken: list[MailRequest] = []
    post = serve(taken.append, router=router)
    assert post()[0] == 200
    assert post("from=a@x.test&to=other@y.test")[0] == 422
    assert len(taken) == 1


def test_a_client_that_goes_loses_only_the_reply(serve: Callable[..., _Posts]) -> None:
    begun, gate, taken = threading.Event(), threading.Event(), threading.Event()

    def slow(_message: MailRequest) -> None:
        begun.set()
        gate.wait(10)
        taken.set()

    post = serve(slow)
    request = f"POST /?from=a@x.test&to=b@y.test HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
    with socket.create_connection(("127.0.0.1", post.port)) as client:
        client.sendall(request.encode() + b"Content-Length: 3\r\n\r\nhi\n")
        assert begun.wait(PATIENCE)
    gate.set()
    assert taken.wait(PATIENCE)


def test_a_request_that_ends_early_leaves_nothing() -> None:
    taken: list[MailRequest] = []
    sent: list[Any] = []

    async def once() -> None:
        events = iter([{"type": "http.request", "body": b"hal", "more_body": True}, {"type": "http.disconnect"}])

        async def receive() -> Any:
            return next(events)

        async def send(event: Any) -> None:
            sent.append(event)

        scope = {
            "type": "http",
            "method": "POST",
            "query_string": b"from=a@x.test&to=b@y.test",
            "headers": [(b"authorization", f"Bearer {TOKEN}".encode())],
        }
        await Ingress(taken.append, TOKEN, router=RoutingBase())(scope, receive, send)

    asyncio.run(once())
    assert taken == []
    assert sent[0]["status"] == 400


def test_the_page_shows_an_application_that_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(os.environ, "INGRESS_TOKEN", TOKEN)
    page = PAGE.read_text()
    monkeypatch.setattr("lamsonq.ingress.Router.table", RoutingBase().table)  # as in a process of its own
    names: dict[str, Any] = {}
    exec(re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0], names)
    server = _Server(lifespan="on")
    post = _Posts(server, names["application"])
    server.start()
    try:
        status, told = post()
    finally:
        server.close()
    assert status == 200
    assert Queue("run/incoming").keys() == [told["id"]]


def test_nothing_of_it_is_left_when_its_server_has_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = set(threading.enumerate())
    server = _Server(lifespan="on")
    post = _Posts(server, Ingress(Queue("run/incoming").push, TOKEN, router=RoutingBase()))
    server.start()
    status, _ = post()
    spools = [thread for thread in set(threading.enumerate()) - before if thread.name == "lamsonq-spool"]
    server.close()
    assert status == 200
    [spool] = spools
    spool.join(10)
    assert not spool.is_alive()
