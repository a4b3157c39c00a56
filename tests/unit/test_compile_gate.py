"""The kernels compile for Hopper and Ampere within their limits, on any machine, and a broken limit is found."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from clif.kernels.dual_lora_kernel import BASE, FUSED, SHRINK
from clif.kernels.testing.compile_gate import Which, cases
from clif.kernels.testing.compiled_code import Access, accesses
from clif.kernels.testing.compiling import Case, Compiled, Operand
from clif.kernels.testing.dual_lora_cases import linear_case
from clif.kernels.tiles import LinearTiles


def kind(case: Case) -> tuple[Any, ...]:
    """What a corner must stand for."""
    return case.capability, case.kernel.__name__, case.constants.get("FORM")


def test_the_corners_are_cases_of_both_makes_of_gpu_of_every_kernel_and_form() -> None:
    every, corners = list(cases()), list(cases("corners"))
    assert {case.key() for case in corners} < {case.key() for case in every}
    assert {kind(case) for case in corners} == {kind(case) for case in every}
    kernels = {case.kernel.__name__ for case in every}
    assert {
        "dual_lora_linear",
        "dual_lora_expand",
        "dual_lora_grads",
        "paged_decode",
        "paged_prefill",
        "swiglu_grad",
    } < kernels
    assert all({(90, k), (80, k)} <= {kind(case)[:2] for case in corners} for k in kernels)
    assert {case.constants["FORM"] for case in corners if "FORM" in case.constants} == {FUSED, SHRINK, BASE}


def test_the_candidates_are_those_of_every_kernel_that_is_tuned_each_code_once() -> None:
    found = list(cases("candidates"))
    keys = [case.key() for case in found]
    assert len(set(keys)) == len(keys)
    # What is computed between the products has no candidates; these have one choice.
    single = ("paged_prefill", "quantised_product")
    tuned = {kind(case) for case in cases() if case.products and case.kernel.__name__ not in single}
    assert {kind(case) for case in found} == tuned
    sizes = [
        (c.constants["BLOCK_M"], c.constants["BLOCK_N"], c.warps) for c in found if c.constants.get("FORM") == FUSED
    ]
    assert sizes and all(m * n <= 128 * 32 * warps for m, n, warps in sizes)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("which", ["corners", pytest.param("all", marks=pytest.mark.slow)])
def test_the_kernels_compile_for_hopper_and_ampere_within_their_limits(tmp_path: Path, which: Which) -> None:
    # Compiled in a process of its own: in this one the interpreter has taken the kernels' place.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-P", "-m", "clif.kernels.testing.compile_gate", f"--{which}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    *lines, last = done.stdout.splitlines()
    assert [line.partition(":")[0] for line in lines] == [f"sm_{c.capability} {c.name}" for c in cases(which)]
    assert re.fullmatch(rf"{len(lines)} compiled in \d+ s, 0 beyond a limit", last)


def made(**changes: Any) -> Compiled:
    """What the compiler made of a case with 64-row tiles, without fault."""
    case = linear_case("x", LinearTiles(), 16)
    good = frozenset(
        {Access("y", True, 16), Access("x", False, 16), Access("w", False, 128), Access("counts", False, 4)}
    )
    return replace(Compiled(case, 255, 0, 1 << 10, frozenset({"wgmma"}), good), **changes)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({}, []),
        ({"stack": 8}, ["8 bytes of stack: registers were spilled"]),
        ({"shared": 228 << 10}, ["233472 bytes of shared memory: more than 232448"]),
        ({"products": frozenset({"mma"})}, ["no wgmma"]),
        ({"products": frozenset()}, ["no tensor-core product", "no wgmma"]),
        ({"accesses": frozenset({Access("y", True, 4)})}, ["y is stored 4 bytes at a time, not 16"]),
        ({"accesses": frozenset({Access("w", False, 2)})}, ["w is loaded 2 bytes at a time, not 16"]),
    ],
)  # fmt: skip
def test_a_kernel_that_breaks_a_limit_is_found(changes: dict[str, Any], found: list[str]) -> None:
    assert made(**changes).broken() == found


def test_an_operand_is_moved_in_pieces_that_its_tile_and_its_rows_allow() -> None:
    assert Operand(64 * 64, 64).width(128) == 16
    # Two numbers of 4 bytes for each thread; rows of 8, of 5 and of 20 numbers of 2 bytes.
    assert Operand(256, 16, 4).width(128) == 8
    assert [Operand(4096, run).width(128) for run in (8, 5, 20)] == [16, 2, 8]
    assert Operand(16, 16).width(128) == 2


PTX = """
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0,
	.param .u64 .ptr .global .align 1 kernel_param_1,
	.param .u32 kernel_param_2,
	.param .align 64 .b8 kernel_param_3[128]
)
{
	ld.param.b64 	%rd1, [kernel_param_0];
	mov.b32 	%r1, kernel_param_0;
	mov.b32 	%r2, kernel_param_1;
	selp.b32 	%r3, %r1, %r2, %p1;
	ld.param.b64 	%rd2, [%r3];
	ld.param.b32 	%r4, [kernel_param_2];
	mad.wide.s32 	%rd3, %r4, 2, %rd1;
	@%p2 ld.global.cg.v4.b32 { %r5, %r6, %r7, %r8 }, [ %rd3 + 0 ];
	mad.wide.s32 	%rd5, %r5, 4, %rd2;
	@%p2 st.global.b16 [ %rd5 + 8 ], { %rs1 };
	mov.b64 	%rd6, kernel_param_3;
	cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%r9], [%rd6, {%r10, %r11}], [%r12];
	cp.async.cg.shared.global [ %r13 + 0 ], [ %rd3 + 0 ], 0x10, %r14;
	st.shared.v2.b64 [%r16], {%rd2, %rd1};
	ld.shared.v2.b64 {%rd7, %rd8}, [%r17+8];
	ld.global.b64 	%rd9, [ %rd8 + 0 ];
	atom.global.gpu.acq_rel.add.u32 %r15, [ %rd1 + 0 ], 0x1;
}
"""


def test_every_access_is_followed_back_to_its_arguments() -> None:
    found = accesses(PTX, ["table", "result", "size", "matrix"])
    assert found == {
        Access("table", False, 16), Access("table", True, 2), Access("result", True, 2), Access("matrix", False, 128),
        # Through shared memory either of the two.
        Access("table", False, 8), Access("result", False, 8),
    }  # fmt: skip
    with pytest.raises(ValueError, match="comes from no parameter"):
        accesses(PTX.replace("[ %rd3 + 0 ]", "[ %rd9 + 0 ]"), ["table", "result", "size", "matrix"])
