"""Cases of the paged decode kernel for the compile gate, see `kernels/testing/compile_gate.py`.

python -m clif.kernels.testing.paged_decode_cases               # needs Triton, no GPU; 1 if a case breaks a limit
python -m clif.kernels.testing.paged_decode_cases --corners     # the largest case, and one whose sizes are padded
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from clif.kernels.paged_decode_host import constants
from clif.kernels.paged_decode_kernel import paged_decode
from clif.kernels.paged_decode_table import DecodeConfig
from clif.kernels.testing.compile_gate import Case, compiled

HEADS = ((128, 4, 16, "bf16"), (128, 8, 64, "bf16"), (64, 3, 16, "bf16"), (80, 7, 12, "bf16"), (96, 1, 16, "fp16"))
"""Size of a head, query heads for each KV head, tokens of a cache block, and the type of all."""
CORNERS = ((128, 8, 64, "bf16"), (80, 7, 12, "bf16"))
"""The one with most registers and shared memory, and the one whose head and group are no powers of two."""


def decode_case(
    head_dim: int, group: int, block_size: int, config: DecodeConfig, *, capability: int = 90, dtype: str = "bf16"
) -> Case:
    """paged_decode as `kernels/paged_decode_host.py` launches it."""
    name = f"paged decode, {group} heads of {head_dim}, blocks of {block_size}, {dtype}"
    made = {**constants(head_dim, group, block_size, config), "INTERPRET": False}
    # A Hopper instruction needs 64 rows, and 16 are all there are.
    return Case(name, paged_decode, capability, dtype, made, config.warps, config.stages, False, _pointers(dtype))


def _pointers(dtype: str) -> tuple[tuple[str, str], ...]:
    """Types of the arguments that other kernels lack, or that have other types there."""
    data, tables = dict.fromkeys(("q", "cache", "out"), f"*{dtype}"), dict.fromkeys(("rows", "lengths"), "*i32")
    return tuple({**data, **tables, "sums": "*fp32"}.items())


def paged_decode_cases(corners: bool = False) -> Iterator[Case]:
    """The default configuration for usual heads, or the corners, on Hopper and Ampere."""
    for capability in (90, 80):
        for head_dim, group, block_size, dtype in CORNERS if corners else HEADS:
            yield decode_case(head_dim, group, block_size, DecodeConfig(), capability=capability, dtype=dtype)


def main(corners: bool = False) -> int:
    """Compile all cases, or the corners, print a line for each, and return how many broke a limit."""
    bad = 0
    for case in paged_decode_cases(corners):
        made = compiled(case)
        broken = made.broken()
        line = f"sm_{case.capability} {case.name}: {made.registers} registers, {made.shared >> 10} KiB shared"
        print(line + (f": {'; '.join(broken)}" if broken else ""), flush=True)
        bad += bool(broken)
    return bad


if __name__ == "__main__":
    sys.exit(bool(main("--corners" in sys.argv[1:])))
