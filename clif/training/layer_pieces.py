"""A pass over one long sample whose layers compute a piece of its rows at a time: only attention sees all at once.

What a layer keeps for its backward, MLP above all, then exists for a piece; of all rows there are queries, keys, values
and what attention gives. The backward computes the piece again.

Sources: gradient checkpointing (Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016); blockwise
feed-forward (Liu and Abbeel, "Blockwise Parallel Transformer for Large Context Models", 2023).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from clif.engine.jobs import FusedPass
from clif.kernels.dual_lora_reference import Segment
from clif.kernels.staging import send_ints
from clif.models.dual_linear import LoraRows
from clif.models.layer import AttentionPlan, SubBatch
from clif.models.scores import Scores
from clif.models.stack import CausalStack
from clif.training.head_loss import HeadLoss
from clif.training.passes import Packed

Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Query [rows, heads, head_dim], key and value [rows, kv_heads, head_dim]."""


class _Taken:
    """A plan that takes the heads of a piece and attends to nothing. scores: how the layer wants them weighed."""

    def __init__(self) -> None:
        self.heads: Heads | None = None
        self.scores: Scores | None = None

    def cache_rows(self, layer: int) -> None:
        """Nothing is kept of these rows."""

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scores: Scores
    ) -> torch.Tensor:
        """Take them."""
        self.heads, self.scores = (query, key, value), scores
        return query


class LayerPieces:
    """The layers of one pass, each in pieces of `rows` rows at most."""

    def __init__(
        self,
        stack: CausalStack,
        positions: torch.Tensor,
        slot: int | None,
        plan: AttentionPlan,
        rows: int,
        learns: bool,
    ) -> None:
        """positions [all rows]; plan: of all rows; slot: of their adapter, None: the base."""
        self._stack, self._plan, self._taken = stack, plan, _Taken()
        count = len(positions)
        self._pieces = [slice(start, min(start + rows, count)) for start in range(0, count, rows)]
        self._sub_batches = [self._sub_batch(positions[piece], slot, learns) for piece in self._pieces]

    def _sub_batch(self, positions: torch.Tensor, slot: int | None, learns: bool) -> SubBatch:
        count = len(positions)
        segments = () if slot is None else (Segment(0, count, slot),)
        return self._stack.sub_batch(LoraRows(count, segments, learns), positions, self._taken)

    @torch.no_grad()
    def forward(self, layer: int, entry: torch.Tensor) -> torch.Tensor:
        """entry [rows, hidden size] -> the layer's output; nothing is kept."""
        attended = self._attend(layer, self._all_heads(layer, entry))
        out = torch.empty_like(entry)
        for piece, sub_batch in zip(self._pieces, self._sub_batches, strict=True):
            out[piece] = self._finish(layer, entry[piece], attended[piece], sub_batch)
        return out

    def backward(self, layer: int, entry: torch.Tensor, gradient: torch.Tensor, wanted: bool) -> None:
        """Add the gradients of a layer's factors. gradient [rows, hidden size]: of its output, and if that of its input
        is wanted, this is what it becomes."""
        with torch.no_grad():
            heads = self._all_heads(layer, entry)
        for part in heads:
            part.requires_grad_()
        with torch.enable_grad():
            attended = self._attend(layer, heads)
        of_attended = self._differentiate_ends(layer, entry, attended, gradient, wanted)
        of_heads = torch.autograd.grad(attended, heads, of_attended)
        del attended, of_attended, heads
        self._differentiate_starts(layer, entry, of_heads, gradient, wanted)

    def _differentiate_ends(
        self, layer: int, entry: torch.Tensor, attended: torch.Tensor, gradient: torch.Tensor, wanted: bool
    ) -> torch.Tensor:
        """Backward of what comes behind attention: gradient becomes that of the input, by this way; returns that of
        what attention gives."""
        of_attended = torch.empty_like(attended)
        for piece, sub_batch in zip(self._pieces, self._sub_batches, strict=True):
            inputs = entry[piece].detach().requires_grad_(wanted), attended[piece].detach().requires_grad_()
            with torch.enable_grad():
                out = self._finish(layer, *inputs, sub_batch)
            out.backward(gradient[piece])
            of_attended[piece] = _grad(inputs[1])
            if wanted:
                gradient[piece] = _grad(inputs[0])
        return of_attended

    def _differentiate_starts(
        self, layer: int, entry: torch.Tensor, of_heads: Sequence[torch.Tensor], gradient: torch.Tensor, wanted: bool
    ) -> None:
        """Backward of what comes before attention; adds to the gradient of the input."""
        for piece, sub_batch in zip(self._pieces, self._sub_batches, strict=True):
            rows = entry[piece].detach().requires_grad_(wanted)
            with torch.enable_grad():
                heads = self._heads(layer, rows, sub_batch)
            if not heads[0].requires_grad:
                return
            torch.autograd.backward(heads, [of[piece] for of in of_heads])
            if wanted:
                gradient[piece] += _grad(rows)

    def _heads(self, layer: int, entry: torch.Tensor, sub_batch: SubBatch) -> Heads:
        decoder = self._stack.decoder_layers[layer]
        _, (qkv,) = decoder.project([entry], [None], [sub_batch.rows])
        decoder.attend(qkv, sub_batch)
        heads, self._taken.heads = self._taken.heads, None
        assert heads is not None
        return heads

    def _all_heads(self, layer: int, entry: torch.Tensor) -> Heads:
        """Of all rows, side by side in one tensor, as attention reads them best."""
        parts: Heads | None = None
        for piece, sub_batch in zip(self._pieces, self._sub_batches, strict=True):
            heads = self._heads(layer, entry[piece], sub_batch)
            if parts is None:
                counts = [part.shape[1] for part in heads]
                whole = heads[0].new_empty(len(entry), sum(counts), heads[0].shape[2])
                query, key, value = whole.split(counts, 1)
                parts = query, key, value
            for to, part in zip(parts, heads, strict=True):
                to[piece] = part
        assert parts is not None
        return parts

    def _attend(self, layer: int, heads: Heads) -> torch.Tensor:
        assert self._taken.scores is not None
        return self._plan.attend(layer, *heads, self._taken.scores)

    def _finish(self, layer: int, entry: torch.Tensor, attended: torch.Tensor, sub_batch: SubBatch) -> torch.Tensor:
        (hidden,), (added,) = self._stack.decoder_layers[layer].finish([entry], [attended], [sub_batch.rows])
        return hidden + added


def _grad(leaf: torch.Tensor) -> torch.Tensor:
    assert leaf.grad is not None
    return leaf.grad


class PiecedPass:
    """A forward under one adapter slot (None: the base), and its backward if it learns, in pieces of rows.

    It keeps the input of each layer, and nothing else.
    """

    fused_pass: FusedPass | None = None

    def __init__(self, stack: CausalStack, batch: Packed, slot: int | None, piece: int, learns: bool) -> None:
        """piece: rows of a piece at most."""
        self.stack, self.rows, self.learns, self.at = stack, batch.tokens, learns, 0
        ids, positions = (send_ints(values, stack.device) for values in (batch.ids, batch.positions))
        self._layers = LayerPieces(stack, positions, slot, stack.sequences(batch.lengths), piece, learns)
        self.hidden, self._entries = stack.embed(ids), list[torch.Tensor]()
        self._gradient: torch.Tensor | None = None
        self.targets = HeadLoss(stack, batch.rows, batch.targets)

    @property
    def pending(self) -> int:
        """Layers whose backward is still to come."""
        return len(self._entries)

    @property
    def left(self) -> int:
        """Layers of the forward that are still to come."""
        return self.stack.num_layers - self.at

    def forward(self, layers: int) -> None:
        """The next layers."""
        for _ in range(layers):
            if self.learns:
                self._entries.append(self.hidden)
            self.hidden = self._layers.forward(self.at, self.hidden)
            self.at += 1

    def head(self, units: int, divisor: float) -> None:
        """The loss of the next targets; a pass that learns gets the gradient of (their summed loss / divisor)."""
        if self.learns and self._gradient is None:
            self._gradient = torch.zeros_like(self.hidden)
        self.targets.add(self.hidden, self._gradient, units, divisor)

    def backward(self, layers: int) -> None:
        """The backward of the last pending layers; adds to the shadow's gradient."""
        for _ in range(layers):
            assert self._gradient is not None
            entry = self._entries.pop()
            self._layers.backward(self.pending, entry, self._gradient, wanted=self.pending > 0)
