"""A GGUF file read tensor by tensor: weights of linear layers stay the blocks that they are, others become plain.

Each rank maps the file and reads its part of it: no rank unpacks anything for others.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from accelerate import init_empty_weights
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

from clif.config import ConfigError
from clif.distributed.collectives import TpGroup
from clif.models.shard import shard_of
from clif.models.weights.files import check_tensors
from clif.models.weights.forms import GGUF_FORMS
from clif.models.weights.gguf_blocks import matrix_of
from clif.models.weights.gguf_header import read_header
from clif.models.weights.part import columns_of
from clif.models.weights.sharded_build import Kept, TensorShard, build


def load_packed_gguf(file: Path, config: Any, dtype: torch.dtype, device: torch.device, tp_group: TpGroup) -> Any:
    """A model whose linear layers and head keep the blocks of the file; with peers this rank's part of it.

    config: of the transformers model. It cannot run by itself. Raises ConfigError for a file that lacks a tensor,
    LayoutError where the peers cannot share it.
    """
    weights = GgufWeights(file, config)
    model = build(config, weights.tensor, dtype, device, tp_group, weights.packed)
    if (file.parent / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(str(file.parent))
    return model


class GgufWeights:
    """The tensors of a file, by the names of a transformers model."""

    def __init__(self, file: Path, config: Any) -> None:
        self._file, self._header = file, read_header(file)
        self._bytes = np.memmap(file, mode="r", dtype=np.uint8)
        kind = str(self._header.values.get("general.architecture"))
        self._order: TensorProcessor = TENSOR_PROCESSORS.get(kind, TensorProcessor)(config=config.to_dict())
        with init_empty_weights():
            empty = transformers.AutoModelForCausalLM.from_config(config)
        self._names = {name: ours for ours, name in get_gguf_hf_weights_map(empty, self._order).items()}

    def packed(self, name: str, shape: torch.Size, part: TensorShard) -> Kept | None:
        """This rank's part of a weight whose blocks a packed form holds."""
        tensor, kind = self._found(name)
        if kind not in GGUF_FORMS:
            return None
        self._check(tensor, self._header.tensors[tensor], shape)
        out, in_ = shape
        rows = self._rows(tensor, out)
        if part is not None and part[0] == "out":
            rows = part[1].take(rows, 0)
        matrix = matrix_of(kind, torch.from_numpy(self._data(tensor)[rows.numpy()]), in_)
        return columns_of(matrix, name, part), None

    def tensor(self, name: str, shape: torch.Size, part: TensorShard) -> torch.Tensor:
        """This rank's part of a tensor as plain numbers."""
        tensor, kind = self._found(name)
        found = gguf.quants.dequantize(self._data(tensor), gguf.GGMLQuantizationType[kind])
        # Names do not matter to what the library returns for one tensor.
        plain = self._order.process(weights=found.reshape(self._header.tensors[tensor]), name=tensor).weights
        whole = torch.from_numpy(np.copy(plain))
        self._check(tensor, tuple(whole.shape), shape)
        return whole if part is None else shard_of(whole, *part).clone()

    def _check(self, tensor: str, found: tuple[int, ...], shape: torch.Size) -> None:
        if found != tuple(shape):
            raise ConfigError(f"{self._file}: {tensor} has shape {list(found)}, and {list(shape)} by its sizes")

    def _found(self, name: str) -> tuple[str, str]:
        """A tensor's name in the file, and its type."""
        tensor = self._names.get(name, name)
        if tensor not in self._header.tensors:
            check_tensors(str(self._file), [name], ())
        return tensor, gguf.GGMLQuantizationType(self._header.extents[tensor].kind).name

    def _data(self, tensor: str) -> np.ndarray[Any, Any]:
        """The bytes of each row, or the numbers of one that has no blocks."""
        extent, shape = self._header.extents[tensor], self._header.tensors[tensor]
        data = self._bytes[extent.start : extent.start + extent.size]
        kind = gguf.GGMLQuantizationType(extent.kind)
        plain = {gguf.GGMLQuantizationType.F32: np.float32, gguf.GGMLQuantizationType.F16: np.float16}.get(kind)
        return data.reshape(*shape[:-1], -1) if plain is None else data.view(plain).reshape(shape)

    def _rows(self, tensor: str, out: int) -> torch.Tensor:
        """Which row of the file each row of the model's weight is: files have those of query and key in other orders.

        The library is asked for it with the numbers of the rows in their place.
        """
        numbered = np.arange(out, dtype=np.int64)[:, None]
        rows = torch.from_numpy(np.array(self._order.process(weights=numbered, name=tensor).weights)).flatten()
        if not torch.equal(rows.sort().values, torch.arange(out)):
            raise ConfigError(f"{self._file}: rows of {tensor} are changed on the way to the model: choose auto")
        return rows
