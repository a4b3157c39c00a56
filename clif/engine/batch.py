"""The batch of one step, filled from the scheduler's plan into buffers of fixed capacity that are made once.

Order of a step: schedule (chunks), fill (this file), forward (the runner: layers and sampling), settle (the scheduler).
On a GPU a fill is one copy from pinned memory for each buffer and nothing here waits for the device, so that a step can
be filled and launched while the one before it still runs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from itertools import groupby
from typing import Any, NamedTuple

import torch

from clif.config import EngineConfig
from clif.engine.attention import DecodeGroup, PagedLayout, WindowRows, make_decode_group
from clif.engine.capture import Captured
from clif.engine.draws import Draws, DrawTable
from clif.engine.logprobs import Reporting
from clif.engine.prompt_logprobs import PromptScoring
from clif.engine.prompt_rows import PaddedPrompts, PromptChunk, PromptRows, VarlenPrompts
from clif.engine.scheduler import Chunk, Sequence
from clif.engine.step_rows import KNOWN as KNOWN
from clif.engine.step_rows import StepRows
from clif.kernels.dual_lora_reference import Segment
from clif.kernels.dual_lora_table import RowTables
from clif.kernels.paged_decode_table import DecodeRow, DecodeTables
from clif.kernels.staging import Staged
from clif.models.causal import bucket
from clif.models.dual_linear import LoraRows
from clif.models.varlen import Varlen

FIELDS = 4
"""Integers of a row: token id, position, cache slot, and the index of its id among the last step's tokens."""


class Batch(NamedTuple):
    """The input of forward(): rows of all chunks, one chunk after the other. Valid until the next fill.

    ids, positions [rows]. sources [rows]: which of the last step's tokens is a row's id, KNOWN where `ids` has it; None
    where all ids are known. ends [chunks that sample]: the rows whose logits choose a token, None for all of them;
    draws: of those that are not simply greedy, None if all are; reporting: of those that report log-probabilities.
    late: some tokens can be chosen only when those of the step before are known. captured: computes it, with padding
    behind these rows, and behind the `sampling` tokens that are chosen. scoring: the rows that tell a prompt's next
    token, for requests that want to know.
    """

    chunks: Seq[Chunk]
    ids: torch.Tensor
    positions: torch.Tensor
    sources: torch.Tensor | None
    ends: torch.Tensor | None
    rows: LoraRows
    layout: PagedLayout
    draws: Draws | None = None
    reporting: Reporting | None = None
    late: bool = False
    captured: Captured[Any] | None = None
    sampling: int = 0
    scoring: PromptScoring | None = None


class SentRows(NamedTuple):
    """The rows of a batch on the device; fields as in Batch."""

    ids: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    sources: torch.Tensor | None
    ends: torch.Tensor | None


class BatchBuilder:
    """Fills batches for one device.

    dtype: of the scores that attention computes without the paged kernel. varlen: what attends in prompts; None: padded
    products. step_tables: attention of all rows reads the step's table, on a CPU; nothing else is made of them.
    windows: those of the model's layers; None: one sees the whole context.
    """

    def __init__(
        self,
        config: EngineConfig,
        vocab_size: int,
        device: torch.device,
        dtype: torch.dtype,
        varlen: Varlen | None = None,
        step_tables: bool = False,
        windows: Seq[int | None] = (None,),
    ) -> None:
        self._block_size, self._device = config.block_size, device
        self._dtype, self._varlen, self._step_tables, self._windows = dtype, varlen, step_tables, windows
        # A row for each answer, and the prompts of a step.
        self._capacity = config.max_batch + config.max_prefill_tokens
        self._rows = StepRows(self._capacity, config.max_batch, config.block_size)
        self._staged: Staged | None = None
        if device.type != "cpu":
            self._staged = Staged.zeros(FIELDS * self._capacity + config.max_batch, torch.int64, device)
        self._tables = DecodeTables(config.block_size, device)
        self._row_tables = RowTables(device)
        self._draws = DrawTable(config.max_batch, vocab_size, device)
        # Of the last step: these are the same where the next one continues it on a CPU.
        self._last: tuple[SentRows, LoraRows, PagedLayout] | None = None

    def fill(self, chunks: Seq[Chunk], paged: bool) -> Batch:
        """The batch of these chunks, which lie sorted by adapter slot. paged: its decode rows are for the kernel."""
        same = self._rows.fill(chunks)
        if not (same and self._last is not None and self._step_tables and not paged):
            self._last = self._parts(chunks, paged)
        (ids, positions, _, sources, ends), rows, layout = self._last
        draws, late = self._fill_draws(chunks if ends is None else [chunk for chunk in chunks if chunk.needs_sampling])
        scoring = None if ends is None else PromptScoring.of(chunks, self._device)
        reporting = self._draws.reporting
        return Batch(chunks, ids, positions, sources, ends, rows, layout, draws, reporting, late, scoring=scoring)

    def with_draws(self, batch: Batch) -> Batch:
        """The batch, whose rows are filled, with the draws of its chunks."""
        sampling = [chunk for chunk in batch.chunks if chunk.needs_sampling]
        draws, late = self._fill_draws(sampling)
        return batch._replace(draws=draws, reporting=self._draws.reporting, late=late, sampling=len(sampling))

    def _fill_draws(self, sampling: Seq[Chunk]) -> tuple[Draws | None, bool]:
        """The draws of the chunks that sample, and whether they wait for the tokens of the step before."""
        # After the rows, which need the index of each sequence among the tokens of the step before.
        for i, chunk in enumerate(sampling):
            chunk.sequence.sampled_at = i
        draws = self._draws.fill(sampling)
        return draws, draws is not None and any(_waits(sampling[row].sequence) for _, row in draws.guided)

    def _parts(self, chunks: Seq[Chunk], paged: bool) -> tuple[SentRows, LoraRows, PagedLayout]:
        """Rows, adapters and layout of the table that has been filled."""
        table = self._rows.table
        segments = segments_of(chunks) if table.adapted else ()
        self._row_tables.refill(segments, table.rows)
        sent = self._views() if self._staged is None else self._send(self._staged)
        rows = LoraRows(table.rows, segments, tables=self._row_tables)
        return sent, rows, self._layout(chunks, sent.slot_mapping, paged)

    def _views(self) -> SentRows:
        """On a CPU: the rows where they are."""
        rows, table = self._rows, self._rows.table
        n = table.rows
        sources = torch.from_numpy(rows.sources[:n]) if rows.late else None
        ends = torch.from_numpy(rows.ends[: rows.sampling]) if rows.sampling < n else None
        return SentRows(table.ids[:n], table.positions[:n], table.cache_slots[:n], sources, ends)

    def _send(self, staged: Staged) -> SentRows:
        """By one copy to the device."""
        rows, n, after = self._rows, self._rows.table.rows, FIELDS * self._capacity
        host = staged.write().numpy()
        fields = host[:after].reshape(FIELDS, self._capacity)
        fields[:, :n] = rows.ids[:n], rows.positions[:n], rows.cache_slots[:n], rows.sources[:n]
        host[after : after + rows.sampling] = rows.ends[: rows.sampling]
        staged.send()
        words = staged.words
        ids, positions, slots, sources = words[:after].view(FIELDS, self._capacity)[:, :n]
        ends = words[after : after + rows.sampling] if rows.sampling < n else None
        return SentRows(ids, positions, slots, sources if rows.late else None, ends)

    def _layout(self, chunks: Seq[Chunk], slot_mapping: torch.Tensor, paged: bool) -> PagedLayout:
        if self._step_tables and not paged:
            return PagedLayout(self._rows.table.rows, slot_mapping, None, (), None, self._rows.table)
        decoding: list[DecodeRow] = []
        prompts: list[PromptChunk] = []
        row = 0
        for chunk in chunks:
            size, blocks = chunk.stop - chunk.start, chunk.sequence.blocks
            if size == 1:
                decoding.append(DecodeRow(row, chunk.stop, blocks))
            else:
                prompts.append(PromptChunk(row, chunk.start, chunk.stop, blocks))
            row += size
        seen = {window: self._seen(decoding, prompts, row, paged, window) for window in self._windows}
        groups, whole = seen.pop(None, WindowRows((), None))
        table = self._tables.refill(decoding) if paged and decoding else None
        windowed = {window: rows for window, rows in seen.items() if window is not None}
        return PagedLayout(row, slot_mapping, table, groups, whole, windowed=windowed)

    def _seen(
        self, decoding: Seq[DecodeRow], prompts: Seq[PromptChunk], count: int, paged: bool, window: int | None
    ) -> WindowRows:
        """What `count` rows read in layers of this window."""
        groups = () if paged else tuple(self._groups(decoding, window))
        return WindowRows(groups, self._prompt_rows(prompts, count, window) if prompts else None)

    def _prompt_rows(self, chunks: Seq[PromptChunk], count: int, window: int | None) -> PromptRows:
        if self._varlen is None:
            return PaddedPrompts.of(chunks, self._block_size, self._device, window)
        return VarlenPrompts.of(chunks, count, self._block_size, self._device, self._varlen)

    def _groups(self, decoding: Seq[DecodeRow], window: int | None) -> Iterator[DecodeGroup]:
        """Without the kernel: rows whose contexts are of like length share a product."""
        by_size: dict[int, list[DecodeRow]] = defaultdict(list)
        for sequence in decoding:
            seen = sequence.length if window is None else min(sequence.length, window)
            by_size[bucket(seen)].append(sequence)
        rest = self._block_size, self._dtype, self._device, window
        return (make_decode_group(members, *rest) for members in by_size.values())


def _waits(sequence: Sequence) -> bool:
    """Its guide depends on a token of the step before, which is not known yet; this step's own is in flight as well."""
    return sequence.guide is not None and sequence.guide.follows and sequence.num_tokens_in_flight > 1


def segments_of(chunks: Seq[Chunk]) -> tuple[Segment, ...]:
    """Rows of each adapter slot; chunks come sorted by slot, those of the base first."""
    segments, row = [], 0
    for slot, members in groupby(chunks, lambda chunk: chunk.sequence.slot):
        start = row
        for _, first, stop, _ in members:
            row += stop - first
        if slot is not None:
            segments.append(Segment(start, row, slot))
    return tuple(segments)
