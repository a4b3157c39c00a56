"""Loading this rank's part of a model from safetensors: the whole never exists in one process.

The model is built without memory, and its tensors are filled one by one: of the decoder layers' linear weights the
rank's own slice is read, everything else whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open

from clif.collectives import Peers
from clif.config import ConfigError
from clif.layout import check_shares
from clif.models.layer import ATTENTION, MLP
from clif.models.shard import Span, Split, layer_spans

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def can_slice(path: str) -> bool:
    """Whether a model path is a folder with safetensors."""
    folder = Path(path)
    return folder.is_dir() and any((folder / name).is_file() for name in (INDEX, SINGLE))


def load_sliced(path: str, dtype: torch.dtype, device: torch.device, peers: Peers) -> Any:
    """A model in which linear layers have this rank's weights only. It cannot run by itself.

    Raises ConfigError when a tensor is missing or has another shape, LayoutError when the peers cannot share it.
    """
    folder = Path(path)
    config = transformers.AutoConfig.from_pretrained(path)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    check_shares(config.num_attention_heads, config.num_key_value_heads, config.intermediate_size, peers.size)
    parts = dict(_parts(model, peers))
    tied = {"lm_head.weight"} if getattr(config, "tie_word_embeddings", False) else set()
    with ExitStack() as stack:
        files = _files(folder, stack)
        for name, parameter in list(model.named_parameters()):
            if name in tied:
                continue
            if name not in files:
                raise ConfigError(
                    f"{folder} holds no tensor {name}: it cannot be loaded in parts, set layout.tp_size=1"
                )
            part = _read(files[name], name, parameter.shape, parts.get(name))
            _put(model, name, part.to(device=device, dtype=dtype))
    model.tie_weights()
    # Its frequencies are computed, not stored.
    inner = model.model
    inner.rotary_emb = type(inner.rotary_emb)(config=model.config).to(device)
    left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if left:
        raise ConfigError(f"{folder}: {', '.join(left[:3])} cannot be loaded in parts: set layout.tp_size=1")
    _read_generation(model, folder)
    return model


def _parts(model: Any, peers: Peers) -> Iterator[tuple[str, tuple[Split, Span]]]:
    """Tensor name -> side and span, for every linear weight (and cut bias) of the decoder layers."""
    for layer in range(len(model.model.layers)):
        for leaf, (split, span) in layer_spans(model.config, peers.rank, peers.size).items():
            block = "self_attn" if leaf in ATTENTION else "mlp"
            assert leaf in ATTENTION or leaf in MLP
            yield f"model.layers.{layer}.{block}.{leaf}.weight", (split, span)
            if split == "out":
                yield f"model.layers.{layer}.{block}.{leaf}.bias", (split, span)


def _files(folder: Path, stack: ExitStack) -> dict[str, Any]:
    """Tensor name -> the opened file that holds it."""
    index = folder / INDEX
    names = json.loads(index.read_text())["weight_map"] if index.is_file() else None
    opened: dict[str, Any] = {}
    try:
        for file in sorted(set(names.values())) if names else [SINGLE]:
            opened[file] = stack.enter_context(safe_open(folder / file, framework="pt"))
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{folder}: {error}") from error
    return {name: file for file in opened.values() for name in file.keys()}  # noqa: SIM118 - not a mapping


def _read(file: Any, name: str, shape: torch.Size, part: tuple[Split, Span] | None) -> torch.Tensor:
    source = file.get_slice(name)
    if list(source.get_shape()) != list(shape):
        raise ConfigError(f"{name} has shape {source.get_shape()}, its config.json says {list(shape)}")
    if part is None:
        tensor: torch.Tensor = source[:]
        return tensor
    split, span = part
    tensor = source[span.start : span.stop] if split == "out" else source[:, span.start : span.stop]
    return tensor


def _put(model: Any, name: str, tensor: torch.Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    setattr(module, leaf, torch.nn.Parameter(tensor, requires_grad=False))
    if leaf == "weight" and isinstance(module, torch.nn.Linear):
        module.out_features, module.in_features = tensor.shape


def _read_generation(model: Any, folder: Path) -> None:
    """End-of-sequence tokens and the like, where the folder has them."""
    if (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(str(folder))
