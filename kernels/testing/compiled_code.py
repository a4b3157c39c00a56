"""Reads what Triton's compiler made: registers, stack, tensor-core products, and how wide each argument is accessed."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import triton

TMA = 128
"""Width of an access by the copy engine, which moves whole lines."""
_PARAMETER = re.compile(r"\w+_param_(\d+)")
_REGISTER = re.compile(r"%[a-z]+\d+")
_INSTRUCTION = re.compile(r"^\s*(?:@!?%p\d+\s+)?([a-z][\w.:]*)\s+(.*);")
_EXCHANGE = re.compile(r"(st|ld)\.shared(?:\.v\d)?\.[bu]64$")
_BITS = re.compile(r"(?:\.v(\d))?\.[bufs](\d+)$")


@dataclass(frozen=True)
class Access:
    """One kind of access of global memory. argument: name; bytes: by one thread in one instruction."""

    argument: str
    store: bool
    bytes: int


def usage(cubin: bytes) -> tuple[int, int]:
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


def tensor_core_products(ptx: str) -> frozenset[str]:
    """The instructions that multiply on tensor cores: mma, and wgmma for 64 rows at once."""
    return frozenset(name for name, start in (("mma", "mma.sync"), ("wgmma", "wgmma.mma_async")) if start in ptx)


def accesses(ptx: str, arguments: Sequence[str]) -> frozenset[Access]:
    """How the code reads and writes the memory of each pointer among the arguments.

    arguments: the name of every parameter of the code, in order. An address is followed back through the registers to
    the parameters that it comes from; it may come from several of them. Raises ValueError for an access that comes
    from no parameter.
    """
    instructions = [(found[1], found[2]) for line in ptx.splitlines() if (found := _INSTRUCTION.match(line))]
    pointers = {int(i) for i in re.findall(r"\.param (?:\.u64 \.ptr|\.align \d+ \.b8) .*?_param_(\d+)", ptx)}
    origins = _origins(instructions, pointers)
    found = set()
    for address, store, width in _accesses(instructions):
        sources = {i for register in _REGISTER.findall(address) for i in origins[register]}
        sources |= {int(i) for i in _PARAMETER.findall(address)}
        if not sources:
            raise ValueError(f"an access of [{address}] comes from no parameter")
        found |= {Access(arguments[i], store, width) for i in sources if i < len(arguments)}
    return frozenset(found)


def _origins(instructions: Sequence[tuple[str, str]], pointers: set[int]) -> dict[str, frozenset[int]]:
    """For each register the pointers among the parameters that its value is computed from."""
    steps = list[tuple[list[str], frozenset[int], list[str]]]()
    for name, operands in instructions:
        # One register, or several in braces.
        target, _, rest = operands.partition("}" if operands.startswith("{") else ",")
        # Threads exchange addresses through shared memory, all of which counts as one register.
        if exchanged := _EXCHANGE.match(name):
            registers = _REGISTER.findall(rest if exchanged[1] == "st" else target)
            steps.append(
                (["shared"], frozenset(), registers) if exchanged[1] == "st" else (registers, frozenset(), ["shared"])
            )
            continue
        # Any other value that is loaded is no address, but a parameter is.
        if name.startswith(("st.", "cp.", "bra", "ld.global", "ld.shared", "ldmatrix", "atom", "red", "wgmma", "mma")):
            continue
        given = frozenset(int(i) for i in _PARAMETER.findall(rest)) & pointers
        if found := _REGISTER.findall(target):
            steps.append((found, given, _REGISTER.findall(rest)))
    origins: dict[str, frozenset[int]] = defaultdict(frozenset)
    changed = True
    while changed:
        changed = False
        for targets, given, sources in steps:
            value = given.union(*(origins[source] for source in sources))
            for target in targets:
                if not value <= origins[target]:
                    origins[target] |= value
                    changed = True
    return origins


def _accesses(instructions: Sequence[tuple[str, str]]) -> Iterator[tuple[str, bool, int]]:
    """(address, whether it stores, bytes) of every access of global memory, atomics left out."""
    for name, operands in instructions:
        brackets = re.findall(r"\[([^\]]*)\]", operands)
        if name.startswith("cp.async.bulk.tensor"):
            store = ".global.shared" in name
            yield brackets[0 if store else 1], store, TMA
        elif name.startswith("cp.async.") and ".shared.global" in name:
            yield brackets[1], False, int(re.split(r",\s*", operands.rpartition("]")[2])[1], 0)
        elif name.startswith(("ld.global", "st.global")) and ".acquire" not in name:
            count, bits = _BITS.search(name).groups()  # type: ignore[union-attr]
            yield brackets[0], name.startswith("st"), int(count or 1) * int(bits) // 8
