"""Finds the fastest split of the paged decode kernel on this GPU; a part of the tuner (tune_gpu.py).

A shape gets one split for all batches, since it decides the bits of a result: a candidate costs the geometric mean of
its times over batches from one short context to many long ones. Sequences read blocks all over a cache that is larger
than what the GPU holds near its multiprocessors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from checkout import use_checkout

use_checkout()

import torch
from halving import Heats, Ranking, fastest, rank
from timing import Timing, prepared

from clif.kernels.kv_types import FP8
from clif.kernels.paged_decode_candidates import decode_candidates
from clif.kernels.paged_decode_config import DecodeConfig, DecodeShape
from clif.kernels.paged_decode_host import PagedDecode
from clif.kernels.paged_decode_table import DecodeRow, DecodeTable, StagedDecodeTable
from clif.kernels.testing.paged_decode_specification import random_decode, violations
from clif.kernels.tile_file import DecodeEntry, Spread, Stamp, TileFile

BLOCK = 16
"""Tokens of a cache block."""
SHAPES = (DecodeShape(32, 8, 64, 2), DecodeShape(32, 8, 128, 2), DecodeShape(32, 8, 64, 1), DecodeShape(32, 8, 128, 1))
"""1B and 8B models, with caches of 16 and of 8 bits."""
BATCHES = ((64, 384), (1, 384), (16, 1024), (64, 2048), (4, 8192))
"""Sequences, and tokens of each."""
DRY_SHAPES, DRY_BATCHES = (DecodeShape(4, 2, 16, 2), DecodeShape(4, 2, 16, 1)), ((3, 40), (1, 70))
RAGGED = (700, 1, 16, 17, 256, 257, 1500)
LAYERS = 64
"""Launches of a graph at most, each over blocks of its own as far as the cache has them."""


@dataclass(frozen=True)
class DecodeJob:
    """Compiles a candidate, in a process that uses no GPU: see compile_ahead.CompilePool."""

    shape: DecodeShape
    config: DecodeConfig

    def key(self) -> tuple[Any, ...]:
        c = self.config
        return "paged decode", self.shape, c.block_kv, c.parts, c.least, c.warps, c.stages

    def __call__(self) -> None:
        cpu = torch.device("cpu")
        q, cache, out = tensors(self.shape, 2, 16 * BLOCK, cpu)
        table = StagedDecodeTable.make([DecodeRow(0, 1, [0])], BLOCK, cpu)
        PagedDecode(cpu, self.config).attend(q, cache, table, 1.0, out)


def tensors(
    shape: DecodeShape, rows: int, slots: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, cache and out in bfloat16, or with a cache of eight bits."""
    q = torch.randn(rows, shape.heads, shape.head_dim, dtype=torch.bfloat16, device=device)
    cache = torch.randn(2 * shape.kv_heads, slots, shape.head_dim, dtype=torch.bfloat16, device=device)
    return q, cache.to(FP8) if shape.itemsize == 1 else cache, torch.zeros_like(q).flatten(1)


class DecodeRig:
    """Times and checks splits of one shape. batches: (sequences, tokens of each)."""

    def __init__(self, shape: DecodeShape, batches: Sequence[tuple[int, int]], device: torch.device) -> None:
        self.shape, self.batches, self.device = shape, batches, device
        slots = max(count * -(-tokens // BLOCK) for count, tokens in batches) * BLOCK
        self._q, self._cache, self._out = tensors(shape, max(count for count, _ in batches), slots, device)
        self._tables = {batch: self._layers(*batch) for batch in batches}
        self._stream = torch.cuda.Stream() if device.type == "cuda" else None
        self._runs: dict[DecodeConfig, list[Callable[[], float]]] = {}

    def cost(self, config: DecodeConfig, count: int) -> list[float]:
        """So many samples: microseconds of a layer, the geometric mean over the batches."""
        return [math.exp(sum(map(math.log, self.times(config))) / len(self.batches)) for _ in range(count)]

    def times(self, config: DecodeConfig) -> list[float]:
        """One sample for each batch. The first call captures graphs."""
        if config not in self._runs:
            kernel = PagedDecode(self.device, config)
            self._runs[config] = [self._prepared(kernel, tables) for tables in self._tables.values()]
        return [run() for run in self._runs[config]]

    def wrong(self, config: DecodeConfig) -> str | None:
        """Why the results of a configuration violate the specification; None: they do not."""
        lengths = RAGGED if self.device.type == "cuda" else (20, 3)
        shape = self.shape
        batch = random_decode(
            lengths, shape.heads, shape.kv_heads, shape.head_dim, BLOCK, dtype=torch.bfloat16, device=str(self.device),
            cache_dtype=FP8 if shape.itemsize == 1 else None,
        )  # fmt: skip
        out = torch.full_like(batch.q, torch.nan).flatten(1)
        PagedDecode(self.device, config).attend(batch.q, batch.cache, batch.table(), batch.scale, out)
        return "; ".join(violations(batch, out)) or None

    def _layers(self, count: int, tokens: int) -> list[DecodeTable]:
        """Tables of sequences over different blocks of the cache, as far as there are so many."""
        each = -(-tokens // BLOCK)
        order = torch.randperm(self._cache.shape[1] // BLOCK, generator=torch.Generator().manual_seed(0)).tolist()
        layers = max(1, min(LAYERS, len(order) // (count * each)))
        tables = list[DecodeTable]()
        for layer in range(layers):
            starts = range(layer * count * each, (layer + 1) * count * each, each)
            rows = [DecodeRow(i, tokens, order[start : start + each]) for i, start in enumerate(starts)]
            tables.append(StagedDecodeTable.make(rows, BLOCK, self.device))
        return tables

    def _prepared(self, kernel: PagedDecode, tables: Sequence[DecodeTable]) -> Callable[[], float]:
        def way(layer: int) -> None:
            kernel.attend(self._q, self._cache, tables[layer], self.shape.head_dim**-0.5, self._out)

        return prepared(way, len(tables), self.device, self._stream)


def tune_decode(
    file: TileFile, stamp: Stamp, capability: int, device: torch.device, ask: Callable[[DecodeJob], Future[float]],
    late: Callable[[], bool], heats: Heats, *, again: bool = False, dry: bool = False,
    asked: Callable[[], None] = lambda: None,
) -> dict[str, int]:  # fmt: skip
    """Measure the shapes that the file does not have; returns how many ended how. The caller writes the file.

    stamp: with the digest of this kernel's source; ask: compiles a job ahead; heats: see halving.py; asked: is called
    when all jobs have been given to the compiler, for others to follow.
    """
    counts: dict[str, int] = {}
    shapes, batches = (DRY_SHAPES, DRY_BATCHES) if dry else (SHAPES, BATCHES)
    # Numbers of eight bits need compute capability 8.9.
    shapes = tuple(s for s in shapes if dry or s.itemsize > 1 or capability >= 89)
    wanted = [s for s in shapes if again or not (s in file.decode and file.decode[s].stamp.same_versions(stamp))]
    candidates = {s: decode_candidates(s, capability)[: 3 if dry else None] for s in wanted}
    compiled = {} if late() else {(s, c): ask(DecodeJob(s, c)) for s in wanted for c in candidates[s]}
    asked()
    for shape in shapes:
        outcome = "known"
        if shape in wanted:
            entry = None if late() else measure(shape, candidates[shape], compiled, batches, device, late, heats, stamp)
            outcome = "not measured" if entry is None else "measured"
            if entry is not None:
                file.decode[shape] = entry
                print(f"paged decode {shape}: {entry.us.median:.1f} us, default {entry.default.median:.1f}", flush=True)
        counts[outcome] = counts.get(outcome, 0) + 1
    return counts


def measure(
    shape: DecodeShape, candidates: Sequence[DecodeConfig],
    compiled: dict[tuple[DecodeShape, DecodeConfig], Future[float]], batches: Sequence[tuple[int, int]],
    device: torch.device, late: Callable[[], bool], heats: Heats, stamp: Stamp,
) -> DecodeEntry | None:  # fmt: skip
    """The entry of one shape; None: time was up, or no candidate is right. The default is timed to the end."""
    rig, default, failed = DecodeRig(shape, batches, device), candidates[0], dict[DecodeConfig, str]()
    for config in candidates:
        try:
            compiled[shape, config].result()
        except RuntimeError as error:
            failed[config] = str(error)
    ready = [c for c in candidates if c not in failed]
    ranking: Ranking[DecodeConfig] = rank(ready, lambda config: config == default, rig.cost, late, heats)
    ranking.left_out |= failed
    whole = ranking.complete and not ranking.cut_short
    best = fastest(ranking.times, ready, rig.wrong, ranking.left_out) if whole else None
    if best is None or default not in ranking.times:
        return None
    reasons: dict[str, int] = {}
    for why in ranking.left_out.values():
        reasons[why] = reasons.get(why, 0) + 1
    each = {f"{count} x {tokens}": round(us, 3) for (count, tokens), us in zip(batches, rig.times(best), strict=True)}
    return DecodeEntry(shape, best, spread(ranking.times[best]), spread(ranking.times[default]), each, stamp, reasons)


def spread(timing: Timing) -> Spread:
    return Spread(*(round(us, 3) for us in (timing.p10, timing.median, timing.p90)))


def summary(file: TileFile) -> list[str]:
    """Markdown: splits and medians in microseconds."""
    lines = ["### Paged decode: microseconds per layer, one split for all batches", ""]
    lines += ["| shape | split | geometric mean | default | of each batch |", "|---" * 5 + "|"]
    for shape, entry in file.decode.items():
        c = entry.config
        split = f"steps of {c.block_kv}, parts of {c.least}, {c.warps} warps, {c.stages} stages, {c.programs} programs"
        each = ", ".join(f"{name}: {us:.1f}" for name, us in entry.batches.items())
        name = f"{shape.heads} heads on {shape.kv_heads}, d={shape.head_dim}, {8 * shape.itemsize} bits"
        lines.append(f"| {name} | {split} | {entry.us.median:.1f} | {entry.default.median:.1f} | {each} |")
    return lines
