"""Where an operation has several implementations, the choice between them: one place, made once, never silent."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import linear

Linear = Callable[[torch.Tensor], torch.Tensor]
PACK_ROWS = 8
"""Rows for which the packed layout is chosen: a decode batch. Measured on AVX512-bf16: any choice serves all sizes."""


def frozen_linear(weight: torch.Tensor, bias: torch.Tensor | None) -> Linear | None:
    """A forward-only x -> x W^T + b with W laid out once for the machine's matrix kernels, or None: use F.linear.

    Only for bfloat16 on a CPU with oneDNN, where F.linear lays W out anew in every call: measured 2.0 times as fast
    for 1 to 8 rows (576x1536, one thread) and 1.05 times for 256. It costs a second copy of W. weight: [out, in].
    Raises RuntimeError if the packed layer computes something else: torch may change these operators.
    """
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16 or not torch.backends.mkldnn.is_available():
        return None
    ops = torch.ops.mkldnn
    packed = ops._reorder_linear_weight(weight.detach(), PACK_ROWS)

    def forward(x: torch.Tensor) -> torch.Tensor:
        return ops._linear_pointwise(x, packed, bias, "none", [], "")

    probe = torch.linspace(-1, 1, 3 * weight.shape[1], dtype=weight.dtype).view(3, -1)
    expected = linear(probe, weight, bias).float()
    if not (forward(probe).float() - expected).norm() <= 0.02 * expected.norm():
        raise RuntimeError("this torch's packed linear layer computes something else: set engine.pack_weights=false")
    return forward
