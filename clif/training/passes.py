"""One forward and backward over packed training rows, layer by layer.

Invariants: the graph is cut at every layer, so that a backward can stop between any two layers and frees the
activations of each one that it has passed; the activations never exceed their budget.

Sources: gradient checkpointing (Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016), for the layers
beyond the budget.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from clif.engine.jobs import FusedPass
from clif.kernels.dual_lora_reference import Segment
from clif.kernels.staging import send_ints
from clif.models.causal import SAVED_LENGTH
from clif.models.dual_linear import LoraRows
from clif.models.stack import CausalStack
from clif.training.head_loss import HeadLoss
from clif.types import TrainSample

LONG_SAMPLE = 2048
"""Longest sample, in tokens, beside whose activations other memory of a pass is small."""
PIECE_UNIT = 64
"""Rows of a piece are a multiple of this."""


@dataclass(frozen=True)
class Packed:
    """Training samples one after the other: ids, positions [rows]; the rows whose logits predict targets, and those."""

    ids: list[int]
    positions: list[int]
    rows: list[int]
    targets: list[int]
    lengths: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


def pack(samples: Sequence[TrainSample]) -> Packed:
    """Lay samples one after the other; the row before each target predicts it."""
    packed = Packed([], [], [], [], tuple(len(sample.ids) for sample in samples))
    for sample in samples:
        at = len(packed.ids)
        packed.ids.extend(sample.ids)
        packed.positions.extend(range(len(sample.ids)))
        packed.rows.extend(range(at + sample.target_start - 1, at + len(sample.ids) - 1))
        packed.targets.extend(sample.ids[sample.target_start :])
    return packed


@dataclass(frozen=True)
class Activations:
    """What the backward of a forward needs, in bytes. budget: all that may be kept at a time.

    entry: a row's input of a layer; layer: what autograd keeps of a row in one layer; square: of a row in one layer
    for each token of its sequence (attention's probabilities; 0 where attention keeps none of them); across: of a row
    that is computed in pieces, while attention sees all rows, beside the inputs of layers; work: what attention works
    in meanwhile, for a sequence of a length.
    """

    budget: int
    layers: int
    entry: int
    layer: int
    square: int
    across: int = 0
    work: Callable[[int], int] = lambda length: 0

    def of_layer(self, lengths: Sequence[int]) -> int:
        """Bytes that autograd keeps for one layer of sequences of these lengths."""
        return sum(n * (self.layer + (self.square * n if n <= SAVED_LENGTH else 0)) for n in lengths)

    def kept(self, lengths: Sequence[int]) -> int:
        """How many layers may keep their activations; the others are computed again in the backward."""
        room = self.budget - sum(lengths) * self.entry * self.layers
        return max(0, min(self.layers, room // max(1, self.of_layer(lengths)) - self._spare(lengths)))

    def fits(self, lengths: Sequence[int]) -> bool:
        """Whether these sequences can be in one pass whose layers compute all rows at once."""
        needed = sum(lengths) * self.entry * self.layers + self._spare(lengths) * self.of_layer(lengths)
        return needed <= self.budget

    def piece(self, length: int) -> int:
        """Rows of a piece at most, for a sample of this length that does not fit as a whole; 0: not even so."""
        room = self.budget - length * (self.entry * self.layers + self.across) - self.work(length)
        # A backward takes about as much again as it finds kept.
        rows = room // (2 * self.layer) // PIECE_UNIT * PIECE_UNIT
        return max(0, min(rows, length))

    def _spare(self, lengths: Sequence[int]) -> int:
        """Layers' worth of memory that stays free for the layer that is being computed again.

        A long sample also needs that of what its backward takes beside: for others it is small.
        """
        return 2 if max(lengths) > LONG_SAMPLE else 1


class Pass:
    """A forward under one adapter slot (None: the base), and its backward if it learns.

    rows: of the pass; at: the layer that comes next; cuts: (input, output) of each layer whose backward is pending,
    output None if it is computed again.
    """

    def __init__(self, stack: CausalStack, batch: Packed, slot: int | None, keep: Activations | None = None) -> None:
        """keep: for a pass that learns."""
        self.stack, self.rows, self.learns = stack, batch.tokens, keep is not None
        segments = () if slot is None else (Segment(0, self.rows, slot),)
        ids, positions = (send_ints(values, stack.device) for values in (batch.ids, batch.positions))
        lora = LoraRows(self.rows, segments, self.learns)
        self.sub_batch = stack.sub_batch(lora, positions, stack.sequences(batch.lengths))
        self.hidden = stack.embed(ids)
        self.at = 0
        self.cuts: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        self._first_kept = stack.num_layers - (keep.kept(batch.lengths) if keep else 0)
        self._gradient: torch.Tensor | None = None
        self.targets = HeadLoss(stack, batch.rows, batch.targets)

    @property
    def fused_pass(self) -> FusedPass | None:
        """A serving step can compute its layers."""
        return self

    @property
    def pending(self) -> int:
        """Layers whose backward is still to come."""
        return len(self.cuts)

    @property
    def left(self) -> int:
        """Layers of the forward that are still to come."""
        return self.stack.num_layers - self.at

    @property
    def _kept(self) -> bool:
        """Whether the next layer keeps its activations; otherwise its backward computes them again."""
        return self.learns and self.at >= self._first_kept

    def forward(self, layers: int) -> None:
        """The next layers, without rows of other kinds."""
        for _ in range(layers):
            entry, keep = self.enter()
            with torch.set_grad_enabled(keep):
                (out,) = self.stack.layers(self.at, self.at + 1, [entry], [self.sub_batch])
            self.leave(entry, out)

    def enter(self) -> tuple[torch.Tensor, bool]:
        """Input [rows, hidden size] of the next layer, cut off from the graph, and whether autograd is to record it."""
        # Nothing below the first layer learns: no gradient with respect to the embedding.
        return self.hidden.detach().requires_grad_(self._kept and self.at > 0), self._kept

    def leave(self, entry: torch.Tensor, out: torch.Tensor) -> None:
        """The next layer has made `out` of `entry`, alone or in the products of a serving step."""
        if self.learns:
            self.cuts.append((entry, out if self._kept else None))
        self.hidden = out.detach()
        self.at += 1

    def head(self, units: int, divisor: float) -> None:
        """The loss of the next targets; a pass that learns gets the gradient of (their summed loss / divisor)."""
        if self.learns and self._gradient is None:
            self._gradient = torch.zeros_like(self.hidden)
        self.targets.add(self.hidden, self._gradient, units, divisor)

    def backward(self, layers: int) -> None:
        """The backward of the last pending layers; adds to the shadow's gradient."""
        for _ in range(layers):
            entry, out = self.cuts.pop()
            if out is None:
                entry.requires_grad_(bool(self.cuts))
                with torch.enable_grad():
                    (out,) = self.stack.layers(len(self.cuts), len(self.cuts) + 1, [entry], [self.sub_batch])
            if out.requires_grad:
                out.backward(self._gradient)
            self._gradient = entry.grad


def measure_activations(stack: CausalStack, budget: int) -> Activations:
    """Measure what autograd keeps of a few rows in one layer: models differ in norms and activations."""
    n = 16
    ids = [i % stack.vocab_size for i in range(n)]
    probe = Packed(ids, ids, ids, ids, (n,))
    run = Pass(stack, probe, None, keep=Activations(1 << 62, stack.num_layers, 0, 0, 0))
    item = run.hidden.element_size()
    square = stack.num_heads * item if stack.keeps_squares else 0
    held: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        # With its history it would hold the layer's graph, which holds it: autograd would use the nodes of these
        # factors, which belong to this stream, in every later pass, and a capture on another stream would fail.
        return tensor.detach()

    frozen = {t.untyped_storage().data_ptr() for linear in stack.linears for t in linear.base.tensors}
    frozen |= {p.untyped_storage().data_ptr() for p in stack.model.parameters()}
    run.forward(1)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        run.forward(1)
    rows = sum(size for pointer, size in held.items() if pointer not in frozen)
    entry = run.hidden.shape[-1] * item
    query, heads = stack.num_heads * stack.head_dim, (stack.num_heads + 2 * stack.num_kv_heads) * stack.head_dim
    # The last output and its gradient; heads, their gradients and a copy; what attention gives, and that of it.
    across = 2 * entry + (3 * heads + (5 if stack.keeps_squares else 2) * query) * item
    return Activations(
        budget, stack.num_layers, entry, max(entry, rows // n - square * n), square, across, stack.attention_work
    )
