"""Rows of the control process: the one place that names the tables and columns of control.h5."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from clif.config import Config
from clif.control.dispatcher import RequestRecord
from clif.control.policy.batch_sizes import Batches
from clif.control.policy.pressure import Pressure, ServiceWindow
from clif.control.policy.promotion import pooled_losses
from clif.control.quality import Quality
from clif.control.rounds import Round
from clif.control.sources import DueRequest
from clif.metrics.provenance import provenance
from clif.metrics.schema import CONTROL_TABLES
from clif.metrics.writer import TableWriter, next_path
from clif.quality.work import Score
from clif.states import ReplicaState
from clif.types import AdapterVersion, FinishReason, Purpose, RoundResult, Vote

ROUND_STAMPS = ("started_s", "trained_s", "aggregated_s", "ended_s")


class Sink(Protocol):
    """Takes the rows of tables: a TableWriter, or a list in memory."""

    def row(self, table: str, **values: Any) -> None:
        """Take one row; None is a missing number."""
        ...

    def since_start(self, stamp: float) -> float:
        """A stamp of the clock as the sink's own time, as the columns of stamps want it."""
        ...

    def maybe_flush(self) -> bool: ...

    def flush(self) -> bool: ...

    def close(self) -> None:
        """Closing twice is harmless."""
        ...


class Records:
    """Rows of control.h5. Stamps are given in seconds of the clock and stored from the start of the sink."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink

    @classmethod
    def in_file(cls, run_dir: Path, config: Config, clock: Callable[[], float]) -> Records:
        """In a new file of the run's folder. Raises MetricsError or OSError as TableWriter does."""
        metrics, path = config.metrics, next_path(run_dir, "control")
        attributes = {**provenance(config)}
        return cls(TableWriter(path, CONTROL_TABLES, attributes, clock, metrics.flush_s, metrics.flush_rows))

    def request(self, record: RequestRecord, exact_match: bool | None) -> None:
        gaps = record.gaps_s
        self._sink.row(
            "requests",
            id=record.request.id,
            purpose=record.request.purpose.value,
            replica=-1 if record.replica is None else record.replica,
            version=-1 if record.version is None else record.version,
            prompt_tokens=len(record.request.prompt),
            output_tokens=len(record.token_times),
            arrival_s=self._stamp(record.arrival_s),
            dispatched_s=self._stamp(record.dispatched_s),
            first_token_s=self._stamp(record.first_token_s),
            finished_s=self._stamp(record.finished_s),
            ttft_s=record.ttft_s,
            tpot_s=record.tpot_s,
            max_itl_s=max(gaps, default=None),
            e2e_s=record.e2e_s,
            finish=(record.finish or FinishReason.FAILED).value,
            detail=record.detail,
            slo_met=record.slo_met,
            exact_match=-1 if exact_match is None else int(exact_match),
        )
        if record.request.purpose is Purpose.USER:
            for gap in gaps:
                self._sink.row("gaps", request=record.request.id, itl_s=gap)

    def dispatch(self, record: RequestRecord, predicted_s: float, reason: str) -> None:
        replica = -1 if record.replica is None else record.replica
        self._sink.row("dispatches", request=record.request.id, replica=replica, predicted_s=predicted_s, reason=reason)

    def transition(self, replica: int, before: ReplicaState, after: ReplicaState, reason: str) -> None:
        self._sink.row("transitions", replica=replica, from_state=before.value, to_state=after.value, reason=reason)

    def round(self, ended: Round) -> None:
        """A round that is over."""
        self.round_row(row_of(ended))

    def round_row(self, row: dict[str, Any]) -> None:
        """A row as row_of() makes it; its stamps are of the clock."""
        stamps = {name: self._stamp(row[name]) for name in ROUND_STAMPS}
        self._sink.row("rounds", **{**row, **stamps})

    def arrival(self, due: DueRequest) -> None:
        request = due.request
        self._sink.row(
            "load",
            request=request.id,
            at_s=due.at_s,
            prompt_tokens=len(request.prompt),
            max_tokens=request.sampling.max_tokens,
        )

    def pressure(self, pressure: Pressure, window: ServiceWindow, reason: str) -> None:
        attainment = window.met / window.finished if window.finished else None
        self._sink.row("pressure", level=pressure.value, attainment=attainment, backlog=window.queued, reason=reason)

    def adapter(self, version: AdapterVersion) -> None:
        self._sink.row(
            "adapters",
            version=version.number,
            round_id=version.round_id,
            heldout_loss=version.heldout_loss,
            adapter=version.adapter,
            parent=version.parent,
            job=version.job,
        )

    def batches(self, replica: int, batches: Batches, reason: str) -> None:
        self._sink.row(
            "batches",
            replica=replica,
            max_batch=batches.max_batch,
            micro_batch=batches.micro_batch,
            reason=reason,
        )

    def quality(self, phase: str, quality: Quality) -> None:
        self._sink.row(
            "quality",
            phase=phase,
            heldout_loss=quality.heldout_loss,
            heldout_tokens=quality.heldout_tokens,
            exact_match=quality.exact_match,
            exact_match_rows=quality.probes,
            version=quality.version,
        )

    def scores(self, phase: str, version: int, scores: Sequence[Score]) -> None:
        for one in scores:
            self._sink.row(
                "scores",
                phase=phase,
                version=version,
                metric=one.metric,
                group=one.group,
                name=one.name,
                value=one.value,
                low=one.low,
                high=one.high,
                count=one.count,
            )

    def maybe_flush(self) -> None:
        self._sink.maybe_flush()

    def flush(self) -> None:
        self._sink.flush()

    def close(self) -> None:
        self._sink.close()

    def _stamp(self, stamp: float | None) -> float | None:
        return None if stamp is None else self._sink.since_start(stamp)


def row_of(ended: Round) -> dict[str, Any]:
    """Columns of the table rounds. ROUND_STAMPS names those that are stamps of the clock."""
    results: list[RoundResult] = list(ended.results.values())
    votes: list[Vote] = list(ended.votes.values())
    candidate, active = pooled_losses(votes)
    return {
        "round_id": ended.plan.round_id,
        "state": ended.state.value,
        "members": ",".join(map(str, ended.plan.members)),
        "version": ended.version,
        "samples": sum(r.samples for r in results),
        "tokens": sum(r.tokens for r in results),
        "steps": sum(r.steps for r in results),
        "train_loss": train_loss(results),
        "heldout_candidate": candidate,
        "heldout_active": active,
        "outer_step": votes[0].outer_step if votes else None,
        "product_error": product_error(votes) if len(votes) == len(ended.plan.members) else None,
        "noise_scale": _mean([r.noise_scale for r in results]),
        "started_s": ended.began_s,
        "trained_s": ended.trained_s,
        "aggregated_s": ended.voted_s,
        "ended_s": ended.over_s,
        "running_requests": ended.running_requests,
        "reason": ended.reason,
        "gave_up": ended.gave_up,
    }


def product_error(votes: Sequence[Vote]) -> float | None:
    """Relative error of averaging A and B separately, from all members' shares; None if one is missing or B = 0."""
    shares = [(v.error2, v.product2) for v in votes if v.error2 is not None and v.product2 is not None]
    error2, product2 = (sum(column) for column in zip(*shares, strict=True)) if shares else (0.0, 0.0)
    # A member may claim numbers that are no squares.
    if len(shares) < len(votes) or not (product2 > 0 and error2 >= 0):
        return None
    return math.sqrt(error2 / product2)


def train_loss(results: list[RoundResult]) -> float | None:
    """Mean training loss over all answer tokens of all steps of all members, nats; None if nothing was finite."""
    finite = [r for r in results if r.targets > 0 and math.isfinite(r.loss)]
    targets = sum(r.targets for r in finite)
    return sum(r.loss * r.targets for r in finite) / targets if targets else None


def _mean(values: list[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None
