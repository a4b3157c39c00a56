"""Cases of the products with weights of 8 and 4 bits for the compile gate, see `kernels/testing/compile_gate.py`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from clif.kernels.quantised import GROUP
from clif.kernels.quantised_host import DENSE_BLOCK, product_tiles
from clif.kernels.quantised_kernel import quantised_dense, quantised_product
from clif.kernels.testing.compiling import Case, Operand

KINDS = {"int8": ("i8", "bf16"), "int4": ("u8", "bf16"), "fp8": ("fp8e4nv", "fp32")}
"""Types of numbers and scales."""
ROWS = (1, 32, 64, 256)
SHAPES = ((3072, 2048), (16384, 2048))
"""Outputs and inputs: contractions in parts, and whole ones."""
AT_ONCE = 8
"""Bytes: the layout of a left operand that is widened in registers has eight numbers in a row."""
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def product_case(
    kind: str,
    rows: int,
    out: int,
    depth: int,
    *,
    capability: int = 90,
    dtype: str = "bf16",
    least: bool = False,
    experts: int = 0,
) -> Case:
    """quantised_product as `kernels/quantised_host.py` launches it."""
    bits, (numbers, scales) = (4 if kind == "int4" else 8), KINDS[kind]
    tiles = product_tiles(rows, out, depth, bits, 132, BYTES[dtype])
    tiles = replace(tiles, split=1) if experts else tiles
    made = {
        "BITS": bits, "BY_OUTPUT": bits == 8, "GROUP": GROUP, "ADDED": int(least), "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n, "BLOCK_K": tiles.block_k, "SPLIT": tiles.split, "HAS_BIAS": False, "EXPERTS": experts,
        "INTERPRET": False,
    }  # fmt: skip
    depth_bytes = tiles.block_k * bits // 8
    operands = {
        "numbers": Operand(tiles.block_n * depth_bytes, AT_ONCE, 1),
        "x": Operand(tiles.block_m * tiles.block_k, tiles.block_k, BYTES[dtype]),
        "planes": Operand(tiles.block_n * tiles.block_m, tiles.block_m, 4),
    }
    types = {
        **dict.fromkeys(("x", "bias", "y"), f"*{dtype}"), "numbers": f"*{numbers}", "planes": "*fp32",
        "tickets": "*i32", "ends": "*i32", **dict.fromkeys(("scales", "added"), f"*{scales}"),
    }  # fmt: skip
    name = f"{kind}{' with least numbers' if least else ''}, {rows} rows, {depth} to {out}, {dtype}"
    name += f", {experts} experts" if experts else ""
    return Case(
        name, quantised_product, capability, made, types, tiles.warps, tiles.stages, frozenset({"rows"}),
        products=dtype != "fp32", wide=dtype != "fp32", operands=operands,
    )  # fmt: skip


def dense_case(kind: str, *, capability: int = 90, dtype: str = "bf16", least: bool = False) -> Case:
    """quantised_dense as it is launched."""
    bits, (numbers, scales) = (4 if kind == "int4" else 8), KINDS[kind]
    made = {
        "BITS": bits, "BY_OUTPUT": bits == 8, "GROUP": GROUP, "ADDED": int(least), "BLOCK": DENSE_BLOCK,
        "INTERPRET": False,
    }  # fmt: skip
    types = {"dense": f"*{dtype}", "numbers": f"*{numbers}", **dict.fromkeys(("scales", "added"), f"*{scales}")}
    counts = frozenset({"first_row", "first_column"})
    return Case(f"{kind} widened, {dtype}", quantised_dense, capability, made, types, 4, 1, counts, products=False)


def quantised_cases(corners: bool = False) -> Iterator[Case]:
    """All kinds for usual shapes, or the corners, on Hopper and, of whole numbers, on Ampere."""
    for capability in (90, 80):
        for kind in KINDS:
            if capability < 90 and kind == "fp8":
                continue
            yield product_case(kind, 256, *SHAPES[1], capability=capability, least=kind == "int4")
            yield dense_case(kind, capability=capability)
            if corners:
                continue
            for rows in ROWS[:-1]:
                for shape in SHAPES:
                    yield product_case(kind, rows, *shape, capability=capability)
            yield product_case(kind, 256, *SHAPES[0], capability=capability)
            yield product_case(kind, 16, *SHAPES[0], capability=capability, dtype="fp32")
            yield product_case(kind, 16, 1536, 2048, capability=capability, experts=128)
            if capability >= 90:
                yield product_case(kind, 64, *SHAPES[0], capability=capability, dtype="fp16")
