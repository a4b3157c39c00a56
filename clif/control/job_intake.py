"""Brings the samples of training jobs to the replicas: reads files, deals rows, and knows which replica has which."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass, field

from clif.config import Config
from clif.control.fleet import Fleet
from clif.control.job_samples import Samples, Survey, deal, survey
from clif.distributed.roles import role_of
from clif.errors import InputError
from clif.jobs.model import STANDING, Job, JobStatus
from clif.jobs.store import JobStore
from clif.wire.messages import JobData, JobOver


@dataclass(frozen=True)
class Outcome:
    """A job's files have been read. samples: to train on; error: why they cannot be used."""

    job: str
    samples: int = 0
    error: str = ""


@dataclass
class _Placed:
    """Where a job's samples are. holders: by replica, the incarnation that has all of its part."""

    found: Survey
    holders: dict[int, int] = field(default_factory=dict)


class JobIntake:
    """Works on one job at a time, a piece per step."""

    def __init__(self, config: Config, store: JobStore, fleet: Fleet) -> None:
        self._config, self._store, self._fleet = config, store, fleet
        replicas = range(fleet.expected)
        self._trainers = tuple(r for r in replicas if role_of(r, fleet.expected, config.run).trains)
        self._placed: dict[str, _Placed] = {}
        self._reading: tuple[str, Generator[None, None, Survey]] | None = None
        self._sending: tuple[str, dict[int, int], Iterator[list[tuple[int, JobData]]]] | None = None

    def holders(self, job: str) -> frozenset[int]:
        """Replicas that have samples of the job, and all of theirs."""
        placed = self._placed.get(job)
        if placed is None:
            return frozenset()
        with_rows = self._trainers[: self.shards(job)]
        return frozenset(r for r in with_rows if placed.holders.get(r) == self._incarnation(r))

    def shards(self, job: str) -> int:
        """How many replicas have samples of the job once all are there."""
        placed = self._placed.get(job)
        return 0 if placed is None else min(len(self._trainers), placed.found.train_rows)

    def gate_tokens(self, job: str) -> int:
        placed = self._placed.get(job)
        return 0 if placed is None else placed.found.gate_tokens

    def forget(self, job: str) -> None:
        """The job has ended."""
        if self._reading is not None and self._reading[0] == job:
            self._reading = None
        if self._sending is not None and self._sending[0] == job:
            self._sending = None
        self._placed.pop(job, None)
        for replica in self._trainers:
            if self._fleet.is_alive(replica):
                self._fleet.send(replica, JobOver(job=job))

    def step(self) -> Outcome | None:
        """Read or send a piece. Returns what came of a job whose files have been read."""
        if self._sending is not None:
            return self._send()
        if self._reading is not None:
            return self._read(*self._reading)
        jobs = [job for job in self._store.live if job.id != STANDING]
        unread = next((job for job in jobs if job.id not in self._placed), None)
        if unread is not None:
            self._reading = unread.id, survey(Samples(self._store, unread), self._config.jobs.heldout_share)
            return None
        self._begin_sending(jobs)
        return None

    def _read(self, job: str, reader: Generator[None, None, Survey]) -> Outcome | None:
        try:
            next(reader)
        except StopIteration as done:
            self._reading = None
            return self._placed_or_not(self._store.get_job(job), done.value)
        except InputError as error:
            self._reading = None
            return Outcome(job, error=str(error))
        return None

    def _placed_or_not(self, job: Job, found: Survey) -> Outcome:
        limit = min(self._config.data.max_sample_tokens, self._config.model.max_context)
        if found.longest > limit:
            return Outcome(job.id, error=f"a sample of {found.longest} tokens: this run trains on {limit} at most")
        if not found.train_rows:
            return Outcome(job.id, error="it has no sample to train on: give it more rows")
        self._placed[job.id] = _Placed(found)
        return Outcome(job.id, samples=found.train_rows)

    def _begin_sending(self, jobs: list[Job]) -> None:
        """Of the first job that some replica lacks."""
        there = {r: self._incarnation(r) for r in self._trainers if self._fleet.is_alive(r)}
        for job in jobs:
            placed = self._placed[job.id]
            lacking = {r: n for r, n in there.items() if placed.holders.get(r) != n}
            if lacking and job.status is not JobStatus.PAUSED:
                source = Samples(self._store, job)
                messages = deal(source, placed.found, self._trainers, frozenset(lacking))
                self._sending = job.id, lacking, messages
                return

    def _send(self) -> Outcome | None:
        assert self._sending is not None
        job, to, messages = self._sending
        try:
            piece = next(messages, None)
        except InputError as error:
            self._sending = None
            return Outcome(job, error=str(error))
        if piece is None:
            self._placed[job].holders |= to
            self._sending = None
            return None
        for replica, message in piece:
            # A replica that was rebuilt meanwhile gets all of it again.
            if self._fleet.is_alive(replica) and to[replica] == self._incarnation(replica):
                self._fleet.send(replica, message)
        return None

    def _incarnation(self, replica: int) -> int:
        return self._fleet.hello_of(replica).incarnation if self._fleet.is_alive(replica) else -1
