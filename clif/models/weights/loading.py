"""Loading a frozen base model and its tokenizer: hub name, folder, GGUF file or random weights."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from clif.config import ConfigError, ModelConfig
from clif.distributed.collectives import TpGroup
from clif.models.bytes_tokenizer import byte_tokenizer
from clif.models.checkpoint_scheme import Scheme, UnreadSchemeError, scheme_of
from clif.models.guard import reading
from clif.models.hf_config import check_tree, read_tree
from clif.models.proof import check_architecture
from clif.models.spec import check_family, spec_of
from clif.models.weights.files import RANDOM, check_tensors, is_gguf, locate
from clif.models.weights.gguf_header import read_header
from clif.models.weights.gguf_once import read_once
from clif.models.weights.hub import is_hub_name, snapshot
from clif.models.weights.kept_forms import KEPT, check_kept
from clif.models.weights.random_init import draw_model
from clif.models.weights.safetensors_shard import can_slice, load_sliced
from clif.tokenizer import ChatTokenizer, from_transformers

log = logging.getLogger(__name__)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class LoadedModel:
    """A frozen causal language model in eval mode, on its device, and what belongs to it."""

    model: transformers.PreTrainedModel
    tokenizer: ChatTokenizer
    device: torch.device
    dtype: torch.dtype
    dtype_reason: str

    @property
    def whole(self) -> bool:
        """Whether it can run by itself. Otherwise its linear layers and head have this rank's parts only."""
        spec = spec_of(self.model.config)
        group = spec.layer.linears[0]
        first: Any = self.model.get_submodule(f"{spec.layers}.0.{group.modules[0].name}")
        return tuple(first.weight.shape) == (group.modules[0].size, group.inputs.size)


def load_model(
    config: ModelConfig, device: torch.device, seed: int = 0, tp_group: TpGroup | None = None
) -> LoadedModel:
    """Load what config.path names; with peers only what this rank needs of it, if it is random or has safetensors.

    Its architecture is proved before anything large is read. Raises ConfigError when the model cannot be had, is
    incomplete, would be computed wrongly or does not fit the context, LayoutError when the peers cannot share it.
    """
    dtype, reason = choose_dtype(config.dtype, device)
    tp_group = tp_group or TpGroup()
    shared = tp_group.size > 1
    # A hub name is a folder, too, once it is here.
    folder = snapshot(config.path) if shared and is_hub_name(config.path) else config.path
    scheme = _scheme(folder)
    check_kept(config, scheme)
    if scheme is not None and is_hub_name(folder):
        folder = snapshot(folder)
    if scheme is not None and not can_slice(folder):
        raise ConfigError(f"model.path {config.path} holds quantised weights that are not in safetensors: get those")
    if config.path.startswith(RANDOM):
        model, tokenizer = _random(config, dtype, seed, device, tp_group)
    elif config.weight_dtype == KEPT and is_gguf(config.path):
        model, tokenizer = _kept_gguf(config, dtype, device, tp_group)
    elif (shared or scheme is not None) and can_slice(folder):
        model, tokenizer = _sliced(config, folder, dtype, device, tp_group, scheme)
    else:
        model, tokenizer = pretrained(config, dtype)
    model.eval().requires_grad_(False).to(device)
    return LoadedModel(model, tokenizer, device, dtype, reason)


def _checked(config: ModelConfig, folder: str) -> Any:
    """The transformers configuration of a model that can be served as it is named. Raises ConfigError.

    folder: model.path, or where a hub name is kept here.
    """
    local = locate(folder)
    if local is not None and is_gguf(local.name):
        read_header(local).check_tree(config.path, config.max_context)
    with reading(f"model.path {config.path}"):
        if config.path.startswith(RANDOM) and local is not None:
            shape = transformers.AutoConfig.for_model(**read_tree(local))
        else:
            shape = transformers.AutoConfig.from_pretrained(**_source(folder))
    tree = shape.to_dict()
    if is_gguf(config.path):
        # It describes the blocks of the file, which is unpacked.
        tree.pop("quantization_config", None)
    check_tree(tree, config.path, config.max_context)
    check_family(tree["model_type"], f"model.path {config.path}")
    check_architecture(shape, config.max_context)
    return shape


def _source(path: str) -> dict[str, Any]:
    """Where transformers is to read. Left to itself it asks on the terminal whether to run code of a folder."""
    local = Path(path)
    file = {"gguf_file": local.name} if is_gguf(path) else {}
    name = str(local.parent) if file else path
    return {"pretrained_model_name_or_path": name, "trust_remote_code": False, **file}


def pretrained(config: ModelConfig, dtype: torch.dtype) -> tuple[Any, ChatTokenizer]:
    """What transformers loads, on the CPU: hub name, folder or GGUF file. Raises ConfigError."""
    path = config.path
    # Every rank would draw its own bar over the run's progress.
    transformers.utils.logging.disable_progress_bar()
    with read_once(path):
        shape = _checked(config, path)
        with reading(f"model.path {path}"):
            tokenizer = transformers.AutoTokenizer.from_pretrained(**_source(path))
            model = load_whole(path, config=shape, **_source(path), **_dense_gguf(path), dtype=dtype)
            return model, from_transformers(tokenizer, _eos_ids(model))


def _kept_gguf(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, tp_group: TpGroup
) -> tuple[Any, ChatTokenizer]:
    """A GGUF file whose weights stay packed."""
    # Late: a machine that serves no GGUF file need not have the package.
    from clif.models.weights.gguf_packed import load_packed_gguf

    shape = _checked(config, config.path)
    with reading(f"model.path {config.path}"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(**_source(config.path))
        model = load_packed_gguf(Path(config.path), shape, dtype, device, tp_group)
        return model, from_transformers(tokenizer, _eos_ids(model))


def _scheme(path: str) -> Scheme | None:
    """How the weights that model.path names are quantised in its files. Raises ConfigError."""
    if path.startswith(RANDOM) or is_gguf(path):
        return None
    locate(path)
    with reading(f"model.path {path}"):
        tree = transformers.PretrainedConfig.get_config_dict(path)[0]
    try:
        # A file that holds no fields is said to be none where it is read.
        return scheme_of(tree) if isinstance(tree, dict) else None
    except UnreadSchemeError:
        # Said with all that is wrong with the model.
        return None


def load_whole(name: str, **source: Any) -> Any:
    """A model as transformers reads it. Raises ConfigError, with `name`, unless all its weights were there and used."""
    # The pair of model and report is not in the type that transformers declares.
    found: Any = transformers.AutoModelForCausalLM.from_pretrained(**source, output_loading_info=True)
    model, info = found
    check_tensors(name, sorted(info["missing_keys"]), sorted(info["unexpected_keys"]))
    return model


def _sliced(
    config: ModelConfig,
    folder: str,
    dtype: torch.dtype,
    device: torch.device,
    tp_group: TpGroup,
    scheme: Scheme | None,
) -> tuple[Any, ChatTokenizer]:
    shape = _checked(config, folder)
    with reading(folder):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model = load_sliced(folder, shape, dtype, device, tp_group, scheme)
        return model, from_transformers(tokenizer, _eos_ids(model))


def _dense_gguf(path: str) -> dict[str, Any]:
    """Arguments for dense weights: transformers since 5.2x keeps GGUF blocks otherwise, which no product here reads."""
    if is_gguf(path) and hasattr(transformers, "GgufConfig"):
        return {"quantization_config": transformers.GgufConfig(dequantize=True)}
    return {}


def _random(
    config: ModelConfig, dtype: torch.dtype, seed: int, device: torch.device, tp_group: TpGroup
) -> tuple[Any, ChatTokenizer]:
    """Random weights, for benchmarks. One seed gives one model, however many ranks share it."""
    shape, file = _checked(config, config.path), locate(config.path)
    assert file is not None
    with reading(str(file)):
        model = draw_model(shape, dtype, device, seed, tp_group)
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
