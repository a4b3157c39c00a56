"""Buffers of a fixed size that the host writes and the device reads repeatedly, without waiting for each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

ALIGNED = 16
"""Words at whose multiples the parts of a table begin, since the compiler uses the alignment."""


def aligned(words: int) -> int:
    """The next multiple of ALIGNED words."""
    return -(-words // ALIGNED) * ALIGNED


class Staged:
    """A tensor on the device with pinned host copies, used alternately; on a CPU host and device share one tensor.

    write() returns the host copy to fill, send() starts its transfer: one copy in the order of the current stream, so
    that launches before it read the old words and launches after it the new ones. A host copy is rewritten only after
    its last transfer has ended. Addresses on the device never change: a captured graph may read them.
    """

    def __init__(self, words: torch.Tensor, hosts: Sequence[torch.Tensor] = ()) -> None:
        """words: on the device; hosts: its copies. None: the words themselves, on a CPU."""
        self.words = words
        self.hosts = tuple(hosts) or (words,)
        self._sent: list[torch.cuda.Event | None] = [None] * len(self.hosts)
        self._turn = 0

    @classmethod
    def zeros(cls, size: int, dtype: torch.dtype, device: torch.device) -> Staged:
        """`size` zeros on the device."""
        words, copies = torch.zeros(size, dtype=dtype, device=device), 2 if device.type == "cuda" else 0
        return cls(words, [torch.zeros(size, dtype=dtype, pin_memory=True) for _ in range(copies)])

    def write(self) -> torch.Tensor:
        """The host copy to fill next, as it was written the last time; with two of them not the time before."""
        sent = self._sent[self._turn]
        if sent is not None:
            sent.synchronize()
        return self.hosts[self._turn]

    def send(self) -> None:
        """Transfer the written host copy to the device."""
        if self.words is self.hosts[self._turn]:
            return
        self.words.copy_(self.hosts[self._turn], non_blocking=True)
        if self.words.is_cuda:
            event = self._sent[self._turn] or torch.cuda.Event()
            event.record(torch.cuda.current_stream(self.words.device))
            self._sent[self._turn] = event
        self._turn = (self._turn + 1) % len(self.hosts)


def send_ints(
    values: Sequence[int] | npt.NDArray[np.integer[Any]], device: torch.device, dtype: torch.dtype = torch.int64
) -> torch.Tensor:
    """A new tensor [values] on the device, for what has no fixed size; the host does not wait for its journey."""
    return _send(values, device, dtype)


def send_floats(values: Sequence[float], device: torch.device) -> torch.Tensor:
    """The same in float32."""
    return _send(values, device, torch.float32)


def _send(values: Any, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    # Pinned memory that is on its way is not given out again: torch's allocator of it sees to that. torch.tensor() with
    # pin_memory refuses arrays of numpy.
    return torch.tensor(values, dtype=dtype).pin_memory().to(device, non_blocking=True)
