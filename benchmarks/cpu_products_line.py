"""Products of one model's linear layers on a CPU: CLIF's kernels against torch's operators, in turns, in one run."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import linear as torch_linear

from clif.kernels.cpu import library
from clif.kernels.cpu.arena import Arena
from clif.kernels.cpu.products import PackedFactors, PackedMatrix, linear, packed_size
from clif.kernels.cpu.quantised_panels import QuantisedPanels, panels_size
from clif.kernels.quantised import Bits, QuantisedMatrix

SHAPES = {"qkv": (960, 576), "attention out": (576, 576), "gate|up": (3072, 576), "down": (576, 1536)}
"""Outputs and inputs of the merged layers of SmolLM2-135M, which has 30 of each."""
HEAD = (49152, 576)
HEAD_ROWS = 64
"""A serving step asks for the head of as many rows at most."""
RANK = 8
CLIF, ADAPTER, TORCH, PREPACKED = "CLIF", "CLIF, all rows with an adapter", "F.linear", "oneDNN, prepacked"
INT8, INT4 = "CLIF, int8", "CLIF, int4"
WAYS = (CLIF, ADAPTER, INT8, INT4, TORCH, PREPACKED)
BYTES = {INT8: 1.0, INT4: 0.5625}
"""Of a weight with its scales: of 4 bits one of two bytes for 32. Of any other way: 2."""

Call = Callable[[], object]


@dataclass(frozen=True)
class Figures:
    """Least times of all layers and of the head, in seconds; 0 for a head that was not asked for."""

    layers: float
    head: float


class Ways:
    """Every way's weights: random, in all layers, so that no cache has them when they are read again."""

    def __init__(self, layers: int, threads: int) -> None:
        self.threads = threads
        shapes = [shape for _ in range(layers) for shape in SHAPES.values()]
        self.weights = [_random(*shape) for shape in (*shapes, HEAD)]
        arena = Arena(sum(Arena.rounded(packed_size(*weight.shape)) for weight in self.weights))
        self.packed = [PackedMatrix.of(weight, arena) for weight in self.weights]
        self.quantised = {INT8: self._quantised(8), INT4: self._quantised(4)}
        self.factors = [PackedFactors(_random(1, RANK, i), _random(1, o, RANK), 2.0) for o, i in shapes]
        reorder = torch.ops.mkldnn._reorder_linear_weight
        self.prepacked = [reorder(weight, 8) for weight in self.weights]

    def calls(self, which: int, x: torch.Tensor) -> dict[str, Call]:
        """The ways to multiply x with one matrix. The head has no adapter."""
        weight, prepacked = self.weights[which], self.prepacked[which]
        pointwise = torch.ops.mkldnn._linear_pointwise
        packed = self.packed[which]
        ways: dict[str, Call] = {CLIF: self._clif(packed, x, None)}
        if which < len(self.factors):
            ways[ADAPTER] = self._clif(packed, x, self.factors[which])
        for way, panels in self.quantised.items():
            ways[way] = self._clif(panels[which], x, None)
        ways[TORCH] = lambda: torch_linear(x, weight)
        ways[PREPACKED] = lambda: pointwise(x, prepacked, None, "none", [], "")
        return ways

    def _quantised(self, bits: Bits) -> list[QuantisedPanels]:
        matrices = [QuantisedMatrix.of(weight, bits) for weight in self.weights]
        arena = Arena(sum(map(panels_size, matrices)))
        return [QuantisedPanels.of(matrix, arena) for matrix in matrices]

    def _clif(self, packed: PackedMatrix | QuantisedPanels, x: torch.Tensor, factors: PackedFactors | None) -> Call:
        """As the decoder's kernel calls it: nothing is allocated, and Python has prepared the arguments."""
        rows = len(x)
        y, low = torch.empty(rows, packed.out, dtype=x.dtype), torch.empty(rows, 32, dtype=x.dtype)
        slots = torch.zeros(rows, dtype=torch.int32)
        view, forward = linear(packed, None, factors), library.load().clif_linear_forward
        addresses = (x.data_ptr(), packed.in_, slots.data_ptr(), low.data_ptr(), y.data_ptr())
        level, threads = library.level(), self.threads

        def call() -> tuple[torch.Tensor, ...]:
            forward(ctypes.byref(view), *addresses, packed.out, rows, level, threads)
            return x, y, low, slots

        return call


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).mul_(0.05).bfloat16()


def measure_products(ways: Ways, rows: int, seconds: float) -> dict[str, Figures]:
    """Every way's figures for so many rows: the sum over all matrices of the least time of each.

    The ways take turns, matrix by matrix, until the time is up: others on the machine disturb all of them alike.
    """
    inputs = {i: _random(rows, i) for i in {weight.shape[1] for weight in ways.weights}}
    count = len(ways.weights) - (rows > HEAD_ROWS)
    calls = [ways.calls(which, inputs[ways.weights[which].shape[1]]) for which in range(count)]
    least: list[dict[str, float]] = [dict.fromkeys(of, float("inf")) for of in calls]
    end, turns = time.monotonic() + seconds, 0
    while turns < 3 or time.monotonic() < end:
        turns += 1
        for way in WAYS:
            for of, best in zip(calls, least, strict=True):
                if way in of:
                    best[way] = min(best[way], _timed(of[way]))
    layers = len(ways.factors)
    return {
        way: Figures(sum(best[way] for best in least[:layers]), least[-1].get(way, 0.0) if count > layers else 0.0)
        for way in WAYS
    }


def _timed(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def read_bandwidth(repeats: int = 20, pieces: int = 64) -> float:
    """Bytes a second that torch's threads read from memory in huge pages, in pieces of 4 MB: least times, as above."""
    size = 1 << 21
    numbers = Arena(pieces * size).cut(pieces * size).fill_(1.0).view(torch.int64).view(pieces, -1)
    least = [float("inf")] * pieces
    for _ in range(repeats):
        least = [min(best, _timed(piece.sum)) for best, piece in zip(least, numbers, strict=True)]
    return 2 * size * pieces / sum(least)


def products_report(layers: int, rows: Sequence[int], seconds: float) -> list[str]:
    """Lines of Markdown: a table of every way and number of rows. Each is printed as soon as it is measured."""
    ways, bandwidth = Ways(layers, torch.get_num_threads()), read_bandwidth()
    size = 2 * layers * sum(out * in_ for out, in_ in SHAPES.values())
    shapes = ", ".join(f"{name} {out}x{in_}" for name, (out, in_) in SHAPES.items())
    lines = [
        f"{layers} layers of {shapes}: {size / 1e6:.0f} MB; head {HEAD[0]}x{HEAD[1]}.",
        f"Memory is read at {bandwidth / 1e9:.1f} GB/s (sums of integers over 256 MB in huge pages).",
        "",
        "| rows | way | layers, ms | GB/s | GFLOP/s | head, ms | time of CLIF / this |",
        "|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for count in rows:
        figures = measure_products(ways, count, seconds)
        for way, of in figures.items():
            head = f"{of.head * 1e3:.2f}" if of.head else "-"
            speed = f"{size / 2 * BYTES.get(way, 2.0) / of.layers / 1e9:.1f} | {size * count / of.layers / 1e9:.0f}"
            ratio = figures[CLIF].layers / of.layers
            lines.append(f"| {count} | {way} | {of.layers * 1e3:.2f} | {speed} | {head} | {ratio:.2f} |")
            print(lines[-1], flush=True)
    return lines
