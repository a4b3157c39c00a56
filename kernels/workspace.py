"""Memory on the device through which the programs of a launch communicate. Free of Triton."""

from __future__ import annotations

import torch


def current_stream(device: torch.device) -> int:
    """A number of the stream that is current; 0 where there are none."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


class Workspace:
    """Memory through which the programs of one stream's launches communicate; it grows with the launches' needs.

    tickets: zero between launches. flags: numbers of launches. left [1]: programs that have left, 65536 per launch.
    """

    def __init__(self, device: torch.device) -> None:
        self.tickets = torch.zeros(1024, dtype=torch.int32, device=device)
        self.flags = torch.zeros(256, dtype=torch.int64, device=device)
        self.left = torch.zeros(1, dtype=torch.int64, device=device)
        self.planes = torch.empty(1 << 16, dtype=torch.float32, device=device)
        # Captured graphs still write to tensors that were replaced by larger ones.
        self._outgrown: list[torch.Tensor] = []

    def take_tickets(self, count: int) -> torch.Tensor:
        if count > len(self.tickets):
            self._outgrown.append(self.tickets)
            self.tickets = self.tickets.new_zeros(2 * count)
        return self.tickets

    def take_flags(self, count: int) -> torch.Tensor:
        if count > len(self.flags):
            self._outgrown.append(self.flags)
            self.flags = self.flags.new_zeros(2 * count)
        return self.flags

    def take_planes(self, count: int) -> torch.Tensor:
        """Memory for `count` partial sums."""
        if count > len(self.planes):
            self._outgrown.append(self.planes)
            self.planes = self.planes.new_empty(count)
        return self.planes


class Workspaces:
    """One workspace for each stream of a device, since launches of one stream never overlap."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._of_streams: dict[int, Workspace] = {}

    def current(self) -> Workspace:
        """That of the current stream. Launch once on a stream before capturing there: the first launch allocates it."""
        stream = current_stream(self._device)
        # setdefault() would make a workspace, with its fills, at every launch.
        if stream not in self._of_streams:
            self._of_streams[stream] = Workspace(self._device)
        return self._of_streams[stream]
