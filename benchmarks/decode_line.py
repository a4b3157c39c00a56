"""Attention of a decode step to the paged KV cache, against the time to read keys and values at the copy rate."""

from __future__ import annotations

from dataclasses import replace

import torch
from form_tiles import Machine
from kernel_cases import PagedCase
from kernel_goals import PAGED, READ, Measured
from timing import Timing, contest

from clif.kernels.paged_decode_host import PagedDecode
from clif.kernels.testing.paged_decode_specification import DecodeBatch, random_decode, violations

LAYERS_BYTES = 256 << 20
"""Keys and values of all layers: more than a cache holds."""


def measure_paged(case: PagedCase, machine: Machine) -> Measured:
    """The kernel of the product, checked and timed over layers with their own caches."""
    device, dtype = machine.device, machine.dtype
    batches = _batches(case, device, dtype)
    paged, table = PagedDecode(device), batches[0].table()
    outs = [torch.zeros_like(b.q).flatten(1) for b in batches]

    def way(layer: int) -> torch.Tensor:
        b = batches[layer]
        paged.attend(b.q, b.cache, table, b.scale, outs[layer])
        return outs[layer]

    faults = violations(batches[0], way(0))
    found, failed = contest({PAGED: way}, len(batches), machine.repeats, device)
    read, copied = (
        2 * case.sequences * case.context * case.kv_heads * case.d * dtype.itemsize,
        copy_time(device, machine.repeats),
    )
    timings = found | {READ: Timing(*(us * read for us in (copied.p10, copied.median, copied.p90)))}
    note = f"reads {read / 2**20:.1f} MiB at {1e-3 / copied.median:.0f} GB/s"
    return Measured(timings, failed, faults, [note])


def _batches(case: PagedCase, device: torch.device, dtype: torch.dtype) -> list[DecodeBatch]:
    lengths = (case.context,) * case.sequences
    first = random_decode(lengths, case.heads, case.kv_heads, case.d, case.block_size, dtype=dtype, device=str(device))
    count = min(16, -(-LAYERS_BYTES // first.cache.nbytes)) if device.type == "cuda" else 1
    return [first, *(replace(first, cache=first.cache.clone()) for _ in range(count - 1))]


def copy_time(device: torch.device, repeats: int) -> Timing:
    """Microseconds for each byte that is read or written, by the faster of two copies: torch's, and a kernel's."""
    source = torch.zeros(1 << 28 if device.type == "cuda" else 1 << 14, dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    ways = {"copy": lambda _: target.copy_(source), "kernel": lambda _: torch.bitwise_not(source, out=target)}
    found, _ = contest(ways, 1, repeats, device)
    best = min(found.values(), key=lambda timing: timing.median)
    return Timing(*(us / (2 * source.nbytes) for us in (best.p10, best.median, best.p90)))
