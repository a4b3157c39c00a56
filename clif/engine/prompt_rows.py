"""Attention of the prompt rows of a step: prompts without a past, and chunks that continue one or reuse a prefix.

PaddedPrompts serves any device. VarlenPrompts is one launch for all of them, where torch's varlen_attn can be had.

Sources: chunked prefill (Sarathi-Serve, Agrawal et al., OSDI 2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from clif.kernels.kv_types import as_cached, read_slots
from clif.kernels.staging import send_ints
from clif.models.causal import CausalSequences
from clif.models.scores import Scores, masked_attention
from clif.models.varlen import SequenceSpans, Varlen


class PromptChunk(NamedTuple):
    """Tokens [start, stop) of a prompt, at least two of them, in the step's rows from `row` on; its cache blocks."""

    row: int
    start: int
    stop: int
    blocks: Sequence[int]

    @property
    def rows(self) -> range:
        return range(self.row, self.row + self.stop - self.start)

    def first(self, window: int | None) -> int:
        """The first token that any of them sees."""
        return 0 if window is None else max(0, self.start + 1 - window)

    def context(self, block_size: int, window: int | None = None) -> npt.NDArray[np.int64]:
        """The cache slots of all that its tokens see, [stop] without a window."""
        start, stop = self.first(window) // block_size, -(-self.stop // block_size)
        first = np.asarray(self.blocks[start:stop], dtype=np.int64) * block_size
        before = start * block_size
        slots = (first[:, None] + np.arange(block_size)).reshape(-1)
        return slots[self.first(window) - before : self.stop - before]


class PromptRows(Protocol):
    """The prompt rows of one step."""

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cache: torch.Tensor,
        scores: Scores,
        out: torch.Tensor,
    ) -> torch.Tensor:
        """All rows of the step: query [rows, heads, d], key and value [rows, kv_heads, d] as the cache [2 * kv_heads,
        slots, d] of the layer has them, and out [rows, heads * d]. Returns out with the prompt rows filled in, or
        another tensor if no row of the step is of another kind."""
        ...


class ContinuedChunk(NamedTuple):
    """Rows that continue a prompt, its context's cache slots [tokens], and who sees what of it [rows, tokens]."""

    rows: range
    context: torch.Tensor
    mask: torch.Tensor


@dataclass(frozen=True)
class PaddedPrompts:
    """Prompts without a past (`fresh`) as a few padded products, continued ones one by one under a dense mask.

    For layers of one window.
    """

    fresh_rows: torch.Tensor | None
    fresh: CausalSequences | None
    continued: Sequence[ContinuedChunk]

    @classmethod
    def of(
        cls, chunks: Sequence[PromptChunk], block_size: int, device: torch.device, window: int | None = None
    ) -> PaddedPrompts:
        fresh = [chunk for chunk in chunks if chunk.start == 0]
        continued = [
            ContinuedChunk(
                chunk.rows, send_ints(chunk.context(block_size, window), device), _past_mask(chunk, window, device)
            )
            for chunk in chunks
            if chunk.start
        ]
        if not fresh:
            return cls(None, None, continued)
        rows = send_ints([row for chunk in fresh for row in chunk.rows], device)
        return cls(rows, CausalSequences([chunk.stop for chunk in fresh], device), continued)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cache: torch.Tensor,
        scores: Scores,
        out: torch.Tensor,
    ) -> torch.Tensor:
        """See PromptRows."""
        if self.fresh is not None and self.fresh_rows is not None:
            q, k, v = (t.index_select(0, self.fresh_rows) for t in (query, *_as_reused(key, value, cache)))
            out.index_copy_(0, self.fresh_rows, self.fresh.attend(0, q, k, v, scores))
        for chunk in self.continued:
            past_k, past_v = read_slots(cache, chunk.context, query.dtype).chunk(2)
            rows = slice(chunk.rows.start, chunk.rows.stop)
            out[rows] = masked_attention(query[rows].transpose(0, 1), past_k, past_v, chunk.mask, scores)
        return out


def _as_reused(key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """With their roundings in the cache: a prompt is answered alike, whether or not a part of it was reused."""
    return as_cached(key, cache.dtype), as_cached(value, cache.dtype)


def _past_mask(chunk: PromptChunk, window: int | None, device: torch.device) -> torch.Tensor:
    """Boolean mask [rows, context] of a chunk that continues a prompt."""
    before = chunk.start - chunk.first(window)
    seen = torch.ones((len(chunk.rows), before + len(chunk.rows)), dtype=torch.bool, device=device).tril(before)
    return seen if window is None else seen.triu_(before + 1 - window)


@dataclass(frozen=True)
class VarlenPrompts:
    """All prompt rows in one launch, in which a continued chunk has fewer queries than keys.

    rows [prompt rows]: where they lie; None: the step has no other rows. context [keys]: cache slots of all that they
    see; None: no prompt has a past, so the keys are those of the rows.
    """

    rows: torch.Tensor | None
    context: torch.Tensor | None
    spans: SequenceSpans
    attention: Varlen

    @classmethod
    def of(
        cls, chunks: Sequence[PromptChunk], count: int, block_size: int, device: torch.device, attention: Varlen
    ) -> VarlenPrompts:
        """count: rows of the step. Does not wait for the device."""
        rows = np.concatenate([np.arange(chunk.rows.start, chunk.rows.stop) for chunk in chunks])
        past = any(chunk.start for chunk in chunks)
        return cls(
            None if len(rows) == count else send_ints(rows, device),
            send_ints(np.concatenate([chunk.context(block_size) for chunk in chunks]), device) if past else None,
            SequenceSpans.of([len(chunk.rows) for chunk in chunks], [chunk.stop for chunk in chunks], device),
            attention,
        )

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cache: torch.Tensor,
        scores: Scores,
        out: torch.Tensor,
    ) -> torch.Tensor:
        """See PromptRows."""
        if self.context is None:
            key, value = map(self._chosen, _as_reused(key, value, cache))
        else:
            key, value = read_slots(cache, self.context, query.dtype).transpose(0, 1).chunk(2, 1)
        got = self.attention(self._chosen(query), key, value, self.spans, scores.plain_scale).flatten(1)
        return got if self.rows is None else out.index_copy_(0, self.rows, got)

    def _chosen(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.rows is None else x.index_select(0, self.rows)
