"""Cases of the paged prefill kernel for the compile gate, see `kernels/testing/compile_gate.py`."""

from __future__ import annotations

from collections.abc import Iterator

from clif.kernels.paged_prefill_host import constants
from clif.kernels.paged_prefill_kernel import paged_prefill
from clif.kernels.paged_prefill_table import prefill_config
from clif.kernels.testing.compiling import Case, Operand
from clif.kernels.testing.paged_decode_cases import BYTES, CORNERS, HEADS, KV_HEADS

STACK = 8
"""Bytes: on Ampere the assembler keeps an address of the result of small tiles there, outside of the loop."""


def prefill_case(
    head_dim: int, group: int, block_size: int, *, capability: int = 90, dtype: str = "bf16", cache: str | None = None
) -> Case:
    """paged_prefill as `kernels/paged_prefill_host.py` launches it. cache: its type, by default that of q."""
    cache = cache or dtype
    config = prefill_config(group, head_dim, BYTES[dtype])
    made = {**constants(KV_HEADS, head_dim, group, block_size, config), "INTERPRET": False}
    of_rows = config.rows * made["HEAD_DIM_P"]
    operands = {
        "cache": Operand(config.block_kv * made["HEAD_DIM_P"], head_dim, BYTES[cache]),
        "q": Operand(of_rows, head_dim, BYTES[dtype]), "out": Operand(of_rows, head_dim, BYTES[dtype]),
    }  # fmt: skip
    tables = dict.fromkeys(("counts", "tiles", "blocks"), "*i32")
    types = {"q": f"*{dtype}", "out": f"*{dtype}", "cache": f"*{cache}", **tables, "scale": "fp32"}
    name = f"paged prefill, {group} heads of {head_dim}, blocks of {block_size}, {dtype}, cache {cache}"
    exact = dtype == "fp32"
    return Case(
        name, paged_prefill, capability, made, types, config.warps, config.stages, frozenset({"table_row"}),
        products=not exact, wide=not exact, operands=operands, item_stack=STACK,
    )  # fmt: skip


def paged_prefill_cases(corners: bool = False) -> Iterator[Case]:
    """The heads of paged decode, or the corners, on Hopper and on Ampere, which lacks 8-bit floats."""
    for capability in (90, 80):
        for head_dim, group, block_size, dtype, cache in CORNERS[capability] if corners else HEADS:
            if capability >= 90 or cache != "fp8e4nv":
                yield prefill_case(head_dim, group, block_size, capability=capability, dtype=dtype, cache=cache)
