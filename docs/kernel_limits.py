"""Tables of docs/kernels.md: what the kernels must move and compute at least, beside what was measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from clif.kernels.testing.roofline import (
    H200,
    LinearShape,
    Work,
    add_rms_norm_bytes,
    limit,
    linear_work,
    necessary,
    necessary_backward,
    paged_decode_bytes,
    rotate_heads_bytes,
    swiglu_bytes,
)
from clif.kernels.tuning import Defaults


@dataclass(frozen=True)
class Row:
    """One case. measured: microseconds of each column, None where there is no figure."""

    name: str
    moved: int
    operations: int
    measured: tuple[float | None, ...]


def layer(segments: Sequence[int], depth: int = 4096, outs: Sequence[int] = (4096,), rank: int = 16) -> LinearShape:
    return LinearShape(tuple(segments), depth, tuple(outs), rank)


SHAPES = {
    "1 row, 4096 -> 4096": layer((1,)),
    "12+4 rows": layer((12, 4)),
    "48+16 rows": layer((48, 16)),
    "192+64 rows": layer((192, 64)),
    "48+16, 4096 -> 6144 (q+k+v)": layer((48, 16), outs=(4096, 1024, 1024)),
    "48+16, 4096 -> 28672 (gate+up)": layer((48, 16), outs=(14336, 14336)),
    "64+1984 rows": layer((64, 1984)),
    "64+2048 rows": layer((64, 2048)),
}
BEFORE = {
    # On an H200, 2026-11-27, commit 93b19ca, with which no tile had rows of two adapters:
    # F.linear alone, the kernel with default tiles, with tiles found by a walk of 16 s, four launches.
    "1 row, 4096 -> 4096": (13.49, 18.68, None, 20.14),
    "12+4 rows": (13.71, 26.97, None, 21.01),
    "48+16 rows": (12.38, 38.99, 26.9, 19.56),
    "192+64 rows": (16.89, 31.14, None, 25.42),
    "48+16, 4096 -> 6144 (q+k+v)": (16.44, 45.90, 33.5, 25.18),
    "48+16, 4096 -> 28672 (gate+up)": (None, None, 78.5, None),
    "64+1984 rows": (92.13, 151.50, 140.0, 117.15),
    "64+2048 rows": (102.04, 152.63, 140.0, 130.32),
}
BACKWARD = {16: (90.84, 151.27, 149.17), 64: (91.86, 172.09, 151.92)}
"""By rank: the gradient of x alone by cuBLAS, all three gradients by the kernels with default tiles, and by PEFT."""
SPREAD = ("1 row, 4096 -> 4096", "48+16 rows", "48+16, 4096 -> 6144 (q+k+v)", "64+1984 rows", "64+2048 rows")
PARTIAL = ("planes", "sums")
DECODE = (32, 8, 64)
"""Heads, KV heads and their size of a 1B model."""


def linear_rows() -> Iterator[Row]:
    for name, shape in SHAPES.items():
        yield Row(name, *necessary(shape), BEFORE[name])


def backward_rows() -> Iterator[Row]:
    for rank, measured in BACKWARD.items():
        yield Row(f"r={rank}", *necessary_backward(layer((2048,), rank=rank)), measured)


def other_rows() -> Iterator[Row]:
    """Launches of one layer of a 1B model at 64 rows; a step of all 16 layers was measured for the first."""
    heads, kv_heads, head_dim = DECODE
    yield Row("paged_decode, 64 contexts of 384 tokens", paged_decode_bytes([384] * 64, *DECODE), 0, (478 / 16,))
    fp8 = paged_decode_bytes([384] * 64, *DECODE, kv_element=1)
    yield Row("the same, KV of 1 byte", fp8, 0, (None,))
    yield Row("add_rms_norm", add_rms_norm_bytes(64, 2048), 0, (None,))
    yield Row("rotate_heads, with the cache", rotate_heads_bytes(64, heads, kv_heads, head_dim), 0, (None,))
    yield Row("swiglu", swiglu_bytes(64, 8192), 0, (None,))


TABLES = {
    "linear": (linear_rows, ("cuBLAS, no adapter", "kernel, default tiles", "kernel, tuned", "four launches")),
    "backward": (backward_rows, ("cuBLAS, gradient of x alone", "kernels, default tiles", "PEFT")),
    "other": (other_rows, ("measured",)),
}


def limits_table(which: str) -> Iterator[str]:
    """linear: layers with adapters; backward: their gradients; other: the other launches of a layer."""
    rows, columns = TABLES[which]
    yield f"| case | MB | GFLOP | at least, us | by | {' | '.join(columns)} |"
    yield f"|---|---|---|---|---|{'---|' * len(columns)}"
    for row in rows():
        least = limit(row.moved, row.operations)
        gflop = f"{row.operations / 1e9:.1f}" if row.operations else ""
        counted = row.name, f"{row.moved / 1e6:.1f}", gflop, f"{least.seconds * 1e6:.1f}", least.resource
        measured = ("" if us is None else f"{us:.1f}" for us in row.measured)
        yield f"| {' | '.join((*counted, *measured))} |"


def spread_table(_: str) -> Iterator[str]:
    """How the launches of the default tiles share their work out among the multiprocessors of an H200."""
    yield "| case | form | launch | items | for one multiprocessor | filled | loaded, MB | partial sums, MB |"
    yield "|---|---|---|---|---|---|---|---|"
    for name in SPREAD:
        shape = SHAPES[name]
        chosen = Defaults(captured=True).linear(shape.rows, shape.depth, shape.out, shape.rank, False)
        for work in linear_work(shape, chosen):
            if work.name != "cuBLAS":
                yield f"| {name} | {chosen.form} | {' | '.join(_cells(work))} |"


def _cells(work: Work) -> tuple[str, ...]:
    most = -(-work.items // H200.multiprocessors)
    sums = sum(part.get(name, 0) for part in (work.read, work.written) for name in PARTIAL)
    loaded = sum(count for name, count in work.read.items() if name not in PARTIAL)
    return (
        work.name, str(work.items), str(most), f"{work.items / (most * H200.multiprocessors):.0%}",
        f"{loaded / 1e6:.1f}", f"{sums / 1e6:.1f}",
    )  # fmt: skip
