"""A message that goes out, built with the standard library's `email` package.

Rules:

1. A header is checked when it is set: a value that could begin another header is refused by us, whatever the
   standard library does.
2. Header texts are written by `lamsonq.headers.written`: the standard library encodes message ids that are longer
   than a line, and takes minutes for long address lists.
3. Date, Message-ID and boundaries are made once, so that `to_bytes()` twice is the same message.
4. mixed(alternative(text, related(html, images), others), attachments), each only where it has more than one
   part: the best alternative comes last (RFC 2046 section 5.1.4), what the HTML shows stands beside it (RFC 2387).
5. Bcc is a recipient and is never written.
6. What a program writes because of a message (`original`) says so, so that no other program answers it (RFC 3834
   section 5): `auto-replied`, and in the thread, where it goes to who wrote that; `auto-generated` where it goes to
   others. This is told from the recipients that it has when somebody looks; a header that was set stays.
"""

from __future__ import annotations

import base64
import itertools
import mimetypes
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from email.message import EmailMessage, Message
from email.policy import EmailPolicy
from email.utils import format_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from lamsonq.address import addresses_in, bare_address
from lamsonq.headers import check_name, check_value, message_ids, written
from lamsonq.mime import Part, leaves, parse

if TYPE_CHECKING:
    from lamsonq.mail import MailRequest

REFERENCES_MAX = 20
_content_type = re.compile(r"([\w!#$&^.+-]{1,127})/([\w!#$&^.+-]{1,127})(\s*;.*)?", re.ASCII)
COPIED_MAX = 2000
_UNENCODABLE = {"message": "message/global", "multipart": "application/octet-stream"}
_BUILT = frozenset({"content-type", "content-transfer-encoding", "content-disposition", "mime-version"})
_MARKS = frozenset({"auto-submitted", "in-reply-to", "references"})
_COPIED = ("Content-Disposition", "Content-ID", "Content-Description", "Content-Language", "Content-Location")


class Attachment(TypedDict):
    """One attachment, as Lamson lists them; `part` is what goes into the message."""

    filename: str | None
    content_type: str
    data: bytes
    disposition: str | None
    part: Message


class _Wire(EmailPolicy):
    """`email.policy.SMTP`, but texts are kept as they are set, and written by rule 2."""

    def header_store_parse(self, name: str, value: Any) -> tuple[str, Any]:
        if name[:8].lower() == "content-":
            return super().header_store_parse(name, value)
        return name, value

    def fold(self, name: str, value: Any) -> str:
        if hasattr(value, "fold"):
            folded: str = super().fold(name, value)
            return folded
        return written(name, re.sub(r"\s*\n\s*", " ", str(value)), self.linesep)

    def fold_binary(self, name: str, value: Any) -> bytes:
        return self.fold(name, value).encode()


# 7bit: no relay on the way has to offer 8BITMIME.
_WIRE = _Wire(linesep="\r\n", cte_type="7bit")


class MailResponse:
    """A message to send.

    `To` is one address, several in one string, or a list. `Body` and `Html` are its texts. Other headers are set
    as `response["Reply-To"] = ...`; one that is None is left out. `attachments`, `embedded` and `alternatives` list
    what `attach`, `embed` and `add_alternative` added. Raises ValueError for a header that holds a line end or another
    control character.

    `original` is the message that a program answers by this, or tells others of; None where a person writes, or where
    there is none. `view.respond` sets it.

    Source: Lamson's and Salmon's `mail.MailResponse`.
    """

    def __init__(
        self,
        To: object = None,
        From: str | None = None,
        Subject: str | None = None,
        Body: str | None = None,
        Html: str | None = None,
    ) -> None:
        self.Body = Body
        self.Html = Html
        self.attachments: list[Attachment] = []
        self.embedded: list[Attachment] = []
        self.alternatives: list[Attachment] = []
        self.original: MailRequest | None = None
        self._content_ids = itertools.count(1)
        self._headers: dict[str, tuple[str, str]] = {}
        self._token = secrets.token_hex(12)
        self._date = format_datetime(datetime.now(UTC))
        self.update({"From": From, "To": To, "Subject": Subject})

    # Headers.

    def __getitem__(self, name: str) -> str | None:
        headers = self._marked() if name.lower() in _MARKS else self._headers
        return headers.get(name.lower(), ("", None))[1]

    def __setitem__(self, name: str, value: object) -> None:
        """Set a header; a list is joined with commas, None removes it. Raises ValueError.

        One that is there keeps its place, and its name as it was written first.
        """
        if check_name(name).lower() in _BUILT:
            raise ValueError(f"{name} is made from Body, Html and the attachments; it cannot be set")
        if value is None:
            self._headers.pop(name.lower(), None)
            return
        if isinstance(value, list | tuple):
            value = ", ".join(map(str, value))
        first, _ = self._headers.get(name.lower(), (name, ""))
        self._headers[name.lower()] = (first, check_value(name, value))

    def __delitem__(self, name: str) -> None:
        self._headers.pop(name.lower(), None)

    def __contains__(self, name: str) -> bool:
        return name.lower() in self._marked()

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def keys(self) -> list[str]:
        """The names of the headers, in order; without those that `to_message` makes."""
        return [name for name, _ in self._marked().values()]

    def items(self) -> list[tuple[str, str]]:
        """The headers, in order; without those that `to_message` makes."""
        return list(self._marked().values())

    def update(self, headers: Mapping[str, object]) -> None:
        """Set several headers."""
        for name, value in headers.items():
            self[name] = value

    @property
    def sender(self) -> str:
        """The bare address of From, "" when there is none."""
        return bare_address(self["From"] or "")

    @property
    def recipients(self) -> list[str]:
        """The bare addresses of To, Cc and Bcc, once each, in order."""
        found = [a for name in ("To", "Cc", "Bcc") for a in addresses_in(self[name] or "", None)]
        return list(dict.fromkeys(found))

    def in_reply_to(self, original: MailRequest) -> None:
        """Put this into a thread: In-Reply-To and References, where the original has an id.

        For what a person answers; a program sets `original`.
        """
        self.update(_thread_of(original))

    @property
    def is_automatic(self) -> bool:
        """Whether no person has written this, by rule 6 or by its own Auto-Submitted."""
        return (self["Auto-Submitted"] or "no").partition(";")[0].strip().lower() != "no"

    def _marked(self) -> dict[str, tuple[str, str]]:
        """The headers that were set, and those of rule 6."""
        if self.original is None:
            return self._headers
        marks = {"Auto-Submitted": "auto-generated"}
        if self.original.writers.intersection(self.recipients):
            marks["Auto-Submitted"] = "auto-replied"
            if self._headers.keys().isdisjoint(("in-reply-to", "references")):
                marks |= _thread_of(self.original)
        missing = {name.lower(): (name, text) for name, text in marks.items() if name.lower() not in self._headers}
        return self._headers | missing

    # Attachments.

    def attach(
        self,
        filename: str | None = None,
        content_type: str | None = None,
        data: bytes | str | None = None,
        disposition: str | None = None,
    ) -> None:
        """Attach `data` under a name, or the file of that name.

        The type is guessed from the name where none is given; "application/octet-stream" when it tells nothing. Raises
        TypeError when there is nothing to attach, FileNotFoundError, and ValueError for what cannot stand in a header.
        """
        self.attachments.append(_made_from(filename, content_type, data, disposition or "attachment"))

    def embed(
        self,
        filename: str | None = None,
        data: bytes | str | None = None,
        content_type: str | None = None,
    ) -> str:
        """Put an image (or a font, ...) beside the HTML text; the URL by which that shows it: `cid:...` (RFC 2392).

            logo = response.embed("app/data/logo.png")
            response.Html = f'<img src="{logo}" alt="">'

        Without `data` it is the file of that name. Without Html it is an attachment that is shown inline. Raises
        what `attach` raises.
        """
        embedded = _made_from(filename, content_type, data, "inline")
        content_id = f"{self._token}.{next(self._content_ids)}@lamsonq"
        embedded["part"]["Content-ID"] = f"<{content_id}>"
        self.embedded.append(embedded)
        return f"cid:{content_id}"

    def add_alternative(self, data: bytes | str, content_type: str) -> None:
        """Say the same in another form: `add_alternative(event, "text/calendar; method=REQUEST")` (RFC 6047).

        Readers show the last alternative that they know, so these stand behind text and HTML. Raises ValueError.
        """
        self.alternatives.append(_made_from(None, content_type, data, None))

    def attach_part(self, part: Part | Message) -> None:
        """Attach a part of another message: the same content, type, name and id."""
        part = part if isinstance(part, Part) else Part(part)
        self.attachments.append(_listed(_copied(part), part.filename, part.data, part.disposition))

    def attach_all_parts(self, mail_request: MailRequest) -> None:
        """Attach every part of a message that came in; a plain text becomes the Body, where there is none yet."""
        if mail_request.base.get_content_type() == "text/plain" and not (self.Body or self.Html):
            self.Body = str(mail_request.body())
            return
        for part in mail_request.all_parts():
            self.attach_part(part)

    def clear(self) -> None:
        """Drop all attachments and embedded images."""
        self.attachments.clear()
        self.embedded.clear()

    # The message.

    def to_message(self) -> EmailMessage:
        """The message as the standard library has it, without Bcc."""
        message = EmailMessage(policy=_WIRE)
        for name, value in [*self.items(), *self._made()]:
            if name.lower() != "bcc":
                message[name] = value
        content = self._content()
        for name, value in content.raw_items():
            message.set_raw(name, value)
        message.set_payload(content.get_payload())
        message["MIME-Version"] = "1.0"
        multiparts = [part for part in message.walk() if part.get_content_maintype() == "multipart"]
        for number, part in enumerate(multiparts):
            part.set_boundary(f"=_{self._token}_{number}")
        return message

    def _made(self) -> list[tuple[str, str]]:
        """Date and Message-ID, where nobody set them."""
        domain = self.sender.rpartition("@")[2]
        message_id = f"<{self._token}@{domain if domain and domain.isascii() else 'localhost'}>"
        made = [("Date", self._date), ("Message-ID", message_id)]
        return [(name, value) for name, value in made if name not in self]

    def _content(self) -> Message:
        """The text in all its forms, and what is attached to it."""
        forms: list[Message] = []
        attached = [a["part"] for a in [*([] if self.Html else self.embedded), *self.attachments]]
        if self.Body is not None or not (self.Html or self.alternatives or attached):
            forms.append(_text(self.Body or "", "plain"))
        if self.Html:
            forms.append(_related(_text(self.Html, "html"), [e["part"] for e in self.embedded]))
        forms += [alternative["part"] for alternative in self.alternatives]
        whole = [_multipart("alternative", forms)] if len(forms) > 1 else forms
        return _multipart("mixed", [*whole, *attached]) if attached else whole[0]

    def all_parts(self) -> list[Part]:
        """The parts that hold content, in order."""
        return list(leaves(self.to_message()))

    def to_bytes(self) -> bytes:
        """The message as it goes over the wire: CRLF line ends, seven bits, without Bcc."""
        return self.to_message().as_bytes()

    __bytes__ = to_bytes

    def __str__(self) -> str:
        return self.to_bytes().decode("utf-8", "replace").replace("\r\n", "\n")

    def __repr__(self) -> str:
        return f"<MailResponse to {self['To']!r}: {self['Subject']!r}>"


def _thread_of(original: MailRequest) -> dict[str, str]:
    """The headers that put an answer behind the original (RFC 5322 section 3.6.4); none where that has no id."""
    answered = next(message_ids(original["message-id"] or ""), None)
    if answered is None:
        return {}
    thread = list(message_ids(original["references"] or original["in-reply-to"] or ""))
    thread = [i for i in dict.fromkeys(thread) if i != answered]
    if len(thread) >= REFERENCES_MAX:
        thread[1 : 2 - REFERENCES_MAX] = []  # the first names the thread, the last ones the place in it
    return {"In-Reply-To": answered, "References": " ".join([*thread, answered])}


def _read(filename: str) -> bytes:
    try:
        return Path(filename).read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(
            f"there is no file {filename!r} to attach; data=... attaches bytes under a name"
        ) from None


def _guessed(name: str | None, is_text: bool) -> str:
    kind, compression = mimetypes.guess_type(name or "")
    if kind is None or compression:
        return "text/plain" if is_text and not compression else "application/octet-stream"
    return kind


def _text(text: str, subtype: str) -> Message:
    part = EmailMessage(policy=_WIRE)
    part.set_content(str(text).encode("utf-8", "replace").decode(), subtype=subtype)
    del part["MIME-Version"]
    return part


def _multipart(subtype: str, parts: Sequence[Message]) -> Message:
    container = EmailMessage(policy=_WIRE)
    container["Content-Type"] = f"multipart/{subtype}"
    container.set_payload([*parts])
    return container


def _related(html: Message, shown: Sequence[Message]) -> Message:
    if not shown:
        return html
    related = _multipart("related", [html, *shown])
    related.set_param("type", "text/html")  # RFC 2387 section 3.1
    return related


def _made_from(
    filename: str | None, content_type: str | None, data: bytes | str | None, disposition: str | None
) -> Attachment:
    """A part of the message from what the caller gave; see `MailResponse.attach`."""
    if data is None and filename is None:
        raise TypeError("there is nothing to attach: give a filename, or data, or both")
    octets = _read(str(filename)) if data is None else data.encode() if isinstance(data, str) else bytes(data)
    name = re.split(r"[/\\]", filename)[-1] if filename else None
    content_type = content_type or _guessed(name, isinstance(data, str))
    part = _attachment(octets, content_type, name, disposition, isinstance(data, str))
    return _listed(part, name, octets, disposition)


def _listed(part: Message, name: str | None, data: bytes, disposition: str | None) -> Attachment:
    return Attachment(
        filename=name, content_type=part.get_content_type(), data=data, disposition=disposition, part=part
    )


def _attachment(data: bytes, content_type: str, name: str | None, disposition: str | None, is_text: bool) -> Message:
    kind = _content_type.fullmatch(check_value("Content-Type", content_type).lower())
    if not kind:
        raise ValueError(f"{content_type!r} is no content type (RFC 6838 section 4.2)")
    label = None if name is None else check_value("Content-Disposition", name)
    shown = None if disposition is None else check_value("Content-Disposition", disposition)
    if kind[1] in ("message", "multipart"):
        part = _raw_part(data, content_type)
        if shown:
            part.add_header("Content-Disposition", shown, filename=label)
        return part
    part = EmailMessage(policy=_WIRE)
    parameters = Message()
    parameters["Content-Type"] = content_type
    found = dict(parameters.get_params([])[1:])
    if kind[1] == "text" and is_text:
        found["charset"] = "utf-8"
    part.set_content(
        data,
        kind[1],
        kind[2],
        disposition=shown,
        filename=label,
        params=found,
    )
    del part["MIME-Version"]
    return part


def _copied(part: Part) -> Message:
    """A part of a message that came in, its content unchanged, its headers only where they are harmless."""
    copied = _raw_part(part.data, _header_of(part, "Content-Type") or part.content_type)
    for name in _COPIED:
        if value := _header_of(part, name):
            copied[name] = value
    return copied


def _header_of(part: Part, name: str) -> str | None:
    """The header on one line, if it is plain ASCII: copied as it is, never parsed."""
    value = " ".join(str(part.message.get(name, "")).split())
    return value if value.isascii() and value.isprintable() and len(value) < COPIED_MAX else None


def _raw_part(data: bytes, content_type: str) -> Message:
    part = Message()
    part["Content-Type"] = content_type
    main_type = part.get_content_maintype()
    if main_type == "message" and _is_seven_bit(data):
        # RFC 2046 section 5.2.1 allows no transfer encoding here.
        part.set_payload(_seven_bit_payload(part, data))
        return part
    if main_type in _UNENCODABLE:
        part.replace_header("Content-Type", _UNENCODABLE[main_type])
    part["Content-Transfer-Encoding"] = "base64"
    part.set_payload(base64.encodebytes(data).decode("ascii"))
    return part


def _seven_bit_payload(part: Message, data: bytes) -> str | list[Message | str]:
    if part.get_content_type() == "message/delivery-status":
        if blocks := _status_blocks(data):
            return blocks
        part.replace_header("Content-Type", "text/plain")
    return re.sub("\r?\n", "\r\n", data.decode("ascii"))


def _status_blocks(data: bytes) -> list[Message | str]:
    """A delivery status as the standard generator wants it, which writes only header blocks; [] when it is none."""
    defects: list[str] = []
    tree = parse(b"Content-Type: message/delivery-status\n\n" + data, defects)
    return list(tree.get_payload()) if tree.is_multipart() and not defects else []


def _is_seven_bit(data: bytes) -> bool:
    return data.isascii() and not re.search(rb"\x00|\r(?!\n)|[^\n]{999}", data)
