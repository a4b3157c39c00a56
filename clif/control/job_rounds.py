"""What rounds did for jobs: the record of a round, and a job with that round counted. Pure functions, free of torch."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec.structs import replace

from clif.control.policy.promotion import pooled_losses
from clif.control.policy.round_admission import History
from clif.control.records import train_loss
from clif.control.rounds import Round
from clif.jobs.model import Job, JobRound
from clif.states import RoundState
from clif.types import AdapterVersion


def what_it_did(ended: Round, unix: float) -> JobRound:
    """The record of a round that is over. unix: the end, as wall time."""
    results = list(ended.results.values())
    candidate, active = pooled_losses(list(ended.votes.values()))
    committed = ended.state is RoundState.COMMITTED
    return JobRound(
        round_id=ended.plan.round_id,
        job=ended.plan.job,
        ended_s=unix,
        committed=committed,
        version=ended.version if committed else 0,
        samples=sum(r.samples for r in results),
        tokens=sum(r.tokens for r in results),
        steps=sum(r.steps for r in results),
        train_loss=train_loss(results),
        candidate_loss=candidate,
        active_loss=active,
        judged=ended.voted_s is not None,
        reason=ended.reason,
        lr_scale=ended.plan.lr_scale,
    )


def as_stored(version: AdapterVersion, row: Mapping[str, object], unix: float) -> JobRound:
    """The record of a committed round of which only its version and its row in the journal are left."""
    samples, tokens = (int(str(row.get(name, 0))) for name in ("samples", "tokens"))
    return JobRound(
        round_id=version.round_id,
        job=version.job,
        ended_s=unix,
        committed=True,
        version=version.number,
        samples=samples,
        tokens=tokens,
        candidate_loss=version.heldout_loss,
        judged=True,
        reason="it was committed before the control process ended",
    )


def counted(job: Job, done: JobRound, history: History) -> Job:
    """The job with a round counted. history: of the job, with this round."""
    return replace(
        job,
        counted=job.counted + done.samples * done.committed,
        trained_tokens=job.trained_tokens + done.tokens,
        served=job.served + done.tokens / job.weight,
        completed=job.completed + done.committed,
        discarded=job.discarded + (not done.committed),
        discarded_in_a_row=history.discarded_in_a_row,
        lr_scale=history.lr_scale,
        discard_reason=job.discard_reason if done.committed else done.reason,
        version=done.version or job.version,
    )


def history_of(job: Job) -> History:
    """The rounds of earlier starts, from the job's record."""
    return History(
        completed=job.completed,
        discarded=job.discarded,
        discarded_in_a_row=job.discarded_in_a_row,
        lr_scale=job.lr_scale,
    )


def event_of(job: Job, done: JobRound) -> tuple[str, dict[str, float | int | str | None]]:
    """The event of a round of a job: its message and its figures."""
    became = f"is committed as version {done.version}" if done.committed else "is discarded"
    data: dict[str, float | int | str | None] = {
        "round": done.round_id,
        "version": done.version,
        "samples": done.samples,
        "tokens": done.tokens,
        "train_loss": done.train_loss,
        "valid_loss": done.candidate_loss,
        "counted": job.counted,
    }
    return f"round {done.round_id} {became}: {done.reason}", data
