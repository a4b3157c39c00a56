"""Attention over the paged cache by the C++ kernels: exact within what the type's roundings allow, and of equal bits
however rows are put together."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch

from clif.kernels.cpu import host
from clif.kernels.cpu.library import Absent, level
from clif.kernels.step_table import StepTable
from clif.models.scores import Scores, cap_

try:
    level()
except Absent as absent:
    pytest.skip(f"no C++ kernels: {absent}", allow_module_level=True)

TYPES = [torch.float32, torch.bfloat16]
SHAPES = [(9, 3, 64), (2, 2, 8), (8, 1, 16), (4, 4, 128), (8, 2, 80), (32, 4, 64), (3, 1, 256), (200, 1, 8)]
"""Query heads, KV heads, numbers of a head."""


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Numbers of torch's threads, which the kernels take."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@dataclass(frozen=True, eq=False)
class Step:
    """Rows of some sequences: query [rows, heads, d], a piece of the merged projection, and the cache they read.

    spans: of each sequence, the contexts of its first and last row. The cache is NaN wherever no row may read.
    scores: None: products by the root of the heads' size.
    """

    shape: host.HeadShape
    spans: list[tuple[int, int]]
    query: torch.Tensor
    cache: torch.Tensor
    table: StepTable
    kind: Scores | None = None

    @property
    def scores(self) -> Scores:
        return self.kind or Scores(self.shape.head_dim**-0.5)

    def by_kernels(self) -> torch.Tensor:
        return host.attention(self.query, self.shape, self.cache, self.table, host.scores_of(*self.scores))

    def first(self, context: int) -> int:
        """The first token that a row sees."""
        return 0 if self.scores.window is None else max(0, context - self.scores.window)

    def rows(self) -> tuple[list[int], list[int]]:
        """Sequence and context of each row."""
        return self.table.sequence[: self.table.rows].tolist(), self.table.context[: self.table.rows].tolist()

    def row(self, row: int) -> Step:
        """The same row alone, and its sequence."""
        at = int(self.table.sequence[row])
        alone = table_of([0], [int(self.table.context[row])], self.table.blocks[at : at + 1], self.table.block_size)
        return replace(self, query=self.query[row : row + 1], table=alone)

    def slots(self, sequence: int, count: int) -> torch.Tensor:
        at = torch.arange(count)
        size = self.table.block_size
        return self.table.blocks[sequence].long()[at // size] * size + at % size

    def exact(self) -> torch.Tensor:
        """In float64, row by row."""
        group, out = self.shape.heads // self.shape.kv_heads, []
        for row, (sequence, context) in enumerate(zip(*self.rows(), strict=True)):
            seen = self.cache[:, self.slots(sequence, context)[self.first(context) :]].double()
            k, v = (t.repeat_interleave(group, 0) for t in seen.chunk(2))
            products = torch.einsum("hd,htd->ht", self.query[row].double(), k) * self.scores.scale
            weights = self.scores.softmax(cap_(products, self.scores.softcap)[None], 1, 0)[0]
            out.append(torch.einsum("ht,htd->hd", weights, v).flatten())
        return torch.stack(out)


def table_of(sequence: list[int], context: list[int], blocks: torch.Tensor, block_size: int) -> StepTable:
    """A table with room for more rows than it has."""
    table = StepTable.zeros(len(context) + 3, len(blocks), block_size)
    table.rows, table.sequences, table.blocks = len(context), len(blocks), blocks.clone()
    table.sequence[: table.rows] = torch.tensor(sequence, dtype=torch.int32)
    table.context[: table.rows] = torch.tensor(context, dtype=torch.int32)
    return table


def drawn(
    heads: int,
    kv_heads: int,
    d: int,
    spans: list[tuple[int, int]],
    dtype: torch.dtype,
    block_size: int = 16,
    seed: int = 0,
    kind: Scores | None = None,
) -> Step:
    """A step with its blocks all over the cache, in which NaN lies behind every context and below every window."""
    rng = torch.Generator().manual_seed(seed)
    needed = [-(-last // block_size) for _, last in spans]
    free = torch.randperm(2 * sum(needed) + 1, generator=rng).int()
    blocks = torch.full((len(spans), max(needed)), 2**30, dtype=torch.int32)
    for at, count in enumerate(needed):
        blocks[at, :count], free = free[:count], free[count:]
    sequence = [at for at, (first, last) in enumerate(spans) for _ in range(first, last + 1)]
    context = [seen for first, last in spans for seen in range(first, last + 1)]
    table = table_of(sequence, context, blocks, block_size)
    qkv = 2 * torch.randn(len(context), heads + 2 * kv_heads, d, generator=rng)
    cache = torch.full((2 * kv_heads, (2 * sum(needed) + 1) * block_size, d), torch.nan)
    step = Step(host.HeadShape(heads, kv_heads, d), spans, qkv.to(dtype)[:, :heads], cache.to(dtype), table, kind)
    for at, (first, last) in enumerate(spans):
        below = step.first(first)
        drawn_tokens = torch.randn(2 * kv_heads, last, d, generator=rng).to(dtype)
        step.cache[:, step.slots(at, last)[below:]] = drawn_tokens[:, below:]
        # What was given back is nowhere.
        step.table.blocks[at, : below // block_size] = 2**30
    return step


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    assert found.isfinite().all()
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "d"), SHAPES)
@pytest.mark.parametrize("block_size", [8, 16])
def test_each_row_attends_to_its_context(
    heads: int, kv_heads: int, d: int, block_size: int, dtype: torch.dtype
) -> None:
    spans = [(1, 1), (300, 300), (1, 33), (17, 17), (120, 140), (128, 128), (129, 129), (1, 2), (250, 257)]
    step = drawn(heads, kv_heads, d, spans, dtype, block_size)
    allowed = 1e-6 if dtype is torch.float32 else 4e-3
    assert error(step.by_kernels(), step.exact()) < allowed


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("seed", range(8))
def test_steps_of_any_composition_are_attended_to(seed: int, dtype: torch.dtype) -> None:
    rng = random.Random(seed)
    heads, kv_heads, d = rng.choice(SHAPES)
    lasts = [rng.randint(1, 300) for _ in range(rng.randint(1, 8))]
    spans = [(rng.randint(max(1, last - 69), last) if rng.random() < 0.5 else last, last) for last in lasts]
    step = drawn(heads, kv_heads, d, spans, dtype, rng.choice([1, 5, 8, 16, 32]), seed)
    assert error(step.by_kernels(), step.exact()) < (1e-6 if dtype is torch.float32 else 4e-3)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "d"), SHAPES[:5])
def test_a_row_has_equal_bits_alone_in_a_prompt_and_on_any_threads(
    heads: int, kv_heads: int, d: int, dtype: torch.dtype, threads: int
) -> None:
    step = drawn(heads, kv_heads, d, [(1, 70), (290, 290), (100, 199), (64, 64)], dtype)
    together = step.by_kernels()
    torch.set_num_threads(1)
    for row in range(len(together)):
        assert torch.equal(step.row(row).by_kernels()[0], together[row])


@pytest.mark.parametrize("dtype", TYPES)
def test_a_nan_of_one_sequence_reaches_no_other(dtype: torch.dtype) -> None:
    spans = [(40, 40), (30, 60), (1, 20), (77, 77)]
    step = drawn(9, 3, 64, spans, dtype)
    clean = step.by_kernels()
    step.cache[:, step.slots(1, 60)] = torch.nan
    found = step.by_kernels()
    bad = torch.tensor(step.rows()[0]) == 1
    assert torch.equal(found[~bad], clean[~bad])
    assert found[bad].isnan().all()


@pytest.mark.parametrize("dtype", TYPES)
def test_a_nan_in_the_last_token_is_seen_by_its_row(dtype: torch.dtype) -> None:
    for place in (0, 1):
        step = drawn(4, 2, 16, [(130, 130)], dtype)
        step.cache[2 * place : 2 * place + 2, step.slots(0, 130)[-1]] = torch.nan
        assert step.by_kernels().isnan().all()


@pytest.mark.parametrize("dtype", TYPES)
def test_scores_of_any_size_do_not_overflow(dtype: torch.dtype) -> None:
    """One token has nearly all the weight; the largest score comes early, late, and below -1e4."""
    step = drawn(2, 2, 64, [(300, 300)], dtype)
    for at in (0, 131, 299):
        cache = step.cache.clone()
        slots = step.slots(0, 300)
        cache[:2, slots] *= 0.01
        cache[:2, slots[at]] = step.query[0] * 40
        cache[0] -= step.query[0, 0] * 400
        found = replace(step, cache=cache)
        assert error(found.by_kernels(), found.exact()) < (1e-4 if dtype is torch.float32 else 8e-3)


def test_bfloat16_is_as_exact_as_torchs_attention() -> None:
    step = drawn(8, 8, 64, [(1, 300)], torch.bfloat16)
    seen = step.cache[:, step.slots(0, 300)].unsqueeze(0)
    query = step.query.transpose(0, 1).unsqueeze(0)
    torchs = torch.nn.functional.scaled_dot_product_attention(query, *seen.chunk(2, 1), is_causal=True)
    exact = step.exact()
    assert error(step.by_kernels(), exact) < 1.1 * error(torchs[0].transpose(0, 1).flatten(1), exact)


def test_any_scale_counts() -> None:
    step = drawn(3, 1, 24, [(50, 50)], torch.float32)
    found = host.attention(step.query, step.shape, step.cache, step.table, host.scores_of(0.5))
    wider = replace(step, query=step.query * 0.5 * math.sqrt(24))
    assert error(found, wider.exact()) < 1e-6


KINDS = {
    "window": Scores(0.3, window=24),
    "narrow window": Scores(0.3, window=1),
    "wide window": Scores(0.3, window=150),
    "cap": Scores(0.3, softcap=1.5),
    "sinks": Scores(0.3, sinks=torch.tensor([])),
    "all": Scores(0.3, 70, 2.0, torch.tensor([])),
}
SPANS = [(1, 1), (300, 300), (1, 33), (17, 17), (120, 190), (128, 128), (129, 129), (1, 2), (250, 257), (24, 25)]


def kind_of(name: str, heads: int, dtype: torch.dtype) -> Scores:
    """A kind of scores, with sinks of so many heads if it has them: one that takes all, one that takes nothing."""
    kind = KINDS[name]
    if kind.sinks is None:
        return kind
    sinks = torch.linspace(-2, 3, heads)
    sinks[0], sinks[-1] = -1e4, 30
    return kind._replace(sinks=sinks.to(dtype))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("heads", "kv_heads", "d"), [(9, 3, 64), (2, 2, 8), (8, 2, 80), (32, 4, 64), (3, 1, 256)])
@pytest.mark.parametrize("block_size", [5, 16])
def test_scores_of_every_kind_are_attended_by(
    heads: int, kv_heads: int, d: int, block_size: int, name: str, dtype: torch.dtype
) -> None:
    step = drawn(heads, kv_heads, d, SPANS, dtype, block_size, kind=kind_of(name, heads, dtype))
    assert error(step.by_kernels(), step.exact()) < (2e-6 if dtype is torch.float32 else 4e-3)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("heads", "kv_heads", "d"), [(9, 3, 64), (2, 2, 8), (8, 1, 16)])
def test_a_row_has_equal_bits_alone_whatever_the_scores(
    heads: int, kv_heads: int, d: int, name: str, dtype: torch.dtype
) -> None:
    spans = [(1, 70), (290, 290), (100, 199), (64, 64)]
    step = drawn(heads, kv_heads, d, spans, dtype, kind=kind_of(name, heads, dtype))
    together = step.by_kernels()
    for row in range(len(together)):
        assert torch.equal(step.row(row).by_kernels()[0], together[row])


@pytest.mark.parametrize("dtype", TYPES)
def test_a_window_as_wide_as_the_context_changes_no_bit(dtype: torch.dtype) -> None:
    step = drawn(9, 3, 64, SPANS, dtype)
    assert torch.equal(replace(step, kind=Scores(64**-0.5, window=300)).by_kernels(), step.by_kernels())


def test_caps_and_sinks_of_any_size_do_not_overflow() -> None:
    step = drawn(2, 2, 64, [(300, 300)], torch.float32)
    for sinks in (torch.tensor([300.0, -300.0]), torch.tensor([-torch.inf, 0.0])):
        for softcap in (None, 50.0):
            kind = Scores(40.0, softcap=softcap, sinks=sinks)
            found = replace(step, kind=kind)
            assert error(found.by_kernels(), found.exact()) < 1e-4
