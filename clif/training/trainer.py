"""The shadow's training step: AdamW on the flat float32 master, in slices; no sample is lost.

Samples are claimed when a step begins, and committed or deferred when the round of the step is settled.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch

from clif.adapters.bank import AdapterBank
from clif.config import TrainConfig
from clif.data.cursor import SampleCursor, fingerprint
from clif.engine.jobs import WAIT, Slice, SliceKind, Slices
from clif.training.device_work import on_host, reads_later
from clif.training.noise_scale import Comparison, NoiseScale, NoiseWatch
from clif.training.train_runner import TrainRunner
from clif.types import TrainSample


@dataclass(frozen=True)
class StepResult:
    """One optimizer step. loss: nats per target token, of which there are `targets`; finite False: nothing was changed.

    tokens: with those of the prompts.
    """

    step: int
    samples: int
    tokens: int
    targets: int
    loss: float
    grad_norm: float
    lr: float
    finite: bool
    noise_scale: float | None


class Measured(NamedTuple):
    """What the host must know of a step. values: norm of the gradient, then so many losses, then those of `seen`."""

    values: torch.Tensor
    losses: int
    seen: Comparison | None


@dataclass
class JobTraining:
    """What the training of a job needs, beside the shadow. moments: those of AdamW [n], none before the first step."""

    samples: list[TrainSample]
    cursor: SampleCursor | None
    noise: NoiseScale
    moments: dict[str, torch.Tensor]
    steps: int = 0


class StepCut(Exception):
    """Raised in a step between two slices: its time is up. Its samples come first again."""


class ShadowTrainer:
    """Trains the bank's shadow on samples of this replica: of one job at a time."""

    def __init__(
        self, runner: TrainRunner, bank: AdapterBank, samples: list[TrainSample], config: TrainConfig, seed: int = 0
    ) -> None:
        """samples: of the run's own data; without any, jobs bring theirs."""
        self.runner, self.bank, self.config = runner, bank, config
        own = self.fresh(samples, seed, fingerprint(samples))
        self.samples, self.cursor, self.steps = own.samples, own.cursor, own.steps
        self.noise = NoiseWatch(bank)
        self._claimed: list[int] = []
        self._optimizer = torch.optim.AdamW(
            [bank.shadow], lr=config.lr, weight_decay=config.weight_decay, foreach=False, fused=True
        )

    def fresh(self, samples: list[TrainSample], seed: int, data: str) -> JobTraining:
        """The training of a job that has not begun. data: fingerprint of the samples."""
        trains = self.config.enabled and bool(samples)
        cursor = SampleCursor(len(samples), seed, data) if trains else None
        return JobTraining(samples, cursor, NoiseScale(), {})

    def exchange(self, training: JobTraining) -> Slices[JobTraining]:
        """Go on with another job; returns the training of the present one. Between rounds; the shadow stays as it is.

        What waits has its moments in the host's memory. They move one at a time; nothing changes before all have moved.
        """
        assert not self._claimed, "a round is under way"
        state, device = self._optimizer.state.get(self.bank.shadow) or {}, self.bank.shadow.device
        parked = yield from _moved(state, torch.device("cpu"))
        moments = yield from _moved(training.moments, device)
        self.noise.forget()
        former = JobTraining(self.samples, self.cursor, self.noise.scale, parked, self.steps)
        self.samples, self.cursor, self.steps = training.samples, training.cursor, training.steps
        self.noise.scale, self._optimizer.state[self.bank.shadow] = training.noise, moments
        return former

    def step(self, micro_batch: int, accumulation: int, lr_scale: float = 1.0) -> Slices[StepResult]:
        """One optimizer step over micro_batch x accumulation samples; the loss is the mean over all target tokens.

        lr_scale: what the learning rate is multiplied by. StepCut, raised between two slices, abandons the step.
        """
        assert self.cursor is not None, "there is no sample to train on: no round may begin"
        claimed = self.cursor.claim(micro_batch * accumulation)
        self._claimed += claimed
        try:
            return (yield from self._step([self.samples[i] for i in claimed], micro_batch, lr_scale))
        except StepCut:
            del self._claimed[len(self._claimed) - len(claimed) :]
            self.cursor.release(claimed)
            raise

    def _step(self, chosen: list[TrainSample], micro_batch: int, lr_scale: float) -> Slices[StepResult]:
        targets = sum(s.targets for s in chosen)
        gradient, noise = self.bank.gradient, self.noise
        gradient.zero_()
        losses, parts = list[torch.Tensor](), self._parts(chosen, micro_batch)
        groups, before = [], noise.gradient()
        for part in parts:
            losses.append((yield from self.runner.loss_and_gradients(part, targets)))
            after = noise.gradient()
            # The mean gradient of this part alone: what it added, over its own targets.
            groups.append((after - before) * (targets / sum(s.targets for s in part)))
            before = after
        sizes = [len(part) for part in parts]
        measure, ahead = partial(self._measure, losses, groups, sizes), None
        if reads_later(gradient, self.bank.tp_group):
            ahead = measure()
            ahead = ahead._replace(values=(yield from on_host(ahead.values, self.bank.tp_group)))
        finish = partial(self._finish, measure, ahead, chosen, lr_scale)
        return (yield Slice(SliceKind.OPTIMIZER, 1, 1, lambda _: finish()))

    def _parts(self, chosen: list[TrainSample], micro_batch: int) -> list[list[TrainSample]]:
        """The samples of each pass or group of passes, in order."""
        size = self.noise.group_size(len(chosen), micro_batch, self.steps)
        return [chosen[start : start + size] for start in range(0, len(chosen), size)]

    def _measure(self, losses: list[torch.Tensor], groups: list[torch.Tensor], sizes: list[int]) -> Measured:
        """Clip the gradient, and compute what the host must know of the step. losses: summed cross-entropy [] of each
        group of passes."""
        adam, beta2 = self._optimizer.state[self.bank.shadow], self._optimizer.param_groups[0]["betas"][1]
        settled = 1 - beta2**self.steps
        seen = self.noise.compare(groups, sizes, adam.get("exp_avg_sq"), settled, self.steps)
        norms2 = [] if seen is None else [*seen.norms2]
        values = torch.stack([x.double() for x in (self._clip(), *losses, *norms2)])
        return Measured(values, len(losses), seen)

    def _finish(
        self, measure: Callable[[], Measured], ahead: Measured | None, chosen: list[TrainSample], lr_scale: float
    ) -> StepResult:
        """The end of a step. What the host must know of it is read here, at once: nothing before waits for the device.

        ahead: what is measured already, and in the memory of the host.
        """
        measured = ahead or measure()
        norm, *found = measured.values.tolist()
        if measured.seen is not None:
            self.noise.observe(measured.seen, found[measured.losses :])
        return self._update(sum(found[: measured.losses]), norm, chosen, lr_scale)

    def _update(self, total: float, norm: float, chosen: list[TrainSample], lr_scale: float) -> StepResult:
        lr = lr_scale * self.config.lr * min(1.0, (self.steps + 1) / max(1, self.config.warmup_steps))
        tokens, targets = sum(len(s.ids) for s in chosen), sum(s.targets for s in chosen)
        loss = total / targets
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite:
            self._optimizer.param_groups[0]["lr"] = lr
            self._optimizer.step()
            self.bank.refresh()
            self.steps += 1
        return StepResult(
            self.steps, len(chosen), tokens, targets, loss, norm, lr, finite, self.noise.scale.noise_scale
        )

    def _clip(self) -> torch.Tensor:
        """Scale the gradient down to clip_norm; returns the norm [] that it had."""
        self.bank.join_gradient()
        norm = self.bank.norm(self.bank.gradient)
        self.bank.gradient.mul_((self.config.clip_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def commit(self) -> None:
        """Keep the steps since the last settlement."""
        self.noise.forget()
        if self.cursor is not None:
            self.cursor.commit(self._claimed)
        self._claimed = []

    def rollback(self, snapshot: dict[str, Any]) -> None:
        """Undo the steps since `snapshot`: shadow, moments and counters; their samples come again, but not next."""
        self.restore(snapshot)
        if self.cursor is not None:
            self.cursor.defer(self._claimed)
        self._claimed = []

    def resume(self, snapshot: dict[str, Any], cursor: dict[str, Any]) -> None:
        """Continue from a checkpoint. Raises InputError if it was made for other samples, or another order of them."""
        self.restore(snapshot)
        if self.cursor is not None and cursor:
            self.cursor.restore(cursor)

    def cursor_state(self, commit: bool = False) -> dict[str, Any]:
        """Where the samples stand, as JSON values; empty when there is no training.

        commit: as they will stand once the steps since the last settlement count.
        """
        return self.cursor.state(commit) if self.cursor is not None else {}

    def snapshot(self) -> dict[str, Any]:
        """Copies of everything that a step changes: shadow [n], moments [n] and the step counters."""
        moments = self._optimizer.state.get(self.bank.shadow) or {}
        return {
            "shadow": self.bank.shadow.detach().clone(),
            "moments": {name: value.clone() for name, value in moments.items()},
            "steps": self.steps,
        }

    def restore(self, snapshot: dict[str, Any]) -> None:
        self.bank.load_shadow(snapshot["shadow"])
        self._optimizer.state[self.bank.shadow] = {name: value.clone() for name, value in snapshot["moments"].items()}
        self.steps = snapshot["steps"]
        self.noise.forget()


def _moved(moments: dict[str, torch.Tensor], device: torch.device) -> Slices[dict[str, torch.Tensor]]:
    """The moments on a device, a slice for each: a copy to the host waits for the device."""
    moved = {}
    for name, value in moments.items():
        moved[name] = value.to(device)
        yield WAIT
    return moved
