"""What guides change in a step's logits, on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from clif.engine.scheduler import Chunk
from clif.kernels.staging import send_floats, send_ints

Guided = tuple[int, int]
"""A row of the draws, and the same one among all rows that choose a token."""


@dataclass(frozen=True)
class Changes:
    """Biases of single tokens, [many], each at a row and a column; and masks [masked rows, words of 32 tokens].

    Either is None where no row has it.
    """

    where: torch.Tensor | None
    values: torch.Tensor | None
    masked: torch.Tensor | None
    masks: torch.Tensor | None

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits [drawing, vocabulary] with these changes, a copy in float32.

        What is forbidden becomes minus infinity, unless it is no number: such a row must not look finite. Temporaries:
        9 bytes for each token of each masked row.
        """
        changed = logits.to(torch.float32, copy=True)
        if self.where is not None and self.values is not None:
            changed[self.where[0], self.where[1]] += self.values
        if self.masked is not None and self.masks is not None:
            bits = torch.arange(32, dtype=torch.int32, device=logits.device)
            allowed = (self.masks[:, :, None] >> bits & 1).bool().flatten(1)[:, : logits.shape[1]]
            changed.index_add_(0, self.masked, torch.where(allowed, 0.0, -torch.inf))
        return changed


def changes_of(sampling: Sequence[Chunk], guided: Sequence[Guided], device: torch.device) -> Changes | None:
    """Of the chunks that choose a token. All tokens before these must be known for guides that follow them."""
    where: tuple[list[int], list[int]] = [], []
    values, masked, masks = list[float](), list[int](), list[bytes]()
    for at, row in guided:
        sequence = sampling[row].sequence
        if sequence.guide is None:
            continue
        sequence.guide.advance(sequence.tokens)
        bias, mask = sequence.guide.bias(), sequence.guide.mask()
        where[0].extend([at] * len(bias))
        where[1].extend(bias)
        values.extend(bias.values())
        if mask is not None:
            masked.append(at)
            masks.append(mask)
    bits = np.frombuffer(b"".join(masks), np.int32).reshape(len(masks), -1) if masks else None
    return Changes(
        send_ints(np.array(where), device) if values else None,
        send_floats(values, device) if values else None,
        send_ints(masked, device) if masks else None,
        None if bits is None else send_ints(bits, device, torch.int32),
    )
