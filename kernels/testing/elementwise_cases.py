"""Cases of the kernels between a layer's products for the compile gate, see `kernels/testing/compile_gate.py`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from clif.kernels import elementwise_kernel as kernels
from clif.kernels.elementwise_host import head_constants, row_constants, tile_constants
from clif.kernels.testing.compiling import Case, Operand

SHAPES = {
    # hidden size, heads, KV heads, size of a head, norms of heads, columns of the gate
    "1B": (2048, 32, 8, 64, False, 8192),
    "8B": (4096, 32, 8, 128, False, 14336),
    "8B, norms of heads": (4096, 32, 8, 128, True, 12288),
    "70B": (8192, 64, 8, 128, False, 28672),
    "ragged": (1680, 21, 7, 80, True, 4500),
}
CORNERS = ("rms_norm_grad, 70B", ", ragged")
"""Parts of the names of the case with most registers, and of those whose sizes are padded."""
FLOATS = dict.fromkeys(("eps", "q_eps", "k_eps"), "fp32")
STRIDES = ("_row", "_head", "_slot")
"""Ends of the names of arguments that are strides; every other one that is no number is a tensor."""


def shape_cases(name: str, capability: int, dtype: str) -> Iterator[Case]:
    """Every kernel as `kernels/elementwise_host.py` launches it for a model of this shape."""
    hidden, heads, kv_heads, head_dim, norms, inner = SHAPES[name]
    rows, turned = row_constants(hidden), head_constants(heads, kv_heads, head_dim, norms)
    tiles = tile_constants(inner)
    for kernel, made in (
        ("add_rms_norm", {**rows, "ADDS": True}),
        ("rms_norm_grad", {**rows, "ADDS": True}),
        ("rotate_heads", {**turned, "CACHES": True}),
        ("rotate_heads_grad", turned),
        ("swiglu", tiles),
        ("swiglu_grad", tiles),
    ):
        yield _case(f"{kernel}, {name}, {dtype}", getattr(kernels, kernel), capability, dtype, made)


def fp8_case(capability: int) -> Case:
    """The rotation of an 8B model with a KV cache of eight bits."""
    case = next(c for c in shape_cases("8B", capability, "bf16") if c.kernel is kernels.rotate_heads)
    _, heads, kv_heads, head_dim, norms, _ = SHAPES["8B"]
    made = head_constants(heads, kv_heads, head_dim, norms)
    cache = Operand(made["BLOCK"] * made["HALF_P"], head_dim // 2, 1)
    return replace(
        case, name=f"{case.name}, cache fp8e4nv", types={**case.types, "cache": "*fp8e4nv"},
        operands={**case.operands, "cache": cache},
    )  # fmt: skip


def _case(name: str, kernel: Any, capability: int, dtype: str, made: dict[str, Any]) -> Case:
    constants = {**made, "INTERPRET": False}
    warps = constants.pop("num_warps")
    tensors = [n for n in kernel.arg_names if n not in constants and not n.endswith(STRIDES)]
    known = {**dict.fromkeys(tensors, f"*{dtype}"), **FLOATS, "slots": "*i64"}
    types = {n: kind for n, kind in known.items() if n in kernel.arg_names}
    if "HALF_P" in constants:
        tile = Operand(constants["BLOCK"] * constants["HALF_P"], constants["HEAD_DIM"] // 2)
        wide = ("qkv", "query", "key", "cache", "grad_query", "grad_key", "grad_value", "grad")
    else:
        tile = Operand(constants["BLOCK"], constants["WIDTH"])
        wide = tuple(n for n, kind in types.items() if kind.startswith("*"))
    return Case(name, kernel, capability, constants, types, warps, products=False, operands=dict.fromkeys(wide, tile))


def elementwise_cases(corners: bool = False) -> Iterator[Case]:
    """Usual shapes, or the corners, on Hopper and Ampere."""
    for capability in (90, 80):
        for name in SHAPES:
            for case in shape_cases(name, capability, "fp16" if name == "ragged" else "bf16"):
                if not corners or any(corner in case.name for corner in CORNERS):
                    yield case
        # Ampere has no numbers of eight bits.
        if capability >= 90:
            yield fp8_case(capability)
