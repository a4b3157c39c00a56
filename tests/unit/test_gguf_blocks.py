"""Blocks of GGUF files stay packed: the numbers are those that the gguf package unpacks them to."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from clif.models.weights.forms import GGUF_FORMS
from clif.models.weights.gguf_blocks import READERS, matrix_of

IN = 512


def blocks_of(kind: str, rows: int = 5) -> np.ndarray:
    """Any bytes, but for scales that are finite."""
    numbers, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    rng = np.random.default_rng(len(kind) + size)
    blocks = rng.integers(0, 256, (rows, IN // numbers, size), dtype=np.uint8)
    halves = rng.normal(0, 0.02, (rows, IN // numbers, 2)).astype(np.float16).view(np.uint8)
    if kind == "Q6_K":
        blocks[..., -2:] = halves[..., :2]
    else:
        blocks[..., :4] = halves
    if kind in ("Q4_0", "Q5_0", "Q8_0"):
        blocks[..., 2:4] = rng.integers(0, 256, blocks[..., 2:4].shape, dtype=np.uint8)
    return blocks.reshape(rows, -1)


@pytest.mark.parametrize("kind", GGUF_FORMS)
def test_packed_blocks_stand_for_what_the_library_unpacks_them_to(kind: str):
    data = blocks_of(kind)
    matrix, form = matrix_of(kind, torch.from_numpy(data), IN), GGUF_FORMS[kind]
    wanted = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
    assert torch.equal(matrix.dense(torch.float32), torch.from_numpy(wanted))
    held = sum(t.nbytes for t in matrix.tensors)
    assert held == form.bytes(*wanted.shape, padded=False) and matrix.bits == form.bits
    assert READERS.keys() == GGUF_FORMS.keys()


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_blocks_of_32_take_what_they_take_in_the_file(kind: str):
    data = blocks_of(kind)
    assert sum(t.nbytes for t in matrix_of(kind, torch.from_numpy(data), IN).tensors) == data.nbytes
