"""An emulated replica's part in rounds and versions: losses are made up, all messages are those of a member.

The made-up loss falls with the optimizer steps that a version has behind it, so that rounds are promoted at first and
discarded once nothing is to be learnt any more. Free of torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors.numpy

from clif.adapters.peft_files import PREFIX
from clif.adapters.slots import SlotTable
from clif.config import AdapterConfig
from clif.types import CLIF, HeldoutLoss, RoundPlan, RoundResult, Vote
from clif.wire import messages as m

STEP_S = 0.05
"""Time of an optimizer step."""
SAMPLE_TOKENS, SAMPLE_TARGETS = 8, 4
"""Tokens of a sample, and those that carry loss: few, so that no limit of a run makes them implausible."""
LOWEST, FALLS_BY, FALLS_IN = 0.8, 2.4, 150.0
"""The loss after many steps, nats per token; what it is above that before training; and the steps in which this falls
to a third."""
FEATURES = 8
NO_ROUND = -1


def loss_after(steps: float) -> float:
    """The made-up loss of a version with so many optimizer steps behind it, nats per token."""
    return LOWEST + FALLS_BY * math.exp(-steps / FALLS_IN)


def shapes(adapter: AdapterConfig) -> dict[str, tuple[int, int]]:
    """The tensors of a made-up adapter."""
    return {"layer.lora_A.weight": (adapter.r, FEATURES), "layer.lora_B.weight": (FEATURES, adapter.r)}


@dataclass
class _Round:
    """A round under way. steps: what was reported; None: it still trains."""

    plan: RoundPlan
    began_s: float
    steps: int | None = None

    def steps_at(self, now: float) -> int:
        return max(1, min(self.plan.local_steps, int((now - self.began_s) / STEP_S)))


@dataclass(frozen=True)
class _Version:
    """A version that waits for a slot. active: it becomes the active one; promoted: by a round of this replica."""

    number: int
    round_id: int
    active: bool
    promoted: bool = False


class EmulatedMember:
    """Takes part in rounds, and holds versions in the slots. send: to the control process. engine_step: its number.

    on_version: called with (version, round) for each switch of the active one. training_steps, last_loss: for reports.
    """

    def __init__(
        self,
        adapter: AdapterConfig,
        replica: int,
        slots: SlotTable,
        send: Callable[[m.Up], None],
        on_version: Callable[[int, int], None],
        engine_step: Callable[[], int],
    ) -> None:
        self.training_steps = 0
        self.last_loss: float | None = None
        self._adapter, self._replica, self._slots = adapter, replica, slots
        self._send, self._on_version, self._engine_step = send, on_version, engine_step
        self._round: _Round | None = None
        self._steps = {0: 0}
        self._waiting: list[_Version] = []
        self._held = slots.held
        self._now = 0.0
        self.orders: dict[type, Callable[[Any], None]] = {
            m.BeginRound: self._begin,
            m.FinishSteps: self._finish_steps,
            m.Aggregate: self._vote,
            m.Settle: self._settle,
            m.Install: self._install,
            m.Keep: self._keep,
            m.Activate: self._activate,
            m.Evaluate: self._evaluate,
        }

    @property
    def micro_batch(self) -> int:
        """Samples of the micro-batch that is trained on now; 0: none is."""
        return self._round.plan.micro_batch if self._round is not None and self._round.steps is None else 0

    def step(self, now: float) -> None:
        """Report the steps of a round whose time is over, and take versions into free slots."""
        self._now, current = now, self._round
        if current is not None and current.steps is None and current.steps_at(now) == current.plan.local_steps:
            self._report(current, current.plan.local_steps)
        while self._waiting and self._take_in(self._waiting[0]):
            self._waiting.pop(0)

    def _begin(self, order: m.BeginRound) -> None:
        self._round = _Round(order.plan, self._now)

    def _finish_steps(self, order: m.FinishSteps) -> None:
        current = self._of(order.round_id)
        if current is not None and current.steps is None:
            self._report(current, current.steps_at(self._now))

    def _report(self, current: _Round, steps: int) -> None:
        plan, current.steps = current.plan, steps
        self.training_steps += steps
        self.last_loss = loss_after(self._steps.get(plan.base_version, 0) + steps)
        samples = steps * plan.micro_batch * plan.accumulation
        result = RoundResult(
            round_id=plan.round_id,
            replica=self._replica,
            samples=samples,
            tokens=samples * SAMPLE_TOKENS,
            targets=samples * SAMPLE_TARGETS,
            steps=steps,
            loss=loss_after(self._steps.get(plan.base_version, 0) + steps / 2),
            finite=True,
            seconds=self._now - current.began_s,
        )
        self._send(m.StepsDone(result=result))

    def _vote(self, order: m.Aggregate) -> None:
        current = self._of(order.round_id)
        if current is None:
            return
        before = self._steps.get(current.plan.base_version, 0)
        vote = Vote(
            round_id=order.round_id,
            replica=self._replica,
            finite=True,
            # Beyond the lowest loss that is left to learn, a candidate is no better.
            candidate_loss=loss_after(before + (current.steps or 0)),
            active_loss=loss_after(before),
            tokens=1,
            error2=0.01,
            product2=1.0,
        )
        self._send(m.Voted(vote=vote))

    def _settle(self, order: m.Settle) -> None:
        current = self._of(order.round_id)
        self._round = None if current is not None else self._round
        if not order.commit or (current is None and not self._slots.holds(order.version)):
            return
        if current is not None:
            plan = current.plan
            self._steps[order.version] = self._steps.get(plan.base_version, 0) + (current.steps or 0)
            self._waiting.append(_Version(order.version, order.round_id, plan.adapter == CLIF, promoted=True))
        if order.publish:
            self._send(self._published(order))

    def _published(self, order: m.Settle) -> m.Published:
        ours = self._adapter
        config = {"peft_type": "LORA", "r": ours.r, "lora_alpha": ours.lora_alpha, "target_modules": ["layer"]}
        weights = {PREFIX + name: np.full(shape, 0.5, np.float32) for name, shape in shapes(ours).items()}
        return m.Published(
            replica=self._replica,
            version=order.version,
            round_id=order.round_id,
            config_json=json.dumps(config),
            weights=safetensors.numpy.save(weights),
        )

    def _install(self, order: m.Install) -> None:
        if order.activate or order.version in self._slots.wanted:
            self._steps.setdefault(order.version, max(self._steps.values()))
            self._waiting.append(_Version(order.version, order.round_id, order.activate and order.adapter == CLIF))

    def _take_in(self, version: _Version) -> bool:
        """Hold a version, as a replica does once a slot has no reader. False: there is no free slot yet."""
        if not self._slots.holds(version.number):
            slot = self._slots.free_slot()
            if slot is None:
                return False
            self._slots.load(version.number, slot)
        if version.active:
            self._slots.activate(version.number)
            self._on_version(version.number, version.round_id)
        elif version.promoted:
            self._slots.keep({*self._slots.wanted, version.number})
        if version.active or version.promoted:
            self._settled(version.number, version.round_id)
        else:
            self._tell_held()
        return True

    def _settled(self, version: int, round_id: int) -> None:
        self._send(m.Settled(replica=self._replica, round_id=round_id, version=version, step=self._engine_step()))
        self._tell_held()

    def _tell_held(self) -> None:
        if self._slots.held != self._held:
            self._held = self._slots.held
            self._send(m.Held(replica=self._replica, versions=self._held))

    def _keep(self, order: m.Keep) -> None:
        self._slots.keep(order.versions)
        self._tell_held()

    def _activate(self, order: m.Activate) -> None:
        if order.version != self._slots.active:
            self._slots.activate(order.version)
            self._on_version(order.version, NO_ROUND)
            self._settled(order.version, NO_ROUND)

    def _evaluate(self, order: m.Evaluate) -> None:
        version = self._slots.active
        loss = loss_after(self._steps.get(version, 0))
        self._send(m.Evaluated(result=HeldoutLoss(replica=self._replica, version=version, loss=loss, tokens=1)))

    def _of(self, round_id: int) -> _Round | None:
        return self._round if self._round is not None and self._round.plan.round_id == round_id else None
