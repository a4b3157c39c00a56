"""Which stream of a GPU serving and training give their work to.

With two of them a training slice runs beside serving steps. What lies on different streams is in no order, so that
everything of training, also what the host does for its jobs between two slices, is given to the stream of training,
and serving steps, and only they, to that of serving. They share the frozen base, which nothing writes, and the serving
slots, which training fills: a step that is launched after publish() sees them. No other tensor crosses.

Sources: CUDA streams as torch has them (torch.cuda.Stream).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch

HIGH, LOW = -1, 0
"""Priorities of streams. Blocks of kernels on a stream of high priority start first; none that runs is stopped."""
Context = AbstractContextManager[Any]
CPU = torch.device("cpu")


class Streams(Protocol):
    """The two contexts may be nested: the inner one counts."""

    def serving(self) -> Context:
        """For one serving step."""
        ...

    def training(self) -> Context:
        """For everything else."""
        ...

    def publish(self) -> None:
        """Serving steps that are launched from now on come after what the current stream has been given until now."""
        ...

    def synchronize(self) -> None:
        """Wait until the device has done all that it was given, on any stream."""
        ...


@dataclass(frozen=True)
class OneStream:
    """Serving and training alternate on the stream that is current: all work is in the order of its launches."""

    device: torch.device = CPU

    def serving(self) -> Context:
        return nullcontext()

    def training(self) -> Context:
        return nullcontext()

    def publish(self) -> None:
        pass

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class TwoStreams:
    """Serving has priority over training. What was made before has to be done: synchronize() comes first."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._serving = torch.cuda.Stream(device, priority=HIGH)
        self._training = torch.cuda.Stream(device, priority=LOW)

    def serving(self) -> Context:
        return torch.cuda.stream(self._serving)

    def training(self) -> Context:
        return torch.cuda.stream(self._training)

    def publish(self) -> None:
        self._serving.wait_stream(torch.cuda.current_stream(self._device))

    def synchronize(self) -> None:
        torch.cuda.synchronize(self._device)


def choose_streams(device: torch.device, concurrent: bool) -> Streams:
    """Two only where slices run beside serving steps on a GPU: elsewhere the order of one stream is wanted."""
    return TwoStreams(device) if concurrent and device.type == "cuda" else OneStream(device)


def same_stream(tensor: torch.Tensor) -> Context:
    """The context of the stream that is current for this tensor's device, for use in another thread.

    A thread begins on the default stream, where nothing waits for what others compute.
    """
    return torch.cuda.stream(torch.cuda.current_stream(tensor.device)) if tensor.is_cuda else nullcontext()
