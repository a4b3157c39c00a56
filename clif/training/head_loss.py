"""The loss of a pass, piece by piece, and the gradient of what its last layer made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from clif.kernels.staging import send_ints
from clif.models.loss import PIECE_ROWS, head_loss
from clif.models.stack import CausalStack


@dataclass(frozen=True)
class HeadPieces:
    """How the head's rows are cut. rows: whose logits are held at a time; unit: rows of a slice's unit; least: units of
    the smallest slice.
    """

    rows: int
    unit: int
    least: int


HEAD_PIECES = {
    "cpu": HeadPieces(rows=PIECE_ROWS["cpu"], unit=1, least=16),
    "cuda": HeadPieces(rows=PIECE_ROWS["cuda"], unit=PIECE_ROWS["cuda"], least=1),
}
"""By type of device."""


class HeadLoss:
    """loss: summed cross-entropy in nats [], float64, of the targets so far; on the device. pieces: see HeadPieces."""

    def __init__(self, stack: CausalStack, rows: Sequence[int], targets: Sequence[int]) -> None:
        """rows: of the pass, whose logits predict `targets`."""
        device = stack.device
        self._stack, self._at = stack, 0
        self._rows, self._targets = send_ints(rows, device), send_ints(targets, device)
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        self.pieces = HEAD_PIECES[device.type]

    @property
    def left(self) -> int:
        """Targets that are still to come."""
        return len(self._targets) - self._at

    def add(self, hidden: torch.Tensor, gradient: torch.Tensor | None, units: int, divisor: float) -> None:
        """Add the next targets, `units` units of them, to the loss.

        hidden [rows, hidden size]: what the last layer made; gradient: for a pass that learns, that of (the summed
        cross-entropy / divisor), of which the rows that predict these targets are written.
        """
        stop = min(self._at + units * self.pieces.unit, len(self._targets))
        for start in range(self._at, stop, self.pieces.rows):
            piece = slice(start, min(start + self.pieces.rows, stop))
            self.loss += self._piece(hidden, gradient, self._rows[piece], self._targets[piece], divisor)
        self._at = stop

    def _piece(
        self,
        hidden: torch.Tensor,
        gradient: torch.Tensor | None,
        rows: torch.Tensor,
        targets: torch.Tensor,
        divisor: float,
    ) -> torch.Tensor:
        learns = gradient is not None
        top = hidden[rows].requires_grad_(learns)
        with torch.set_grad_enabled(learns):
            normed = self._stack.norm(top)
        loss, of_normed = head_loss(self._stack.head, normed.detach(), targets, divisor if learns else None)
        if gradient is not None:
            normed.backward(of_normed)
            assert top.grad is not None
            gradient.index_copy_(0, rows, top.grad)
        return loss
