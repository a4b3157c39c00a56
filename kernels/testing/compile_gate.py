"""Compiles the kernels for GPUs that need not be present, and checks the compiler's output.

    python -m clif.kernels.testing.compile_gate            # needs Triton and no GPU; exits with 1 beyond a limit
    python -m clif.kernels.testing.compile_gate --corners  # the cases nearest to a limit, of each kernel and form

Limits: nothing spilled to local memory, shared memory within a multiprocessor's, tensor-core products used (of 64 rows
on Hopper), operands and results moved 16 bytes at a time where their tiles allow it, and none of the interpreter's
casts left.
"""

from __future__ import annotations

import itertools
import multiprocessing
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

from clif.kernels.testing import dual_lora_cases, elementwise_cases, paged_decode_cases
from clif.kernels.testing.compiling import Case, compiled


def cases(corners: bool = False) -> Iterator[Case]:
    """All cases, or the corners."""
    yield from dual_lora_cases.dual_lora_cases(corners)
    yield from paged_decode_cases.paged_decode_cases(corners)
    yield from elementwise_cases.elementwise_cases(corners)


def _line(corners: bool, number: int) -> tuple[str, bool]:
    """A line for one of the cases, and whether all limits hold. It is named by number: kernels cannot be pickled."""
    case = next(itertools.islice(cases(corners), number, None))
    made = compiled(case)
    broken = made.broken()
    line = f"sm_{case.capability} {case.name}: {made.registers} registers, {made.shared >> 10} KiB shared"
    return line + (f": {'; '.join(broken)}" if broken else ""), not broken


def main(corners: bool = False) -> int:
    """Compile all cases, or the corners, print a line for each, and return how many broke a limit."""
    bad, count = 0, sum(1 for _ in cases(corners))
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(mp_context=context) as pool:
        for line, good in pool.map(_line, itertools.repeat(corners), range(count)):
            print(line, flush=True)
            bad += not good
    return bad


if __name__ == "__main__":
    sys.exit(bool(main("--corners" in sys.argv[1:])))
