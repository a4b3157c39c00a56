"""The layers of training passes, captured once for a few sizes and launched from then on: a layer is one launch.

A pass is cut at every layer anyway; so each layer is a graph in each direction. Its output is the next one's input, and
what autograd keeps of it lies where the backward's graph reads it. Which tokens, positions and sequences a pass has is
data. Embedding and rotary embedding are a graph too, which begins the pass; head and optimizer are not captured.

Captured in the order in which they are launched, the sizes from the largest on. What a layer keeps is released once its
backward is captured: the next size lies in the same memory. So one pass is under way at a time; one that is given up
leaves nothing behind.

Sources: torch.cuda.make_graphed_callables for the order of captures; gradient checkpointing (Chen et al., "Training
Deep Nets with Sublinear Memory Cost", 2016).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from functools import partial

import torch

from clif.engine.capture import Captured, Recorder
from clif.engine.checked_capture import CaptureError
from clif.engine.jobs import FusedPass
from clif.kernels.dual_lora_reference import Segment
from clif.models.dual_linear import SHADOW, LoraRows
from clif.models.layer import SubBatch
from clif.models.layer_ops import Rope
from clif.models.stack import CausalStack
from clif.models.varlen import VarlenSequences
from clif.training.head_loss import HeadLoss
from clif.training.pass_buffers import PassBuffers, most_sequences
from clif.training.passes import Activations, Packed

log = logging.getLogger(__name__)
SIZES = (256, 512, 1024, 2048)
"""Rows of captured passes."""
SMALLEST = Packed([0], [0], [0], [0], (1,))
"""A pass of one token: what a graph reads while it is captured."""
Kept = tuple[torch.Tensor, list[torch.Tensor]]
"""A layer's output, and what autograd keeps for its backward."""


class LayerGraphs:
    """The layers for passes of one size under the shadow.

    rows: of a pass; hidden [rows, hidden size]: after the last layer, gradient: of it, zeros when a pass begins.
    """

    def __init__(self, stack: CausalStack, buffers: PassBuffers, rows: int, kept: int, recorder: Recorder) -> None:
        """kept: layers that keep what their backward needs, the last ones; the others are computed again."""
        assert stack.varlen is not None, "padded products depend on the lengths of sequences"
        self.rows, self._stack, self._buffers = rows, stack, buffers
        self.hidden, self.gradient = buffers.hidden[:rows], buffers.gradient[:rows]
        buffers.fill(SMALLEST, rows)
        self._begin = recorder.capture(self._first)
        entry, *angles = self._begin.result
        ropes = [Rope(cos, sin) for cos, sin in zip(angles[::2], angles[1::2], strict=True)]
        lora = LoraRows(rows, (Segment(0, rows, SHADOW),), learns=True)
        self._sub_batch = SubBatch(lora, ropes, VarlenSequences(buffers.spans(rows), stack.varlen))
        self._first_kept = stack.num_layers - kept
        # Nothing below the lowest layer with factors learns: no gradient goes further down.
        self._lowest = next(layer for layer in range(stack.num_layers) if stack.masters(layer))
        # Entries and results are held here alone: what nothing refers to any more is memory of the next capture.
        entries, self._forward = [entry], list[Captured[Kept]]()
        for layer in range(stack.num_layers):
            self._forward.append(recorder.capture(partial(self._run, layer, entries[layer])))
            entries.append(self._forward[layer].result[0].detach().requires_grad_(layer >= self._lowest))
        self._backward = self._capture_backwards(entries, recorder)
        # What the graphs read beside their own tensors: tables of kernels.
        self._held = [linear.held() for linear in stack.linears]

    def fits(self, lengths: Sequence[int]) -> bool:
        """Whether a pass may have these sequences."""
        padded = sum(lengths) < self.rows
        return sum(lengths) <= self.rows and len(lengths) + padded <= most_sequences(self.rows)

    def begin(self, batch: Packed) -> None:
        """A pass begins; the one before is over."""
        self._buffers.fill(batch, self.rows)
        self._begin.replay()

    def forward(self, layer: int) -> None:
        self._forward[layer].replay()

    def backward(self, layer: int) -> None:
        """Add the gradients of a layer's factors, behind the backward of the layer above."""
        if layer in self._backward:
            self._backward[layer].replay()

    def _first(self) -> tuple[torch.Tensor, ...]:
        """The input of the first layer, and cos and sin of each rotary embedding."""
        self.gradient.zero_()
        positions = self._buffers.positions(self.rows).long()
        ropes = self._stack.ropes(positions)
        angles = [part for rope in ropes for part in (rope.cos, rope.sin)]
        return self._stack.embed(self._buffers.ids(self.rows).long()), *angles

    def _run(self, layer: int, entry: torch.Tensor) -> Kept:
        """Compute a layer; what autograd keeps is returned, so that it lies at the same place after each launch."""
        saved: list[torch.Tensor] = []

        def keep(tensor: torch.Tensor) -> int:
            # With its history it would hold the layer's graph, which holds it: nothing would ever be released.
            saved.append(tensor.detach())
            return len(saved) - 1

        learns = layer >= self._first_kept
        with torch.set_grad_enabled(learns), torch.autograd.graph.saved_tensors_hooks(keep, saved.__getitem__):
            out = self._layer(layer, entry)
        if layer == self._stack.num_layers - 1:
            with torch.no_grad():
                self.hidden.copy_(out)
        return out, saved

    def _layer(self, layer: int, entry: torch.Tensor) -> torch.Tensor:
        (out,) = self._stack.layers(layer, layer + 1, [entry], [self._sub_batch])
        return out

    def _capture_backwards(self, entries: list[torch.Tensor], recorder: Recorder) -> dict[int, Captured[torch.Tensor]]:
        """Of the layers from the last down to the lowest with factors."""
        found: dict[int, Captured[torch.Tensor]] = {}
        gradient = self.gradient
        for layer in reversed(range(self._stack.num_layers)):
            if layer >= self._lowest:
                found[layer] = recorder.capture(partial(self._differentiate, layer, entries[layer], gradient))
                gradient = found[layer].result
            self._forward[layer].release()
            del entries[layer + 1 :]
            if layer + 1 in found:
                found[layer + 1].release()
        found[self._lowest].release()
        return found

    def _differentiate(self, layer: int, entry: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """Add the gradients of a layer's factors, given that of its output; returns that of its input [rows, hidden
        size], or that of its output where none is wanted below."""
        kept, masters = layer >= self._first_kept, self._stack.masters(layer)
        if kept:
            out, _ = self._forward[layer].result
        else:
            with torch.enable_grad():
                out = self._layer(layer, entry)
        wanted = [entry, *masters] if layer > self._lowest else masters
        # A region runs several times before and while it is captured.
        found = list(torch.autograd.grad(out, wanted, gradient, retain_graph=kept))
        if masters:
            gradients = [master.grad for master in masters if master.grad is not None]
            torch._foreach_add_(gradients, found[-len(masters) :])
        return found[0] if layer > self._lowest else gradient


class TrainingGraphs:
    """The captured layers of one model, by size of the pass."""

    def __init__(
        self,
        stack: CausalStack,
        activations: Activations,
        recorder: Recorder,
        gradient: torch.Tensor,
        sizes: Sequence[int],
    ) -> None:
        """Captures the sizes whose activations fit their budget. gradient [n]: of the shadow; it is zero afterwards."""
        start, held = time.monotonic(), recorder.bytes
        fitting = sorted((rows for rows in sizes if activations.fits([rows])), reverse=True)
        buffers = PassBuffers(stack, max(fitting, default=1))
        kept = {rows: activations.kept([rows]) for rows in fitting}
        self.sizes = {rows: LayerGraphs(stack, buffers, rows, kept[rows], recorder) for rows in fitting}
        # A region really runs before it is captured.
        gradient.zero_()
        log.info(
            "training: captured passes of %s rows in %.1f s, %.0f MiB; of %d layers, %s keep what their backward needs",
            "/".join(map(str, kept)) or "no",
            time.monotonic() - start,
            (recorder.bytes - held) / 2**20,
            stack.num_layers,
            "/".join(map(str, kept.values())) or "none",
        )

    def of(self, lengths: Sequence[int]) -> LayerGraphs | None:
        """The smallest size for a pass with these sequences; None if there is none."""
        fitting = [graphs for graphs in self.sizes.values() if graphs.fits(lengths)]
        return min(fitting, key=lambda graphs: graphs.rows, default=None)


def capture_training(
    stack: CausalStack, activations: Activations, recorder: Recorder, gradient: torch.Tensor, sizes: Sequence[int]
) -> TrainingGraphs | None:
    """The captured layers, or None if they do what cannot be captured or no size has room. See TrainingGraphs."""
    try:
        graphs = TrainingGraphs(stack, activations, recorder, gradient, sizes)
    except CaptureError as error:
        log.warning("training: no CUDA graphs, passes are launched kernel by kernel: %s", error)
        gradient.zero_()
        return None
    return graphs if graphs.sizes else None


class CapturedPass:
    """A pass under the shadow whose layers are launched as graphs; a serving step cannot compute them."""

    fused_pass: FusedPass | None = None

    def __init__(self, stack: CausalStack, batch: Packed, graphs: LayerGraphs, learns: bool) -> None:
        self.rows, self.learns, self._graphs = graphs.rows, learns, graphs
        self._layers, self._at, self.pending = stack.num_layers, 0, 0
        graphs.begin(batch)
        self.targets = HeadLoss(stack, batch.rows, batch.targets)

    def forward(self, layers: int) -> None:
        """The next layers: so many launches."""
        for layer in range(self._at, self._at + layers):
            self._graphs.forward(layer)
        self._at += layers
        self.pending = self._at if self.learns else 0

    def head(self, units: int, divisor: float) -> None:
        """The loss of the next targets; a pass that learns gets the gradient of (their summed loss / divisor)."""
        self.targets.add(self._graphs.hidden, self._graphs.gradient if self.learns else None, units, divisor)

    def backward(self, layers: int) -> None:
        """The backward of the last pending layers: so many launches. Adds to the shadow's gradient."""
        for layer in range(self.pending - 1, self.pending - 1 - layers, -1):
            self._graphs.backward(layer)
        self.pending -= layers

    @property
    def left(self) -> int:
        """Layers of the forward that are still to come."""
        return self._layers - self._at
