"""The packed weights of a folder with safetensors, module by module."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from clif.config import ConfigError
from clif.distributed.layout import LayoutError
from clif.models.checkpoint_scheme import MARKS, Scheme
from clif.models.weights.packed_layouts import LayoutFaultError, read_packed
from clif.models.weights.part import columns_of
from clif.models.weights.sharded_build import Kept, TensorShard


class PackedFiles:
    """files: the opened file of each tensor. used: names of tensors that were read."""

    def __init__(self, folder: Path, scheme: Scheme, files: Mapping[str, Any]) -> None:
        self._folder, self._scheme, self._files = folder, scheme, files
        # Some tools write a bias of zeros for layers that have none.
        self.used = {name for name in files if name.endswith(".bias") and not bool(self._whole(name).any())}

    def __call__(self, name: str, shape: torch.Size, part: TensorShard) -> Kept | None:
        """This rank's part of a weight; None: it is plain. Raises ConfigError for one that is damaged, LayoutError for
        one that the peers cannot share."""
        module = name.removesuffix(".weight")
        found = {mark: f"{module}.{mark}" for mark in MARKS[self._scheme.method]}
        have = {mark: tensor for mark, tensor in found.items() if tensor in self._files}
        if not have.keys() - {"weight"}:
            return None
        self.used |= set(have.values())
        out, in_ = shape
        rows = part[1] if part is not None and part[0] == "out" else None
        try:
            matrix, order = read_packed(
                self._scheme, lambda mark: self._whole(have[mark]) if mark in have else None, out, in_, rows
            )
        except LayoutFaultError as error:
            raise ConfigError(f"{self._folder}: {module} is damaged ({error}): get it again") from error
        if order is not None and part is not None and part[0] == "in":
            raise LayoutError(
                f"ranks of a replica cannot share {name}, whose groups are of inputs in another order (desc_act): set "
                "layout.tp_size=1"
            )
        return columns_of(matrix, name, part), order

    def _whole(self, tensor: str) -> torch.Tensor:
        found: torch.Tensor = self._files[tensor].get_tensor(tensor)
        return found
