"""The conformance suite finds a backend that is at fault: each of these has one."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import pytest

from lamsonq.backends.memory import Memory
from lamsonq.conformance import BackendConformance
from lamsonq.errors import Later, LeaseLost
from lamsonq.jobs import DONE, Done, Job, Outcome, Put, Tick
from tests.lamsonq.stores import MemoryStores

# -- backends with a fault -----------------------------------------------------------------------------------------


class ForgetsFencing(Memory):
    def _held(self, job: Job) -> Any:
        return self._store.jobs.get(job.key) or super()._held(job)


class LosesADelay(Memory):
    def put(self, puts: Sequence[Put], conn: object = None) -> list[bool]:
        return super().put([replace(put, job=replace(put.job, due=None)) for put in puts], conn)


class ClaimsTwice(Memory):
    def _take(self, n: int, only: Collection[str] | None) -> list[Job]:
        jobs = super()._take(n, only)
        for job in jobs:
            kept = self._store.jobs[job.key]
            kept.state = "ready"
            self._line_up(kept)
        return jobs


class DropsMetadata(Memory):
    def put(self, puts: Sequence[Put], conn: object = None) -> list[bool]:
        return super().put([replace(put, job=replace(put.job, metadata={})) for put in puts], conn)


class TakesTheNullSenderForNone(Memory):
    def put(self, puts: Sequence[Put], conn: object = None) -> list[bool]:
        return super().put([replace(put, job=replace(put.job, sender=put.job.sender or None)) for put in puts], conn)


class RewritesBytes(Memory):
    def put(self, puts: Sequence[Put], conn: object = None) -> list[bool]:
        return super().put(
            [replace(put, job=replace(put.job, body=put.job.body.replace(b"\x00", b""))) for put in puts], conn
        )


class PublishesForWhoHasLost(Memory):
    def settle(self, job: Job, outcome: Outcome, puts: Sequence[Put] = ()) -> list[bool]:
        self.put([replace(put, store=self) for put in puts])
        return super().settle(job, outcome, [])


class ForgetsPuts(Memory):
    def settle(self, job: Job, outcome: Outcome, puts: Sequence[Put] = ()) -> list[bool]:
        super().settle(job, outcome, [put for put in puts if put.store is self])
        return [True for _ in puts]


class KnowsNoPriority(Memory):
    def put(self, puts: Sequence[Put], conn: object = None) -> list[bool]:
        return super().put([replace(put, job=replace(put.job, priority=0)) for put in puts], conn)


class TakesWhatIsNotItsOwn(Memory):
    def _take(self, n: int, only: Collection[str] | None) -> list[Job]:
        return super()._take(n, only and None)


class KnowsNoUnique(Memory):
    def _put(self, put: Put) -> bool:
        self._store.unique.clear()
        return super()._put(put)


class KeepsUniqueForEver(Memory):
    def _free_unique(self, job: Job) -> None:
        pass


class DecidesBeforeItKeeps(Memory):
    """Reads the gate, and keeps the job in another step."""

    def put(self, puts: Sequence[Put], conn: object = None) -> list[bool]:
        results = []
        for put in puts:
            gate = put.gate
            if gate is None:
                results += super().put([put], conn)
                continue
            passage = gate.passage(self._store.gates.get(gate.key, (None, 0.0))[0], self._now())
            time.sleep(0.2)
            if passage is not None:
                self._store.gates[gate.key] = passage.last, 0.0
                super().put([replace(put, gate=None, job=replace(put.job, due=passage.due))])
            results.append(passage is not None)
        return results


class TicksEveryTime(Memory):
    def _put(self, put: Put) -> bool:
        return super()._put(replace(put, gate=None) if isinstance(put.gate, Tick) else put)


class LosesReports(Memory):
    def report(self, key: str) -> str:
        return super().report(key)[:0]


class KeepsOnlyTheLastReport(Memory):
    def settle(self, job: Job, outcome: Outcome, puts: Sequence[Put] = ()) -> list[bool]:
        self._held(job).report = ""
        return super().settle(job, outcome, puts)


class ForgetsTheDead(Memory):
    def release_stale(self) -> int:
        with self._store.changed:
            for key in [key for key, kept in self._store.jobs.items() if kept.worker in self._store.dead_workers]:
                self._delete(key)
        return super().release_stale()


class DoesNotCountDeliveries(Memory):
    def release_stale(self) -> int:
        with self._store.changed:
            for kept in self._store.jobs.values():
                if kept.worker in self._store.dead_workers:
                    kept.job = replace(kept.job, deliveries=0)
        return super().release_stale()


class ForgivesNobody(Memory):
    def forgive(self) -> None:
        pass


class CountsWhatIsGivenBack(Memory):
    def settle(self, job: Job, outcome: Outcome, puts: Sequence[Put] = ()) -> list[bool]:
        if isinstance(outcome, Later) and not outcome.counted:
            outcome = Later(outcome.reason, self._now())
        return super().settle(job, outcome, puts)


class PausesOnlyItself(Memory):
    def pause(self) -> None:
        self._resting = True

    def paused(self) -> bool:
        return getattr(self, "_resting", False)


class KicksWithItsCounts(Memory):
    def kick(self, key: str) -> bool:
        attempts = self._store.jobs[key].job.attempts if key in self._store.jobs else 0
        kicked = super().kick(key)
        if kicked:
            self._store.jobs[key].job = replace(self._store.jobs[key].job, attempts=attempts)
        return kicked


class PurgesTheYoungToo(Memory):
    def purge(self, state: str, before: float | None = None) -> int:
        return super().purge(state, before and None)


class ClaimsWhereItLooks(Memory):
    def get(self, key: str) -> Job | None:
        return self.claim(key)


class ForgetsToWake(Memory):
    def _line_up(self, kept: Any) -> None:
        with self._store.changed:
            before, self._store.changed = self._store.changed, threading.Condition()
            with self._store.changed:
                super()._line_up(kept)
            self._store.changed = before


class KeepsNoArchive(Memory):
    def settle(self, job: Job, outcome: Outcome, puts: Sequence[Put] = ()) -> list[bool]:
        return super().settle(job, DONE if isinstance(outcome, Done) else outcome, puts)


class ForgetsWhereAToolFoundIt(Memory):
    def claim(self, key: str) -> Job | None:
        job = super().claim(key)
        if job is not None:
            self._store.jobs[key].origin = ""
        return job


FAULTS: dict[type[Memory], str] = {
    ForgetsFencing: "test_who_has_lost_a_claim_changes_nothing",
    LosesADelay: "test_a_delayed_job_comes_when_it_is_due_and_not_before",
    ClaimsTwice: "test_a_job_has_one_worker",
    DropsMetadata: "test_a_job_comes_back_with_all_that_it_was_put_with",
    TakesTheNullSenderForNone: "test_the_null_sender_is_not_the_same_as_no_sender",
    RewritesBytes: "test_the_bytes_of_a_message_are_never_changed",
    PublishesForWhoHasLost: "test_who_has_lost_a_claim_changes_nothing",
    ForgetsPuts: "test_what_came_of_a_job_is_there_when_it_is_settled",
    KnowsNoPriority: "test_the_most_urgent_come_first_and_the_oldest_of_them",
    TakesWhatIsNotItsOwn: "test_only_jobs_with_these_targets_are_reserved",
    KnowsNoUnique: "test_of_like_jobs_one_waits",
    KeepsUniqueForEver: "test_a_like_job_may_come_when_the_first_has_ended",
    DecidesBeforeItKeeps: "test_of_racing_debounced_jobs_one_runs_in_a_window",
    TicksEveryTime: "test_each_tick_is_put_once_by_whomever",
    LosesReports: "test_dead_letters_are_kept_with_reason_and_traceback",
    KeepsOnlyTheLastReport: "test_each_failure_is_told_behind_the_others",
    ForgetsTheDead: "test_the_job_of_a_dead_worker_comes_again_counted",
    DoesNotCountDeliveries: "test_a_job_that_kills_its_workers_is_a_dead_letter",
    ForgivesNobody: "test_a_worker_that_is_being_stopped_may_be_killed_and_harms_no_job",
    CountsWhatIsGivenBack: "test_a_job_given_back_uncounted_is_as_if_it_had_never_been_taken",
    PausesOnlyItself: "test_nothing_is_reserved_from_a_paused_queue_by_any_process",
    KicksWithItsCounts: "test_kicked_jobs_are_ready_with_their_counts_at_zero",
    PurgesTheYoungToo: "test_purging_deletes_one_state_or_what_has_been_in_it_for_long",
    ClaimsWhereItLooks: "test_looking_claims_nothing",
    ForgetsToWake: "test_a_waiting_worker_hears_of_a_job_that_another_process_puts",
    ForgetsWhereAToolFoundIt: "test_what_a_tool_had_claimed_when_it_died_goes_back_as_it_was",
    KeepsNoArchive: "test_what_is_kept_lies_in_the_archive_and_can_be_run_again",
}


LONG = {ForgetsToWake}  # waits for two seconds in vain


@pytest.mark.parametrize(
    ("fault", "test"),
    [pytest.param(*each, marks=pytest.mark.slow if each[0] in LONG else ()) for each in FAULTS.items()],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_the_suite_finds_a_backend_that_is_at_fault(fault: type[Memory], test: str) -> None:
    class Stores(MemoryStores):
        kind = fault

    with pytest.raises((AssertionError, ValueError, KeyError, LeaseLost)):
        getattr(BackendConformance(), test)(Stores())
