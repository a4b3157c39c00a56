"""Runs one training slice at a time on a thread of its own, while serving steps run.

PyTorch releases Python's lock inside its operators, so that a slice on some of the cores and a serving step on the
others run at the same time. Only work that touches nothing of serving may run here (see jobs.Slice).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, ClassVar

import torch


class TrainThread:
    """threads: CPU threads of this rank, of which a slice takes half and leaves the rest to serving."""

    always: ClassVar[bool] = False

    def __init__(self, threads: int) -> None:
        self.threads, self._share = threads, max(1, threads // 2)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="slice")
        self._future: Future[tuple[Any, float]] | None = None

    def close(self) -> None:
        """Wait for the slice that runs, and end the thread."""
        self._pool.shutdown()

    def start(self, work: Callable[[], Any]) -> None:
        assert self._future is None, "one slice at a time"
        self._future = self._pool.submit(self._do, work)
        torch.set_num_threads(max(1, self.threads - self._share))

    def _do(self, work: Callable[[], Any]) -> tuple[Any, float]:
        torch.set_num_threads(self._share)
        start = time.perf_counter()
        return work(), time.perf_counter() - start

    def poll(self, wait: bool = False) -> tuple[Any, float] | None:
        """(result, seconds) of the slice, once, when it is done (or after waiting for it). Raises what it raised."""
        future = self._future
        if future is None or not (wait or future.done()):
            return None
        try:
            return future.result()
        finally:
            self._future = None
            torch.set_num_threads(self.threads)
