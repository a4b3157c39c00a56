"""A PEFT folder made into an adapter of the run, without torch and without the model.

A smaller rank is padded to the run's: rows of A that are added are drawn like those of a new adapter, columns of B are
zero. So it computes what it did, and training can use the whole rank; rows of zeros on both sides would never train.
B takes up the difference between its scale, lora_alpha / r, and the run's. A larger rank is refused: it would have to
be cut, which is another adapter.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from clif.adapters.peft_files import ELSEWHERE, PREFIX, describe
from clif.adapters.store import CONFIG_FILE, WEIGHTS_FILE
from clif.errors import InputError, plain

MOST_BYTES = 8 * 2**30
LARGEST = {"float16": 65504.0}
"""Values that are finite in float32 and not in the type that serves; the others have its range."""
_A, _B = ".lora_A.", ".lora_B."
Tensors = dict[str, np.ndarray]


def fit_files(
    folder: Path, r: int, lora_alpha: float, described: str, dtype: str, base: str, seed: int
) -> tuple[str, bytes]:
    """(adapter_config.json, safetensors bytes) of an adapter of the run: its rank and scale, float32.

    described: from describe(), of the run's adapters. dtype: the type that serves. base: name of the base model. seed:
    of the rows that are added. Raises InputError.
    """
    config, weights = _read(folder)
    rank, scale = _rank_and_scale(config, folder)
    if rank > r:
        raise InputError(f"{folder.name} has r={rank}, more than adapter.r {r}: export one of at most r={r}")
    tensors = _tensors(weights, folder, LARGEST.get(dtype, math.inf))
    _check_pairs(tensors, rank, folder)
    whole = _padded(tensors, r, scale / (lora_alpha / r), np.random.default_rng(seed))
    if describe({name: tensor.shape for name, tensor in whole.items()}) != described:
        leaves = sorted({name.split(_A)[0].split(_B)[0].rsplit(".", 1)[-1] for name in whole})
        raise InputError(
            f"{folder.name} adapts other modules than the run's adapters, or has other shapes: it has "
            f"{', '.join(map(plain, leaves))}, see adapter.target_modules"
        )
    names = sorted({name.split(_A)[0] for name in whole if _A in name})
    return _config_json(names, r, lora_alpha, base), safetensors.numpy.save({PREFIX + k: v for k, v in whole.items()})


def _read(folder: Path) -> tuple[dict[str, Any], bytes]:
    try:
        config = json.loads(_bytes(folder / CONFIG_FILE))
        weights = _bytes(folder / WEIGHTS_FILE)
    except OSError as error:
        raise InputError(f"{folder.name} is not a PEFT adapter folder: {error.strerror} ({_name(error)})") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{CONFIG_FILE} of {folder.name} is damaged: {plain(error)}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise InputError(f"{folder.name} does not describe a LoRA adapter: export one with peft_type LORA")
    for key in ELSEWHERE:
        if config.get(key):
            raise InputError(f"{folder.name} uses {key}, which cannot be served: export it without")
    return config, weights


def _bytes(path: Path) -> bytes:
    # A pipe, say, would be waited for.
    if path.exists() and not path.is_file():
        raise OSError(0, "not a plain file", str(path))
    if path.stat().st_size > MOST_BYTES:
        raise OSError(0, f"larger than {MOST_BYTES >> 30} GiB", str(path))
    return path.read_bytes()


def _name(error: OSError) -> str:
    return Path(error.filename).name if error.filename else "?"


def _rank_and_scale(config: dict[str, Any], folder: Path) -> tuple[int, float]:
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise InputError(f"{folder.name} has r={plain(rank)}: correct it to a whole number above 0")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < math.inf:
        raise InputError(f"{folder.name} has lora_alpha={plain(alpha)}: correct it to a number above 0")
    return rank, alpha / rank


def _tensors(weights: bytes, folder: Path, largest: float) -> Tensors:
    """By names without PEFT's prefix, float32."""
    try:
        found = safetensors.deserialize(weights)
    except safetensors.SafetensorError as error:
        raise InputError(f"{WEIGHTS_FILE} of {folder.name} is not a safetensors file: {plain(error)}") from error
    tensors: Tensors = {}
    for key, tensor in found:
        name = key.removeprefix(PREFIX)
        if name in tensors:
            raise InputError(f"{folder.name} holds {plain(name)} twice, with and without {PREFIX}: leave one out")
        tensors[name] = _float32(name, tensor)
        if not (np.abs(tensors[name]) <= largest).all() or not np.isfinite(tensors[name]).all():
            raise InputError(f"{plain(name)} of {folder.name} holds values that are not finite in what serves")
    return tensors


def _float32(name: str, tensor: dict[str, Any]) -> np.ndarray:
    kind, shape, data = tensor["dtype"], tensor["shape"], bytes(tensor["data"])
    if kind == "BF16":
        # The upper half of a float32.
        return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4").reshape(shape)
    if kind not in ("F16", "F32", "F64"):
        raise InputError(f"{plain(name)} is {plain(kind)}, not floating point: export the adapter in float32")
    with np.errstate(over="ignore"):
        return np.frombuffer(data, f"<f{int(kind[1:]) // 8}").astype("<f4").reshape(shape)


def _check_pairs(tensors: Tensors, rank: int, folder: Path) -> None:
    for name, tensor in sorted(tensors.items()):
        other = name.replace(_A, _B) if _A in name else name.replace(_B, _A)
        if other == name or other not in tensors:
            raise InputError(f"{folder.name} holds {plain(name)} without its other factor: export the adapter again")
        if tensor.ndim != 2 or tensor.shape[0 if _A in name else 1] != rank:
            raise InputError(f"{plain(name)} of {folder.name} has shape {list(tensor.shape)}, and r is {rank}")
    if not tensors:
        raise InputError(f"{folder.name} holds no tensors: export the adapter again")


def _padded(tensors: Tensors, r: int, scale: float, rng: np.random.Generator) -> Tensors:
    whole = {}
    for name, tensor in sorted(tensors.items()):
        if _A in name:
            rank, inputs = tensor.shape
            # As torch draws the weights of a linear layer.
            added = rng.uniform(-1, 1, (r - rank, inputs)).astype("<f4") / np.sqrt(np.float32(max(1, inputs)))
            whole[name] = np.concatenate((tensor, added))
        else:
            outputs, rank = tensor.shape
            padded = np.concatenate((tensor, np.zeros((outputs, r - rank), "<f4")), axis=1)
            whole[name] = padded * np.float32(scale) if scale != 1 else padded
    return whole


def _config_json(names: list[str], r: int, lora_alpha: float, base: str) -> str:
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": r,
        "lora_alpha": lora_alpha,
        "target_modules": names,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": False,
    }
    return json.dumps(described, indent=2)
