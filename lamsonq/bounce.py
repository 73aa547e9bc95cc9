"""Bounces: mail that says that a mail of ours was not delivered. To whom, why, and for good or for now.

    @route("bounces@(host)")
    @bounce_to(soft=LATER, hard=GONE)
    def START(message, host=None):
        ...  # what is no bounce

Rules:

1. The delivery report (RFC 3464) is the witness; the text for people counts where no report names a recipient.
2. The headers decide whether this may be a bounce at all, so that ordinary mail costs no parsing and a letter that
   quotes, forwards or attaches a bounce is none. A subject alone, or a postmaster alone, is no bounce.
3. Hard means for good: the address or the message is refused. Soft is every other bounce, also one that nobody
   understands. What tells of a success, a complaint (RFC 5965) or a reading (RFC 8098) is no bounce.
4. Everything in a bounce can be forged. Who removes members because of one routes bounces to an address that holds a
   secret.
5. Reading is bounded in time and never raises.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from email.message import Message
from itertools import islice
from typing import TYPE_CHECKING, Any

from lamsonq.address import mailboxes_in
from lamsonq.bouncetext import from_verp, read_text, returned_headers
from lamsonq.dsn import Recipient, Report, address_in, blocks, content, is_report, leaves, read_report, untyped
from lamsonq.mime import Part, Tree
from lamsonq.statuscodes import find_reply

if TYPE_CHECKING:
    from lamsonq.mail import MailRequest

__all__ = ["BounceAnalyzer", "Recipient", "bounce_to", "detect"]

HEADERS = (
    "Action",
    "Content-Description",
    "Diagnostic-Code",
    "Final-Recipient",
    "Received",
    "Remote-Mta",
    "Reporting-Mta",
    "Status",
)
"""The names of Lamson's `headers`."""

NO_STATUS = "No status codes found in bounce message."

EVIDENT = 0.4
"""What the headers have to say for a bounce, before the text is read for more than the forms that are known."""
WEAK = 0.2
"""The score of what looks a little like a bounce and is none."""

# Who writes, in words: names and local parts, in lower case and without punctuation.
_daemon = re.compile(
    r"mailer ?daemon|m(?:ail)? ?daemon|(?:internet )?mail delivery (?:sub ?)?system|delivery (?:sub ?)?system"
    r"|microsoftexchange[0-9a-f]+"
)
_system = re.compile(
    r"post ?master.*|mail ?adm.*|mail (?:system|delivery).*|system administrator|.* smtp (?:mail service|gateways?)"
)
# The words that the subjects of bounces are made of, up to the first colon or bracket; people need others.
_failing = re.compile(
    r"\b(?:undeliver(?:able|ed)|non-?deliver(?:y|able|ed)|nd[nr]|not|unable|fail(?:ed|ure|ing)?|return(?:ed|ing)?"
    r"|bounced?|delay(?:ed)?|rejected|error|problem|report|status|warning)\b"
)
_of_mail = re.compile(
    r"\b(?:(?:e-?)?mail|messages?|(?:un|non-?)?deliver(?:y|ed|able)?|sender|notice|notification|nd[nr])\b"
)
_between = re.compile(
    r"\b(?:your|the|a|to|of|ha[sd]|have|been|be|was|is|could|cannot|permanent|temporary|system|during|automatically)\b"
)

_answer = re.compile(
    r"(?:\s*\[[^\]]{0,80}\])*+\s*"
    r"(?:re|aw|antw(?:ort)?|sv|vs|ref|res|rif|r|odp|ynt|vá|atb|bls|ha|отв|ответ|回复|回覆|答复|返信"
    r"|fwd?|fw|wg|vb|vl|tr|rv|enc|i|pd|ilt|i̇lt|fs|doorst|továbbítás|пересл|转发|轉寄|転送"
    r"|forward(?:ed)?|weitergeleitet|weiterleitung|reenviad[oa]|transféré|inoltrato|doorgestuurd)"
    r"\s*(?:\[\d{1,4}\]|\(\d{1,4}\)|\^\d{1,4})?\s*[:：]|.*\(fwd\)",
    re.IGNORECASE,
)
_tagged = re.compile(r"\s*\[[^\]]{1,80}\]")
_absence = re.compile(
    r"\W*(?:auto(?:matic|mated|matische|matisch|matiskt)?[- ]?(?:reply|response|antwort|antwoord|svar)\b"
    r"|out of (?:the )?office|ooo\b|away from|(?:on )?(?:vacation|holiday)|on leave|abwesen|absence|afwezig|frånvaro"
    r"|réponse automatique|respuesta automática|risposta automatica|resposta automática|fuera de|fora do|fuori"
    r"|автоматический ответ|автоответ|自動応答|自動返信|自动答复|自动回复)",
    re.IGNORECASE,
)
_REPLY_HEADERS = (
    *("x-autoreply", "x-auto-reply", "x-autoreply-from", "x-autorespond", "x-autoresponder", "x-autoresponse"),
    "x-mail-autoreply",
)
_report_type = re.compile(r'report-type\s*+=\s*+"?\s*+([\w-]+)', re.IGNORECASE)


class BounceAnalyzer:
    """What is known of a bounce. Source: Lamson's `lamson.bounce.BounceAnalyzer`, with its names.

    `score` is how sure it is that this is one, 0.0 to 1.0. `recipients` has a record for each recipient that is
    told of; the other attributes speak of one of them, the worst:

    - `primary_status`, `secondary_status`, `combined_status`: (int, text), or (None, None). Of 5.7.26 they are 5, 7
      and 726; `recipients[n].status` tells 5.1.10 from 5.11.0.
    - `final_recipient`, `remote_mta`, `action`: text or None; `diagnostic_codes`: [code, text], each may be None.
    - `reporting_mta`: the system that wrote the report, or None. `headers`: the report's fields, as in HEADERS.
    - `content_parts`: the parts by their kind, in the words of Postfix: "notification", "delivery report" and
      "undelivered message"; `notification` and `original` are the first of theirs (or None), `report` is the list.
    - `feedback_type`: "abuse" and the like of a complaint (RFC 5965), else None.
    """

    def __init__(
        self,
        headers: Mapping[str, Sequence[str]],
        score: float,
        recipients: Sequence[Recipient] = (),
        content_parts: Mapping[str, Sequence[Part]] | None = None,
        feedback_type: str | None = None,
    ) -> None:
        self.headers = {name: list(values) for name, values in headers.items()}
        self.score = score
        self.recipients = list(recipients)
        self.feedback_type = feedback_type
        self._read_recipient(min(self.recipients, key=_severity, default=Recipient()))
        self.reporting_mta = untyped(next(iter(self.headers.get("Reporting-Mta", ())), "")) or None
        self.content_parts = {kind: list(parts) for kind, parts in (content_parts or {}).items()}
        self.notification = next(iter(self.content_parts.get("notification", ())), None)
        self.report = self.content_parts.get("delivery report", [])
        self.original = next(iter(self.content_parts.get("undelivered message", ())), None)

    def _read_recipient(self, worst: Recipient) -> None:
        self._permanent = worst.permanent is True
        self.final_recipient = worst.final or worst.address or None
        self.remote_mta = worst.remote_mta or None
        self.action = worst.action or None
        self.diagnostic_codes = _diagnostic_codes(worst.diagnostic)
        self.primary_status: tuple[int, str] | tuple[None, None] = (None, None)
        self.secondary_status: tuple[int, str] | tuple[None, None] = (None, None)
        self.combined_status: tuple[int, str] | tuple[None, None] = (None, None)
        status = worst.status
        if status is not None:
            primary, secondary, combined = status.words()
            self.primary_status = status.primary, primary
            self.secondary_status = status.subject, secondary
            self.combined_status = int(f"{status.subject}{status.detail}"), combined

    def probable(self, threshold: float = 0.3) -> bool:
        """Whether this is likely to be a bounce."""
        return self.score > threshold

    def is_hard(self) -> bool:
        """Whether some recipient is refused for good."""
        return self.probable() and self._permanent

    def is_soft(self) -> bool:
        """Whether it is a bounce, but none for good: a delay, a full mailbox, or nobody knows."""
        return self.probable() and not self._permanent

    def error_for_humans(self) -> str:
        """The status in words: class, subject and detail, comma between them."""
        if self.primary_status[0] is None:
            return NO_STATUS
        return f"{self.primary_status[1]}, {self.secondary_status[1]}, {self.combined_status[1]}"

    def __repr__(self) -> str:
        return f"<BounceAnalyzer {self.score:.1f} {[recipient.address for recipient in self.recipients]}>"


def _severity(recipient: Recipient) -> int:
    return 0 if recipient.permanent else 1 if recipient.failed else 2


def _diagnostic_codes(diagnostic: str) -> list[str | None]:
    code = find_reply(diagnostic)
    if not diagnostic:
        return [None, None]
    text = re.sub(rf"^{code}[ -]", "", diagnostic) if code else diagnostic
    return [str(code) if code else None, text]


def detect(message: MailRequest) -> BounceAnalyzer:
    """Look at a whole message. `recipients` holds what is found even where the headers say that it is no bounce.

    Source: Lamson's `lamson.bounce.detect`.
    """
    feedback = _feedback_type(message)
    if feedback is not None:
        return BounceAnalyzer({}, 0.0, (), _content_parts(message.base), feedback)
    marks = _marks(message)
    report = read_report(message.base)
    recipients = [*_from_report(message, report)]
    if not any(recipient.address for recipient in recipients):
        recipients = _completed(message, recipients, marks)
    score = _score(marks, report, recipients)
    return BounceAnalyzer(_headers(report, message.base), score, recipients, _content_parts(message.base))


def detect_if_likely(message: MailRequest) -> BounceAnalyzer:
    """`detect`, but nothing is parsed of a message whose headers and envelope do not speak for a bounce."""
    marks = _marks(message)
    likely = marks.evidence >= EVIDENT or (message["content-type"] or "").lower().startswith("multipart/report")
    return detect(message) if likely else BounceAnalyzer({}, marks.evidence)


def _from_report(message: MailRequest, report: Report) -> list[Recipient]:
    """The recipients of the report; one that it does not name is the one that other headers do."""
    nameless = [recipient for recipient in report.recipients if not recipient.address]
    if len(nameless) != 1:
        return report.recipients
    failed = address_in(message["x-failed-recipients"] or "")
    verp = from_verp([message.To, *message.route_to])
    named = failed or verp
    return [replace(r, address=named) if not r.address else r for r in report.recipients]


def _completed(message: MailRequest, reported: list[Recipient], marks: _Marks) -> list[Recipient]:
    """The recipients that the text names, and what the report said without a name."""
    found = read_text(message, by_form_only=marks.evidence < EVIDENT, trusted=marks.trusted)
    if not found:
        verp = from_verp([message.To, *message.route_to])
        return [Recipient(address=verp)] if verp and not reported and marks.evidence >= EVIDENT else reported
    if len(reported) == 1:
        told = reported[0]
        return [
            replace(told, address=one.address, final=one.final, diagnostic=told.diagnostic or one.diagnostic)
            for one in found
        ]
    return found


def _score(marks: _Marks, report: Report, recipients: Sequence[Recipient]) -> float:
    failed = [recipient for recipient in recipients if recipient.failed]
    if recipients and not failed:
        return WEAK  # a report of success
    if not failed or marks.evidence < EVIDENT:
        return min(marks.evidence, 0.5)  # nobody knows for whom; or a letter that quotes a bounce
    return 1.0 if report.recipients else 0.8


@dataclass(frozen=True, slots=True)
class _Marks:
    """What headers and envelope say for a bounce.

    `by_system`: a mail system wrote it, and says so in its name or in a header that only they use. `other`: it is an
    automatic reply, a report of another kind, or somebody's forwarded mail.
    """

    by_system: float
    declared: float
    null: bool
    postmaster: bool
    subject: bool
    other: bool

    @property
    def evidence(self) -> float:
        """0.0 to 1.0."""
        told = self.by_system + self.declared + 0.5 * self.null + WEAK * (self.postmaster + self.subject)
        return min(told, WEAK if self.other else 1.0)

    @property
    def trusted(self) -> bool:
        """Whether a mail system wrote the text, as far as one can tell: the null sender writes much else."""
        return self.evidence >= EVIDENT and bool(self.by_system or self.declared or self.subject)


def _marks(message: MailRequest) -> _Marks:
    kind = (message["content-type"] or "").lower()
    report_type = _report_type.search(kind)
    of_delivery = report_type is None or report_type[1] == "delivery-status"
    names = _names(message)
    by_system = 0.4 * any(map(_daemon.fullmatch, names)) + 0.5 * ("x-failed-recipients" in message)
    report = kind.startswith(("multipart/report", "message/delivery-status", "message/global-delivery-status"))
    declared = (0.5 * report + 0.5 * (report_type is not None)) if of_delivery else 0.0
    null = message.From == "" or (message["from"] or "x").rstrip().endswith("<>")
    replied = _is_automatic_reply(message) and not (declared and is_report(message.base))
    passed_on = _is_passed_on(message, null=null, declared=bool(declared))
    return _Marks(
        by_system=by_system,
        declared=declared,
        null=null,
        postmaster=any(map(_system.fullmatch, names)),
        subject=_speaks_of_failure(message["subject"] or ""),
        other=not by_system and (replied or passed_on or not of_delivery),
    )


def _names(message: MailRequest) -> set[str]:
    """How the sender is called, by the header and by the envelope."""
    written = [message.From]
    for mailbox in islice(mailboxes_in((message["from"] or "")[:1000]), 5):
        written += [mailbox.name, mailbox.path]
    return {" ".join(re.findall(r"[^\W_]+", (name.rpartition("@")[0] or name)[:200].lower())) for name in written}


def _speaks_of_failure(subject: str) -> bool:
    head = re.split(r"[:(\"<]", subject[:500])[0].lower()
    rest = _between.sub("", _of_mail.sub("", _failing.sub("", head)))
    return bool(_failing.search(head) and _of_mail.search(head)) and not re.search(r"\w", rest)


def _is_passed_on(message: MailRequest, *, null: bool, declared: bool) -> bool:
    """Whether a person or a list sent this on. Reports of the null sender may have the subject of what they report."""
    subject = (message["subject"] or "")[:500]
    if _answer.match(subject):
        return not (null and declared)
    return not null and bool(_tagged.match(subject) or re.search(r"\bvia\b", (message["from"] or "")[:500]))


def _is_automatic_reply(message: MailRequest) -> bool:
    """Whether the mail says that a program wrote it as an answer (RFC 3834): mail systems mark their reports so too."""
    submitted = (message["auto-submitted"] or "").strip().lower().startswith(("auto-replied", "auto-notified"))
    precedence = re.sub(r"[^a-z]", "", f"{message['precedence']} {message['x-precedence']}".lower())
    marked = any((message[name] or "no").strip().lower() not in ("no", "false") for name in _REPLY_HEADERS)
    absent = _absence.match((message["subject"] or "")[:500])
    return bool(submitted or "autoreply" in precedence or marked or absent)


def _feedback_type(message: MailRequest) -> str | None:
    kind = _report_type.search(message["content-type"] or "")
    if kind is None or kind[1].lower() != "feedback-report":
        return None
    for part in leaves(message.base):
        if Part(part).content_type == "message/feedback-report":
            for fields in blocks(content(part, 64 * 1024)):
                return next(iter(fields.get("feedback-type", ())), "").strip().lower() or "other"
    return "other"


def _headers(report: Report, tree: Tree) -> dict[str, list[str]]:
    described = [Part(part)["content-description"] for part in leaves(tree)]
    found = {name: report.fields.get(name.lower(), []) for name in HEADERS}
    found["Content-Description"] = list(filter(None, described))
    return {name: values for name, values in found.items() if values}


_KINDS = {
    "message/delivery-status": "delivery report",
    "message/global-delivery-status": "delivery report",
    "message/rfc822": "undelivered message",
    "message/global": "undelivered message",
    "message/global-headers": "undelivered message",
    "text/rfc822-headers": "undelivered message",
}


def _content_parts(tree: Tree) -> dict[str, list[Part]]:
    kinds: dict[str, list[Part]] = {}
    for part in leaves(tree):
        content_type = Part(part).content_type
        kind = _KINDS.get(content_type)
        if kind is None and content_type.startswith("text/") and "notification" not in kinds:
            kind = "notification"
        if kind is not None and kind != "undelivered message":
            kinds.setdefault(kind, []).extend(_inside(part) if kind == "delivery report" else [Part(part)])
    original = returned_headers(tree)
    if original is not None:
        kinds["undelivered message"] = [Part(original)]
    return kinds


def _inside(part: Tree) -> Iterable[Part]:
    inner = part.get_payload() if part.is_multipart() else ()
    return [Part(block) for block in inner if isinstance(block, Message)] or [Part(part)]


State = Callable[..., Any]


def bounce_to(soft: State, hard: State) -> Callable[[State], State]:
    """Decorator, under `@route`: a bounce goes to `soft` or `hard` in place of the function that it stands on.

    Each is called with the message, whose `bounce` is the BounceAnalyzer, and with those captures of the route
    that it has parameters for; what it returns is what the state function would have returned. All three may be
    `async def`. Raises TypeError when one of them cannot be called.

    Source: Lamson's `lamson.bounce.bounce_to`.
    """
    for name, function in (("soft", soft), ("hard", hard)):
        if not callable(function):
            raise TypeError(f"bounce_to({name}=...) takes a function that is called with the message, not {function!r}")
    targets = {True: (hard, _takes(hard)), False: (soft, _takes(soft))}

    def decorate(function: State) -> State:
        @functools.wraps(function)
        def unless_bounce(message: MailRequest, *args: Any, **captures: Any) -> Any:
            if not message.is_bounce() or message.bounce is None:
                return function(message, *args, **captures)
            target, takes = targets[message.bounce.is_hard()]
            return target(message, **{name: value for name, value in captures.items() if takes(name)})

        return unless_bounce

    return decorate


def _takes(function: State) -> Callable[[str], bool]:
    """Which captures a function has parameters for, besides the message."""
    parameters = list(inspect.signature(function).parameters.values())[1:]
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return bool  # every name: none is empty
    names = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return names.__contains__
