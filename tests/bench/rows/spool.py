"""Accepted durably into a queue, against Postfix: 250 is said when the message would survive a power failure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from ..contest import CPU, RATE, Contest, Entry, Scale, Target
from ..load import Load, accepted
from ..peers import lamsonq, postfix

SQLITE, MAILDIR, POSTFIX = "lamsonq, SQLite", "lamsonq, maildir", "Postfix"
TWICE = "lamsonq, SQLite, -workers 2"
SYNCED = "file and directory synced"
BOTH = (
    Target(SQLITE, POSTFIX, RATE, least=2.5),
    Target(SQLITE, POSTFIX, CPU, most=0.25),
    Target(TWICE, SQLITE, RATE),
    Target(MAILDIR, POSTFIX, RATE, least=1.1),
    Target(MAILDIR, POSTFIX, CPU),
)


def contests(scale: Scale) -> Iterator[Contest]:
    yield contest(scale, Load(), BOTH)
    crowd = [
        Target(SQLITE, POSTFIX, RATE, least=5),
        Target(TWICE, SQLITE, RATE),
        Target(MAILDIR, POSTFIX, RATE, least=2),
    ]
    yield contest(scale, Load(sessions=50), crowd)
    yield contest(scale, Load(sessions=1), _alike(1.7))
    yield contest(scale, Load(keep=False), _alike(1.6))


def contest(scale: Scale, load: Load, targets: Sequence[Target]) -> Contest:
    twice = partial(lamsonq.sqlite, processes=2)
    return Contest(
        f"Accepted durably: {load.named()}",
        [
            Entry(SQLITE, "committed, synced", partial(accepted, lamsonq.sqlite, load, scale.seconds)),
            *(
                [Entry(TWICE, "committed, synced", partial(accepted, twice, load, scale.seconds))]
                if any(target.ours == TWICE for target in targets)
                else []
            ),
            Entry(MAILDIR, SYNCED, partial(accepted, lamsonq.maildir, load, scale.seconds)),
            Entry(POSTFIX, SYNCED, partial(accepted, postfix.durable, load, scale.seconds), postfix.missing()),
        ],
        targets,
    )


def _alike(times: float) -> list[Target]:
    return [Target(SQLITE, POSTFIX, RATE, least=times), Target(MAILDIR, POSTFIX, RATE)]
