"""Cases of the paged decode kernel for the compile gate, see `kernels/testing/compile_gate.py`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from clif.kernels.paged_decode_candidates import decode_candidates
from clif.kernels.paged_decode_config import DecodeConfig, DecodeShape, default_config
from clif.kernels.paged_decode_host import constants
from clif.kernels.paged_decode_kernel import paged_decode
from clif.kernels.testing.compiling import Case, Operand

HEADS = (
    # Size of a head, query heads for each KV head, tokens of a cache block, type of q, and of the cache.
    (64, 4, 16, "bf16", "bf16"),
    (128, 4, 16, "bf16", "bf16"),
    (128, 8, 64, "bf16", "bf16"),
    (80, 7, 12, "bf16", "bf16"),
    (96, 1, 16, "fp16", "fp16"),
    (80, 3, 12, "fp32", "fp32"),
    (256, 2, 16, "bf16", "bf16"),
    (64, 4, 16, "bf16", "fp8e4nv"),
    (128, 8, 64, "bf16", "fp8e4nv"),
)
CORNERS = {
    90: ((256, 2, 16, "bf16", "bf16"), (80, 3, 12, "fp32", "fp32"), (128, 8, 64, "bf16", "fp8e4nv")),
    80: ((256, 2, 16, "bf16", "bf16"),),
}
"""Most registers; a head that is no power of two, without tensor cores; and numbers that are cast."""
KV_HEADS = 8
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8e4nv": 1}
ITEM_STACK = 32
"""Bytes: the assembler spills a few values that live from one item to the next, where that makes room for one more
program. They are stored before the loop over a context and loaded behind it, never within."""


def decode_case(
    head_dim: int, group: int, block_size: int, config: DecodeConfig | None = None, *, capability: int = 90,
    dtype: str = "bf16", cache: str | None = None,
) -> Case:  # fmt: skip
    """paged_decode as `kernels/paged_decode_host.py` launches it, by default with the default configuration.

    cache: its type, by default that of q.
    """
    cache = cache or dtype
    config = config or default_config(DecodeShape(group * KV_HEADS, KV_HEADS, head_dim, BYTES[cache]))
    name = f"paged decode, {group} heads of {head_dim}, blocks of {block_size}, {dtype}"
    if cache != dtype:
        name += f", cache {cache}"
    made = {**constants(KV_HEADS, head_dim, group, block_size, config), "INTERPRET": False}
    of_heads = made["ROWS"] * made["HEAD_DIM_P"]
    operands = {
        "cache": Operand(config.block_kv * made["HEAD_DIM_P"], head_dim, BYTES[cache]),
        "q": Operand(of_heads, head_dim, BYTES[dtype]), "out": Operand(of_heads, head_dim, BYTES[dtype]),
        "planes": Operand(of_heads, head_dim, 4),
    }  # fmt: skip
    types = {**_types(dtype), "cache": f"*{cache}"}
    return Case(
        name, paged_decode, capability, made, types, config.warps, config.stages, frozenset({"first", "capacity"}),
        # float32 has no product of tensor cores that is exact.
        products=dtype != "fp32", operands=operands, item_stack=ITEM_STACK,
    )  # fmt: skip


def _types(dtype: str) -> dict[str, str]:
    data, tables = ("q", "out"), ("counts", "rows", "lengths", "blocks", "tickets")
    partial = dict.fromkeys(("planes", "sums"), "*fp32")
    return {**dict.fromkeys(data, f"*{dtype}"), **dict.fromkeys(tables, "*i32"), **partial, "scale": "fp32"}


def paged_decode_cases(corners: bool = False) -> Iterator[Case]:
    """The default configuration for usual heads, or the corners, on Hopper and on Ampere, which lacks 8-bit floats."""
    for capability in (90, 80):
        for head_dim, group, block_size, dtype, cache in CORNERS[capability] if corners else HEADS:
            if capability >= 90 or cache != "fp8e4nv":
                yield decode_case(head_dim, group, block_size, capability=capability, dtype=dtype, cache=cache)


def decode_candidate_cases() -> Iterator[Case]:
    """All splits that the tuner measures for these heads, each code once, on Hopper and on Ampere."""
    found: dict[tuple[Any, ...], Case] = {}
    for capability in (90, 80):
        for head_dim, group, block_size, dtype, cache in HEADS:
            if capability < 90 and cache == "fp8e4nv":
                continue
            shape = DecodeShape(group * KV_HEADS, KV_HEADS, head_dim, BYTES[cache])
            for config in decode_candidates(shape, capability):
                case = decode_case(
                    head_dim, group, block_size, config, capability=capability, dtype=dtype, cache=cache
                )  # fmt: skip
                found.setdefault(case.key(), replace(case, name=f"{case.name}: {config}"))
    yield from found.values()
