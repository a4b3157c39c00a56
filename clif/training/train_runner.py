"""Training and evaluation of one rank in slices: a slice says what comes next, the engine how much of it runs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from clif.config import ConfigError
from clif.engine.jobs import Slice, SliceKind, Slices
from clif.engine.runner import ModelRunner
from clif.models.dual_linear import SHADOW
from clif.training.layer_graphs import SIZES, CapturedPass, TrainingGraphs, capture_training
from clif.training.layer_pieces import PiecedPass
from clif.training.passes import PIECE_UNIT, Pass, measure_activations, pack
from clif.types import TrainSample

AnyPass = Pass | CapturedPass | PiecedPass


class TrainRunner:
    """Computes losses and gradients with the model and the adapters of a ModelRunner, within engine.activation_mib."""

    def __init__(self, runner: ModelRunner, sizes: Sequence[int] = SIZES) -> None:
        """sizes: rows of the passes that are captured, where the runner has a recorder for them."""
        self.stack, self.bank, self.config, self.device = runner.stack, runner.bank, runner.config, runner.device
        self.activations = measure_activations(self.stack, self.config.activation_mib << 20)
        self._runner = runner
        self.graphs: TrainingGraphs | None = None
        if runner.train_recorder is not None:
            recorder, gradient = runner.train_recorder, self.bank.gradient
            self.graphs = capture_training(self.stack, self.activations, recorder, gradient, sizes)

    def check_samples(self, longest: int) -> None:
        """Raises ConfigError if a training sample of this many tokens cannot be held."""
        if not self.activations.fits([longest]) and not self.activations.piece(longest):
            raise ConfigError(
                f"a training sample of {longest} tokens needs more than engine.activation_mib "
                f"{self.config.activation_mib}: raise it or lower data.max_sample_tokens"
            )

    def loss_and_gradients(self, samples: Sequence[TrainSample], divisor: float) -> Slices[torch.Tensor]:
        """Forward and backward of the shadow; adds the gradients of (summed cross-entropy / divisor) to it.

        Returns the summed cross-entropy in nats [], float64, on the device.
        """
        total, left = self._zero(), list(samples)
        while left:
            run = yield from self._pack(left, SHADOW, learns=True)
            yield from self._forward(run, SliceKind.FORWARD)
            yield from self._head(run, SliceKind.HEAD, divisor)
            while run.pending:
                yield Slice(SliceKind.BACKWARD, run.rows, run.pending, run.backward)
            total += run.targets.loss
        return total

    def loss(self, samples: Sequence[TrainSample], slot: int | None) -> Slices[torch.Tensor]:
        """The same under an adapter slot (SHADOW, a serving slot, None: the base), without gradients."""
        total, left = self._zero(), list(samples)
        while left:
            run = yield from self._pack(left, slot, learns=False)
            yield from self._forward(run, SliceKind.EVALUATE)
            yield from self._head(run, SliceKind.EVALUATE_HEAD, 1.0)
            total += run.targets.loss
        return total

    def _pack(self, left: list[TrainSample], slot: int | None, learns: bool) -> Slices[AnyPass]:
        """The next pass over samples from `left`; how many tokens it may have is asked by a slice."""
        tokens = sum(len(sample.ids) for sample in left)
        work = partial(self._next_pass, left, slot, learns)
        return (yield Slice(SliceKind.PACK, 1, tokens, work, least=len(left[0].ids)))

    def _next_pass(self, left: list[TrainSample], slot: int | None, learns: bool, max_batch_tokens: int) -> AnyPass:
        """Take samples from `left`: one, and as many more as the tokens, memory and captured passes allow.

        One that does not fit the memory as a whole is computed in pieces.
        """
        graphs = self.graphs if slot == SHADOW and not self._runner.fuses else None
        taken = [left.pop(0)]
        lengths = [len(taken[0].ids)]
        if not self.activations.fits(lengths):
            piece = max(PIECE_UNIT, self.activations.piece(lengths[0]))
            return PiecedPass(self.stack, pack(taken), slot, piece, learns)
        while left and sum(lengths) + len(left[0].ids) <= max_batch_tokens:
            more = [*lengths, len(left[0].ids)]
            if (learns and not self.activations.fits(more)) or (graphs is not None and graphs.of(more) is None):
                break
            taken.append(left.pop(0))
            lengths = more
        chosen = None if graphs is None else graphs.of(lengths)
        if chosen is not None:
            return CapturedPass(self.stack, pack(taken), chosen, learns)
        return Pass(self.stack, pack(taken), slot, self.activations if learns else None)

    def _forward(self, run: AnyPass, kind: SliceKind) -> Slices[None]:
        while run.left:
            yield Slice(kind, run.rows, run.left, run.forward, fused_pass=run.fused_pass)

    def _head(self, run: AnyPass, kind: SliceKind, divisor: float) -> Slices[None]:
        pieces = run.targets.pieces
        while (targets := run.targets.left) > 0:
            units = -(-targets // pieces.unit)
            work = partial(run.head, divisor=divisor)
            yield Slice(kind, min(pieces.unit, targets), units, work, least=min(pieces.least, units))

    def _zero(self) -> torch.Tensor:
        return torch.zeros((), dtype=torch.float64, device=self.device)
