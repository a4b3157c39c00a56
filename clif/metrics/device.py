"""Samples of this process and of its GPU (NVML, module pynvml of nvidia-ml-py). Free of torch."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import psutil
import pynvml

log = logging.getLogger(__name__)

NAN = float("nan")


class DeviceMonitor:
    """Makes rows of the table `device`. An unreadable figure is NaN and never an error; each kind is logged once.

    gpu: NVML index, or a UUID as torch or nvidia-smi print it (safer: CUDA may number GPUs in another order),
    or None for a rank that computes on the CPU. note: why there are no GPU figures, empty if there are; logged once.
    """

    def __init__(self, gpu: int | str | None = None) -> None:
        self._process = psutil.Process()
        self._process.cpu_percent()  # The first call only sets the mark from which the next one measures.
        self._handle: Any = None
        self._open = False
        self._said: set[str] = set()
        self.note = "this rank uses no GPU" if gpu is None else self._attach(gpu)
        if self.note:
            log.info("no GPU samples: %s", self.note)

    def _attach(self, gpu: int | str) -> str:
        try:
            pynvml.nvmlInit()
            self._open = True
            self._handle = _handle(gpu)
        except pynvml.NVMLError as error:
            self.close()
            return f"NVML does not answer for GPU {gpu}: {error}"
        return ""

    def sample(self) -> dict[str, float]:
        """Columns of one row of the table `device`."""
        return {
            "cpu_percent": self._of_process("cpu_percent", self._process.cpu_percent),
            "rss_bytes": self._of_process("rss_bytes", lambda: self._process.memory_info().rss),
            "gpu_util": self._read(lambda handle: pynvml.nvmlDeviceGetUtilizationRates(handle).gpu),
            "gpu_mem_bytes": self._read(lambda handle: pynvml.nvmlDeviceGetMemoryInfo(handle).used),
            "gpu_power_w": self._read(lambda handle: pynvml.nvmlDeviceGetPowerUsage(handle) / 1000),
        }

    def _of_process(self, name: str, figure: Callable[[], float]) -> float:
        try:
            return float(figure())
        except (psutil.Error, OSError) as error:
            # OSError: psutil reads /proc, for which a process may lack file descriptors.
            self._say(name, error)
            return NAN

    def _say(self, name: str, error: Exception) -> None:
        if name not in self._said:
            self._said.add(name)
            log.warning("a device sample is missing (%s; said once): %s", name, error)

    def _read(self, figure: Callable[[Any], float]) -> float:
        """One figure; some devices lack some (a MIG slice has no utilisation)."""
        if self._handle is None:
            return NAN
        try:
            return float(figure(self._handle))
        except pynvml.NVMLError as error:
            log.debug("no GPU sample: %s", error)
            return NAN

    def close(self) -> None:
        """Leave NVML. Closing twice is harmless."""
        self._handle = None
        if self._open:
            self._open = False
            pynvml.nvmlShutdown()


def _handle(gpu: int | str) -> Any:
    if isinstance(gpu, int):
        return pynvml.nvmlDeviceGetHandleByIndex(gpu)
    # torch prints a UUID without the prefix that NVML wants.
    return pynvml.nvmlDeviceGetHandleByUUID(gpu if gpu.startswith(("GPU-", "MIG-")) else f"GPU-{gpu}")
