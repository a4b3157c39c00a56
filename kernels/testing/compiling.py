"""One compilation of a kernel for a GPU that need not be present, and what it must keep to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from clif.kernels.testing.compiled_code import Access, accesses, tensor_core_products, usage

SHARED_BYTES = {90: 227 << 10, 80: 163 << 10}
"""Shared memory that one program can have, by compute capability (CUDA C++ Programming Guide, table of features)."""
WIDEST = 16
"""Bytes that one thread moves in one instruction at most."""


@dataclass(frozen=True)
class Operand:
    """A tile of an argument, as one program loads or stores it. run: numbers that lie in a row; bytes: of each."""

    numbers: int
    run: int
    bytes: int = 2

    def width(self, threads: int) -> int:
        """Bytes that one thread can move at once: a power of two."""
        most = min(WIDEST, self.run * self.bytes, max(self.bytes, self.numbers * self.bytes // threads))
        # What begins at any multiple of the run is aligned to the power of two in it.
        return min(1 << (most.bit_length() - 1), (self.run & -self.run) * self.bytes)


@dataclass(frozen=True)
class Case:
    """One compilation, as the host side launches the kernel.

    constants: what is compiled in; types: of the arguments that are not integers; counts: integers that may be anything
    (all others are sizes and strides, multiples of 16 in every model); products: whether it has some, wide: of at least
    64 rows; operands: what must be moved in pieces as wide as possible; item_stack: bytes that may be spilled, by
    programs that take several items, from one to the next.
    """

    name: str
    kernel: Any
    capability: int
    constants: Mapping[str, Any]
    types: Mapping[str, str]
    warps: int
    stages: int = 1
    counts: frozenset[str] = frozenset()
    products: bool = True
    wide: bool = False
    dependent: bool = False
    operands: Mapping[str, Operand] = field(default_factory=dict)
    item_stack: int = 0

    def key(self) -> tuple[Any, ...]:
        """Equal for cases of which the compiler makes the same code."""
        parts = (self.constants.items(), self.types.items(), self.counts)
        return (
            self.kernel.__name__, self.capability, self.warps, self.stages, self.dependent,
            *(tuple(sorted(part, key=str)) for part in parts),
        )  # fmt: skip

    def parameters(self) -> list[str]:
        """The argument of each parameter of the code: a tensor descriptor has one, two sizes and two strides."""
        given = (name for name in self.kernel.arg_names if name not in self.constants)
        return [name for name in given for _ in range(5 if self.types.get(name, "").startswith("tensordesc") else 1)]


@dataclass(frozen=True)
class Compiled:
    """Output of the compiler. Bytes of shared memory per program, registers and stack bytes per thread."""

    case: Case
    registers: int
    stack: int
    shared: int
    products: frozenset[str]
    accesses: frozenset[Access]

    def broken(self) -> list[str]:
        """The limits that are exceeded."""
        found, most = [], SHARED_BYTES[self.case.capability]
        if self.stack > self.case.item_stack:
            found.append(f"{self.stack} bytes of stack: registers were spilled")
        if self.shared > most:
            found.append(f"{self.shared} bytes of shared memory: more than {most}")
        if self.case.products and not self.products:
            found.append("no tensor-core product")
        # A Hopper instruction needs 64 rows.
        if self.case.capability >= 90 and self.case.wide and "wgmma" not in self.products:
            found.append("no wgmma")
        return found + self.narrow()

    def narrow(self) -> list[str]:
        """Accesses of operands in smaller pieces than their tiles allow."""
        found = []
        for access in sorted(self.accesses, key=str):
            if operand := self.case.operands.get(access.argument):
                wanted = operand.width(32 * self.case.warps)
                if access.bytes < wanted:
                    verb = "stored" if access.store else "loaded"
                    found.append(f"{access.argument} is {verb} {access.bytes} bytes at a time, not {wanted}")
        return found


def compiled(case: Case) -> Compiled:
    """Compile a case. Raises Triton's error for a kernel that does not compile."""
    signature: dict[str, str] = {}
    attributes = {}
    for index, name in enumerate(case.kernel.arg_names):
        kind = "constexpr" if name in case.constants else case.types.get(name, "i32")
        signature[name] = kind
        if kind.startswith("*") or (kind == "i32" and name not in case.counts):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(case.kernel, signature, dict(case.constants), attributes)
    options = {"num_warps": case.warps, "num_stages": case.stages, "enable_fp_fusion": True}
    if case.dependent:
        options["launch_pdl"] = True
    made = triton.compile(source, GPUTarget("cuda", case.capability, 32), options)
    registers, stack = usage(made.asm["cubin"])
    ptx = made.asm["ptx"]
    found = accesses(ptx, case.parameters())
    return Compiled(case, registers, stack, made.metadata.shared, tensor_core_products(ptx), found)
