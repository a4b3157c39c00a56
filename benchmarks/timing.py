"""Times several ways of the same work alternately, so that a drift of clocks affects all of them.

On a GPU each way is captured once as a CUDA graph over several layers with their own weights, so that no weight is in
the cache when it is read, and no launch waits for Python.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Way = Callable[[int], Any]
"""Does the work of one layer."""
SAMPLE_S = 1e-3
"""Least length of a sample, in replays of the graph."""


@dataclass(frozen=True)
class Timing:
    """Microseconds per layer."""

    p10: float
    median: float
    p90: float

    @classmethod
    def of(cls, samples: list[float]) -> Timing:
        ordered = sorted(samples)
        at = [ordered[round(q * (len(ordered) - 1))] for q in (0.1, 0.9)]
        return cls(at[0], statistics.median(ordered), at[1])

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.p10:.2f} to {self.p90:.2f})"


def contest(
    ways: Mapping[str, Way], layers: int, repeats: int, device: torch.device
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Timings of all ways, and for those that failed the reason: a rival that breaks must not stop the others."""
    runs: dict[str, Callable[[], float]] = {}
    failed: dict[str, str] = {}
    for name, way in ways.items():
        try:
            runs[name] = prepared(way, layers, device)
        except Exception as error:  # noqa: BLE001 - whatever it was, it is reported in the way's place
            failed[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats):
        # Every other time in reverse order: the order must not matter.
        for name in list(runs)[:: 1 if repeat % 2 else -1]:
            samples[name].append(runs[name]())
    return {name: Timing.of(values) for name, values in samples.items()}, failed


def copy_time(device: torch.device, repeats: int) -> Timing:
    """Microseconds for each byte that is read or written, by the faster of two copies: torch's, and a kernel's."""
    source = torch.zeros(1 << 28 if device.type == "cuda" else 1 << 14, dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    ways = {"copy": lambda _: target.copy_(source), "kernel": lambda _: torch.bitwise_not(source, out=target)}
    found, _ = contest(ways, 1, repeats, device)
    best = min(found.values(), key=lambda timing: timing.median)
    return Timing(*(us / (2 * source.nbytes) for us in (best.p10, best.median, best.p90)))


def read_time(count: int, device: torch.device, repeats: int) -> tuple[Timing, str]:
    """Microseconds to read so many bytes at the copy rate, measured now, and a note that says both."""
    copied = copy_time(device, repeats)
    reading = Timing(*(us * count for us in (copied.p10, copied.median, copied.p90)))
    return reading, f"reads {count / 2**20:.1f} MiB at {1e-3 / copied.median:.0f} GB/s"


def prepared(
    way: Way, layers: int, device: torch.device, stream: torch.cuda.Stream | None = None
) -> Callable[[], float]:
    """A function that gives one sample, microseconds per layer. Everything is compiled and captured before it returns.

    stream: where it is captured; by default one of its own.
    """
    return _captured(way, layers, stream or torch.cuda.Stream()) if device.type == "cuda" else _plain(way, layers)


def _plain(way: Way, layers: int) -> Callable[[], float]:
    way(0)

    def run() -> float:
        start = time.perf_counter()
        for layer in range(layers):
            way(layer)
        return (time.perf_counter() - start) * 1e6 / layers

    return run


def _captured(way: Way, layers: int, stream: torch.cuda.Stream) -> Callable[[], float]:
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # This compiles, and makes tables and workspaces, outside of the capture.
        for _ in range(2):
            for layer in range(layers):
                way(layer)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for layer in range(layers):
            way(layer)
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def replays(count: int) -> float:
        start.record()
        for _ in range(count):
            graph.replay()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) * 1e-3 / count

    replays(2)
    count = max(1, round(SAMPLE_S / replays(3)))

    # The graph writes to workspaces of what was launched: the way holds them.
    def run(held: Way = way) -> float:
        return replays(count) * 1e6 / layers

    return run
