"""The SMTP engine alone: a message is dropped after its 250."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from ..contest import CPU, RATE, Contest, Entry, Scale, Target
from ..load import Load, accepted
from ..peers import aiosmtpd, lamsonq

OURS, FUNCTION = "lamsonq, the session", "lamsonq, a function in a thread"
STOCK = "aiosmtpd, a handler that drops"


def contests(scale: Scale) -> Iterator[Contest]:
    yield _contest(scale, Load(size=5_000), 3, 1 / 3)
    yield _contest(scale, Load(size=100_000), 8, 1 / 8)
    if scale.full:
        yield _contest(scale, Load(size=1_000_000), 8, 1 / 8)


def _contest(scale: Scale, load: Load, times: float, share: float) -> Contest:
    return Contest(
        f"SMTP engine: {load.named()}",
        [
            Entry(OURS, "nothing is kept", partial(accepted, lamsonq.session, load, scale.seconds)),
            Entry(FUNCTION, "nothing is kept", partial(accepted, lamsonq.engine, load, scale.seconds)),
            Entry(STOCK, "nothing is kept", partial(accepted, aiosmtpd.sink, load, scale.seconds), aiosmtpd.missing()),
        ],
        [
            Target(OURS, STOCK, RATE, least=times),
            Target(OURS, STOCK, CPU, most=round(share, 3)),
            Target(FUNCTION, STOCK, RATE),
            Target(FUNCTION, STOCK, CPU),
        ],
        note="The session answers on the event loop, as aiosmtpd's handler does; a function of ours runs in a thread.",
    )
