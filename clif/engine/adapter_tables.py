"""The adapters of captured steps, as the dual LoRA kernels read them: a part of the one tensor that a step sends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from clif.kernels.dual_lora_reference import Segment
from clif.kernels.dual_lora_table import RowTable, most_pairs, table_parts, table_words, write_pairs

HEIGHTS = (16, 32, 64, 128, 256)
"""Rows of a tile for which the dual LoRA kernels may ask: all that the candidates of the tuner have."""


@dataclass
class Tables:
    """The adapters of a step of one size, by tile height; `used` gets each height that a layer asks for."""

    tables: dict[int, RowTable]
    used: set[int]

    def of(self, block_m: int, slots: int) -> RowTable:
        self.used.add(block_m)
        return self.tables[block_m]


class CapturedTables:
    """Tables for steps of up to `capacity` rows and `slots` adapter slots, in `size` int32 words.

    Until keep_used_heights() those of all heights are written, then those that the steps of a size have asked for.
    """

    def __init__(self, capacity: int, slots: int) -> None:
        self._capacity, self._slots = capacity, slots
        words = [table_words(capacity, height, self._pairs(capacity, height)) for height in HEIGHTS]
        *starts, self.size = np.cumsum([0, *words]).tolist()
        self._starts: dict[int, int] = dict(zip(HEIGHTS, starts, strict=True))
        self._used: dict[int, set[int]] = {}
        self._all = True

    def _pairs(self, rows: int, height: int) -> int:
        return most_pairs(rows, height, self._slots)

    def of_size(self, words: torch.Tensor, rows: int) -> Tables:
        """Those of steps of so many rows. words: on the device."""
        found = {}
        for height, at in self._starts.items():
            whole = RowTable(words[at:], self._capacity, height, self._pairs(self._capacity, height))
            found[height] = whole.first(rows, self._pairs(rows, height))
        return Tables(found, self._used.setdefault(rows, set()))

    def keep_used_heights(self) -> None:
        """All steps are captured: tables of a height that a size has not asked for are not filled any more."""
        self._all = False

    def write(self, words: Any, segments: Sequence[Segment], rows: int) -> None:
        """Fill a step of so many rows. words: the host's, a numpy array."""
        for height in HEIGHTS if self._all else sorted(self._used[rows]):
            parts = table_parts(
                words[self._starts[height] :], self._capacity, height, self._pairs(self._capacity, height)
            )
            write_pairs(parts, segments, rows, height, self._slots)
