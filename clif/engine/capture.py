"""Regions of device work that are captured once and launched again, with other contents of their buffers.

What a captured region must keep to: it reads nothing from the device on the host, makes no tensor from Python values,
and its shapes never change. Whatever differs between two launches lies in tensors that were there before it was
captured. The rules are those of clif/engine/checked_capture.py, whose CheckedRecorder proves them on a CPU.

Sources: CUDA graphs as torch has them (torch.cuda.CUDAGraph).
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, Protocol, TypeVar

import torch

from clif.config import EngineConfig
from clif.engine.checked_capture import CaptureRules
from clif.engine.streams import HIGH, LOW

log = logging.getLogger(__name__)
T_co = TypeVar("T_co", covariant=True)
T = TypeVar("T")
WARM_UPS = 3
"""Runs before a capture: kernels are compiled and loaded, libraries allocate their workspaces."""


class Captured(Protocol[T_co]):
    """A captured region. result: what it returned; the same tensors at every launch, with new contents."""

    @property
    def result(self) -> T_co: ...

    def replay(self) -> None:
        """Launch it on the current stream. Does not wait for the device."""
        ...

    def release(self) -> None:
        """Give the memory of its results to regions that are captured later: the host reads them no more."""
        ...


class Recorder(Protocol):
    """Captures regions of one device.

    Regions share memory. Two of them must not run at the same time, and the results of a launch hold until a region is
    launched that was captured before this one, or after this one was released: they may lie in what those use.
    """

    bytes: int

    def capture(self, region: Callable[[], T]) -> Captured[T]:
        """Run the region a few times, and capture it. Its effects on tensors from outside do happen."""
        ...


class CudaGraph(Generic[T]):
    """A captured region as one CUDA graph."""

    def __init__(self, graph: torch.cuda.CUDAGraph, result: T) -> None:
        self._graph, self._held = graph, [result]

    @property
    def result(self) -> T:
        return self._held[0]

    def replay(self) -> None:
        self._graph.replay()

    def release(self) -> None:
        self._held.clear()


class CudaRecorder:
    """CUDA graphs with one memory pool.

    stream: where regions are captured; their kernels keep its priority wherever they are launched. bytes: reserved
    for them.
    """

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream, self.bytes = stream, 0
        self._pool = torch.cuda.graph_pool_handle()
        # Passes of a former engine may lie in cycles. While one lives, autograd uses its nodes of the adapters' factors
        # in new passes, too. They belong to another stream, which would be pulled into a capture.
        gc.collect()

    def capture(self, region: Callable[[], T]) -> CudaGraph[T]:
        """As Recorder.capture(). Raises CaptureError for a region that breaks the rules, with nothing captured.

        Raises RuntimeError for one that the device refuses: it may be in no state to go on.
        """
        device = self._stream.device
        # Every capture begins with this: otherwise what is given back then would be taken from the first one's bytes.
        torch.cuda.empty_cache()
        current, before = torch.cuda.current_stream(device), torch.cuda.memory_reserved(device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                for _ in range(WARM_UPS):
                    region()
                # An error in the middle of a capture leaves the device in no good state.
                CaptureRules().run(region)
        finally:
            # What a refused region has changed, others may change again.
            current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Threads of NCCL ask the device for events at any time, which a stricter mode takes for an error.
        captured = torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local")
        try:
            with no_collection(), captured:
                result = region()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RuntimeError(f"a CUDA graph could not be captured ({error}): set engine.graphs=off") from error
        current.wait_stream(self._stream)
        self.bytes += max(0, torch.cuda.memory_reserved(device) - before)
        return CudaGraph(graph, result)


@contextmanager
def no_collection() -> Iterator[None]:
    """No garbage is collected: graphs, events and pinned memory of a former engine may be among it, and to free them in
    the middle of a capture is not for certain allowed."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def why_not_captured(config: EngineConfig, device: torch.device, tp_size: int, kernel: bool) -> str:
    """Why the steps of a replica are not captured; empty: they are. kernel: decode rows have the Triton kernel."""
    why = _obstacle(config, device, tp_size)
    return why if why or kernel else "attention to the cache needs the Triton kernel, see engine.decode_kernel"


def choose_recorder(config: EngineConfig, device: torch.device, tp_size: int, kernel: bool) -> Recorder | None:
    """Captures the steps of a replica; None: none are captured. See why_not_captured."""
    return _recorder("steps", device, HIGH, why_not_captured(config, device, tp_size, kernel))


def choose_train_recorder(
    config: EngineConfig, device: torch.device, tp_size: int, varlen: bool, fuses: bool
) -> Recorder | None:
    """Captures the layers of training passes; None: none are captured. See why_training_not_captured."""
    return _recorder("training", device, LOW, why_training_not_captured(config, device, tp_size, varlen, fuses))


def why_training_not_captured(
    config: EngineConfig, device: torch.device, tp_size: int, varlen: bool, fuses: bool
) -> str:
    """Why the layers of training passes are not captured; empty: they are.

    varlen: their attention is torch's varlen_attn; fuses: serving steps compute forwards of training.
    """
    why = _obstacle(config, device, tp_size)
    if not why and fuses:
        why = "serving steps compute training forwards, see engine.coserving"
    if not why and not varlen:
        why = "attention is padded to the lengths of sequences"
    return why


def _obstacle(config: EngineConfig, device: torch.device, tp_size: int) -> str:
    """Why nothing of a replica is captured; empty: it may be."""
    if config.graphs == "off":
        return "engine.graphs is off"
    if device.type != "cuda":
        return f"a {device.type} has none"
    return "several ranks share the model" if tp_size > 1 else ""


def _recorder(what: str, device: torch.device, priority: int, why: str) -> Recorder | None:
    if why:
        log.info("no CUDA graphs of %s: %s", what, why)
        return None
    return CudaRecorder(torch.cuda.Stream(device, priority=priority))
