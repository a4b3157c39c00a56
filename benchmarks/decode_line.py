"""Attention of a decode step to the paged KV cache, against the time to read keys and values at the copy rate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from form_tiles import Machine
from kernel_cases import PagedCase
from kernel_goals import PAGED, READ, Measured
from timing import contest, read_time

from clif.config import ConfigError
from clif.kernels.kv_types import FP8
from clif.kernels.paged_decode_config import DecodeShape, default_config
from clif.kernels.paged_decode_host import PagedDecode
from clif.kernels.testing.paged_decode_specification import DecodeBatch, random_decode, violations
from clif.models.backends import choose_decode

LAYERS_BYTES = 256 << 20
"""Keys and values of all layers: more than a cache holds."""


def measure_paged(case: PagedCase, machine: Machine) -> Measured:
    """The kernel as the product launches it, and by the default split, checked and timed over distinct layers."""
    cache_dtype = FP8 if case.fp8 else machine.dtype
    try:
        product = choose_decode("triton", machine.device, machine.dtype, cache_dtype)
    except ConfigError as error:
        return Measured(failed={"the case": f"not here: {error}"})
    assert product is not None
    batches = _batches(case, machine, cache_dtype)
    shape = DecodeShape(case.heads, case.kv_heads, case.d, cache_dtype.itemsize)
    config, default = product.config(shape), default_config(shape)
    kernels = {PAGED: product}
    if config != default:
        kernels[f"{PAGED}, default split"] = PagedDecode(machine.device, default)
    ways = {name: _way(batches, kernel) for name, kernel in kernels.items()}
    faults = [f"{name}: {fault}" for name, way in ways.items() for fault in violations(batches[0], way(0))]
    found, failed = contest(ways, len(batches), machine.repeats, machine.device)
    read = 2 * case.sequences * case.context * case.kv_heads * case.d * cache_dtype.itemsize
    reading, note = read_time(read, machine.device, machine.repeats)
    return Measured(found | {READ: reading}, failed, faults, [note, f"{config}"])


def _way(batches: Sequence[DecodeBatch], kernel: PagedDecode) -> Callable[[int], torch.Tensor]:
    table, outs = batches[0].table(), [torch.zeros_like(b.q).flatten(1) for b in batches]

    def way(layer: int) -> torch.Tensor:
        b = batches[layer]
        kernel.attend(b.q, b.cache, table, b.scale, outs[layer])
        return outs[layer]

    return way


def _batches(case: PagedCase, machine: Machine, cache_dtype: torch.dtype) -> list[DecodeBatch]:
    lengths, heads = (case.context,) * case.sequences, (case.heads, case.kv_heads, case.d)
    types = {"dtype": machine.dtype, "cache_dtype": cache_dtype}
    first = random_decode(lengths, *heads, case.block_size, device=str(machine.device), **types)
    count = min(16, -(-LAYERS_BYTES // first.cache.nbytes)) if machine.device.type == "cuda" else 1
    return [first, *(replace(first, cache=first.cache.clone()) for _ in range(count - 1))]
