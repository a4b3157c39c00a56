"""Runs batches through the model: serving steps, alone or with training rows beside them, and training in slices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch

from clif.adapters.bank import AdapterBank
from clif.config import ConfigError, EngineConfig
from clif.engine.attention import KVCache, PagedRows
from clif.engine.jobs import Slice, SliceKind, Slices
from clif.engine.passes import Pass, measure_activations, pack
from clif.engine.scheduler import Chunk
from clif.kernels.dual_lora_reference import Segment
from clif.models.dual_linear import SHADOW, LoraRows
from clif.models.layer import SubBatch
from clif.models.stack import CausalStack
from clif.types import TrainSample

if TYPE_CHECKING:
    from clif.kernels.paged_decode_host import PagedDecode

HEAD_LEAST = 16
"""Rows of the head's smallest slice: one row would read the whole matrix, too."""


class Pace(Protocol):
    """How many rows a training forward has."""

    def pass_tokens(self) -> int:
        """Rows of the next forward at most; a longer sample goes alone."""
        ...


class AtOnce:
    """As many as the memory allows."""

    def pass_tokens(self) -> int:
        return 1 << 30


class ModelRunner:
    """The model of one rank with its adapters and KV cache.

    pace: set by the engine; paged: the kernel for attention of decode rows, None: torch's products.
    """

    def __init__(
        self,
        stack: CausalStack,
        bank: AdapterBank,
        config: EngineConfig,
        device: torch.device,
        dtype: torch.dtype,
        paged: PagedDecode | None = None,
    ) -> None:
        self.stack, self.bank, self.config, self.device = stack, bank, config, device
        self.cache = KVCache(stack.num_layers, config.kv_tokens, stack.num_kv_heads, stack.head_dim, dtype, device)
        self.activations = measure_activations(stack, device, config.activation_mib << 20)
        self.pace: Pace = AtOnce()
        self.paged = paged

    def check_samples(self, longest: int) -> None:
        """Raises ConfigError if a training sample of this many tokens cannot be held."""
        if not self.activations.fits([longest]):
            raise ConfigError(
                f"a training sample of {longest} tokens needs more than engine.activation_mib "
                f"{self.config.activation_mib}: raise it or lower data.max_sample_tokens"
            )

    @torch.no_grad()
    def serve(self, chunks: Sequence[Chunk], rider: Pass | None = None) -> torch.Tensor:
        """Compute one step's chunks. Returns this rank's columns of the logits of the chunks that sample, in order.

        rider: a forward that goes through its remaining layers in the same products.
        """
        ids = self._tensor([t for c in chunks for t in c.sequence.tokens[c.start : c.stop]])
        positions = self._tensor([p for c in chunks for p in range(c.start, c.stop)])
        plan = PagedRows(self.cache, chunks, self.config.block_size, self.device, self.paged)
        sub_batch = self.stack.sub_batch(LoraRows(plan.count, _segments(chunks)), positions, plan)
        hidden = self._layers(self.stack.embed(ids), sub_batch, rider)
        ends = torch.tensor([c.stop - c.start for c in chunks]).cumsum(0) - 1
        rows = ends[torch.tensor([c.needs_sampling for c in chunks])].to(self.device)
        return self.stack.head(self.stack.norm(hidden[rows]))

    def _layers(self, hidden: torch.Tensor, sub_batch: SubBatch, rider: Pass | None) -> torch.Tensor:
        joined = self.stack.num_layers if rider is None else rider.at
        (hidden,) = self.stack.layers(0, joined, [hidden], [sub_batch])
        while rider is not None and rider.left:
            (hidden,) = rider.layer([hidden], [sub_batch])
        return hidden

    def loss_and_gradients(self, samples: Sequence[TrainSample], divisor: float) -> Slices[float]:
        """Forward and backward of the shadow; adds the gradients of (summed cross-entropy / divisor) to it.

        Returns the summed cross-entropy in nats.
        """
        total, left = 0.0, list(samples)
        while left:
            run = self._next_pass(left, SHADOW, learns=True)
            yield from self._forward(run, SliceKind.FORWARD)
            total += yield from self._head(run, SliceKind.HEAD, divisor)
            while run.cuts:
                yield Slice(SliceKind.BACKWARD, run.batch.tokens, len(run.cuts), run.backward)
        return total

    def loss(self, samples: Sequence[TrainSample], slot: int | None) -> Slices[float]:
        """Summed cross-entropy in nats under an adapter slot (SHADOW, a serving slot, None: the base)."""
        total, left = 0.0, list(samples)
        while left:
            run = self._next_pass(left, slot, learns=False)
            yield from self._forward(run, SliceKind.EVALUATE)
            total += yield from self._head(run, SliceKind.EVALUATE_HEAD, 1.0)
        return total

    def _next_pass(self, left: list[TrainSample], slot: int | None, learns: bool) -> Pass:
        """Takes the samples of the next pass from `left`: at least one, and what the pace and the memory allow."""
        most, taken = self.pace.pass_tokens(), [left.pop(0)]
        lengths = [len(taken[0].ids)]
        while left and sum(lengths) + len(left[0].ids) <= most:
            if learns and not self.activations.fits([*lengths, len(left[0].ids)]):
                break
            taken.append(left.pop(0))
            lengths.append(len(taken[-1].ids))
        if slot == SHADOW:
            # The masters may have changed since: rounding them again is cheap beside a forward.
            self.bank.refresh()
        return Pass(self.stack, pack(taken, self.device), slot, self.device, self.activations if learns else None)

    def _forward(self, run: Pass, kind: SliceKind) -> Slices[None]:
        while run.left:
            yield Slice(kind, run.batch.tokens, run.left, run.forward, rider=run)

    def _head(self, run: Pass, kind: SliceKind, divisor: float) -> Slices[float]:
        total, start, end = 0.0, 0, len(run.batch.targets)
        while start < end:
            work = partial(run.head, start, divisor=divisor)
            loss, start = yield Slice(kind, 1, end - start, work, least=min(HEAD_LEAST, end - start))
            total += loss
        return total

    def _tensor(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)


def _segments(chunks: Sequence[Chunk]) -> tuple[Segment, ...]:
    """Rows of each adapter slot; chunks come sorted by slot, those of the base first."""
    return tuple(_merged(chunks))


def _merged(chunks: Sequence[Chunk]) -> Iterator[Segment]:
    row = 0
    current: Segment | None = None
    for chunk in chunks:
        stop, slot = row + chunk.stop - chunk.start, chunk.sequence.slot
        if current is not None and current.slot == slot:
            current = current._replace(stop=stop)
        else:
            if current is not None:
                yield current
            current = None if slot is None else Segment(row, stop, slot)
        row = stop
    if current is not None:
        yield current
