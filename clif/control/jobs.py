"""Training jobs in the control process: what clients ask of them, whose round is next, and what rounds did for them.

Everything lasting is in the store, RUN/jobs.db, and becomes durable at the end of each step of the server.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping

from msgspec.structs import replace

from clif.config import Config
from clif.control.fleet import Fleet
from clif.control.job_intake import JobIntake
from clif.control.job_rounds import as_stored, counted, event_of, history_of, what_it_did
from clif.control.policy.round_admission import OWN_DATA, History, JobTerms, pause_s, target_reached
from clif.control.rounds import Round
from clif.control.versions import Versions
from clif.errors import InputError
from clif.jobs.model import (
    STANDING,
    FeedbackRow,
    Hyperparameters,
    Job,
    JobEvent,
    JobRound,
    JobStatus,
    LimitReached,
    advance_job,
)
from clif.jobs.policy import JobView, choose_job, job_done, joins_at, named
from clif.jobs.store import JobStore, new_id
from clif.types import CLIF, AdapterVersion, RoundPlan

log = logging.getLogger(__name__)
DAY_S = 86_400.0


class JobBoard:
    """Owner of the store. now: seconds of the server's clock; unix: a stamp of it as wall time.

    gate_tokens: answer tokens by which replicas judge the candidate of the last round that began, beside their own
    rows. Its job may end before they vote. The board is one of the federation's observers.
    """

    def __init__(
        self, config: Config, store: JobStore, fleet: Fleet, versions: Versions, unix: Callable[[float], float]
    ) -> None:
        self.store, self._versions = store, versions
        self._config, self._unix = config, unix
        self._intake = JobIntake(config, store, fleet)
        self.gate_tokens = 0
        self._last_end_s: dict[str, float] = {}
        self._now, self._own_over = 0.0, False
        self._own = config.train.enabled and config.data.path is not None
        if self._own:
            self._take_in_own(config.jobs.own_weight)

    # --- what clients ask ----------------------------------------------------------------------------

    def create(self, now: float, job: Job) -> Job:
        """Take in a job; its id is new_id("ftjob"). Its adapter follows from the suffix: `clif` without one.

        Raises InputError, UnknownId for a file that is not there, LimitReached, and Refused for a suffix that is no
        name of an adapter, or of one for which the replicas have no slot.
        """
        if not self._config.train.enabled:
            raise InputError("this run does not train (train.enabled is false): no job can run")
        if job.suffix:
            self._check_adapter(job.suffix)
        if len(self._jobs) >= self._config.jobs.max_jobs:
            raise LimitReached(
                f"{self._config.jobs.max_jobs} jobs have not ended, as many as jobs.max_jobs allows: wait or cancel one"
            )
        job = replace(job, adapter=job.suffix or CLIF, status=JobStatus.VALIDATING_FILES, served=self._joins_at(job))
        self.store.create_job(job)
        self._event(now, job.id, "the job is created; its files are being read")
        return job

    def cancel(self, now: float, id: str) -> Job:
        """End a job; the round under way is given up. Raises UnknownId, and Conflict if it has ended."""
        return self._end(now, self.store.get_job(id), JobStatus.CANCELLED, "the job is cancelled")

    def pause(self, now: float, id: str) -> Job:
        """No further round until resume(); one that is under way ends first. Raises as cancel() does."""
        return self._change(now, self.store.get_job(id), JobStatus.PAUSED, "the job is paused")

    def resume(self, now: float, id: str) -> Job:
        """Go on with a paused job. Raises as cancel() does."""
        job = self.store.get_job(id)
        return self._change(now, replace(job, served=self._joins_at(job)), JobStatus.QUEUED, "the job goes on")

    def add_feedback(self, now: float, rows: Iterable[FeedbackRow]) -> tuple[int, int]:
        """(rows that are kept, rows that are known already). Raises InputError, and LimitReached for a full store or a
        key that has used up its quota; rows before that are kept."""
        jobs, kept, known = self._config.jobs, 0, 0
        if not self._takes_feedback:
            raise InputError("this run takes no feedback: it needs jobs.allow_feedback=true and train.enabled=true")
        for row in rows:
            if self.store.feedback_of(row.owner, self._unix(now) - DAY_S) >= jobs.feedback_quota:
                raise LimitReached(f"a key may send {jobs.feedback_quota} rows of feedback in a day: go on tomorrow")
            new = self.store.add_feedback(row, jobs.max_feedback)
            kept, known = kept + new, known + (not new)
        return kept, known

    # --- rounds --------------------------------------------------------------------------------------

    def begin(self, now: float, committed: Iterable[AdapterVersion], rows: Mapping[int, Mapping[str, object]]) -> None:
        """Count the committed rounds that a killed process had no time to note, each once.

        rows: by round, what the journal says of it.
        """
        known, jobs = self.store.known_rounds(), self.store.jobs()
        for version in committed:
            if version.job in jobs and version.job != STANDING and version.round_id not in known:
                done = as_stored(version, rows.get(version.round_id, {}), self._unix(now))
                job = self.store.get_job(version.job)
                self._count(now, done, History(lr_scale=job.lr_scale).after(now, True, True))

    def histories(self) -> dict[str, History]:
        """What earlier starts did for the jobs that go on."""
        return {job.id: history_of(job) for job in self._jobs}

    @property
    def wanted(self) -> bool:
        """Whether a job waits for rounds, besides the run's own data."""
        return any(job.status is not JobStatus.PAUSED for job in self._jobs)

    def objection(self, job: str) -> str:
        """Why a round of this job is to be given up; empty: it is not."""
        return "" if job == STANDING or any(job == live.id for live in self._jobs) else "its job has ended"

    def candidates(self, now: float, own: History) -> Iterator[tuple[JobTerms | None, str]]:
        """The jobs that may take the next round, the first choice first, with the reasons; at last why no further.

        own: history of the run's own data.
        """
        self._own_over = target_reached(own, self._config)[0]
        if not self._jobs:
            yield (OWN_DATA, "") if self._own or self._own_over else (None, "no job wants rounds")
            return
        jobs = {job.id: job for job in self._competing}
        views = [self._view(job) for job in jobs.values()]
        while views:
            chosen, reason = choose_job(now, views)
            if chosen is None:
                yield None, reason
                return
            views.remove(chosen)
            yield self._terms(jobs[chosen.id]), reason

    def step(self, now: float) -> None:
        """Once per step of the server: read files and send samples, a piece of them."""
        self._now = now
        outcome = self._intake.step()
        if outcome is None:
            return
        job = self.store.get_job(outcome.job)
        if outcome.error:
            self._end(now, job, JobStatus.FAILED, outcome.error)
        elif job.status is JobStatus.VALIDATING_FILES:
            job = replace(job, samples=outcome.samples)
            self._change(now, job, JobStatus.QUEUED, f"{outcome.samples} samples to train on; the job waits for slack")

    def decide(self, now: float) -> None:
        """Once per control period: feedback becomes a job, and what is done ends."""
        if self._takes_feedback:
            self._batch_feedback(now)
        for job in self._jobs:
            status, reason = job_done(job)
            if status is not None:
                self._end(now, job, status, reason)

    def commit(self) -> None:
        """Make durable what this step wrote."""
        self.store.commit()

    # --- the federation's observer -------------------------------------------------------------------

    def on_round_began(self, plan: RoundPlan) -> None:
        self.gate_tokens = self._intake.gate_tokens(plan.job)
        if plan.job == STANDING:
            return
        job = self.store.get_job(plan.job)
        if job.status is JobStatus.QUEUED:
            started = job.started_s if job.started_s is not None else self._unix(self._now)
            base = job.base_version if job.completed + job.discarded else plan.base_version
            job = replace(job, started_s=started, base_version=base)
            self._change(self._now, job, JobStatus.RUNNING, "the job trains")
        message = f"round {plan.round_id} began on replicas {', '.join(map(str, plan.members))}"
        data = {"round": plan.round_id, "base_version": plan.base_version, "learning_rate_scale": plan.lr_scale}
        self._event(self._now, plan.job, message, type="round", data=data)

    def on_round_decided(self, current: Round) -> None:
        return

    def on_storing(self, current: Round, version: AdapterVersion) -> None:
        return

    def on_stored(self, version: AdapterVersion) -> None:
        return

    def on_round_ended(self, ended: Round) -> None:
        if ended.plan.job == STANDING and not self._own:
            return
        self._last_end_s[ended.plan.job] = ended.over_s or self._now
        assert ended.history is not None
        self._count(self._now, what_it_did(ended, self._unix(self._now)), ended.history)

    # --- all of them ---------------------------------------------------------------------------------

    def _check_adapter(self, name: str) -> None:
        self._versions.check_name(name)
        if name == CLIF:
            raise InputError(f'the suffix "{CLIF}" is the name of the run\'s own adapter: leave the suffix out')
        self._versions.check_room(*(job.adapter for job in self._jobs), name)

    @property
    def _takes_feedback(self) -> bool:
        return self._config.jobs.allow_feedback and self._config.train.enabled

    def _take_in_own(self, weight: float) -> None:
        known = next((job for job in self.store.live if job.id == STANDING), None)
        if known is None:
            self.store.create_job(Job(id=STANDING, created_s=0.0, status=JobStatus.RUNNING, weight=weight))
        elif known.weight != weight:
            self.store.put_job(replace(known, weight=weight))

    @property
    def _jobs(self) -> list[Job]:
        return [job for job in self.store.live if job.id != STANDING]

    @property
    def _competing(self) -> list[Job]:
        """Jobs that may get rounds, now or later, and the run's own data as long as they want some."""
        return [job for job in self.store.live if job.id != STANDING or (self._own and not self._own_over)]

    def _joins_at(self, job: Job) -> float:
        others = (o.served for o in self._competing if o.id != job.id and o.status is not JobStatus.PAUSED)
        return joins_at(job.served, others)

    def _count(self, now: float, done: JobRound, history: History) -> None:
        """Note a round, once."""
        if not self.store.record_round(done):
            return
        job = self.store.get_job(done.job)
        job = counted(job, done, history)
        self.store.put_job(job)
        if done.job == STANDING:
            return
        message, data = event_of(job, done)
        self._event(now, job.id, message, type="round", data=data)

    def _view(self, job: Job) -> JobView:
        history = History(discarded_in_a_row=job.discarded_in_a_row)
        rests = self._last_end_s.get(job.id, float("-inf")) + pause_s(history, self._config)
        waits = "" if job.id == STANDING else self._waits(job)
        return JobView(job.id, job.priority, job.served, rests, waits)

    def _waits(self, job: Job) -> str:
        if job.status is JobStatus.PAUSED:
            return "it is paused"
        if job.status is JobStatus.VALIDATING_FILES:
            return "its files are being read"
        return "" if self._intake.holders(job.id) else "its samples are on their way to the replicas"

    def _terms(self, job: Job) -> JobTerms:
        if job.id == STANDING:
            return OWN_DATA
        wanted = job.hyperparameters
        return JobTerms(
            job=job.id,
            adapter=job.adapter,
            ready=self._intake.holders(job.id),
            shards=self._intake.shards(job.id),
            samples_left=max(1, job.wanted - job.counted),
            batch_size=wanted.batch_size,
            lr_scale=wanted.learning_rate_multiplier,
        )

    def _batch_feedback(self, now: float) -> None:
        jobs, waiting, live = self._config.jobs, self.store.feedback_waiting(), self._jobs
        if not waiting or len(live) >= jobs.max_jobs or any(job.from_feedback for job in live):
            return
        oldest = self.store.oldest_feedback_s()
        due = oldest is not None and self._unix(now) - oldest >= jobs.feedback_wait_s
        if waiting < jobs.feedback_rows and not due:
            return
        wanted = Hyperparameters(n_epochs=jobs.feedback_epochs)
        job = Job(id=new_id("ftjob"), created_s=self._unix(now), hyperparameters=wanted, metadata={"from": "feedback"})
        self.store.take_feedback(job.id)
        self.create(now, job)

    def _change(self, now: float, job: Job, status: JobStatus, message: str) -> Job:
        changed = self.store.put_job(replace(job, status=advance_job(job.status, status)))
        self._event(now, job.id, message)
        return changed

    def _end(self, now: float, job: Job, status: JobStatus, reason: str) -> Job:
        error = reason if status is JobStatus.FAILED else ""
        job = self._change(now, replace(job, finished_s=self._unix(now), error=error), status, reason)
        if job.from_feedback:
            self.store.drop_feedback(job.id)
        self._intake.forget(job.id)
        log.info("%s %s: %s", named(job.id), status.value, reason)
        return job

    def _event(self, now: float, job: str, message: str, type: str = "message", data: Mapping | None = None) -> None:
        event = JobEvent(
            id=new_id("ftevent"), created_s=self._unix(now), message=message, type=type, data=dict(data or {})
        )
        self.store.add_event(job, event)
