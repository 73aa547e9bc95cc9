"""dead, retry and bury: the dead letters. Those that failed alike have one fingerprint (lamsonq.reports)."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from lamsonq.commands.options import argument, declare, json_option, option, switch
from lamsonq.commands.queues.opened import existing
from lamsonq.commands.queues.printed import moment, print_json, print_line, shown
from lamsonq.commands.queues.several import each_key, one_way
from lamsonq.errors import Refusal

if TYPE_CHECKING:
    from lamsonq.jobs import Backend
    from lamsonq.reports import Group


@declare()
@argument("name", metavar="QUEUE")
@option("fingerprint", "Those with this fingerprint only.", metavar="F")
@switch("keys", "Print the keys, one a line.")
@json_option
def dead(name: str | None, fingerprint: str | None, keys: bool, as_json: bool) -> None:
    """Show the dead letters in groups that failed alike: fingerprint, count, first, last, function, reason."""
    store = existing(name).backend
    groups = _groups(store, fingerprint)
    if as_json:
        print_json({"queue": store.name, "groups": [asdict(group) | {"count": len(group.keys)} for group in groups]})
        return
    for group in groups:
        if keys:
            print_line("\n".join(map(shown, group.keys)))
            continue
        when = f"{moment(group.first)}  {moment(group.last)}"
        target = shown(group.target) or "by address"
        print_line(f"{group.fingerprint}  {len(group.keys):>6}  {when}  {target}  {shown(group.reason)}")


def _groups(store: Backend, fingerprint: str | None) -> list[Group]:
    """Raises Refusal for a fingerprint that no dead letter has."""
    from lamsonq.reports import grouped

    def letters() -> list[tuple[str, str | None, str]]:
        jobs = ((key, store.get(key)) for key in store.keys("dead"))
        return [(key, job.target, store.report(key)) for key, job in jobs if job is not None]

    groups = grouped(letters())
    if fingerprint is None:
        return groups
    found = [group for group in groups if group.fingerprint == fingerprint]
    if not found:
        known = ", ".join(dict.fromkeys(group.fingerprint for group in groups)) or "none"
        raise Refusal(f"no dead letter of {store.name} has the fingerprint {fingerprint}; those there are: {known}")
    return found


@declare()
@argument("name", metavar="QUEUE")
@argument("keys", metavar="[KEY]...", nargs=-1)
@option("fingerprint", "All with this fingerprint.", metavar="F")
@switch("all", "All dead letters.")
@json_option
def retry(name: str | None, keys: tuple[str, ...], fingerprint: str | None, all: bool, as_json: bool) -> None:
    """Make dead letters ready again, their counts at zero; they go to the function that failed, and to no other."""
    one_way("dead letters", keys, all, fingerprint)
    store = existing(name).backend
    if fingerprint is not None:
        keys = tuple(key for group in _groups(store, fingerprint) for key in group.keys)
        store.keys("dead")  # a maildir remembers where they are
    elif all:
        keys = tuple(store.keys("dead"))
    each_key(store, keys, "dead", store.kick, "retried", as_json, listed=fingerprint is not None or all)


@declare()
@argument("name", metavar="QUEUE")
@argument("keys", metavar="[KEY]...", nargs=-1)
@option("reason", "Why; it is kept as the last failure.", default="buried by hand", metavar="TEXT")
@json_option
def bury(name: str | None, keys: tuple[str, ...], reason: str, as_json: bool) -> None:
    """Make messages dead letters that are not being worked."""
    from lamsonq.errors import Dead
    from lamsonq.jobs import Outcome

    one_way("messages", keys)
    store = existing(name).backend
    outcome: Outcome = Dead(reason)

    def act(key: str) -> bool:
        job = store.claim(key)
        if job is None:
            return False
        store.settle(job, outcome)
        return True

    each_key(store, keys, None, act, "buried", as_json)
