"""Any octets are a message: what must hold whatever they are.

1. Reading raises nothing, and a header that is shown is one line.
2. The octets are never rewritten: `to_bytes()` gives them back, and after an edit everything else is as before.
3. What goes out ends where it should: on the wire there is one CRLF.CRLF (RFC 5321 section 4.5.2), and nothing that
   another server could take for one.
"""

from __future__ import annotations

import re

from lamsonq.mail import MailRequest
from lamsonq.transaction import _with_dots_doubled, for_the_wire

NAME = "X-Lamsonq-Fuzz"
_FALSE_END = re.compile(rb"(\r\n|\r|\n)\.(\r\n|\r|\n)")


def check(data: bytes) -> None:
    """Raises AssertionError, or whatever else a message raises, when something of the above does not hold."""
    message = MailRequest(("127.0.0.1", 1), None, None, data)
    _read(message)
    assert message.to_bytes() == data
    assert MailRequest(None, "ann@x.test", ["bob@y.test"], data).To == "bob@y.test"
    _edit(message, data)
    _send(data)


def _read(message: MailRequest) -> None:
    for name, text in message.items():
        assert not set(text) & {"\r", "\n"}, (name, text)
        assert message[name] is not None
        assert name in message
    assert isinstance(message.body(), str | bytes)
    for part in [*message.all_parts(), *message.walk()]:
        assert isinstance(part.body, str | bytes | None), part.body
    assert message.is_bounce() in (True, False)
    assert message.is_automatic in (True, False)
    assert message.may_be_answered in (True, False)
    assert all("\n" not in address for address in (message.From, *message.route_to, *message.writers))
    assert all(isinstance(defect, str) for defect in message.defects)
    assert str(message) is not None
    message.to_message()


def _edit(message: MailRequest, data: bytes) -> None:
    keys, body = message.keys(), message.body()
    message[NAME] = "one"
    edited = MailRequest(None, None, None, message.to_bytes())
    assert edited[NAME] == "one", edited.Data
    assert [key for key in edited.keys() if key.lower() != NAME.lower()] == [  # noqa: SIM118 - no mapping
        key for key in keys if key.lower() != NAME.lower()
    ]
    assert edited.body() == body or message.defects, (edited.body(), body)
    del message[NAME]
    if NAME.lower() not in [key.lower() for key in keys]:
        assert MailRequest(None, None, None, message.to_bytes()).keys() == keys


def _send(data: bytes) -> None:
    content = for_the_wire(data)
    wire = _with_dots_doubled(content) + b".\r\n"
    assert (b"\r\n" + wire).find(b"\r\n.\r\n") == len(wire) - 3
    assert not _FALSE_END.search(b"\r\n" + wire, 0, len(wire) - 3), wire
    assert (b"\r\n" + wire[:-3]).replace(b"\r\n.", b"\r\n")[2:] == content
