"""Steps in which every row continues an answer, captured once for a few sizes and replayed from then on.

A graph holds embedding, layers, norm, head, argmax and the check for finite logits. Which sequences and blocks, which
adapters and which tokens of the step before it reads are data (clif/engine/decode_buffers.py): neither a new request
nor a promotion captures anything.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from clif.engine.attention import PagedLayout
from clif.engine.batch import Batch, segments_of
from clif.engine.capture import Captured, Recorder
from clif.engine.decode_buffers import DecodeBuffers
from clif.engine.scheduler import Chunk
from clif.models.dual_linear import LoraRows, SlotsOnDevice

log = logging.getLogger(__name__)
MOST_ROWS = 512
"""Largest captured step: beyond it a launch costs little beside the arithmetic."""
Compute = Callable[[Batch], tuple[torch.Tensor, torch.Tensor]]
"""Logits [rows that sample, own columns] and greedy tokens [rows that sample] of a batch."""


def decode_sizes(max_batch: int) -> list[int]:
    """Sizes of captured steps: 1, 2, 4, then every 8 up to the largest batch."""
    most = min(max_batch, MOST_ROWS)
    return sorted({size for size in (1, 2, 4, *range(8, most, 8)) if size < most} | {most})


class DecodeGraphs:
    """The captured steps of one runner."""

    def __init__(self, compute: Compute, buffers: DecodeBuffers, recorder: Recorder) -> None:
        """Capture all sizes, the largest first: smaller ones then fit into its memory."""
        self._compute, self._buffers = compute, buffers
        self.sizes = decode_sizes(buffers.capacity)
        start = time.monotonic()
        # What a replay reads lies in the buffers: of these only rows and layout count.
        self._batches = {size: self._inputs(size) for size in self.sizes}
        self.captured: dict[int, Captured[tuple[torch.Tensor, torch.Tensor]]] = {}
        for size in reversed(self.sizes):
            # Nothing but padding. Tables of a larger step would make a kernel write behind the rows of this one.
            buffers.fill((), (), size)
            self.captured[size] = recorder.capture(partial(self._step, size))
        buffers.keep_used_heights()
        self.capture_s = time.monotonic() - start
        shown = len(self.sizes), self.sizes[-1], self.capture_s, recorder.bytes / 2**20
        log.info("captured %d decode steps of up to %d rows in %.1f s, %.0f MiB", *shown)

    def can_run(self, chunks: Sequence[Chunk]) -> bool:
        """Whether one of the captured steps computes these chunks."""
        return self._buffers.fits(chunks)

    def fill(self, chunks: Sequence[Chunk]) -> Batch:
        """The batch of these chunks, which lie sorted by adapter slot, for the smallest step that holds them."""
        size = next(size for size in self.sizes if size >= len(chunks))
        self._buffers.fill(chunks, segments_of(chunks), size)
        return self._batches[size]._replace(chunks=chunks, captured=self.captured[size])

    def _step(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._compute(self._inputs(size))

    def _inputs(self, size: int) -> Batch:
        """What a step of this size reads: views, except for one conversion, which is a part of the step."""
        ids, positions, cache_slots, sources, slots = self._buffers.fields(size).long()
        rows = LoraRows(size, on_device=SlotsOnDevice(slots, self._buffers.tables(size)))
        layout = PagedLayout(size, cache_slots, self._buffers.decode_table(size), (), None)
        return Batch((), ids, positions, sources, None, rows, layout)
