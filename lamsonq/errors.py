"""Every exception, and the one vocabulary of failure: *later* or *never*.

Whatever goes wrong while a message is handled answers one question: may it be tried again? `Later` says
yes, `Dead` says no. Both are raised by handlers and are also the value that the attempt settles its job with:
over SMTP they become a 4xx or 5xx reply, in a queue a delayed job or a dead letter.

The other half of this file is for the people at the keyboard: `Refusal` and what derives from it carry the exit
code of the command that they end, and a message that says what to do.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime


class Later(Exception):
    """Try this again: at `at` (seconds since the epoch, or a datetime), or when the queue's back-off says so.

    `counted=False` gives the job back as if it had never been taken: no failure, no delivery. Raises TypeError or
    ValueError for an `at` that is no moment.
    """

    def __init__(self, reason: str = "", at: float | datetime | None = None, *, counted: bool = True) -> None:
        super().__init__(reason)
        self.reason = reason
        self.at = None if at is None else _moment(at)
        self.counted = counted


def _moment(at: float | datetime) -> float:
    seconds = at.timestamp() if isinstance(at, datetime) else at
    if not isinstance(seconds, int | float):
        raise TypeError(f"Later(at=...) takes seconds since the epoch or a datetime, not {at!r}")
    if not math.isfinite(seconds):
        raise ValueError(f"Later(at={seconds}) is no moment")
    return seconds


class Dead(Exception):
    """Never try this again; keep the message as a dead letter, with this reason."""

    def __init__(self, reason: str = "") -> None:
        super().__init__(reason)
        self.reason = reason


# The words of RFC 3463 section 3 for the class of a status (the first digit of a reply, too) and for its subject (the
# second), with which both ancestors answer and tell of bounces: users' logs and tests know them.
CLASSES = {2: "Success", 4: "Persistent Transient Failure", 5: "Permanent Failure"}
SUBJECTS = {
    0: "Other or Undefined Status",
    1: "Addressing Status",
    2: "Mailbox Status",
    3: "Mail System Status",
    4: "Network and Routing Status",
    5: "Mail Delivery Protocol Status",
    6: "Message Content or Media Status",
    7: "Security or Policy Status",
}


class SMTPError(Exception):
    """Raised by a handler: the reply over SMTP; in a queue 4xx means later and 5xx means dead.

    `code` is the three-digit reply code (RFC 5321 section 4.2), `message` the text behind it; without one the text
    is made from the digits. Raises ValueError for a code that is not three digits.
    """

    def __init__(self, code: int, message: str | None = None) -> None:
        digits = str(code)
        if not (isinstance(code, int) and len(digits) == 3 and digits.isdigit()):
            raise ValueError(f"an SMTP reply code has three digits (RFC 5321 section 4.2), not {code!r}")
        if message is None:
            primary, subject = CLASSES.get(code // 100), SUBJECTS.get(code // 10 % 10)
            message = " ".join(filter(None, [primary, subject])) if primary else ""
        self.code = code
        self.message = message
        super().__init__(f"{code} {message}")


@dataclass(frozen=True, slots=True)
class Receipt:
    """Who has got a message, and from which mail server we know it.

    `final` says that this server has it in the recipient's mailbox (LMTP, RFC 2033), `reports` that it has taken over
    what the sender wants to be told (RFC 3461 section 5.2.2).
    """

    recipient: str
    server: str = ""
    final: bool = False
    reports: bool = False


@dataclass(frozen=True, slots=True)
class Failure:
    """One call of a plan that failed: which function, for whom, and the exception that says later or never.

    `target` is the dotted name of the function, or None where no state function was involved (a relay). `judged` is
    what the function's policy made of the error, if one was asked. `server` is the mail server whose words the error
    has, "" where none has said anything.
    """

    recipient: str
    target: str | None
    error: Exception
    judged: Later | Dead | None = None
    server: str = ""

    def outcome(self) -> Later | Dead:
        """Whether this call may be tried again."""
        return self.judged or outcome_of(self.error)


class Undelivered(Exception):
    """Raised by `deliver`: these calls or recipients failed; all others have succeeded and must not run again.

    `receipts` tell of those who have got a message that a relay has sent.
    """

    def __init__(self, failures: Sequence[Failure], receipts: Sequence[Receipt] = ()) -> None:
        self.failures = tuple(failures)
        self.receipts = tuple(receipts)
        super().__init__("; ".join(f"{f.recipient}: {reason_of(f.error)}" for f in failures))


class LeaseLost(Exception):
    """The job was settled or taken by somebody else: whatever this worker did with it is dropped."""


def outcome_of(error: BaseException) -> Later | Dead:
    """What an exception says by itself, *later* or *never*; it stays attached as the cause. What becomes of a crash in
    a function is for its policy to say (lamsonq.policy)."""
    if isinstance(error, Later | Dead):
        return error
    if isinstance(error, Undelivered):  # a relay's: worth another try while anybody may still get it
        later = any(isinstance(failure.outcome(), Later) for failure in error.failures)
    else:
        later = isinstance(error, SMTPError) and 400 <= error.code < 500
    outcome = Later(str(error)) if later else Dead(reason_of(error))
    outcome.__cause__ = error
    return outcome


REASON_MAX = 1000
"""Characters of an error's text that one line tells."""

REPORT_MAX = 64 << 10
"""Characters that are kept of one failure: an error may quote all that it was about."""


def reason_of(error: BaseException) -> str:
    """One line that names the error: what a dead letter and a log line show first."""
    try:
        text = " ".join(str(error)[: 4 * REASON_MAX].split())
    except BaseException:  # an error of the user's, with a __str__ of the user's
        text = "(an error whose text cannot be told)"
    text = text if len(text) <= REASON_MAX else f"{text[:REASON_MAX]}..."
    if isinstance(error, Later | Dead | SMTPError):
        return text or type(error).__name__
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def report_of(outcome: Later | Dead) -> str:
    """The reason and, where there was an exception, its traceback: what is kept beside a failed job."""
    try:
        details = _details_of(outcome.__cause__ or outcome)
    except BaseException as trouble:  # as in `reason_of`: a failure that cannot be told has to be settled, too
        details = f"(its traceback cannot be told: {type(trouble).__name__})\n"
    if len(details) > REPORT_MAX:
        half = REPORT_MAX // 2
        details = f"{details[:half]}\n[... {len(details) - 2 * half} characters ...]\n{details[-half:]}"
    return f"{reason_of(outcome)}\n\n{details}" if details else f"{reason_of(outcome)}\n"


def _details_of(error: BaseException) -> str:
    if error.__traceback__ is None and error.__cause__ is None and not getattr(error, "__notes__", None):
        return ""
    return "".join(traceback.format_exception(error))


class Refusal(Exception):
    """What a command cannot do, in one line that says what to do about it. `exit_code` ends the command."""

    exit_code = 1


class UsageError(Refusal):
    """A command line, a handler module or a route that cannot be used."""

    exit_code = 2


class RouteError(UsageError):
    """A route that cannot be loaded: names the file and line of the decorator."""


class QueueError(Refusal):
    """A queue that cannot be opened or written. `data` is what was to be queued, as Lamson has it."""

    def __init__(self, message: str, data: object = None) -> None:
        super().__init__(message)
        self._message = message  # Lamson's name for it
        self.data = data


class BrokerError(Refusal):
    """A queue's URL that no backend serves, or a server that does not answer."""

    exit_code = 3


class PidFileError(Refusal):
    """A pid file that is held by a running server, or is not one."""

    exit_code = 4


class SettingsError(Refusal):
    """A setting that is missing, misspelt or of the wrong type: names file, key, what was wanted and found."""

    exit_code = 5
