"""Compiles the kernels for GPUs that need not be present, and checks the compiler's output.

    python -m clif.kernels.testing.compile_gate               # needs Triton and no GPU; exits with 1 beyond a limit
    python -m clif.kernels.testing.compile_gate --corners     # the cases nearest to a limit, of each kernel and form
    python -m clif.kernels.testing.compile_gate --candidates  # every kernel that the tuner may try: minutes

Limits: nothing spilled to local memory, shared memory within a multiprocessor's, tensor-core products used (of 64 rows
on Hopper), operands and results moved 16 bytes at a time where their tiles allow it, and none of the interpreter's
casts left.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from typing import Literal, get_args

from triton.compiler.errors import CompilationError
from triton.runtime.errors import PTXASError

from clif.kernels.testing import (
    dual_lora_cases,
    elementwise_cases,
    paged_decode_cases,
    paged_prefill_cases,
    quantised_cases,
)
from clif.kernels.testing.compiling import Case, compiled

Which = Literal["all", "corners", "candidates"]


def cases(which: Which = "all") -> Iterator[Case]:
    """The kernels as they are launched by default, those of them nearest to a limit, or the tuner's candidates."""
    if which == "candidates":
        yield from dual_lora_cases.candidate_cases()
        yield from paged_decode_cases.decode_candidate_cases()
        return
    corners = which == "corners"
    yield from dual_lora_cases.dual_lora_cases(corners)
    yield from paged_decode_cases.paged_decode_cases(corners)
    yield from paged_prefill_cases.paged_prefill_cases(corners)
    yield from elementwise_cases.elementwise_cases(corners)
    yield from quantised_cases.quantised_cases(corners)


@cache
def _listed(which: Which) -> tuple[Case, ...]:
    return tuple(cases(which))


def _line(which: Which, number: int) -> tuple[str, bool]:
    """A line for one of the cases, and whether all limits hold. It is named by number: kernels cannot be pickled."""
    case = _listed(which)[number]
    line = f"sm_{case.capability} {case.name}: "
    try:
        made = compiled(case)
    except (CompilationError, PTXASError, ValueError) as error:
        return f"{line}{error}", False
    broken = made.broken()
    line += f"{made.registers} registers, {made.shared >> 10} KiB shared"
    return line + (f": {'; '.join(broken)}" if broken else ""), not broken


def main() -> int:
    """Compile, print a line for each case and a last one with their number; return whether one broke a limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_mutually_exclusive_group()
    for which in get_args(Which):
        group.add_argument(f"--{which}", dest="which", action="store_const", const=which, default="all")
    args = parser.parse_args()
    # It would take a tenth of the time, and changes no code.
    os.environ.setdefault("TRITON_DISABLE_LINE_INFO", "1")
    began, bad, count = time.monotonic(), 0, len(_listed(args.which))
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(mp_context=context) as pool:
        for line, good in pool.map(_line, itertools.repeat(args.which, count), range(count)):
            print(line, flush=True)
            bad += not good
    print(f"{count} compiled in {time.monotonic() - began:.0f} s, {bad} beyond a limit")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
