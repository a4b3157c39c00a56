"""The paged prefill kernel compiled for a GPU: the specification of the interpreter's tests, and replays of graphs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from clif.kernels.cpu.host import HeadShape
from clif.kernels.kv_types import FP8
from clif.kernels.paged_prefill_host import PagedPrefill, prefill_fault
from clif.kernels.testing.paged_decode_specification import violations
from clif.kernels.testing.paged_prefill_specification import PrefillBatch, random_prefill

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")]
DEVICE = "cuda"
MIXED = ((0, 300), (16, 17), (5, 222), (0, 2), (512, 700))


def compute(batch: PrefillBatch, **room: int) -> torch.Tensor:
    kernel, q, cache = PagedPrefill(), batch.rows.q, batch.rows.cache
    out = q.new_zeros(q.shape).flatten(1)
    tokens = kernel.tile_tokens(q.shape[1] * 2 // len(cache), q.shape[2], q.itemsize)
    kernel.attend(q, cache, batch.table(tokens, **room), batch.rows.scale, out)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "d", "block_size"),
    [(32, 8, 64, 16), (32, 8, 128, 16), (16, 16, 96, 64), (21, 7, 80, 12), (14, 2, 64, 4), (8, 4, 256, 16)],
)
def test_results_are_as_near_to_float64_as_torch_s(
    dtype: torch.dtype, heads: int, kv_heads: int, d: int, block_size: int
) -> None:
    if d == 256 and dtype == torch.float32:
        pytest.skip("256 products in one chain of float32 are added with 1.5 times the error of torch's order (H100)")
    batch = random_prefill(MIXED, heads, kv_heads, d, block_size, dtype=dtype, device=DEVICE, shared=1)
    assert violations(batch.rows, compute(batch)) == []


def test_a_cache_of_eight_bits_is_read_as_what_it_holds() -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("numbers of eight bits need compute capability 8.9")
    batch = random_prefill(MIXED, 32, 8, 64, 16, dtype=torch.bfloat16, device=DEVICE, cache_dtype=FP8)
    found = compute(batch)
    assert violations(batch.rows, found) == []
    assert torch.equal(found, compute(replace(batch, rows=replace(batch.rows, cache=batch.rows.cache.bfloat16()))))


def test_room_for_more_changes_no_bit_and_the_check_of_a_start_finds_no_fault() -> None:
    batch = random_prefill(MIXED, 32, 8, 128, 16, dtype=torch.bfloat16, device=DEVICE)
    assert torch.equal(compute(batch), compute(batch, rows=4096, sequences=512))
    for dtype in (torch.bfloat16, torch.float32):
        heads = HeadShape(32, 8, 128)
        assert prefill_fault(PagedPrefill(), torch.device(DEVICE), dtype, heads, dtype, 16) is None
