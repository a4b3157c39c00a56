"""Steps with prompts, captured for a few numbers of rows and replayed from then on.

A graph computes rows of all kinds: chunks of prompts, new ones and those that continue or that reuse a prefix, and rows
that continue an answer. Which rows are what is data (clif/engine/prompt_buffers.py). Attention reads the KV cache,
where a step's own keys and values are by then, by the kernels of clif/kernels: varlen_attn of torch would need the
contexts gathered, as many tokens as the longest ones together, and shapes that depend on them.

Sources: chunked prefill (Sarathi-Serve, Agrawal et al., OSDI 2024).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from clif.engine.attention import PagedLayout
from clif.engine.batch import Batch, segments_of
from clif.engine.capture import Captured, Recorder
from clif.engine.graphs import Compute
from clif.engine.prompt_buffers import PromptBuffers
from clif.engine.scheduler import Chunk
from clif.kernels.paged_prefill_table import PrefillTable
from clif.models.dual_linear import LoraRows, SlotsOnDevice
from clif.models.scores import Scores

log = logging.getLogger(__name__)
MOST_ROWS = 4096
"""Largest captured step with prompts: beyond it a launch costs little beside the arithmetic."""
STEPS = (64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
NEAR = 1.125
"""A size that is nearer to the largest one is left out."""


def prompt_sizes(max_batch: int, max_prefill_tokens: int) -> list[int]:
    """Rows of captured steps with prompts; the largest holds any step that is not above MOST_ROWS."""
    most = min(max_batch + max_prefill_tokens, MOST_ROWS)
    return [*(size for size in STEPS if size * NEAR < most), -(-most // 16) * 16]


class Prefill(Protocol):
    """Attention of prompt tokens to the KV cache: clif.kernels.paged_prefill_host.PagedPrefill, or its stand-in."""

    def tile_tokens(self, group: int, head_dim: int, itemsize: int) -> int: ...

    def attend(
        self, q: torch.Tensor, cache: torch.Tensor, table: PrefillTable, scale: float, out: torch.Tensor
    ) -> None: ...


@dataclass(frozen=True)
class PagedPrompts:
    """The prompt rows of a step in tiles that read the cache: see clif.engine.prompt_rows.PromptRows."""

    table: PrefillTable
    prefill: Prefill

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cache: torch.Tensor,
        scores: Scores,
        out: torch.Tensor,
    ) -> torch.Tensor:
        self.prefill.attend(query, cache, self.table, scores.plain_scale, out)
        return out


class PromptGraphs:
    """The captured steps with prompts of one runner. prefill: attention of their prompts."""

    def __init__(
        self, compute: Compute, buffers: PromptBuffers, prefill: Prefill, sizes: Sequence[int], recorder: Recorder
    ) -> None:
        """Capture all sizes, the largest first: smaller ones then fit into its memory."""
        self._compute, self._buffers, self._prefill, self.sizes = compute, buffers, prefill, sizes
        start, before = time.monotonic(), recorder.bytes
        # What a replay reads lies in the buffers: of these only rows and layout count.
        self._batches = {size: self._inputs(size) for size in sizes}
        self.captured: dict[int, Captured[tuple[torch.Tensor, torch.Tensor]]] = {}
        for size in reversed(sizes):
            # Nothing but padding, as for decode steps.
            buffers.fill((), (), size)
            self.captured[size] = recorder.capture(partial(self.step, size))
        buffers.keep_used_heights()
        self.capture_s = time.monotonic() - start
        self._said: set[str] = set()
        shown = "/".join(map(str, reversed(sizes))), self.capture_s, (recorder.bytes - before) / 2**20
        log.info("captured steps with prompts of %s rows in %.1f s, %.0f MiB", *shown)

    def can_run(self, chunks: Sequence[Chunk]) -> bool:
        """Whether one of the captured steps computes these chunks; each reason why not is logged once."""
        why = self.obstacle(chunks)
        if why and why not in self._said:
            self._said.add(why)
            log.info("steps with prompts that are launched kernel by kernel: %s", why)
        return not why

    def obstacle(self, chunks: Sequence[Chunk]) -> str:
        """Why no captured step computes these chunks; empty: one does."""
        _, starts, stops, _ = zip(*chunks, strict=True)
        buffers = self._buffers
        if sum(stops) - sum(starts) > self.sizes[-1]:
            return f"more than {self.sizes[-1]} rows"
        if len(chunks) > buffers.sequences:
            return f"more than {buffers.sequences} requests"
        if max(stops) > buffers.max_blocks * buffers.block_size:
            return f"contexts of more than {buffers.max_blocks * buffers.block_size} tokens"
        scored = any(chunk.sequence.scored is not None for chunk in chunks)
        return "log-probabilities of a prompt are asked for" if scored else ""

    def fill(self, chunks: Sequence[Chunk]) -> Batch:
        """The batch of these chunks, which lie sorted by adapter slot, for the smallest step that holds them."""
        rows = sum(stop - start for _, start, stop, _ in chunks)
        size = next(size for size in self.sizes if size >= rows)
        self._buffers.fill(chunks, segments_of(chunks), size)
        return self._batches[size]._replace(chunks=chunks, captured=self.captured[size])

    def step(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What is captured."""
        return self._compute(self._inputs(size))

    def _inputs(self, size: int) -> Batch:
        """What a step of this size reads: views, except for two conversions, which are a part of the step."""
        buffers = self._buffers
        ids, positions, cache_slots, sources, slots = buffers.fields(size).long()
        rows = LoraRows(size, on_device=SlotsOnDevice(slots, buffers.adapters(size)))
        prompts = PagedPrompts(buffers.prefill_table(size), self._prefill)
        layout = PagedLayout(size, cache_slots, buffers.decode_table(size), (), prompts, padded=True)
        return Batch((), ids, positions, sources, buffers.ends(size).long(), rows, layout)
