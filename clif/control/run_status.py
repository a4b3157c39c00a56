"""The run as clients, metrics and the live page are shown it: one JSON object, made a few times a second.

Its size is bounded: of replicas, rounds, versions and events it has the first or the latest, and sums over all.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import numpy as np

from clif import __version__
from clif.config import Config
from clif.control.activity import Activity
from clif.control.dispatcher import Dispatcher
from clif.control.federation import Federation
from clif.control.fleet import Fleet
from clif.control.job_shares import owner_of_job
from clif.control.jobs import JobBoard
from clif.control.policy.view import ReplicaView
from clif.control.policy_loop import PolicyLoop
from clif.control.progress import Snapshot
from clif.control.quality_scores import QualityScores
from clif.control.reporter import Reporter
from clif.control.versions import ModelRow, Versions
from clif.jobs.model import STANDING, Job, JobEvent

MOST_REPLICAS, MOST_JOBS, MOST_VERSIONS = 64, 16, 32
JOBS_S = 1.0


class StatusReport:
    """Reads every part and changes none. wall: seconds since 1970."""

    def __init__(
        self,
        config: Config,
        fleet: Fleet,
        dispatcher: Dispatcher,
        federation: Federation,
        policy: PolicyLoop,
        versions: Versions,
        reporter: Reporter,
        activity: Activity,
        jobs: JobBoard,
        scores: QualityScores,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._config, self._fleet, self._dispatcher = config, fleet, dispatcher
        self._federation, self._policy, self._reporter, self._activity = federation, policy, reporter, activity
        self._versions, self._wall, self._jobs, self._scores = versions, wall, jobs, scores
        self._owners: dict[str, str] = {}
        self._jobs_body: dict[str, Any] = {}
        self._next_jobs_s = -math.inf

    def body(self, now: float) -> dict[str, Any]:
        unix, tally = round(self._wall(), 2), self._fleet.tally()
        shown = self._reporter.snapshot(now)
        return {
            "version": __version__,
            "context": self._dispatcher.context_limit,
            "vocabulary": min((hello.vocabulary for hello in self._fleet.hellos), default=0),
            "unix": unix,
            "run": {**self._run(shown), "in_batches": tally.running},
            "promise": self._promise(),
            "training": self._training(now, shown),
            "states": dict(tally.states),
            "kv": {"used": tally.kv_used, "tokens": tally.kv_tokens},
            "replica_count": self._fleet.expected,
            "drained_count": len(self._fleet.drained),
            "replicas": self._replicas(shown),
            "models": [vars(row) | {"owner": self._owner(row.job)} for row in self._versions.models()],
            "canary": self._versions.canary,
            "pinned": self._versions.pinned,
            "versions": self._listed(),
            "quality": [*self._scores.latest],
            "rounds": [{"unix": round(unix - (now - at), 2), **row} for at, row in self._activity.rounds],
            "jobs": self._of_jobs(now),
            "totals": self._activity.totals.body(),
            "events": self._activity.events.body(now, unix),
        }

    def _run(self, shown: Snapshot) -> dict[str, Any]:
        return {
            "name": self._config.run.name,
            "model": self._config.model.path,
            "seconds": round(shown.seconds, 1),
            "phase": shown.phase,
            "pressure": shown.pressure,
            "pressure_reason": self._policy.pressure_reason,
            "running": shown.running,
            "queued": shown.queued,
            "outstanding": self._dispatcher.outstanding,
            "load_left": shown.load_left,
            "finished": dict(shown.finished),
            "ttft_ms": in_ms(shown.ttft_s),
            "itl_ms": in_ms(shown.itl_s),
            "last_loss": shown.last_loss,
            "training_steps": shown.training_steps,
            "version": shown.version,
            "round": shown.round,
        }

    def _promise(self) -> dict[str, Any]:
        """Latencies that are promised, and how many of the latest requests got them."""
        slo, window = self._config.slo, self._policy.window
        return {
            "ttft_ms": slo.ttft_ms,
            "tpot_ms": slo.tpot_ms,
            "finished": window.finished,
            "met": window.met,
            "window_s": self._config.control.window_s,
            "oldest_wait_s": round(window.oldest_wait_s, 2),
        }

    def _training(self, now: float, shown: Snapshot) -> dict[str, Any]:
        current = self._federation.current
        body: dict[str, Any] = {
            "enabled": self._config.train.enabled,
            "paused": self._policy.paused,
            "reason": self._policy.round_reason,
            "steps": shown.training_steps,
            "last_loss": shown.last_loss,
            "round": None,
        }
        if current is not None:
            plan = current.plan
            body["round"] = {
                "round_id": plan.round_id,
                "state": current.state.value,
                "members": len(plan.members),
                "seconds": round(now - current.began_s, 1),
                "job": plan.job,
                "adapter": plan.adapter,
                "base_version": plan.base_version,
            }
        return body

    def _replicas(self, shown: Snapshot) -> list[dict[str, Any]]:
        """The first MOST_REPLICAS."""
        known = (replica for replica in range(self._fleet.expected) if self._fleet.was_here(replica))
        views = (self._fleet.view_of(replica) for replica in islice(known, MOST_REPLICAS))
        return [_replica(view, shown.slack.get(view.replica, "")) for view in views]

    def _owner(self, job: str) -> str:
        """Of a job's id: the front end tells it to that key alone. It never changes, and is read from the store."""
        if job not in self._owners:
            self._owners[job] = owner_of_job(self._jobs.store, job)
        return self._owners[job]

    def _listed(self) -> list[dict[str, Any]]:
        """The newest versions, and the base at last."""
        rows = [*self._versions.listing(MOST_VERSIONS), self._versions.row(0)]
        return [_version(row) | self._answered(row.version) for row in rows]

    def _answered(self, version: int) -> dict[str, int]:
        answered = self._activity.totals.versions.get(version)
        if answered is None:
            return {"requests": 0, "tokens": 0, "slo_met": 0}
        return {"requests": answered.requests, "tokens": answered.tokens, "slo_met": answered.slo_met}

    def _of_jobs(self, now: float) -> dict[str, Any]:
        """The newest jobs with their last events, once a second: it is read from the store."""
        if now >= self._next_jobs_s:
            self._next_jobs_s = now + JOBS_S
            store = self._jobs.store
            live = Counter(job.status.value for job in store.live if job.id != STANDING)
            rows = [_job(job, store.events(job.id, limit=1)) for job in store.list_jobs(limit=MOST_JOBS)]
            self._jobs_body = {"live": dict(live), "rows": rows, "feedback_waiting": store.feedback_waiting()}
        return self._jobs_body


def _replica(view: ReplicaView, slack: str) -> dict[str, Any]:
    return {
        "replica": view.replica,
        "state": view.state.value,
        "drained": view.drained,
        "version": view.version,
        "running": view.running,
        "outstanding": view.outstanding,
        "max_batch": view.max_batch,
        "utilisation": round(view.utilisation, 3),
        "kv_used": view.kv_used,
        "kv_tokens": view.kv_tokens,
        "slack": slack,
    }


def _version(row: ModelRow) -> dict[str, Any]:
    return {
        "id": row.id,
        "version": row.version,
        "adapter": row.adapter,
        "state": row.state,
        "parent": row.parent,
        "round_id": row.round,
        "job": row.job,
        "heldout_loss": row.heldout_loss,
    }


def _job(job: Job, events: Sequence[JobEvent]) -> dict[str, Any]:
    return {
        "id": job.id,
        "created_s": job.created_s,
        "adapter": job.adapter,
        "status": job.status.value,
        "feedback": job.from_feedback,
        "priority": job.priority,
        "weight": job.weight,
        "counted": job.counted,
        "wanted": job.wanted,
        "completed": job.completed,
        "discarded": job.discarded,
        "trained_tokens": job.trained_tokens,
        "version": job.version,
        "error": job.error,
        "event": events[0].message if events else "",
    }


def in_ms(seconds: Sequence[float]) -> dict[str, float | None]:
    """Quantiles of latencies, milliseconds; None without any."""
    if not seconds:
        return {"p50": None, "p99": None}
    median, tail = np.percentile(seconds, (50, 99)) * 1000
    return {"p50": round(float(median), 1), "p99": round(float(tail), 1)}
