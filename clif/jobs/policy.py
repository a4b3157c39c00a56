"""Which job trains in the next round, and when a job is done. Pure functions, free of torch.

Sources: start-time fair queueing (Goyal et al., SIGCOMM 1996): each flow's service is counted as work / weight, the one
that has had least is next, and one that comes or returns begins where the least served stands: it claims nothing for
the time in which it wanted nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from clif.jobs.model import Job, JobStatus

GIVE_UP = 8
"""A job ends after this many discarded rounds in a row: they make nothing that is better."""


@dataclass(frozen=True)
class JobView:
    """A job at one moment. served: trained tokens / weight. rests_until_s: after discarded rounds, of the clock.

    waits: why it can take no round now; empty: it can.
    """

    id: str
    priority: int = 0
    served: float = 0.0
    rests_until_s: float = float("-inf")
    waits: str = ""


def choose_job(now: float, views: Sequence[JobView]) -> tuple[JobView | None, str]:
    """The job whose round is next, with the reason, or None and why there is none.

    Of those that can take a round: the highest priority, then the least served, then the oldest.
    """
    if not views:
        return None, "there is no job"
    ready = [view for view in views if not view.waits and now >= view.rests_until_s]
    if not ready:
        first = min(views, key=lambda view: (bool(view.waits), view.rests_until_s))
        pause = f"pauses for {first.rests_until_s - now:.1f} s after discarded rounds"
        return None, f"{named(first.id)}: {first.waits or pause}"
    top = max(view.priority for view in ready)
    chosen = min((view for view in ready if view.priority == top), key=lambda view: view.served)
    if len(ready) == 1:
        return chosen, f"{named(chosen.id)} is the only one"
    why = f"of {len(ready)} jobs it has trained least for its weight"
    return chosen, f"{named(chosen.id)}: {why}" + (f", at priority {top}" if top else "")


def named(job: str) -> str:
    return f"job {job}" if job else "the run's own data"


def joins_at(served: float, others: Iterable[float]) -> float:
    """Where a job stands that comes or returns, among those that want rounds already."""
    return max(served, min(others, default=served))


def job_done(job: Job) -> tuple[JobStatus | None, str]:
    """The status in which a job ends now, with the reason; None while it goes on."""
    limit = job.hyperparameters.max_rounds
    if job.samples and job.counted >= job.wanted:
        return JobStatus.SUCCEEDED, f"{job.counted} samples were trained on, {job.hyperparameters.n_epochs} epochs"
    if limit is not None and job.completed >= limit:
        return JobStatus.SUCCEEDED, f"{job.completed} rounds are committed, as many as were asked for"
    if job.discarded_in_a_row < GIVE_UP:
        return None, f"{job.counted} of {job.wanted} samples"
    why = f"{job.discarded_in_a_row} rounds in a row were discarded, the last because: {job.discard_reason}"
    if job.version:
        return JobStatus.SUCCEEDED, f"version {job.version} is the best one: {why}"
    return JobStatus.FAILED, why
