"""Cases of the dual LoRA kernels for the compile gate, see `kernels/testing/compile_gate.py`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import triton

from clif.kernels.candidates import AFTER_TORCH, grads_candidates, linear_candidates
from clif.kernels.dual_lora_expand_kernel import dual_lora_expand
from clif.kernels.dual_lora_grads_kernel import dual_lora_grads
from clif.kernels.dual_lora_kernel import BASE, FUSED, SHRINK, dual_lora_linear
from clif.kernels.testing.compiling import Case, Operand
from clif.kernels.tiles import GradTiles, LinearTiles, descriptor_boxes, piece_width
from clif.kernels.tuning import Defaults

SHAPES = (
    # rows, depth, outputs, adapted members: decode, decode of merged projections, mixed with training.
    (1, 4096, 4096, 1),
    (64, 4096, 4096, 1),
    (64, 4096, 6144, 3),
    (64, 4096, 28672, 2),
    (256, 2048, 2048, 1),
    (2112, 4096, 4096, 1),
    (2112, 4096, 6144, 3),
)
SMALLEST = "1 rows 2048->2048 r=16 x1, float16, bias"
LARGEST = ("pair, first, r=64", "pair, second, r=64", "three, second, r=64", "three, third, r=64",
           "gradients of the factors, r=64")  # fmt: skip
CORNERS = {
    90: frozenset({"2112 rows 4096->6144 r=64 x3, backward", SMALLEST, *LARGEST}),
    80: frozenset({"2112 rows 4096->6144 r=64 x3", *LARGEST}),
}
"""Names of the largest case of each form, which needs most registers and shared memory, and of the smallest."""
DATA = ("x", "w", "bias", "a", "b", "hidden", "y", "grad", "grad_hidden")
TABLES = ("counts", "firsts", "pairs", "col_tiles", "blocks", "tickets", "sum_tickets")
TYPES = {
    **dict.fromkeys(TABLES, "*i32"), **dict.fromkeys(("planes", "sums", "grad_a", "grad_b"), "*fp32"),
    **dict.fromkeys(("flags", "left"), "*i64"), "scale": "fp32",
}  # fmt: skip


def types_of(kernel: Any, dtype: str, others: dict[str, str] | None = None) -> dict[str, str]:
    """Types of a kernel's arguments that are not integers. others: those that are not as in other kernels."""
    known = {**dict.fromkeys(DATA, f"*{dtype}"), **TYPES, **(others or {})}
    return {name: known[name] for name in kernel.arg_names if name in known}


def padded(r: int) -> int:
    return max(16, int(triton.next_power_of_2(r)))


def linear_case(
    name: str, tiles: LinearTiles, r: int, *, form: int = FUSED, capability: int = 90, dtype: str = "bf16",
    blocks: int = 1, transposed: bool = False, bias: bool = False,
) -> Case:  # fmt: skip
    """dual_lora_linear as `kernels/dual_lora_host.py` launches it."""
    if form == SHRINK:
        # What the second launch alone is made for changes no code of the first.
        tiles = replace(tiles, block_n=16, split=1, group_m=1, store_tma=False)
    constants = {
        "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n, "BLOCK_K": tiles.block_k, "GROUP_M": tiles.group_m,
        "SPLIT": tiles.split, "ALIGNED": True, "RANK": r, "RANK_P": padded(r), "BLOCKS": blocks,
        "SLICES": tiles.slices, "FORM": form, "TRANSPOSED": transposed, "PACKED": True, "HAS_BIAS": bias,
        "EARLY": form == SHRINK and tiles.form == "pair",
        "TMA": tiles.tma, "STORE_TMA": tiles.store_tma, "INTERPRET": False,
        # Launches specialise strides of 1.
        **({"w_out": 1, "a_rank": 1, "b_out": 1} if transposed else {"w_k": 1, "a_k": 1, "b_rank": 1}),
    }  # fmt: skip
    boxes = descriptor_boxes(tiles, padded(r), transposed) if tiles.tma else {}
    described = {n: _descriptor(dtype, box) for n, box in boxes.items() if n != "y" or tiles.store_tma}
    counts = {"n_columns", "shrinkers", "rows"}
    if blocks * r % 16:
        # The stride of a factor that lies with its rank in a row.
        counts |= {"a_k"} if transposed else {"b_out"}
    return Case(
        name, dual_lora_linear, capability, constants, types_of(dual_lora_linear, dtype, described), tiles.warps,
        tiles.stages, frozenset(counts), wide=tiles.block_m >= 64, dependent=form == BASE,
        operands=_linear_operands(tiles, r, transposed),
    )  # fmt: skip


def _descriptor(dtype: str, box: tuple[int, int]) -> str:
    return f"tensordesc<{dtype}[{box[0]},{box[1]}]>"


def _linear_operands(tiles: LinearTiles, r: int, transposed: bool) -> dict[str, Operand]:
    m, n, k, rank = tiles.block_m, tiles.block_n, tiles.block_k, padded(r)
    width = piece_width(tiles)
    return {
        "x": Operand(m * k, k), "w": Operand(n * k, n if transposed else k),
        "a": Operand(rank * k, r if transposed else k), "b": Operand(width * rank, width if transposed else r),
        "hidden": Operand(m * rank, r), "y": Operand(m * width, width),
        "planes": Operand(m * rank, rank, 4), "sums": Operand(m * n, n, 4),
    }  # fmt: skip


def expand_case(
    name: str, tiles: LinearTiles, r: int, *, capability: int = 90, dtype: str = "bf16", blocks: int = 1,
    transposed: bool = False,
) -> Case:  # fmt: skip
    """dual_lora_expand as `kernels/dual_lora_host.py` launches it."""
    m, n, rank = tiles.block_m, tiles.block_n, padded(r)
    constants = {
        "BLOCK_M": m, "BLOCK_N": n, "RANK": r, "RANK_P": rank, "BLOCKS": blocks, "ALIGNED": True,
        "PACKED": not transposed, "EARLY": tiles.early, "INTERPRET": False, ("b_out" if transposed else "b_rank"): 1,
    }  # fmt: skip
    operands = {
        "y": Operand(m * n, n), "b": Operand(n * rank, n if transposed else r), "hidden": Operand(m * rank, r),
    }  # fmt: skip
    counts = {"n_columns"} | ({"b_out"} if blocks * r % 16 and not transposed else set())
    return Case(
        name, dual_lora_expand, capability, constants, types_of(dual_lora_expand, dtype), tiles.warps, tiles.stages,
        frozenset(counts), wide=m >= 64, dependent=tiles.early, operands=operands,
    )  # fmt: skip


def grads_case(
    name: str, tiles: GradTiles, r: int, *, capability: int = 90, dtype: str = "bf16", blocks: int = 1
) -> Case:
    """dual_lora_grads as `kernels/dual_lora_host.py` launches it."""
    c, rank = tiles.block_c, padded(r)
    constants = {
        "BLOCK_C": c, "BLOCK_R": tiles.block_r, "RANK": r, "RANK_P": rank, "BLOCKS": blocks, "SLICES": tiles.slices,
        "ALIGNED": True, "TMA": tiles.tma, "INTERPRET": False,
    }  # fmt: skip
    box = _descriptor(dtype, (tiles.block_r, c))
    described = {"x": box, "grad": box} if tiles.tma else {}
    thin, wide = Operand(rank * tiles.block_r, r), Operand(c * tiles.block_r, c)
    return Case(
        name, dual_lora_grads, capability, constants, types_of(dual_lora_grads, dtype, described), tiles.warps,
        tiles.stages, frozenset({"rows"}), wide=r >= 64,
        operands={
            "x": wide, "grad": wide, "hidden": thin, "grad_hidden": thin, "planes": Operand(rank * c, c, 4),
            "grad_a": Operand(rank * c, c, 4), "grad_b": Operand(rank * c, r, 4),
        },
    )  # fmt: skip


def dual_lora_cases(corners: bool = False) -> Iterator[Case]:
    """The default tiles for the shapes of 1B and 8B models, or the corners, on Hopper and Ampere."""
    return (case for case in _every_case() if not corners or case.name in CORNERS[case.capability])


def _every_case() -> Iterator[Case]:
    for capability, programs in ((90, 132), (80, 108)):
        defaults = Defaults(programs, capability)
        for r in (8, 16, 64) if capability >= 90 else (16, 64):
            for rows, depth, out, projections in SHAPES:
                tiles = defaults.tiles("fused", rows, depth, out, r)
                name = f"{rows} rows {depth}->{out} r={r} x{projections}"
                yield linear_case(name, tiles, r, capability=capability, blocks=projections)
                if rows > 256:
                    back = defaults.tiles("fused", rows, out, depth, r)
                    yield linear_case(
                        f"{name}, backward", back, r, capability=capability, blocks=projections, transposed=True
                    )
            tiles = defaults.tiles("fused", 64, 4096, 4096, r)
            if capability >= 90:
                pair = replace(tiles, form="pair")
                yield linear_case(f"pair, first, r={r}", pair, r, form=SHRINK)
                yield linear_case(f"pair, second, r={r}", pair, r, form=BASE, bias=True)
            thin = LinearTiles("three", block_m=64, block_n=128, block_k=128, stages=3)
            yield linear_case(f"three, second, r={r}", thin, r, form=SHRINK, capability=capability, blocks=3)
            yield expand_case(f"three, third, r={r}", thin, r, capability=capability, blocks=3)
            if capability >= 90:
                yield expand_case(f"three, third, early, r={r}", replace(thin, early=True), r, blocks=3)
            grads = defaults.grads(2048, 4096, 4096, r)
            yield grads_case(f"gradients of the factors, r={r}", grads, r, capability=capability)
        small = defaults.tiles("fused", 1, 2048, 2048, 16)
        yield linear_case(SMALLEST, small, 16, capability=capability, dtype="fp16",
                          bias=True)  # fmt: skip


LAYERS = (
    (4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096), (2048, 3072), (2048, 2048), (2048, 16384), (8192, 2048),
    (4096, 1024),
)  # fmt: skip
"""Depth and outputs of the merged layers of 8B and 1B models."""
ROWS = (1, 16, 64, 256, 2048, 2112)
MERGED = 3
"""Projections of a layer in the cases of candidates: the code for fewer is a part of it."""


def candidate_cases() -> Iterator[Case]:
    """All candidates of the tuner for the layers of 8B and 1B models, each code once, on Hopper and Ampere."""
    found: dict[tuple[Any, ...], Case] = {}
    for capability, programs in ((90, 132), (80, 108)):
        for rows, r, (depth, out) in itertools.product(ROWS, (8, 16, 64), LAYERS):
            for case in _candidates(rows, depth, out, r, programs, capability):
                found.setdefault(case.key(), case)
    yield from found.values()


def _candidates(rows: int, depth: int, out: int, r: int, programs: int, capability: int) -> Iterator[Case]:
    for backward in (False, True) if rows == 2048 else (False,):
        width, outputs = (out, depth) if backward else (depth, out)
        for tiles in linear_candidates(rows, width, outputs, r, backward, programs, capability):
            yield from candidate(f"{rows} rows {depth}->{out} r={r}", tiles, r, capability, backward)
    if rows == 2048:
        for of_factors in grads_candidates(rows, depth, out, r, programs, capability):
            name = f"{rows} rows {depth}->{out} r={r}: {of_factors}"
            yield grads_case(name, of_factors, r, capability=capability, blocks=MERGED)


def candidate(name: str, tiles: LinearTiles, r: int, capability: int, backward: bool) -> Iterator[Case]:
    """The launches of one candidate that are not torch's."""
    forms = {"fused": (FUSED,), "pair": (SHRINK, BASE)}.get(tiles.form, (SHRINK,))
    name = f"{name}: {tiles}"
    for form in forms:
        yield linear_case(name, tiles, r, form=form, capability=capability, blocks=MERGED, transposed=backward)
    if tiles.form in AFTER_TORCH:
        yield expand_case(name, tiles, r, capability=capability, blocks=MERGED, transposed=backward)
