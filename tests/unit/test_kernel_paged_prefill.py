"""The paged prefill kernel in Triton's interpreter, and its stand-in, against the specification of paged decode."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from clif.kernels import paged_prefill_host
from clif.kernels.kv_types import FP8
from clif.kernels.paged_prefill_host import INTERPRET, PagedPrefill
from clif.kernels.paged_prefill_reference import PagedPrefillReference
from clif.kernels.paged_prefill_table import PrefillConfig, most_tiles, prefill_config
from clif.kernels.testing.paged_decode_specification import violations
from clif.kernels.testing.paged_prefill_specification import PrefillBatch, random_prefill

pytestmark = pytest.mark.skipif(not INTERPRET, reason="the kernel is compiled in this process: see tests/gpu")
SMALL = PrefillConfig(16, 16, 4, 1)
MIXED = ((0, 18), (16, 17), (5, 22), (0, 2), (16, 21))
"""A new prompt, a token of an answer, a chunk that continues in a block, a short one, one behind a reused prefix."""
Kernel = PagedPrefill | PagedPrefillReference


def compute(batch: PrefillBatch, kernel: Kernel | None = None, **room: int) -> torch.Tensor:
    """The kernel's result; rows that it left alone are zero."""
    kernel, q, cache = kernel or PagedPrefill(SMALL), batch.rows.q, batch.rows.cache
    out = q.new_zeros(q.shape).flatten(1)
    tokens = kernel.tile_tokens(q.shape[1] * 2 // len(cache), q.shape[2], q.itemsize)
    kernel.attend(q, cache, batch.table(tokens, **room), batch.rows.scale, out)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "d", "block_size"), [(8, 2, 64, 16), (6, 2, 80, 5), (14, 2, 16, 4), (3, 3, 8, 7)]
)
def test_results_are_as_near_to_float64_as_torch_s(
    dtype: torch.dtype, heads: int, kv_heads: int, d: int, block_size: int
) -> None:
    batch = random_prefill(MIXED, heads, kv_heads, d, block_size, dtype=dtype)
    assert violations(batch.rows, compute(batch)) == []


def test_a_table_may_have_room_for_more() -> None:
    batch = random_prefill(MIXED, 6, 2, 16, 4, dtype=torch.float32)
    assert violations(batch.rows, compute(batch, rows=200, sequences=9)) == []


def test_the_stand_in_of_captured_steps_on_a_cpu_is_what_the_kernel_is() -> None:
    for seed, tokens in enumerate((1, 3, 4, 16)):
        batch = random_prefill(MIXED, 6, 2, 16, 4, dtype=torch.float32, seed=seed)
        assert violations(batch.rows, compute(batch, PagedPrefillReference(tokens))) == []


def test_a_cache_of_eight_bits_is_read_as_what_it_holds() -> None:
    batch = random_prefill(MIXED, 8, 2, 64, 16, dtype=torch.bfloat16, cache_dtype=FP8)
    found = compute(batch)
    assert violations(batch.rows, found) == []
    assert torch.equal(found, compute(replace(batch, rows=replace(batch.rows, cache=batch.rows.cache.bfloat16()))))


def test_the_default_of_each_shape_computes_the_same_function() -> None:
    batch = random_prefill(((0, 40), (64, 80)), 4, 1, 64, 16, dtype=torch.bfloat16)
    assert violations(batch.rows, compute(batch, PagedPrefill())) == []
    for d in (64, 128, 256):
        assert prefill_config(4, d, 2).rows >= 64, "what Hopper's instructions need"


@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(1, 25)), min_size=1, max_size=4),
    st.sampled_from([(1, 1), (3, 1), (4, 2), (7, 1)]),
    st.integers(1, 20),
)
def test_any_chunks_will_do(chunks: list[tuple[int, int]], heads: tuple[int, int], block_size: int) -> None:
    batch = random_prefill([(a, a + n) for a, n in chunks], *heads, 16, block_size, dtype=torch.float16)
    assert violations(batch.rows, compute(batch)) == []


def test_tiles_of_any_step_fit_and_those_that_read_the_most_come_first() -> None:
    for chunks in (MIXED, ((0, 2),) * 7, ((0, 64),), ((0, 1),)):
        batch = random_prefill(chunks, 2, 1, 8, 4, dtype=torch.float32)
        rows = sum(stop - start for start, stop in chunks)
        table = batch.table(3, rows=rows)
        count = int(table.counts)
        first, size, start, _ = table.tiles[:count].unbind(1)
        assert count <= most_tiles(rows, len(chunks), 3) and bool((size > 0).all())
        ends = (start + size).tolist()
        assert ends == sorted(ends, reverse=True)
        covered = sorted(r for f, n in zip(first.tolist(), size.tolist(), strict=True) for r in range(f, f + n))
        assert covered == sorted(row.row for row in batch.rows.sequences)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("kernel", [PagedPrefill(SMALL), PagedPrefillReference()], ids=["kernel", "stand-in"])
def test_what_one_sequence_holds_never_reaches_another_and_rows_of_no_prompt_stay_as_they_are(kernel: Kernel) -> None:
    batch = random_prefill(MIXED, 4, 2, 16, 4, dtype=torch.float32)
    clean, victim = compute(batch, kernel), batch.chunks[2]
    cache = batch.rows.cache.clone()
    for block in victim.blocks:
        cache[:, block * 4 : (block + 1) * 4] = torch.nan
    found = compute(replace(batch, rows=replace(batch.rows, cache=cache)), kernel)
    mine = slice(victim.row, victim.row + victim.stop - victim.start)
    assert bool(found[mine].isnan().any())
    found[mine] = clean[mine]
    assert torch.equal(found, clean)
    rows = {row.row for row in batch.rows.sequences}
    assert not clean[[r for r in range(len(clean)) if r not in rows]].any()


def test_a_prompt_gets_the_same_bits_in_any_batch() -> None:
    batch = random_prefill(MIXED, 4, 2, 16, 4, dtype=torch.bfloat16)
    together = compute(batch)
    for chunk in batch.chunks:
        alone = compute(replace(batch, chunks=(chunk,)))
        mine = slice(chunk.row, chunk.row + chunk.stop - chunk.start)
        assert torch.equal(alone[mine], together[mine])


def test_tiles_of_another_size_are_refused() -> None:
    batch = random_prefill(MIXED, 4, 2, 16, 4, dtype=torch.float32)
    q = batch.rows.q
    with pytest.raises(ValueError, match="tiles of 3 rows: make them of 8"):
        PagedPrefill(SMALL).attend(q, batch.rows.cache, batch.table(3), 1.0, q.new_zeros(q.shape).flatten(1))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("scores - above[:, None]) * scale", "scores - above[:, None]) * (scale * 1.02)"),
        ("tokens[None, :] <= (start + row)", "tokens[None, :] <= (start + row + 1)"),
        ("tl.load(tiles + 4 * tile + 3)", "(tl.load(tiles + 4 * tile + 3) ^ 1)"),
        ("acc * shrink[:, None]", "acc"),
        ("head * GROUP + members % GROUP", "head * GROUP + members // GROUP % GROUP"),
    ],
    ids=["scale", "a token too far", "tables swapped", "sums not rescaled", "heads swapped"],
)
def test_a_broken_kernel_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, old: str, new: str) -> None:
    batch = random_prefill(((0, 18), (5, 22)), 4, 1, 64, 16, dtype=torch.bfloat16)
    monkeypatch.setattr(paged_prefill_host, "paged_prefill", broken_kernel(tmp_path, old, new))
    assert violations(batch.rows, compute(batch)) != []


def broken_kernel(folder: Path, old: str, new: str) -> Any:
    """The kernel with a piece of its text replaced."""
    text = Path(paged_prefill_host.paged_prefill.fn.__code__.co_filename).read_text()
    assert text.count(old) == 1, old
    (folder / "broken_prefill.py").write_text(text.replace(old, new))
    spec = importlib.util.spec_from_file_location("broken_prefill", folder / "broken_prefill.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.paged_prefill
