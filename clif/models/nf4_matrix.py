"""Matrices of NormalFloat numbers of 4 bits, as bitsandbytes makes and widens them, on a GPU and on a CPU.

Sources: QLoRA (Dettmers et al. 2023).
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch.nn.functional import pad

from clif.config import ConfigError
from clif.kernels.quantised import strips

BLOCK = 64
"""Inputs that share a scale."""
PIECE = 1 << 25
"""Numbers that are quantised at a time."""


@dataclass(frozen=True, eq=False)
class Nf4Matrix:
    """W [out, in_]: entries of a table of 16 numbers, times the scales of blocks of one output.

    numbers: uint8 [out, inputs / 2], up to whole blocks; scales: float32 [out, blocks]; table: float32 [16].
    """

    in_: int
    numbers: torch.Tensor
    scales: torch.Tensor
    table: torch.Tensor

    @property
    def out(self) -> int:
        return len(self.numbers)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Numbers and scales."""
        return self.numbers, self.scales

    @classmethod
    def of(cls, weight: torch.Tensor) -> Nf4Matrix:
        """The nearest to a weight [out, in], on its device. Raises ConfigError without bitsandbytes."""
        (out, in_), library = weight.shape, _library()
        found = []
        for rows in strips(out, in_, PIECE):
            piece = pad(weight[rows], (0, -in_ % BLOCK)).contiguous()
            numbers, state = library.quantize_4bit(piece, blocksize=BLOCK, quant_type="nf4", compress_statistics=False)
            found.append((numbers.view(len(piece), -1), state.absmax.view(len(piece), -1), state.code))
        numbers, scales = (torch.cat(parts) for parts in list(zip(*found, strict=True))[:2])
        return cls(in_, numbers, scales, found[0][2])

    def dense(self, dtype: torch.dtype, rows: slice = slice(None), columns: slice = slice(None)) -> torch.Tensor:
        """W [rows, columns], each number rounded once to dtype."""
        library, (start, stop, _) = _library(), columns.indices(self.in_)
        blocks = slice(start // BLOCK, -(-stop // BLOCK))
        numbers = self.numbers[rows, blocks.start * BLOCK // 2 : blocks.stop * BLOCK // 2].contiguous()
        scales = self.scales[rows, blocks].contiguous()
        shape = torch.Size((len(numbers), 2 * numbers.shape[1]))
        if not numbers.numel():
            return numbers.new_empty(len(numbers), stop - start, dtype=dtype)
        state = library.QuantState(
            absmax=scales.flatten(), shape=shape, code=self.table, blocksize=BLOCK, quant_type="nf4", dtype=dtype
        )
        whole: torch.Tensor = library.dequantize_4bit(numbers.view(-1, 1), state)
        skipped = start - blocks.start * BLOCK
        return whole[:, skipped : skipped + stop - start]


def assert_library() -> None:
    """Raises ConfigError where bitsandbytes is not installed; it is not imported."""
    if find_spec("bitsandbytes") is None:
        raise ConfigError(
            'model.weight_dtype nf4 needs bitsandbytes: python -m pip install "bitsandbytes>=0.46", or set '
            "model.weight_dtype=int4"
        )


def _library() -> Any:
    """bitsandbytes' functions. It takes seconds to import."""
    assert_library()
    from bitsandbytes import functional

    return functional
