"""Measures how long work takes where it runs: on the host at once, on a GPU once the device has done it. Free of waits.

A GPU is given work and does it later: the host's time of a launch says nothing about it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import torch

Clock = Callable[[], float]


class Timing(Protocol):
    """The time of work that has begun. Nothing here waits for the device, but wait()."""

    def stop(self) -> None:
        """All of the work has been given to the device."""
        ...

    def done(self) -> bool:
        """Whether the device has done it."""
        ...

    def wait(self) -> None:
        """Wait until it has."""
        ...

    def seconds(self) -> float:
        """How long it took, once it is done."""
        ...


Stopwatch = Callable[[Clock], Timing]
"""Begins to measure. The clock is the engine's: a device that has a clock of its own does not read it."""


class HostTiming:
    """Of work that is done when its call returns."""

    def __init__(self, clock: Clock = time.perf_counter) -> None:
        self._clock = clock
        self._start, self._seconds = clock(), 0.0

    def stop(self) -> None:
        self._seconds = self._clock() - self._start

    def done(self) -> bool:
        return True

    def wait(self) -> None:
        pass

    def seconds(self) -> float:
        return self._seconds


class CudaTiming:
    """Of work on the stream that is current, by two of its events."""

    def __init__(self, clock: Clock = time.perf_counter) -> None:
        self._first, self._last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._first.record()

    def stop(self) -> None:
        self._last.record()

    def done(self) -> bool:
        return self._last.query()

    def wait(self) -> None:
        self._last.synchronize()

    def seconds(self) -> float:
        return self._first.elapsed_time(self._last) / 1000


def choose_stopwatch(device: torch.device) -> Stopwatch:
    """What measures the device's work."""
    return CudaTiming if device.type == "cuda" else HostTiming
