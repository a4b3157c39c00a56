"""Runs batches through the model: whole serving ticks, and training forwards and backwards in slices."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch.nn.functional import cross_entropy

from clif.adapters.bank import AdapterBank, inject
from clif.adapters.layers import SHADOW
from clif.config import Config, EngineConfig
from clif.kernels.dual_lora import Segment
from clif.models.loading import LoadedModel
from clif.models.stack import CausalStack, check_stack
from clif.replica.attention import KVCache, PackedRows, PagedRows
from clif.replica.scheduler import Chunk
from clif.types import TrainSample


class Slice(NamedTuple):
    """A piece of training work that runs without a break: `tokens` rows through `layers` layers."""

    kind: str
    tokens: int = 0
    layers: int = 0


WAIT = Slice("wait")
STEP_KINDS = frozenset({"forward", "head", "backward", "optimizer"})
"""Slices that belong to an optimizer step; the others evaluate or wait."""
T = TypeVar("T")
Slices = Generator[Slice, None, T]
"""A resumable job with a result: it yields the slice that it will do when it is resumed the next time."""


@dataclass(frozen=True)
class Packed:
    """Training samples one after the other: ids, positions [rows]; rows whose logits predict targets, and these."""

    ids: torch.Tensor
    positions: torch.Tensor
    rows: torch.Tensor
    targets: torch.Tensor
    lengths: tuple[int, ...]


class ModelRunner:
    """The model of one rank with its adapters and KV cache."""

    def __init__(
        self, stack: CausalStack, bank: AdapterBank, config: EngineConfig, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.stack, self.bank, self.config, self.device = stack, bank, config, device
        self.cache = KVCache(stack.num_layers, config.kv_tokens, stack.num_kv_heads, stack.head_dim, dtype, device)

    @torch.no_grad()
    def serve(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        """Compute one tick's chunks. Returns logits [chunks that sample, vocabulary], in order."""
        plan = PagedRows(self.cache, chunks, self.config.block_size, self.device)
        ids = self._tensor([t for c in chunks for t in c.sequence.tokens[c.start : c.stop]])
        positions = self._tensor([p for c in chunks for p in range(c.start, c.stop)])
        self.bank.rows.segments = _segments(chunks)
        hidden, rope = self.stack.embed(ids, positions)
        hidden = self.stack.layers(0, self.stack.num_layers, hidden, rope, plan)
        ends = torch.tensor([c.stop - c.start for c in chunks]).cumsum(0) - 1
        rows = ends[torch.tensor([c.samples for c in chunks])].to(self.device)
        return self.stack.logits(hidden, rows)

    def pack(self, samples: Sequence[TrainSample]) -> Packed:
        ids: list[int] = []
        positions: list[int] = []
        rows: list[int] = []
        targets: list[int] = []
        at = 0
        for sample in samples:
            ids += sample.ids
            positions += range(len(sample.ids))
            rows += range(at + sample.target_start - 1, at + len(sample.ids) - 1)
            targets += sample.ids[sample.target_start :]
            at += len(sample.ids)
        lengths = tuple(len(s.ids) for s in samples)
        return Packed(self._tensor(ids), self._tensor(positions), self._tensor(rows), self._tensor(targets), lengths)

    def loss_and_gradients(self, batch: Packed, divisor: float) -> Slices[float]:
        """Forward and backward of the shadow; adds the gradients of (summed cross-entropy / divisor) to it.

        Returns the summed cross-entropy in nats. The graph is cut at every slice's border, so that one slice's
        activations are freed as soon as its backward is done.
        """
        tokens, borders = len(batch.ids), self._borders()
        plan = PackedRows(batch.lengths, self.device)
        cuts: list[tuple[torch.Tensor, torch.Tensor]] = []
        yield Slice("forward", tokens, borders[0][1])
        hidden, rope = self.stack.embed(batch.ids, batch.positions)
        for i, (start, stop) in enumerate(borders):
            if i:
                yield Slice("forward", tokens, stop - start)
            # Nothing below the first layers learns: no gradient with respect to the embedding.
            entry = hidden.detach().requires_grad_(i > 0)
            hidden = self._layers(start, stop, entry, rope, plan, SHADOW)
            cuts.append((entry, hidden))
        top, total = hidden.detach().requires_grad_(), 0.0
        for rows, targets in self._head_parts(batch):
            yield Slice("head", len(rows), 1)
            loss = cross_entropy(self.stack.logits(top, rows).float(), targets, reduction="sum")
            (loss / divisor).backward()
            total += loss.item()
        gradient = top.grad
        for start, stop in reversed(borders):
            yield Slice("backward", tokens, stop - start)
            entry, hidden = cuts.pop()
            hidden.backward(gradient)
            gradient = entry.grad
        return total

    def loss(self, batch: Packed, slot: int | None) -> Slices[float]:
        """Summed cross-entropy in nats under an adapter slot (SHADOW, a serving slot, None: the base)."""
        plan = PackedRows(batch.lengths, self.device)
        with torch.no_grad():
            hidden, rope = self.stack.embed(batch.ids, batch.positions)
        for start, stop in self._borders():
            yield Slice("evaluate", len(batch.ids), stop - start)
            with torch.no_grad():
                hidden = self._layers(start, stop, hidden, rope, plan, slot)
        total = 0.0
        for rows, targets in self._head_parts(batch):
            yield Slice("evaluate_head", len(rows), 1)
            with torch.no_grad():
                total += cross_entropy(self.stack.logits(hidden, rows).float(), targets, reduction="sum").item()
        return total

    def _layers(
        self, start: int, stop: int, hidden: torch.Tensor, rope: tuple, plan: PackedRows, slot: int | None
    ) -> torch.Tensor:
        # Set anew in every slice: a serving tick in between has left its own segments.
        self.bank.rows.segments = () if slot is None else (Segment(0, hidden.shape[1], slot),)
        return self.stack.layers(start, stop, hidden, rope, plan)

    def _head_parts(self, batch: Packed) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Rows and targets of each slice of the head: a large vocabulary makes it dearer than several layers."""
        size = self.config.head_rows_per_slice
        return zip(batch.rows.split(size), batch.targets.split(size), strict=True)

    def _borders(self) -> list[tuple[int, int]]:
        step, n = self.config.layers_per_slice, self.stack.num_layers
        return [(i, min(i + step, n)) for i in range(0, n, step)]

    def _tensor(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)


def _segments(chunks: Sequence[Chunk]) -> list[Segment]:
    """Rows of each adapter slot; chunks come sorted by slot, those of the base first."""
    segments: list[Segment] = []
    row = 0
    for chunk in chunks:
        stop = row + chunk.stop - chunk.start
        slot = chunk.sequence.slot
        if slot is not None:
            if segments and segments[-1].slot == slot:
                segments[-1] = segments[-1]._replace(stop=stop)
            else:
                segments.append(Segment(row, stop, slot))
        row = stop
    return segments


def build_runner(config: Config, loaded: LoadedModel) -> tuple[ModelRunner, AdapterBank]:
    """The model with dual layers and our attention. Raises ConfigError for a model that we would compute wrongly."""
    stack = CausalStack(loaded.model)
    probe = torch.arange(8, device=loaded.device) % stack.vocab_size
    with torch.no_grad():
        expected = loaded.model(probe.unsqueeze(0), use_cache=False).logits[0]
        stack.take_over()
        # The same first A on every replica: FedAvg averages factors, which only makes sense from one start.
        torch.manual_seed(config.run.seed)
        bank = inject(loaded.model, config.adapter)
        if config.engine.pack_weights:
            stack.pack_head()
            for layer in bank.layers.values():
                layer.pack()
        check_stack(stack, PackedRows([len(probe)], loaded.device), probe, expected)
    return ModelRunner(stack, bank, config.engine, loaded.device, loaded.dtype), bank
