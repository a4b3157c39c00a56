"""Splits of the paged decode kernel worth measuring for one shape: about two dozen, chosen by arithmetic.

The tuner (benchmarks/tune_decode.py) measures all of them. A shape gets one split for all batches and contexts, since
the split decides the bits of a result: those of a sequence must be the same in any batch. Free of Triton and torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from clif.kernels.candidates import SHARED_BYTES
from clif.kernels.paged_decode_config import DecodeConfig, DecodeShape, default_config, power_of_two

OTHER_SHARED = 9 << 10
"""Bytes of a program's shared memory beside K and V: slots, weights, exchanges between warps, and the system's own."""
REGISTERS = 65536
"""Of a multiprocessor. A thread needs 80 to 168 (see the compile gate): these are counted with 96."""
MOST_PROGRAMS = 8
STEPS = (
    # KiB of K and V of a step, warps, stages.
    (16, 4, 5), (16, 4, 7), (8, 4, 7), (8, 2, 7), (16, 2, 5), (32, 8, 5), (32, 4, 5), (16, 4, 3),
)  # fmt: skip
PARTS = (64, 32, 128)
"""KiB of K and V that a part has at least."""


def decode_candidates(shape: DecodeShape, capability: int) -> tuple[DecodeConfig, ...]:
    """Configurations that fit a multiprocessor, the default first. capability: of the GPU, 90 = 9.0."""
    default = default_config(shape)
    found = [default]
    for config in _splits(shape, default):
        programs = most_programs(config, shape, capability)
        if programs:
            found.append(replace(config, programs=programs))
    # Fewer programs read as fast where few bytes on the way suffice, and fewer have to be started.
    found += [replace(default, programs=programs) for programs in (2, 3, 6)]
    return tuple(dict.fromkeys(found))


def most_programs(config: DecodeConfig, shape: DecodeShape, capability: int) -> int:
    """Programs that a multiprocessor has room for at the same time; 0: not even one."""
    shared = OTHER_SHARED + steps_in_flight(config) * step_bytes(config, shape)
    by_memory = SHARED_BYTES.get(capability, min(SHARED_BYTES.values())) // shared
    return min(MOST_PROGRAMS, by_memory, REGISTERS // (96 * 32 * config.warps))


def steps_in_flight(config: DecodeConfig) -> int:
    """Steps of K and V that have been asked for while one is computed: a step takes two stages."""
    return max(1, (config.stages - 1) // 2)


def step_bytes(config: DecodeConfig, shape: DecodeShape) -> int:
    """K and V of a step as they lie in shared memory, heads padded to a power of two."""
    return 2 * config.block_kv * max(16, power_of_two(shape.head_dim)) * shape.itemsize


def items(config: DecodeConfig, shape: DecodeShape, lengths: list[int]) -> int:
    """What the programs of a launch share: parts of contexts, for each KV head."""
    return shape.kv_heads * sum(len(config.part_lengths(length)) for length in lengths)


def _splits(shape: DecodeShape, default: DecodeConfig) -> Iterator[DecodeConfig]:
    token = 2 * shape.head_dim * shape.itemsize
    padded = step_bytes(default, shape) // default.block_kv
    for part in PARTS:
        for step, warps, stages in STEPS:
            block_kv = max(16, min(256, (step << 10) // padded))
            least = max(block_kv, power_of_two((part << 10) // token))
            yield replace(default, block_kv=block_kv, least=least, warps=warps, stages=stages)
