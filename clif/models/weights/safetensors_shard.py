"""Reading this rank's part of a model from a folder with safetensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open

from clif.config import ConfigError
from clif.distributed.collectives import TpGroup
from clif.models.checkpoint_scheme import Scheme
from clif.models.expert_spec import Pieces
from clif.models.shard import Shard, axis_of
from clif.models.spec import spec_of
from clif.models.weights.files import INDEX, SINGLE, check_packed, check_tensors, read_index
from clif.models.weights.packed_files import PackedFiles
from clif.models.weights.sharded_build import TensorShard, build

Read = Callable[[str, Sequence[int], TensorShard], torch.Tensor]
"""(name, shape, part wanted) -> that part of a tensor of the files."""


def can_slice(path: str) -> bool:
    """Whether a model path is a folder with safetensors."""
    folder = Path(path)
    return folder.is_dir() and any((folder / name).is_file() for name in (INDEX, SINGLE))


def load_sliced(
    path: str,
    config: Any,
    dtype: torch.dtype,
    device: torch.device,
    tp_group: TpGroup,
    scheme: Scheme | None = None,
) -> Any:
    """A model whose linear layers and head have this rank's weights only. It cannot run by itself.

    config: of the transformers model. scheme: of its weights; those of linear layers then stay packed. Raises
    ConfigError when a tensor is missing or has another shape, LayoutError when the peers cannot share it.
    """
    folder = Path(path)
    with ExitStack() as stack:
        files = _files(folder, stack)

        def read(name: str, shape: torch.Size, part: TensorShard) -> torch.Tensor:
            if name not in files and name in pieces:
                return _assembled(partial(one, dtype), pieces[name], shape, part)
            return one(None, name, shape, part)

        def one(as_type: torch.dtype | None, name: str, shape: Sequence[int], part: TensorShard) -> torch.Tensor:
            if name not in files:
                raise ConfigError(
                    f"{folder} lacks the tensor {name}: get it again, or set layout.tp_size=1 if its tensors have "
                    "other names"
                )
            return _read(files[name], name, shape, part).to(as_type)

        pieces = spec_of(config).pieces()
        if scheme is not None:
            check_packed(spec_of(config), str(folder))
        packed = None if scheme is None else PackedFiles(folder, scheme, files)
        model = build(config, read, dtype, device, tp_group, packed)
        used = (
            (set() if packed is None else packed.used)
            | model.state_dict().keys()
            | {one for all in pieces.values() for below in all for one in below}
        )
        check_tensors(str(folder), (), sorted(files.keys() - used))
    if (folder / "generation_config.json").is_file():
        # End-of-sequence tokens and the like.
        model.generation_config = transformers.GenerationConfig.from_pretrained(str(folder))
    return model


def _files(folder: Path, stack: ExitStack) -> dict[str, Any]:
    """Tensor name -> the opened file that holds it."""
    names = read_index(folder) or {}
    opened: dict[str, Any] = {}
    try:
        for file in sorted(set(names.values())) or [SINGLE]:
            opened[file] = stack.enter_context(safe_open(folder / file, framework="pt"))
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{folder} lacks a part ({error}): get it again") from error
    return {name: file for file in opened.values() for name in file.keys()}  # noqa: SIM118 - not a mapping


def _assembled(read: Read, pieces: Pieces, shape: torch.Size, part: TensorShard) -> torch.Tensor:
    """A rank's part of a tensor [experts, out, in] that files have matrix by matrix, or of one under another name."""
    if len(shape) < 3:
        return read(pieces[0][0], shape, part)
    out = shape[1] // len(pieces[0])
    of_one = _of_pieces(part[1], out) if part is not None and part[0] == "out" else [part] * len(pieces[0])
    whole: torch.Tensor | None = None
    for expert, below in enumerate(pieces):
        matrix = torch.cat([read(name, (out, shape[2]), one) for name, one in zip(below, of_one, strict=True)])
        # One matrix at a time beside the tensor that is being filled.
        whole = matrix.new_empty((len(pieces), *matrix.shape)) if whole is None else whole
        whole[expert] = matrix
    assert whole is not None
    return whole


def _of_pieces(shard: Shard, out: int) -> list[TensorShard]:
    """Of each matrix of `out` rows the part that lies in a shard of all of them, one below the other."""
    return [("out", Shard(start - i * out, stop - i * out, out)) for i, (start, stop) in enumerate(shard.ranges)]


def _read(file: Any, name: str, shape: Sequence[int], part: TensorShard) -> torch.Tensor:
    source = file.get_slice(name)
    if list(source.get_shape()) != list(shape):
        raise ConfigError(
            f"{name} has shape {source.get_shape()}, its config.json says {list(shape)}: correct that, or get it again"
        )
    if part is None:
        tensor: torch.Tensor = source[:]
        return tensor
    shard_dim, shard = part
    before = (slice(None),) * axis_of(shard_dim, len(shape))
    parts = [source[(*before, slice(start, stop))] for start, stop in shard.ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, len(before))
