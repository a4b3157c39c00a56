"""Held-out loss of an adapter on this replica's part of some held-out rows, in slices."""

from __future__ import annotations

import torch

from clif.adapters.slots import SlotTable
from clif.engine.jobs import Slices
from clif.training.device_work import until_done
from clif.training.train_runner import TrainRunner
from clif.types import TrainSample


class Heldout:
    """Held-out samples of this replica, of one part: the gate's or the report's.

    num_rows: samples; tokens: answer tokens among them; max_tokens: tokens of one forward at most.
    """

    def __init__(self, runner: TrainRunner, samples: list[TrainSample], max_tokens: int) -> None:
        self._runner = runner
        self._batches = _batches(samples, max_tokens)
        self.num_rows = len(samples)
        self.tokens = sum(s.targets for s in samples)
        self._known: tuple[int, float] | None = None

    @property
    def known(self) -> bool:
        """Whether the loss of some version is known."""
        return self._known is not None

    def loss(self, slot: int | None) -> Slices[float]:
        """Summed cross-entropy in nats under an adapter slot."""
        losses = []
        for batch in self._batches:
            losses.append((yield from self._runner.loss(batch, slot)))
        yield from until_done(self._runner.bank.shadow, self._runner.bank.tp_group)
        return sum(torch.stack(losses).tolist()) if losses else 0.0

    def loss_of(self, slots: SlotTable, version: int) -> Slices[float]:
        """Summed loss of a version that can be read here; computed once per version.

        The version is held meanwhile, as by a request: no promotion changes its slot.
        """
        if self._known is None or self._known[0] != version:
            slots.acquire(version)
            try:
                loss = yield from self.loss(slots.slot_of(version))
            finally:
                slots.release(version)
            self._known = (version, loss)
        return self._known[1]

    def remember(self, version: int, loss: float) -> None:
        """The candidate whose loss this is became this version."""
        self._known = (version, loss)


def _batches(samples: list[TrainSample], max_tokens: int) -> list[list[TrainSample]]:
    """Samples of like length together, each batch within max_tokens (or a single longer sample)."""
    batches: list[list[TrainSample]] = []
    size = 0
    for sample in sorted(samples, key=lambda s: len(s.ids)):
        if not batches or size + len(sample.ids) > max_tokens:
            batches.append([])
            size = 0
        batches[-1].append(sample)
        size += len(sample.ids)
    return batches
