"""The paged decode kernel compiled for a GPU: the specification of the interpreter's tests, and replays of graphs."""

from __future__ import annotations

import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import answer, make_rig, request
from timing import prepared

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from clif.kernels.kv_types import FP8
from clif.kernels.paged_decode_config import DecodeConfig
from clif.kernels.paged_decode_host import PagedDecode
from clif.kernels.paged_decode_table import DecodeTable
from clif.kernels.testing.paged_decode_specification import DecodeBatch, random_decode, violations

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")]
DEVICE = "cuda"
RAGGED = (700, 1, 16, 17, 256, 257, 3000, 64, 5)


def compute(batch: DecodeBatch, kernel: PagedDecode, table: DecodeTable | None = None) -> torch.Tensor:
    out = batch.q.new_zeros(batch.q.shape).flatten(1)
    kernel.attend(batch.q, batch.cache, table or batch.table(), batch.scale, out)
    return out


def usual(seed: int = 0) -> DecodeBatch:
    return random_decode(RAGGED, 32, 8, 128, 16, dtype=torch.bfloat16, device=DEVICE, seed=seed)


@pytest.fixture
def kernel() -> PagedDecode:
    return PagedDecode(torch.device(DEVICE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "d", "block_size"),
    [(32, 8, 128, 16), (16, 16, 96, 64), (14, 2, 64, 4), (21, 7, 80, 12), (8, 1, 128, 32), (6, 2, 8, 5)],
)
def test_results_are_as_near_to_float64_as_torch_s(
    kernel: PagedDecode, dtype: torch.dtype, heads: int, kv_heads: int, d: int, block_size: int
) -> None:
    batch = random_decode(RAGGED, heads, kv_heads, d, block_size, dtype=dtype, device=DEVICE, shared=1)
    assert violations(batch, compute(batch, kernel)) == []
    assert not kernel.workspace().tickets.any()


@pytest.mark.parametrize(("heads", "kv_heads", "d", "block_size"), [(32, 8, 64, 16), (32, 8, 128, 16), (21, 7, 80, 12)])
def test_a_cache_of_eight_bits_is_read_as_what_it_holds(
    kernel: PagedDecode, heads: int, kv_heads: int, d: int, block_size: int
) -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("numbers of eight bits need compute capability 8.9")
    options = {"dtype": torch.bfloat16, "device": DEVICE, "cache_dtype": FP8}
    batch = random_decode(RAGGED, heads, kv_heads, d, block_size, **options)
    assert violations(batch, compute(batch, kernel)) == []


def test_many_sequences_are_several_launches(kernel: PagedDecode) -> None:
    batch = random_decode([1 + i % 40 for i in range(300)], 4, 2, 64, 16, dtype=torch.bfloat16, device=DEVICE)
    assert violations(batch, compute(batch, kernel)) == []


@pytest.mark.parametrize(
    "config",
    [
        DecodeConfig(parts=1),
        DecodeConfig(block_kv=16, least=16, parts=64, warps=2),
        DecodeConfig(block_kv=128, warps=8),
        DecodeConfig(programs=1, stages=3),
    ],
    ids=["one part", "many parts", "large steps", "few programs"],
)
def test_any_configuration_computes_the_same_function(config: DecodeConfig) -> None:
    batch = usual()
    assert violations(batch, compute(batch, PagedDecode(torch.device(DEVICE), config))) == []


def test_nobody_in_the_batch_leaves_the_result_as_it_is(kernel: PagedDecode) -> None:
    batch = usual()
    table = batch.table()
    table.refill(())
    assert not compute(batch, kernel, table).any()


def test_what_one_sequence_holds_never_reaches_another(kernel: PagedDecode) -> None:
    batch = usual()
    clean, cache = compute(batch, kernel), batch.cache.clone()
    for block in batch.sequences[0].blocks:
        cache[:, block * 16 : (block + 1) * 16] = torch.nan
    dirty = compute(replace(batch, cache=cache), kernel)
    assert torch.equal(dirty[1:], clean[1:]) and dirty[0].isnan().all()


def test_a_sequence_gets_the_same_bits_in_any_company(kernel: PagedDecode) -> None:
    batch = usual()
    together = compute(batch, kernel)
    for i, sequence in enumerate(batch.sequences):
        assert torch.equal(compute(replace(batch, sequences=(sequence,)), kernel)[i], together[i])


def test_a_graph_replayed_over_other_sequences_gives_the_bits_of_a_launch_and_leaves_no_ticket() -> None:
    """Thousands of replays: the order in which parts arrive is another one each time."""
    batch, kernel, stream = usual(), PagedDecode(torch.device(DEVICE)), torch.cuda.Stream()
    table, out = batch.table(), torch.zeros_like(batch.q).flatten(1)
    full, graph = compute(batch, kernel), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        kernel.attend(batch.q, batch.cache, table, batch.scale, out)
    with torch.cuda.graph(graph, stream=stream):
        kernel.attend(batch.q, batch.cache, table, batch.scale, out)
    for turn in range(10):
        some = batch.sequences[turn % 3 :: 1 + turn % 4]
        rows = [s.row for s in some]
        with torch.cuda.stream(stream):
            table.refill(some)
            for _ in range(1000):
                out.zero_()
                graph.replay()
            assert torch.equal(out[rows], full[rows])
            assert not out[[r for r in range(len(full)) if r not in rows]].any()
            assert not kernel.workspace().tickets.any()


def test_what_is_timed_keeps_the_memory_that_its_graph_writes_to() -> None:
    """A capture gives unused memory back to the device: a graph whose kernel is gone would write where nothing is."""
    batch, runs = usual(), []
    for parts in (1, 16):
        kernel, out = PagedDecode(torch.device(DEVICE), DecodeConfig(parts=parts)), torch.zeros_like(batch.q).flatten(1)
        kernel.workspace().take_planes(1 << 24)
        runs.append(prepared(partial(attend, kernel, batch, batch.table(), out), 1, torch.device(DEVICE)))
        held = weakref.ref(kernel)
        del kernel
        assert held() is not None
    torch.cuda.empty_cache()
    assert all(run() > 0 for run in runs)


def attend(kernel: PagedDecode, batch: DecodeBatch, table: DecodeTable, out: torch.Tensor, layer: int) -> None:
    kernel.attend(batch.q, batch.cache, table, batch.scale, out)


@pytest.mark.parametrize("kv_dtype", ["auto", "fp8"])
def test_an_engine_with_the_kernel_gives_the_tokens_of_one_without(tiny_config: Path, kv_dtype: str) -> None:
    if kv_dtype == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("numbers of eight bits need compute capability 8.9")
    answers = []
    for paged in (None, PagedDecode(torch.device(DEVICE))):
        rig = make_rig(f"random:{tiny_config}", engine={"kv_tokens": 256, "kv_dtype": kv_dtype}, device=DEVICE)
        rig.runner.paged = paged
        rig.fill(1, seed=4)
        requests = [request(i, [*range(20), *[99 + i] * 40], max_tokens=40, ignore_eos=True) for i in range(5)]
        events = rig.run(requests, arrive={i: 2 * i for i in range(5)})
        assert rig.engine.scheduler.preemptions > 0 and rig.engine.scheduler.reused_tokens > 0
        answers.append([answer(events[i]) for i in range(5)])
    assert answers[0] == answers[1]
