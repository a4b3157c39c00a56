"""Attention of one new token per sequence to a paged KV cache: the torch reference, and its error bounds.

    out = softmax(scale * q K^T) V      over the sequence's own slots of the cache, for each of its query heads

The specification is the same for GPU and interpreter. A result is compared with float64: every element is within the
bound of its roundings. With enough elements for a comparison of random errors, its Frobenius error is at most 1.25
times that of torch's products in the same type on the same data, plus that of the hardware's exponential. A cache of
fewer bits is data as it is: its roundings are not the kernel's. Free of Triton.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from clif.kernels.kv_types import to_cache_type
from clif.kernels.paged_decode_table import DecodeRow, DecodeTable, StagedDecodeTable

EXP2 = 2.0**-22
"""The kernel's weights come from the hardware's 2^x, right to two units in the last place (CUDA C++ Programming Guide,
exp2f), torch's from a more exact one. It shows in float32 alone: 3.13e-7 against torch's 1.74e-7 on an H200."""
FEW = 512
"""Below this many elements it is chance which error is larger: up to 1.8 times in 65 float32 batches."""


def attend_by_torch(
    q: torch.Tensor, cache: torch.Tensor, sequences: Sequence[DecodeRow], block_size: int, scale: float
) -> torch.Tensor:
    """out [rows, heads * d] in the type of q [rows, heads, d]; rows of no sequence are zero.

    cache [2 * kv_heads, slots, d], keys first. Token i of a sequence lies in slot blocks[i // block_size] *
    block_size + i % block_size.
    """
    out = q.new_zeros(q.shape)
    for row, length, blocks in sequences:
        k, v = cache.index_select(1, _slots(blocks, block_size, length, q.device)).chunk(2)
        grouped = (q[row] * scale).view(len(k), -1, q.shape[-1])
        group = grouped.shape[1]
        # As many rows as tensor cores take: torch adds up a product of one row in another order, with other errors.
        padded = pad(grouped, (0, 0, 0, max(0, 16 - group)))
        out[row] = (torch.matmul(padded, k.transpose(-1, -2)).softmax(-1) @ v)[:, :group].reshape_as(out[row])
    return out.flatten(1)


def _slots(blocks: Sequence[int], block_size: int, length: int, device: torch.device) -> torch.Tensor:
    tokens = torch.arange(length, device=device)
    return torch.tensor(blocks, device=device)[tokens // block_size] * block_size + tokens % block_size


@dataclass(frozen=True, eq=False)
class DecodeBatch:
    """One layer's input. cache: NaN wherever no token of a sequence lies; of the type of q, or of fewer bits."""

    q: torch.Tensor
    cache: torch.Tensor
    sequences: tuple[DecodeRow, ...]
    block_size: int
    scale: float

    def table(self, capacity: int = 0, max_blocks: int = 0) -> DecodeTable:
        return StagedDecodeTable.make(self.sequences, self.block_size, self.q.device, capacity, max_blocks)


def random_decode(
    lengths: Sequence[int], heads: int, kv_heads: int, d: int, block_size: int, *, dtype: torch.dtype,
    device: str = "cpu", shared: int = 0, seed: int = 0, cache_dtype: torch.dtype | None = None,
) -> DecodeBatch:  # fmt: skip
    """Sequences of these lengths in blocks that lie anywhere; the first `shared` blocks are the same for all.

    cache_dtype: of the cache, by default that of q.
    """
    rng = torch.Generator().manual_seed(seed)
    counts = [-(-length // block_size) for length in lengths]
    total = shared + sum(counts) + 3
    # Block 0 belongs to no sequence: a table full of zeros must not look right.
    order = (torch.randperm(total - 1, generator=rng) + 1).tolist()
    beginning, order = order[:shared], order[shared:]
    sequences = []
    for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        own, order = order[: count - min(shared, count)], order[count - min(shared, count) :]
        sequences.append(DecodeRow(row, length, (*beginning[:count], *own)))
    filled = torch.full((2 * kv_heads, total * block_size, d), torch.nan)
    for _, length, blocks in sequences:
        at = _slots(blocks, block_size, length, filled.device)
        filled[:, at] = torch.randn(2 * kv_heads, length, d, generator=rng)
    # Scores that differ by a few units: a softmax that is neither flat nor one token.
    q = 2 * torch.randn(len(lengths), heads, d, generator=rng)
    cache = to_cache_type(filled.to(device, dtype), cache_dtype or dtype)
    return DecodeBatch(q.to(device, dtype), cache, tuple(sequences), block_size, d**-0.5)


def violations(batch: DecodeBatch, found: torch.Tensor) -> list[str]:
    """Violations of the specification, in words; empty if there are none."""
    exact, torchs = _by_torch(batch, torch.float64), _by_torch(batch, batch.q.dtype).double()
    if not exact.numel():
        return []
    if not found.isfinite().all():
        return ["the result is not finite"]
    wrong, unit = [], torch.finfo(batch.q.dtype).eps
    error, allowed = ((x - exact).norm() / exact.norm() for x in (found.double(), torchs))
    # Where torch happens to be exact, a rounding of the last bit is no fault. Independent errors add by their squares.
    if exact.numel() >= FEW and error > math.hypot(1.25 * allowed + unit / 8, EXP2):
        wrong.append(f"relative error {error:.2e}, torch's is {allowed:.2e}")
    excess = ((found.double() - exact).abs() / _bound(batch, exact)).max()
    if excess > 1:
        wrong.append(f"an element is off by {excess:.1f} times what roundings allow")
    return wrong


def _by_torch(batch: DecodeBatch, dtype: torch.dtype) -> torch.Tensor:
    return attend_by_torch(batch.q.to(dtype), batch.cache.to(dtype), batch.sequences, batch.block_size, batch.scale)


def _bound(batch: DecodeBatch, exact: torch.Tensor) -> torch.Tensor:
    """The most by which each element may be off: a rounding of it, of each weight and of their sum, float32 scores."""
    cache = batch.cache.double()
    cache[len(cache) // 2 :].abs_()
    weighted = attend_by_torch(batch.q.double(), cache, batch.sequences, batch.block_size, batch.scale)
    # A score is a sum of d products, and its error is that of the weight, in proportion.
    scores = 8 * batch.q.shape[-1] ** 0.5 * 2.0**-24
    return torch.finfo(batch.q.dtype).eps / 2 * (2 * exact.abs() + weighted) * 1.01 + scores * weighted + 1e-30
