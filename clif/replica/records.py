"""Writes a rank's metrics: the one place that names the tables and columns of its file. Free of torch."""

from __future__ import annotations

import math
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clif.config import MetricsConfig
from clif.engine.jobs import STEP_KINDS
from clif.engine.scheduler import Scheduler
from clif.engine.step_record import StepRecord
from clif.metrics.device import DeviceMonitor
from clif.metrics.writer import TableWriter, next_path
from clif.types import RoundPlan, TrainingSlack

if TYPE_CHECKING:
    from clif.training.trainer import StepResult

TABLES = ("ticks", "train_steps", "versions", "device")


class RankRecords:
    """The HDF5 file of one rank. Rows are buffered and flushed by time and number. gpu: UUID or index, if any."""

    def __init__(
        self, run_dir: Path, rank: int, config: MetricsConfig, attributes: dict[str, Any], gpu: int | str | None = None
    ) -> None:
        self._writer = TableWriter(
            next_path(run_dir, f"rank-{rank:05d}"),
            TABLES,
            attributes,
            flush_s=config.flush_s,
            flush_rows=config.flush_rows,
        )
        self._device, self._device_s, self._sampled = DeviceMonitor(gpu), config.device_s, -math.inf
        self._step_s = 0.0
        self._ended: deque[tuple[RoundPlan, StepResult]] = deque()
        self.last_step: StepResult | None = None

    def engine_step(self, step: int, record: StepRecord, scheduler: Scheduler) -> None:
        """Record a step that did work; idle steps have no row."""
        if not record.serve_s and not record.train_s:
            return
        if record.train_kind in STEP_KINDS:
            self._step_s += record.train_s
        if record.step_ended:
            self._write_step()
        self._writer.row(
            "ticks",
            step=step,
            seconds=record.serve_s,
            decode_rows=record.decode_rows,
            prefill_tokens=record.prefill_tokens,
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            kv_used=scheduler.pool.used_tokens,
            train_kind=record.train_kind,
            train_s=record.train_s,
            regime=record.regime,
            preemptions=scheduler.preemptions,
            reused_tokens=scheduler.reused_tokens,
            **_slack(record.slack),
        )

    def train_step(self, plan: RoundPlan, result: StepResult) -> None:
        """Record an optimizer step at its end, when the time of its last slice is known."""
        self.last_step = result
        self._ended.append((plan, result))

    def _write_step(self) -> None:
        if not self._ended:
            return
        plan, result = self._ended.popleft()
        seconds, self._step_s = self._step_s, 0.0
        self._writer.row(
            "train_steps",
            step=result.step,
            round_id=plan.round_id,
            samples=result.samples,
            tokens=result.tokens,
            loss=result.loss,
            grad_norm=result.grad_norm,
            lr=result.lr,
            seconds=seconds,
            noise_scale=math.nan if result.noise_scale is None else result.noise_scale,
        )

    def version(self, version: int, round_id: int, step: int, slot: int) -> None:
        self._writer.row("versions", version=version, round_id=round_id, step=step, slot=slot)

    def maybe_flush(self) -> None:
        now = time.monotonic()
        if now - self._sampled >= self._device_s:
            self._sampled = now
            self._writer.row("device", **self._device.sample())
        self._writer.maybe_flush()

    def close(self) -> None:
        self._writer.close()


def _slack(slack: TrainingSlack | None) -> dict[str, Any]:
    """Columns of `ticks`; their defaults if no slack was computed."""
    if slack is None:
        return {}
    return {"slack_s": slack.seconds, "slack_limit": slack.limit.value, "slack_request": slack.request}
