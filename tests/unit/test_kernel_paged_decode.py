"""The paged decode kernel in Triton's interpreter, against the specification that the GPU tests use, too."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Rig, answer, make_rig, request
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

import triton
from triton import language as tl

from clif.kernels import paged_decode_host
from clif.kernels.kv_types import FP8, to_cache_type
from clif.kernels.numerics import rounded, widened
from clif.kernels.paged_decode_config import DecodeConfig, DecodeShape, default_config
from clif.kernels.paged_decode_host import INTERPRET, PagedDecode
from clif.kernels.paged_decode_table import DecodeRow, DecodeTable, StagedDecodeTable
from clif.kernels.testing.paged_decode_specification import DecodeBatch, random_decode, violations

pytestmark = pytest.mark.skipif(not INTERPRET, reason="the kernel is compiled in this process: see tests/gpu")
CPU = torch.device("cpu")
SMALL = DecodeConfig(block_kv=16, parts=3, least=16)
RAGGED = (37, 1, 16, 17, 32)


def compute(batch: DecodeBatch, kernel: PagedDecode | None = None, table: DecodeTable | None = None) -> torch.Tensor:
    """The kernel's result; rows that it left alone are zero."""
    kernel = kernel or PagedDecode(CPU, SMALL)
    out = batch.q.new_zeros(batch.q.shape).flatten(1)
    kernel.attend(batch.q, batch.cache, table or batch.table(), batch.scale, out)
    assert not kernel.workspace().tickets.any(), "tickets are back at zero"
    return out


def usual(dtype: torch.dtype = torch.bfloat16, **options: Any) -> DecodeBatch:
    return random_decode(RAGGED, 8, 2, 64, 16, dtype=dtype, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "d", "block_size"),
    [(2, 2, 64, 16), (6, 2, 80, 5), (4, 1, 96, 64), (14, 2, 64, 4), (8, 1, 128, 32), (3, 1, 8, 7)],
)
def test_results_are_as_near_to_float64_as_torch_s(
    dtype: torch.dtype, heads: int, kv_heads: int, d: int, block_size: int
) -> None:
    batch = random_decode(RAGGED, heads, kv_heads, d, block_size, dtype=dtype)
    assert violations(batch, compute(batch)) == []


@pytest.mark.parametrize(
    "lengths",
    [(), (1,), (15,), (16,), (17,), (47, 48, 49), (1, 200)],
    ids=["nobody", "1", "below a block", "a block", "above a block", "around all parts", "far apart"],
)
def test_any_lengths_will_do(lengths: tuple[int, ...]) -> None:
    batch = random_decode(lengths, 4, 1, 64, 16, dtype=torch.float32)
    assert violations(batch, compute(batch, table=batch.table(capacity=4))) == []


@pytest.mark.parametrize("parts", [1, 2, 7, 64])
def test_any_number_of_parts_computes_the_same_function(parts: int) -> None:
    """Also more parts than the sequences have blocks."""
    batch = usual(torch.float32)
    assert violations(batch, compute(batch, PagedDecode(CPU, replace(SMALL, parts=parts)))) == []


def test_the_shape_that_failed_on_a_gpu_with_the_default_split() -> None:
    """Heads padded from 80 to 128, blocks of 12 tokens across the steps of a part, float32."""
    batch = random_decode((268, 13), 21, 7, 80, 12, dtype=torch.float32, shared=1)
    assert default_config(DecodeShape(21, 7, 80, 4)).part_lengths(268) == [128, 140]
    assert violations(batch, compute(batch, PagedDecode(CPU))) == []


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=3),
    st.sampled_from([(1, 1), (3, 1), (4, 2), (7, 1)]),
    st.sampled_from([8, 16, 24]),
    st.integers(1, 20),
    st.integers(1, 4),
)
def test_any_small_shape_will_do(
    lengths: list[int], heads: tuple[int, int], d: int, block_size: int, parts: int
) -> None:
    batch = random_decode(lengths, *heads, d, block_size, dtype=torch.float16)
    assert violations(batch, compute(batch, PagedDecode(CPU, replace(SMALL, parts=parts)))) == []


def test_the_query_and_the_result_may_be_parts_of_wider_tensors() -> None:
    batch = usual()
    wide = torch.full((len(batch.q), 12, 64), torch.nan, dtype=batch.q.dtype)
    wide[:, 2:10] = batch.q
    out = torch.zeros(len(batch.q), 600, dtype=batch.q.dtype)
    PagedDecode(CPU, SMALL).attend(wide[:, 2:10], batch.cache, batch.table(), batch.scale, out[:, 40:552])
    assert torch.equal(out[:, 40:552], compute(batch))
    assert not out[:, :40].any() and not out[:, 552:].any()


# --- the split


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 40_000), st.sampled_from([16, 64, 128]), st.integers(1, 4), st.integers(1, 70))
def test_parts_are_equal_to_within_a_step_and_none_is_smaller_than_asked(
    tokens: int, block_kv: int, least: int, parts: int
) -> None:
    config = DecodeConfig(block_kv=block_kv, least=least * block_kv, parts=parts)
    lengths = config.part_lengths(tokens)
    assert sum(lengths) == tokens and len(lengths) == max(1, min(parts, tokens // config.least))
    assert max(lengths) - min(lengths) <= block_kv + (-tokens) % block_kv
    assert len(lengths) == 1 or min(lengths) > config.least - block_kv


@pytest.mark.parametrize("itemsize", [1, 2, 4])
@pytest.mark.parametrize("d", [8, 64, 80, 96, 128, 256])
def test_a_default_step_moves_little_enough_for_four_programs_on_a_multiprocessor(d: int, itemsize: int) -> None:
    config = default_config(DecodeShape(8, 8, d, itemsize))
    padded = 1 << (max(d, 16) - 1).bit_length()
    assert 16 <= config.block_kv <= 128 and 2 * 2 * config.block_kv * padded * itemsize <= 64 << 10
    assert config.part_lengths(config.least * 3) == [config.least] * 3


def test_a_shape_has_its_measured_configuration_and_any_other_shape_the_default() -> None:
    shape, config = DecodeShape(8, 2, 64, 2), DecodeConfig(block_kv=32)
    kernel = PagedDecode(CPU, measured={shape: config})
    assert kernel.config(shape) == config
    assert kernel.config(replace(shape, itemsize=1)) == default_config(replace(shape, itemsize=1))
    assert PagedDecode(CPU, SMALL, {shape: config}).config(shape) == SMALL


def test_more_sequences_than_a_launch_looks_at_are_several_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = usual()
    expected = compute(batch)
    monkeypatch.setattr(paged_decode_host, "SEQUENCES", 2)
    assert torch.equal(compute(batch, table=batch.table(capacity=7)), expected)


# --- a cache of eight bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("heads", "kv_heads", "d", "block_size"), [(8, 2, 64, 16), (6, 2, 80, 5)])
def test_a_cache_of_eight_bits_is_read_as_what_it_holds(
    dtype: torch.dtype, heads: int, kv_heads: int, d: int, block_size: int
) -> None:
    batch = random_decode(RAGGED, heads, kv_heads, d, block_size, dtype=dtype, cache_dtype=FP8)
    found = compute(batch)
    assert violations(batch, found) == []
    assert torch.equal(found, compute(replace(batch, cache=batch.cache.to(dtype))))


def test_eight_bits_are_widened_as_torch_does() -> None:
    """All 256 values, which the interpreter does not know."""
    held = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(FP8)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        found = torch.zeros(256, dtype=dtype)
        widen[(1,)](held, found, 256)
        assert torch.equal(found.nan_to_num(nan=999), held.to(dtype).nan_to_num(nan=999))


def test_what_is_too_large_for_eight_bits_saturates_and_a_nan_stays_one() -> None:
    """Every value, every number halfway between two, and beyond: the kernels round as torch."""
    held = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(FP8).float()
    finite = held[held.isfinite()].sort().values
    beyond = torch.tensor([448.1, 464.0, 465.0, 1e30, torch.inf, -torch.inf, torch.nan, -1e4, 2.0**-10, 2.0**-11])
    values = torch.cat((held, (finite[1:] + finite[:-1]) / 2, beyond, 20 * torch.randn(507)))
    found = torch.zeros(1024, dtype=torch.uint8).view(FP8)
    assert len(values) >= 1024
    narrow[(1,)](values, found, 1024)
    expected = to_cache_type(values[:1024], FP8)
    assert torch.equal(found.float().nan_to_num(nan=999), expected.float().nan_to_num(nan=999))
    assert to_cache_type(beyond, FP8)[:6].float().tolist() == [448.0] * 5 + [-448.0]
    assert to_cache_type(beyond, FP8)[6].isnan()


@triton.jit
def widen(source, to, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(to + at, widened(tl.load(source + at), to.dtype.element_ty, True))


@triton.jit
def narrow(source, to, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(to + at, rounded(tl.load(source + at), to.dtype.element_ty, True))


# --- isolation


def test_sequences_that_share_their_beginning_read_it_both() -> None:
    batch = usual(shared=1)
    assert len({s.blocks[0] for s in batch.sequences}) == 1
    assert violations(batch, compute(batch)) == []


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("half", ["keys", "values"])
def test_what_one_sequence_holds_never_reaches_another(poison: float, half: str) -> None:
    batch = usual()
    clean, victim = compute(batch), batch.sequences[0]
    cache = batch.cache.clone()
    for block in victim.blocks:
        (cache[:2] if half == "keys" else cache[2:])[:, block * 16 : (block + 1) * 16] = poison
    dirty = compute(replace(batch, cache=cache))
    assert torch.equal(dirty[1:], clean[1:])
    assert not torch.equal(dirty[0], clean[0])


def test_a_result_depends_on_the_sequence_s_own_tokens_only() -> None:
    """Other values wherever none of its tokens lies, the rest of its last block included, or nobody else there."""
    batch = usual()
    together = compute(batch)
    for i, sequence in enumerate(batch.sequences):
        own = torch.zeros(batch.cache.shape[1], dtype=torch.bool)
        own[[sequence.blocks[t // 16] * 16 + t % 16 for t in range(sequence.length)]] = True
        for other in (torch.nan, 1.0):
            cache = torch.where(own[:, None], batch.cache, other)
            alone = compute(replace(batch, cache=cache, sequences=(sequence,)))
            assert torch.equal(alone[i], together[i])


def test_equal_input_gives_equal_bits_also_in_another_order() -> None:
    batch, kernel = usual(), PagedDecode(CPU, SMALL)
    first = compute(batch, kernel)
    assert torch.equal(first, compute(batch, kernel))
    assert torch.equal(first, compute(replace(batch, sequences=batch.sequences[::-1]), kernel))
    assert torch.equal(first, compute(batch, kernel, batch.table(capacity=11, max_blocks=40)))


# --- tables


def test_a_table_filled_again_is_a_new_one_and_rows_of_nobody_stay_as_they_are() -> None:
    batch, kernel = usual(), PagedDecode(CPU, SMALL)
    table, full = batch.table(), compute(batch)
    where = [t.data_ptr() for t in (table.counts, table.rows, table.lengths, table.blocks)]
    for some in (batch.sequences[4:5], batch.sequences[::2], (), batch.sequences):
        table.refill(some)
        out = compute(replace(batch, sequences=some), kernel, table)
        rows = [s.row for s in some]
        assert torch.equal(out[rows], full[rows])
        assert not out[[r for r in range(len(full)) if r not in rows]].any()
    assert where == [t.data_ptr() for t in (table.counts, table.rows, table.lengths, table.blocks)]


def test_a_table_says_what_does_not_fit_and_keeps_what_it_has() -> None:
    table = StagedDecodeTable.make([DecodeRow(0, 9, [5, 3, 8])], 4, CPU, capacity=2, max_blocks=4)
    assert table.blocks.tolist() == [[5, 3, 8, 8], [0, 0, 0, 0]]
    good = DecodeRow(1, 1, [2])
    for wrong, words in (
        ([good] * 3, "3 sequences do not fit in 2: make the table with more capacity"),
        ([good, DecodeRow(0, 17, [1] * 5)], "17 tokens needs 5 blocks of 4: make the table with more max_blocks"),
        ([good, DecodeRow(0, 9, [1, 2])], "needs 3 blocks, its sequence has 2: give it its blocks first"),
        ([good, DecodeRow(0, 0, [])], "a context of 0 tokens: leave the sequence out"),
    ):
        with pytest.raises(ValueError, match=words):
            table.refill(wrong)
        assert (table.counts.tolist(), table.rows.tolist(), table.lengths.tolist()) == ([1], [0, 0], [9, 0])
    with pytest.raises(ValueError, match="at least 1"):
        StagedDecodeTable(0, 1, 1, CPU)


def test_tables_of_like_size_have_one_shape() -> None:
    shapes = {tuple(StagedDecodeTable.make([DecodeRow(0, n, range(9))] * 5, 4, CPU).blocks.shape) for n in (1, 20, 36)}
    assert shapes == {(8, 16)}


@pytest.mark.parametrize(
    ("options", "words"),
    [({"block_kv": 8}, "block_kv 8"), ({"block_kv": 48}, "block_kv 48"), ({"least": 65}, "multiple"),
     ({"parts": 0}, "parts 0"), ({"programs": 0}, "programs 0")],
)  # fmt: skip
def test_a_configuration_that_cannot_be_is_refused(options: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DecodeConfig(**options)


def test_tensors_that_do_not_fit_are_refused() -> None:
    batch, kernel = usual(), PagedDecode(CPU, SMALL)
    out, table = torch.zeros(5, 512, dtype=torch.bfloat16), batch.table()
    q, cache = batch.q, batch.cache
    for wrong, words in (
        ((q, cache[:3], 1.0, out), "do not fit together"),
        ((q, cache[:0], 1.0, out), "do not fit together"),
        ((q[:, :7], cache, 1.0, out), "do not fit together"),
        ((q[..., :32], cache, 1.0, out), "do not fit together"),
        ((q, cache, 1.0, out[:4]), "do not fit together"),
        ((q.float(), cache, 1.0, out), "one type is needed"),
        ((q, cache.to(torch.float8_e5m2), 1.0, out), "one type is needed, or torch.float8_e4m3fn of cache"),
        ((q.transpose(1, 2).contiguous().transpose(1, 2), cache, 1.0, out), "contiguous"),
        ((q, cache, 0.0, out), "scale 0.0"),
    ):
        with pytest.raises(ValueError, match=words):
            kernel.attend(wrong[0], wrong[1], table, *wrong[2:])


# --- mutations: each of these faults is found by the specification or by the promises above


def broken_kernel(folder: Path, old: str, new: str) -> Any:
    """The kernel with a piece of its text replaced."""
    text = Path(paged_decode_host.paged_decode.fn.__code__.co_filename).read_text()
    assert text.count(old) == 1, old
    (folder / "broken_kernel.py").write_text(text.replace(old, new))
    spec = importlib.util.spec_from_file_location("broken_kernel", folder / "broken_kernel.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.paged_decode


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("weight = tl.exp2((one - highest) * scale)", "weight = tl.exp2((one - highest) * scale) * (i > 0)"),
        ("scores - above[:, None]) * scale", "scores - above[:, None]) * (scale * 1.02)"),
        ("blocks + (first + own) * table_row", "blocks + (first + own ^ 1) * table_row"),
        ("tl.where(inside[None, :], scores, float(\"-inf\"))", "scores"),
        ("acc * shrink[:, None]", "acc"),
        ("value = tl.load(values + slot[:, None] + cols[None, :], mask=inside[:, None] &",
         "value = tl.load(values + slot[:, None] + cols[None, :], mask="),
        ("(unit - start + 1) * steps", "(unit - start + 1) * (steps - 1)"),
    ],
    ids=["a part dropped", "scale", "tables swapped", "padding seen", "sums not rescaled", "stale values loaded",
         "a step dropped"],
)  # fmt: skip
def test_a_broken_kernel_is_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dtype: torch.dtype, old: str, new: str
) -> None:
    # Lengths that no token block divides, in lines of like length: only the contents differ.
    batch = random_decode((37, 41, 61, 59), 4, 1, 64, 16, dtype=dtype)
    assert violations(batch, compute(batch)) == []
    monkeypatch.setattr(paged_decode_host, "paged_decode", broken_kernel(tmp_path, old, new))
    assert violations(batch, compute(batch)) != []


def test_tickets_that_are_left_are_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(paged_decode_host, "paged_decode", broken_kernel(tmp_path, "tl.store(ticket, 0)", "pass"))
    with pytest.raises(AssertionError, match="tickets"):
        compute(usual())


# --- in the engine


def served(rig: Rig, count: int) -> dict[int, list[int]]:
    """Requests with a common beginning that fill the cache until the youngest must give way."""
    requests = [request(i, [*range(20), *[99 + i] * 72], max_tokens=9, ignore_eos=True) for i in range(count)]
    return {i: answer(events) for i, events in rig.run(requests, arrive={1: 2, 2: 2}).items()}


def test_an_engine_with_the_kernel_gives_the_tokens_of_one_without(two_layers: Path) -> None:
    """With a shared beginning, prompts beside answers, and a request that is preempted and starts again."""
    small = {"kv_tokens": 256, "max_batch": 3, "max_prefill_tokens": 64}
    rigs = [make_rig(f"random:{two_layers}", engine=small) for _ in range(2)]
    kernel = rigs[1].runner.paged = Counting(CPU, DecodeConfig(block_kv=32, parts=2, least=64))
    for rig in rigs:
        rig.fill(1, seed=4)
    assert served(rigs[0], 3) == served(rigs[1], 3)
    for rig in rigs:
        assert rig.engine.scheduler.preemptions > 0 and rig.engine.scheduler.reused_tokens == 40
    assert set(kernel.sequences) == {1, 2, 3}
    assert len(kernel.sequences) % rigs[1].runner.stack.num_layers == 0


class Counting(PagedDecode):
    """Notes how many sequences each launch has."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.sequences: list[int] = []

    def attend(self, q: torch.Tensor, cache: torch.Tensor, table: DecodeTable, scale: float, out: torch.Tensor) -> None:
        self.sequences.append(int(table.counts))
        super().attend(q, cache, table, scale, out)
