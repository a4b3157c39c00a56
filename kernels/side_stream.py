"""Work beside other work of the same step: on a second stream of a GPU, one after the other elsewhere. Free of Triton.

Sources: CUDA streams and events as torch has them (torch.cuda.Stream.wait_stream).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch

T = TypeVar("T")


class SideStream(Protocol):
    """Where launches run that need nothing of those that are launched in the same step."""

    def beside(self, main: Callable[[], T], side: Callable[[], object]) -> T:
        """Launch both and return what `main` made. Whatever is launched later comes after both.

        Neither may need the other's results. What they use must have been made before, and live until they are done.
        """
        ...


class InOrder:
    """One after the other."""

    def beside(self, main: Callable[[], T], side: Callable[[], object]) -> T:
        result = main()
        side()
        return result


class SideStreams:
    """A side stream for each stream, made at its first use there, with the same priority.

    Captured, it becomes a branch of the graph: the side stream waits for an event of the stream that is being captured,
    and that stream for one of the side stream. Everything that `side` uses lies in memory of the current stream, which
    gives none of it to others before the join.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sides: dict[int, torch.cuda.Stream] = {}

    def beside(self, main: Callable[[], T], side: Callable[[], object]) -> T:
        current = torch.cuda.current_stream(self._device)
        other = self._side_of(current)
        other.wait_stream(current)
        try:
            with torch.cuda.stream(other):
                side()
            return main()
        finally:
            # Also after an error: what `side` reads must not be given to others while it runs.
            current.wait_stream(other)

    def _side_of(self, current: torch.cuda.Stream) -> torch.cuda.Stream:
        key = current.cuda_stream
        if key not in self._sides:
            self._sides[key] = torch.cuda.Stream(self._device, priority=current.priority)
        return self._sides[key]


def side_stream(device: torch.device) -> SideStream:
    """That of a device."""
    return SideStreams(device) if device.type == "cuda" else InOrder()
