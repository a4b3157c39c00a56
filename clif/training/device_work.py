"""Waiting for a device without holding up what else runs on it."""

from __future__ import annotations

import torch

from clif.distributed.collectives import TpGroup
from clif.engine.jobs import WAIT, Slices


def until_done(tensor: torch.Tensor, tp_group: TpGroup) -> Slices[None]:
    """Until the device has computed what was launched on the current stream: a read behind it hardly waits.

    The host would wait for the whole backward otherwise, and launch no serving step meanwhile. With peers that read
    waits all the same: their slices must come in one order, and each rank sees another moment.
    """
    if not tensor.is_cuda or tp_group.size > 1:
        return
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(tensor.device))
    while not event.query():
        yield WAIT


def reads_later(tensor: torch.Tensor, tp_group: TpGroup) -> bool:
    """Whether numbers are copied to the host while other slices and serving steps run, see on_host()."""
    return tensor.is_cuda and tp_group.size == 1


def on_host(values: torch.Tensor, tp_group: TpGroup) -> Slices[torch.Tensor]:
    """The values in memory of the host, once the device has them: no slice is held up by the wait."""
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
    host.copy_(values, non_blocking=True)
    yield from until_done(values, tp_group)
    return host
