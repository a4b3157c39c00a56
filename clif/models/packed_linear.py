"""A linear layer of a model whose weight is whole numbers and scales, as its checkpoint has it.

It stands in a model for as long as the model is taken apart: it cannot compute.
"""

from __future__ import annotations

import torch
from torch import nn

from clif.kernels.quantised import QuantisedMatrix


class PackedLinear(nn.Linear):
    """matrix: the weight, this rank's part of it. weight: empty, for type and device; bias: [out] or None.

    order [in]: the input that stands in each column of the matrix; None: as they are.
    """

    def __init__(
        self,
        matrix: QuantisedMatrix,
        bias: nn.Parameter | None,
        dtype: torch.dtype,
        order: torch.Tensor | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.matrix, self.order = matrix, order
        self.in_features, self.out_features = matrix.in_, matrix.out
        empty = torch.empty(0, dtype=dtype, device=matrix.numbers.device)
        self.weight = nn.Parameter(empty, requires_grad=False)
        self.register_parameter("bias", bias)
