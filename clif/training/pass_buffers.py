"""What captured passes read and leave behind: tensors whose addresses never change."""

from __future__ import annotations

import torch

from clif.kernels.staging import Staged
from clif.models.stack import CausalStack
from clif.models.varlen import SequenceSpans, cumulated
from clif.training.passes import Packed


def most_sequences(rows: int) -> int:
    """Sequences of a captured pass at most, that of its padding included: attention takes memory for each of them."""
    return 16 + rows // 128


class PassBuffers:
    """ids, positions and sequences of the rows, filled by one copy; shared by passes of all sizes.

    hidden, gradient [most rows, hidden size]: what the last layer makes, and its gradient, which the head writes.
    """

    def __init__(self, stack: CausalStack, rows: int) -> None:
        """rows: of the largest pass."""
        self._rows = rows
        self._staged = Staged.zeros(2 * rows + most_sequences(rows) + 1, torch.int32, stack.device)
        like = stack.embed(self._staged.words[:1].long())
        self.hidden, self.gradient = (like.new_zeros(rows, like.shape[1]) for _ in range(2))

    def ids(self, rows: int) -> torch.Tensor:
        """[rows] of a pass of this size, int32."""
        return self._staged.words[:rows]

    def positions(self, rows: int) -> torch.Tensor:
        """[rows], int32."""
        return self._staged.words[self._rows : self._rows + rows]

    def spans(self, rows: int) -> SequenceSpans:
        """Of as many sequences as a pass of this size may have."""
        start = 2 * self._rows
        ends = self._staged.words[start : start + most_sequences(rows) + 1]
        return SequenceSpans(ends, ends, rows, rows)

    def fill(self, batch: Packed, rows: int) -> None:
        """The pass that comes next, of this size. Rows of padding are a sequence of their own, which nothing reads.

        They repeat a token of the pass: what layers make of it is as finite as the rest. Their gradients are zero.
        """
        words, padding, most = self._staged.write().numpy(), rows - batch.tokens, self._rows
        lengths = [*batch.lengths, padding] if padding else batch.lengths
        ends = cumulated(lengths, most_sequences(rows))
        words[:rows] = batch.ids + batch.ids[:1] * padding
        words[most : most + rows] = batch.positions + [0] * padding
        words[2 * most : 2 * most + len(ends)] = ends
        self._staged.send()
