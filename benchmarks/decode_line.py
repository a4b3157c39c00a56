"""Attention of a decode step to the paged KV cache, against the time to read keys and values at the copy rate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from form_tiles import Machine
from kernel_cases import PagedCase
from kernel_goals import PAGED, READ, Measured
from timing import Timing, contest

from clif.kernels.kv_types import FP8
from clif.kernels.paged_decode_config import DecodeShape, default_config
from clif.kernels.paged_decode_host import PagedDecode
from clif.kernels.testing.paged_decode_specification import DecodeBatch, random_decode, violations

LAYERS_BYTES = 256 << 20
"""Keys and values of all layers: more than a cache holds."""


def measure_paged(case: PagedCase, machine: Machine) -> Measured:
    """The kernel as the product launches it and with other splits, checked and timed over layers with own caches."""
    batches = _batches(case, machine)
    paged = _kernels(case, batches[0], machine.device)
    ways = {name: _way(batches, kernel) for name, kernel in paged.items()}
    faults = [f"{name}: {fault}" for name, way in ways.items() for fault in violations(batches[0], way(0))]
    found, failed = contest(ways, len(batches), machine.repeats, machine.device)
    read = 2 * case.sequences * case.context * case.kv_heads * case.d * batches[0].cache.itemsize
    reading, note = read_time(read, machine)
    return Measured(found | {READ: reading}, failed, faults, [note])


def _kernels(case: PagedCase, batch: DecodeBatch, device: torch.device) -> dict[str, PagedDecode]:
    """By way: as the product launches it; on a GPU also with contexts in more parts, and with fewer programs."""
    own = default_config(DecodeShape(case.heads, case.kv_heads, case.d, batch.cache.itemsize))
    # At least two and four parts of the contexts at hand, in powers of two of tokens.
    shorter = (1 << max(16, case.context // parts).bit_length() - 1 for parts in (2, 4))
    others = {f"parts of {n}": replace(own, block_kv=min(own.block_kv, n), least=n) for n in shorter}
    others |= {f"{own.programs // 2} programs": replace(own, programs=own.programs // 2)}
    forced = {f"{PAGED}, {name}": PagedDecode(device, config) for name, config in others.items()}
    return {PAGED: PagedDecode(device), **(forced if device.type == "cuda" else {})}


def _way(batches: Sequence[DecodeBatch], kernel: PagedDecode) -> Callable[[int], torch.Tensor]:
    table, outs = batches[0].table(), [torch.zeros_like(b.q).flatten(1) for b in batches]

    def way(layer: int) -> torch.Tensor:
        b = batches[layer]
        kernel.attend(b.q, b.cache, table, b.scale, outs[layer])
        return outs[layer]

    return way


def _batches(case: PagedCase, machine: Machine) -> list[DecodeBatch]:
    lengths, dtypes = (case.context,) * case.sequences, {"dtype": machine.dtype, "cache_dtype": machine.dtype}
    if case.fp8:
        dtypes["cache_dtype"] = FP8
    heads = case.heads, case.kv_heads, case.d, case.block_size
    first = random_decode(lengths, *heads, device=str(machine.device), **dtypes)
    count = min(16, -(-LAYERS_BYTES // first.cache.nbytes)) if machine.device.type == "cuda" else 1
    return [first, *(replace(first, cache=first.cache.clone()) for _ in range(count - 1))]


def read_time(count: int, machine: Machine) -> tuple[Timing, str]:
    """Microseconds to read so many bytes at the copy rate, measured now, and a note that says both."""
    copied = copy_time(machine.device, machine.repeats)
    reading = Timing(*(us * count for us in (copied.p10, copied.median, copied.p90)))
    return reading, f"reads {count / 2**20:.1f} MiB at {1e-3 / copied.median:.0f} GB/s"


def copy_time(device: torch.device, repeats: int) -> Timing:
    """Microseconds for each byte that is read or written, by the faster of two copies: torch's, and a kernel's."""
    source = torch.zeros(1 << 28 if device.type == "cuda" else 1 << 14, dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    ways = {"copy": lambda _: target.copy_(source), "kernel": lambda _: torch.bitwise_not(source, out=target)}
    found, _ = contest(ways, 1, repeats, device)
    best = min(found.values(), key=lambda timing: timing.median)
    return Timing(*(us / (2 * source.nbytes) for us in (best.p10, best.median, best.p90)))
