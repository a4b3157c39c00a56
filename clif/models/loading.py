"""Loading a frozen base model and its tokenizer: hub name, folder, GGUF file or random weights."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from clif.collectives import Peers
from clif.config import ConfigError, ModelConfig
from clif.model_config import check_tree
from clif.models.bytes_tokenizer import byte_tokenizer
from clif.models.drawn import draw_model
from clif.models.guard import reading
from clif.models.hub import is_hub_name, snapshot
from clif.models.proof import check_make
from clif.models.sliced import can_slice, load_sliced
from clif.text import ChatTokenizer, from_transformers

log = logging.getLogger(__name__)
RANDOM = "random:"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DERIVED = re.compile(r"rotary_emb\.|\.masked_bias$")
"""Tensors in older files that are computed and not loaded."""


@dataclass(frozen=True)
class LoadedModel:
    """A frozen causal language model in eval mode, on its device, and what belongs to it.

    whole False: its linear layers and head have this rank's parts only, so that it cannot run by itself.
    """

    model: transformers.PreTrainedModel
    tokenizer: ChatTokenizer
    device: torch.device
    dtype: torch.dtype
    dtype_reason: str
    whole: bool = True


def load_model(config: ModelConfig, device: torch.device, seed: int = 0, peers: Peers | None = None) -> LoadedModel:
    """Load what config.path names; with peers only what this rank needs of it, if it is random or has safetensors.

    Its make is proved before anything large is read. Raises ConfigError when it cannot be had, is incomplete, would be
    computed wrongly or does not fit the context wanted, LayoutError when the peers cannot share it.
    """
    dtype, reason = choose_dtype(config.dtype, device)
    peers = peers or Peers()
    shared = peers.size > 1
    # A hub name is a folder, too, once it is here.
    folder = snapshot(config.path) if shared and is_hub_name(config.path) else config.path
    if config.path.startswith(RANDOM):
        model, tokenizer = _random(config, dtype, seed, device, peers)
    elif shared and can_slice(folder):
        model, tokenizer = _sliced(config, folder, dtype, device, peers)
    else:
        model, tokenizer, shared = *pretrained(config, dtype), False
    model.eval().requires_grad_(False).to(device)
    return LoadedModel(model, tokenizer, device, dtype, reason, whole=not shared)


def check_config(shape: Any, config: ModelConfig) -> None:
    """Raises ConfigError for a model, known by its transformers configuration, that cannot be served as it is named."""
    tree = shape.to_dict()
    if config.path.endswith(".gguf"):
        # It says how the file is packed: it is unpacked.
        tree.pop("quantization_config", None)
    check_tree(tree, config.path, config.max_context)
    check_make(shape, config.max_context)


def pretrained(config: ModelConfig, dtype: torch.dtype) -> tuple[Any, ChatTokenizer]:
    """What transformers loads, on the CPU: hub name, folder or GGUF file. Raises ConfigError."""
    path = config.path
    source: dict[str, Any] = {"pretrained_model_name_or_path": path, "trust_remote_code": False}
    if path.endswith(".gguf"):
        file = Path(path)
        if not file.is_file():
            hint = "run `clif fetch`" if file.parts[:1] == ("assets",) else "correct it"
            raise ConfigError(f"model.path {path} does not exist: {hint}")
        source |= {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    elif path.startswith((".", "/")) and not Path(path).is_dir():
        raise ConfigError(f"model.path {path} is not a folder: correct it")
    # Every rank would draw its own bar over the run's status.
    transformers.utils.logging.disable_progress_bar()
    with reading(f"model.path {path}"):
        shape = transformers.AutoConfig.from_pretrained(**source)
    check_config(shape, config)
    with reading(f"model.path {path}"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
        model = load_whole(path, config=shape, **source, **_dense_gguf(path), dtype=dtype)
        return model, from_transformers(tokenizer, _eos_ids(model))


def load_whole(name: str, **source: Any) -> Any:
    """A model as transformers reads it. Raises ConfigError, with `name`, unless all its weights were there and used."""
    # The pair of model and report is not in the type that transformers declares.
    found: Any = transformers.AutoModelForCausalLM.from_pretrained(
        **source, attn_implementation="sdpa", output_loading_info=True
    )
    model, info = found
    check_tensors(name, sorted(info["missing_keys"]), sorted(info["unexpected_keys"]))
    return model


def check_tensors(name: str, missing: Sequence[str], unexpected: Sequence[str]) -> None:
    """Raises ConfigError for weights that a model lacks, which would be random ones, or has and would not use."""
    if missing:
        raise ConfigError(f"{name} lacks {_some(missing)}, which would be random: get it again")
    unused = [
        tensor for tensor in unexpected if tensor.startswith(("model.", "lm_head.")) and not DERIVED.search(tensor)
    ]
    if unused:
        raise ConfigError(
            f"{name} holds {_some(unused)}, which the model that its config.json describes does not have: "
            "correct that, or get it again"
        )


def _some(tensors: Sequence[str]) -> str:
    more = f" and {len(tensors) - 3} more" if len(tensors) > 3 else ""
    return f"the tensors {', '.join(tensors[:3])}{more}"


def _sliced(
    config: ModelConfig, folder: str, dtype: torch.dtype, device: torch.device, peers: Peers
) -> tuple[Any, ChatTokenizer]:
    with reading(folder):
        shape = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    check_config(shape, config)
    with reading(folder):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model = load_sliced(folder, shape, dtype, device, peers)
        return model, from_transformers(tokenizer, _eos_ids(model))


def _dense_gguf(path: str) -> dict[str, Any]:
    """transformers since 5.2x keeps GGUF blocks packed unless told otherwise; LoRA and bf16 GEMMs need them dense."""
    if path.endswith(".gguf") and hasattr(transformers, "GgufConfig"):
        return {"quantization_config": transformers.GgufConfig(dequantize=True)}
    return {}


def _random(
    config: ModelConfig, dtype: torch.dtype, seed: int, device: torch.device, peers: Peers
) -> tuple[Any, ChatTokenizer]:
    """Random weights of a given shape, for benchmarks; one seed gives one model, however many ranks share it."""
    place = Path(config.path.removeprefix(RANDOM))
    file = place / "config.json" if place.is_dir() else place
    if not file.is_file():
        raise ConfigError(f"model.path {config.path}: there is no {file}; name a config.json or a folder with one")
    with reading(f"{file}, which is to be a transformers configuration,"):
        shape = transformers.AutoConfig.for_model(**json.loads(file.read_text()))
    check_config(shape, config)
    with reading(str(file)):
        model = draw_model(shape, dtype, device, seed, peers)
        if (file.parent / "tokenizer.json").is_file():
            tokenizer = transformers.AutoTokenizer.from_pretrained(str(file.parent), trust_remote_code=False)
            return model, from_transformers(tokenizer, _eos_ids(model))
        return model, byte_tokenizer(shape.vocab_size)


def _eos_ids(model: Any) -> list[int]:
    ids = getattr(model.generation_config, "eos_token_id", None)
    return [] if ids is None else ids if isinstance(ids, list) else [ids]


def choose_dtype(wanted: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype of the base weights and why. On a CPU, auto is decided by a short measurement.

    Raises ConfigError for a dtype that the device cannot compute in.
    """
    if wanted == "float16" and device.type == "cpu":
        raise ConfigError("model.dtype float16 is for GPUs: use bfloat16, float32 or auto on a CPU")
    if wanted != "auto":
        return DTYPES[wanted], "asked for"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported():
            return torch.bfloat16, "the GPU computes in bfloat16"
        return torch.float16, "the GPU has no bfloat16"
    seconds = {name: _matmul_seconds(DTYPES[name]) for name in ("float32", "bfloat16")}
    best = min(seconds, key=lambda name: seconds[name])
    rates = ", ".join(f"{name} {2 * 256 * 1024**2 / s / 1e9:.0f} GFLOP/s" for name, s in seconds.items())
    return DTYPES[best], f"measured {rates}"


def _matmul_seconds(dtype: torch.dtype, repeats: int = 5) -> float:
    """Best time of one 256x1024x1024 product: the best, because ranks measure at the same moment on shared cores."""
    x, w = torch.ones(256, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        torch.nn.functional.linear(x, w)
        best = min(best, time.perf_counter() - start)
    return best
