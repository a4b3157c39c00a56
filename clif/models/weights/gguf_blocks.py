"""Blocks of a GGUF file as packed matrices of the same numbers: nothing is rounded.

Sources: the layouts of ggml's quants (llama.cpp), as the gguf package reads them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from clif.kernels.quantised import Bits, QuantisedMatrix, joined, strips, two_in_a_byte
from clif.models.weights.forms import GGUF_FORMS

PIECE = 1 << 24
"""Numbers that are converted at a time."""
SUPER = 256
"""Numbers of a block of the K types."""
Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
"""Whole numbers [rows, blocks, numbers], scales and least numbers [rows, blocks, groups of a block]."""


def matrix_of(kind: str, data: torch.Tensor, in_: int) -> QuantisedMatrix:
    """Bytes of rows [out, bytes of a row] of one of READERS -> their matrix [out, in_]."""
    found = joined([_of_rows(kind, data[rows], in_) for rows in strips(len(data), in_, PIECE)])
    assert found is not None
    return found


def _of_rows(kind: str, data: torch.Tensor, in_: int) -> QuantisedMatrix:
    form = GGUF_FORMS[kind]
    numbers, scales, least = READERS[kind](data.unflatten(1, (-1, _block_bytes(kind, data.shape[1], in_))))
    bits: Bits = 4 if form.bits == 4 else 8
    whole = two_in_a_byte(numbers.flatten(1)) if bits == 4 else numbers.flatten(1).view(torch.int8)
    added = None if least is None else least.flatten(1)
    return QuantisedMatrix(bits, in_, whole, scales.flatten(1), added, None, form.group)


def _block_bytes(kind: str, row: int, in_: int) -> int:
    return row // (in_ // (SUPER if kind.endswith("K") else 32))


def _half(data: torch.Tensor) -> torch.Tensor:
    """Two bytes [.., 2] -> a float16 number [.., 1]."""
    return data.contiguous().view(torch.float16)


def _nibbles(data: torch.Tensor, width: int) -> torch.Tensor:
    """Bytes [.., n * width], each with a number and that `width` numbers on -> [.., 2 * n * width]."""
    pairs = data.unflatten(-1, (-1, 1, width))
    return torch.cat((pairs & 15, pairs >> 4), -2).flatten(-3)


def _q8_0(blocks: torch.Tensor) -> Parts:
    return blocks[..., 2:].contiguous(), _half(blocks[..., :2]), None


def _q4_0(blocks: torch.Tensor) -> Parts:
    return _nibbles(blocks[..., 2:], 16), _half(blocks[..., :2]), None


def _q4_1(blocks: torch.Tensor) -> Parts:
    return _nibbles(blocks[..., 4:], 16), _half(blocks[..., :2]), _half(blocks[..., 2:4])


def _fifth(high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """The fifth bit of each of 32 numbers [.., 4], and the four others [.., 32]."""
    shifts = torch.arange(8, dtype=torch.uint8)
    return low | (high.unsqueeze(-1) >> shifts & 1).flatten(-2) << 4


def _q5_0(blocks: torch.Tensor) -> Parts:
    numbers = _fifth(blocks[..., 2:6], _nibbles(blocks[..., 6:], 16))
    return (numbers.view(torch.int8) - 16).view(torch.uint8), _half(blocks[..., :2]), None


def _q5_1(blocks: torch.Tensor) -> Parts:
    numbers = _fifth(blocks[..., 4:8], _nibbles(blocks[..., 8:], 16))
    return numbers, _half(blocks[..., :2]), _half(blocks[..., 2:4])


def _six_bits(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and least numbers [.., 8] in float32, from the first 16 bytes of a block of Q4_K or Q5_K."""
    scale, least, rest = blocks[..., 4:16].unflatten(-1, (3, 4)).unbind(-2)
    scales = torch.cat((scale & 63, rest & 15 | scale >> 2 & 48), -1).float()
    added = torch.cat((least & 63, rest >> 4 | least >> 2 & 48), -1).float()
    return _half(blocks[..., :2]).float() * scales, -(_half(blocks[..., 2:4]).float() * added)


def _q4_k(blocks: torch.Tensor) -> Parts:
    return _nibbles(blocks[..., 16:], 32), *_six_bits(blocks)


def _q5_k(blocks: torch.Tensor) -> Parts:
    # Bit g of a byte belongs to the group g.
    high = blocks[..., 16:48].unsqueeze(-2) >> torch.arange(8, dtype=torch.uint8)[:, None] & 1
    return _nibbles(blocks[..., 48:], 32) | high.flatten(-2) << 4, *_six_bits(blocks)


def _q6_k(blocks: torch.Tensor) -> Parts:
    high = blocks[..., 128:192].unflatten(-1, (2, 1, 32)) >> torch.tensor([[0], [2], [4], [6]], dtype=torch.uint8) & 3
    numbers = _nibbles(blocks[..., :128], 64) | high.flatten(-3) << 4
    scales = _half(blocks[..., 208:]).float() * blocks[..., 192:208].contiguous().view(torch.int8).float()
    return (numbers.view(torch.int8) - 32).view(torch.uint8), scales, None


READERS: dict[str, Callable[[torch.Tensor], Parts]] = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q8_0": _q8_0, "Q5_0": _q5_0, "Q5_1": _q5_1,
    "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k,
}  # fmt: skip
"""Of each of GGUF_FORMS."""
