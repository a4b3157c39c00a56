"""Cases of the paged decode kernel for the compile gate, see `kernels/testing/compile_gate.py`."""

from __future__ import annotations

from collections.abc import Iterator

from clif.kernels.paged_decode_host import constants
from clif.kernels.paged_decode_kernel import paged_decode
from clif.kernels.paged_decode_table import DecodeConfig
from clif.kernels.testing.compiling import Case, Operand

HEADS = ((128, 4, 16, "bf16"), (128, 8, 64, "bf16"), (64, 3, 16, "bf16"), (80, 7, 12, "bf16"), (96, 1, 16, "fp16"))
"""Size of a head, query heads for each KV head, tokens of a cache block, and the type of all."""
CORNERS = ((80, 7, 12, "bf16"),)
"""The one with most registers, whose head and group are no powers of two."""


def decode_case(
    head_dim: int, group: int, block_size: int, config: DecodeConfig, *, capability: int = 90, dtype: str = "bf16"
) -> Case:
    """paged_decode as `kernels/paged_decode_host.py` launches it."""
    name = f"paged decode, {group} heads of {head_dim}, blocks of {block_size}, {dtype}"
    made = {**constants(head_dim, group, block_size, config), "INTERPRET": False}
    tile, of_heads = Operand(config.block_kv * made["HEAD_DIM_P"], head_dim), made["ROWS"] * made["HEAD_DIM_P"]
    operands = {
        "cache": tile, "q": Operand(of_heads, head_dim), "out": Operand(of_heads, head_dim),
        "planes": Operand(of_heads, head_dim, 4),
    }  # fmt: skip
    return Case(name, paged_decode, capability, made, _types(dtype), config.warps, config.stages, operands=operands)


def _types(dtype: str) -> dict[str, str]:
    data, tables = ("q", "cache", "out"), ("counts", "rows", "lengths", "blocks", "tickets")
    partial = dict.fromkeys(("planes", "sums"), "*fp32")
    return {**dict.fromkeys(data, f"*{dtype}"), **dict.fromkeys(tables, "*i32"), **partial, "scale": "fp32"}


def paged_decode_cases(corners: bool = False) -> Iterator[Case]:
    """The default configuration for usual heads, or the corners, on Hopper and Ampere."""
    for capability in (90, 80):
        for head_dim, group, block_size, dtype in CORNERS if corners else HEADS:
            yield decode_case(head_dim, group, block_size, DecodeConfig(), capability=capability, dtype=dtype)
