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
