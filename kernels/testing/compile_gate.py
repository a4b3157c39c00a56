"""Compiles the kernels for GPUs that need not be present, and checks the compiler's output.

    python -m clif.kernels.testing.compile_gate            # needs Triton and no GPU; exits with 1 beyond a limit
    python -m clif.kernels.testing.compile_gate --corners  # the cases nearest to a limit, of each kernel and form

Limits: nothing spilled to local memory, shared memory within a multiprocessor's, tensor-core products used, and none
of the interpreter's casts left.
"""

from __future__ import annotations

import itertools
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from clif.kernels.dual_lora_grads_kernel import dual_lora_grads
from clif.kernels.dual_lora_kernel import BASE, FUSED, SHRINK, dual_lora_linear
from clif.kernels.tiles import GradTiles, LinearTiles, descriptor_boxes
from clif.kernels.tuning import Defaults

SHARED_BYTES = {90: 227 << 10, 80: 163 << 10}
"""Shared memory that one program can have, by compute capability (CUDA C++ Programming Guide, table of features)."""


@dataclass(frozen=True)
class Case:
    """One compilation. descriptors: arguments that are tensor descriptors, and their types; products: it has some."""

    name: str
    kernel: Any
    capability: int
    dtype: str
    constants: dict[str, Any]
    warps: int
    stages: int
    tensor_cores: bool = True
    descriptors: tuple[tuple[str, str], ...] = ()
    products: bool = True


@dataclass(frozen=True)
class Compiled:
    """Output of the compiler. Bytes per program, registers and stack bytes per thread."""

    case: Case
    registers: int
    stack: int
    shared: int
    wgmma: bool
    mma: bool

    def broken(self) -> list[str]:
        """The limits that are exceeded."""
        found = []
        if self.stack:
            found.append(f"{self.stack} bytes of stack: registers were spilled")
        if self.shared > SHARED_BYTES[self.case.capability]:
            found.append(f"{self.shared} bytes of shared memory: more than {SHARED_BYTES[self.case.capability]}")
        if self.case.products and not (self.wgmma or self.mma):
            found.append("no tensor-core product")
        # A Hopper instruction needs 64 rows.
        if self.case.capability >= 90 and self.case.tensor_cores and not self.wgmma:
            found.append("no wgmma")
        return found


def linear_case(
    name: str, tiles: LinearTiles, r: int, *, form: int = FUSED, capability: int = 90, dtype: str = "bf16",
    blocks: int = 1, transposed: bool = False, bias: bool = False,
) -> Case:  # fmt: skip
    """dual_lora_linear as `kernels/dual_lora_host.py` launches it."""
    constants = {
        "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n, "BLOCK_K": tiles.block_k, "GROUP_M": tiles.group_m,
        "SPLIT": tiles.split, "ALIGNED": True,
        "RANK": r, "RANK_P": max(16, triton.next_power_of_2(r)), "BLOCKS": blocks, "SLICES": tiles.slices,
        "FORM": form, "TRANSPOSED": transposed, "HAS_BIAS": bias, "TMA": tiles.tma,
        "STORE_TMA": tiles.store_tma, "INTERPRET": False,
        # Launches specialise strides of 1.
        **({"w_out": 1, "a_rank": 1, "b_out": 1} if transposed else {"w_k": 1, "a_k": 1, "b_rank": 1}),
    }  # fmt: skip
    boxes = descriptor_boxes(tiles, constants["RANK_P"], transposed).items() if tiles.tma else ()
    boxes = [(name, box) for name, box in boxes if name != "y" or tiles.store_tma]
    descriptors = tuple((name, f"tensordesc<{dtype}[{box[0]},{box[1]}]>") for name, box in boxes)
    wide = tiles.block_m >= 64 and form != SHRINK
    return Case(name, dual_lora_linear, capability, dtype, constants, tiles.warps, tiles.stages, wide, descriptors)


def grads_case(
    name: str, tiles: GradTiles, r: int, *, capability: int = 90, dtype: str = "bf16", blocks: int = 1
) -> Case:
    """dual_lora_grads as `kernels/dual_lora_host.py` launches it."""
    constants = {
        "BLOCK_C": tiles.block_c, "BLOCK_R": tiles.block_r, "RANK": r, "RANK_P": max(16, triton.next_power_of_2(r)),
        "BLOCKS": blocks, "SLICES": tiles.slices, "ALIGNED": True, "TMA": tiles.tma,
        "INTERPRET": False,
    }  # fmt: skip
    box = f"tensordesc<{dtype}[{tiles.block_r},{tiles.block_c}]>"
    described = (("x", box), ("grad", box)) if tiles.tma else ()
    return Case(name, dual_lora_grads, capability, dtype, constants, tiles.warps, tiles.stages, r >= 64, described)


TYPES = {
    "planes": "*fp32", "sums": "*fp32", "grad_a": "*fp32", "grad_b": "*fp32", "scale": "fp32", "flags": "*i64",
    "left": "*i64",
}  # fmt: skip
TABLES = ("counts", "firsts", "pairs", "col_tiles", "blocks", "tickets", "sum_tickets")
INTEGERS = ("n_columns", "shrinkers", "rows")
"""Counts, which may be anything; all other integers are sizes and strides, multiples of 16 in every model."""


def compiled(case: Case) -> Compiled:
    """Compile a case. Raises Triton's error for a kernel that does not compile."""
    signature, attributes, described = {}, {}, dict(case.descriptors)
    pointers = {"x", "w", "bias", "a", "b", "hidden", "y", "grad", "grad_hidden"}
    for index, name in enumerate(case.kernel.arg_names):
        if name in case.constants:
            signature[name] = "constexpr"
            continue
        kind = described.get(name) or TYPES.get(name)
        if kind is None:
            kind = "*i32" if name in TABLES else f"*{case.dtype}" if name in pointers else "i32"
        signature[name] = kind
        if kind.startswith("*") or (kind == "i32" and name not in INTEGERS):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(case.kernel, signature, case.constants, attributes)
    options = {"num_warps": case.warps, "num_stages": case.stages, "enable_fp_fusion": True}
    if case.constants.get("FORM") == BASE:
        options["launch_pdl"] = True
    made = triton.compile(source, GPUTarget("cuda", case.capability, 32), options)
    registers, stack = _usage(made.asm["cubin"])
    ptx = made.asm["ptx"]
    return Compiled(case, registers, stack, made.metadata.shared, "wgmma.mma_async" in ptx, "mma.sync" in ptx)


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes per thread, as the assembler states them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+).*?STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump said nothing about registers: {text!r}")
    return int(found[1]), int(found[2])


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


def cases() -> Iterator[Case]:
    """The default tiles for the shapes of 1B and 8B models, on Hopper and Ampere."""
    for capability, programs in ((90, 132), (80, 108)):
        defaults = Defaults(programs, capability)
        for r in (8, 16, 64) if capability >= 90 else (16, 64):
            for rows, depth, out, projections in SHAPES:
                tiles = defaults.linear(rows, depth, out, r, False)
                name = f"{rows} rows {depth}->{out} r={r} x{projections}"
                yield linear_case(name, tiles, r, capability=capability, blocks=projections)
                if rows > 256:
                    back = defaults.linear(rows, out, depth, r, True)
                    yield linear_case(
                        f"{name}, backward", back, r, capability=capability, blocks=projections, transposed=True
                    )
            tiles = defaults.linear(64, 4096, 4096, r, False)
            if capability >= 90:
                yield linear_case(f"pair, first, r={r}", tiles, r, form=SHRINK)
                yield linear_case(f"pair, second, r={r}", tiles, r, form=BASE, bias=True)
            grads = defaults.grads(2048, 4096, 4096, r)
            yield grads_case(f"gradients of the factors, r={r}", grads, r, capability=capability)
        yield linear_case("float16, bias", defaults.linear(64, 2048, 2048, 16, False), 16, capability=capability,
                          dtype="fp16", bias=True)  # fmt: skip


CORNERS = frozenset(
    {
        "1 rows 4096->4096 r=16 x1",
        "2112 rows 4096->6144 r=64 x3",
        "2112 rows 4096->6144 r=64 x3, backward",
        "pair, first, r=64",
        "pair, second, r=64",
        "gradients of the factors, r=64",
        "float16, bias",
    }
)
"""Names of the smallest case and of the largest of each form: they need most registers and shared memory."""


def _line(number: int) -> tuple[str, bool]:
    """A line for one of the cases, and whether all limits hold. It is named by number: kernels cannot be pickled."""
    case = next(itertools.islice(cases(), number, None))
    made = compiled(case)
    broken = made.broken()
    line = f"sm_{case.capability} {case.name}: {made.registers} registers, {made.shared >> 10} KiB shared"
    return line + (f": {'; '.join(broken)}" if broken else ""), not broken


def main(corners: bool = False) -> int:
    """Compile all cases, or the corners, print a line for each, and return how many broke a limit."""
    bad, numbers = 0, [i for i, case in enumerate(cases()) if not corners or case.name in CORNERS]
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("forkserver")) as pool:
        for line, good in pool.map(_line, numbers):
            print(line, flush=True)
            bad += not good
    return bad


if __name__ == "__main__":
    sys.exit(bool(main("--corners" in sys.argv[1:])))
