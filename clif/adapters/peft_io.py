"""Adapters in PEFT's format: adapter_config.json and adapter_model.safetensors, in both directions."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from clif.adapters.bank import AdapterBank, State
from clif.adapters.peft_files import ELSEWHERE, PREFIX
from clif.adapters.store import CONFIG_FILE, WEIGHTS_FILE
from clif.errors import InputError, plain

_A, _B = ".lora_A.", ".lora_B."


class AdapterError(InputError):
    """An adapter does not fit the model, or holds values that must not be served."""


def config_json(bank: AdapterBank, base: str) -> str:
    """adapter_config.json of the bank's adapters. base: name or path of the base model.

    Not written by peft, whose import takes half of a rank's start; a test compares it with what peft writes.
    """
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": bank.config.r,
        "lora_alpha": bank.config.lora_alpha,
        "target_modules": _target_names(bank),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": False,
    }
    return json.dumps(described, indent=2)


def _target_names(bank: AdapterBank) -> list[str]:
    """Last name parts where "all-linear" made them safe; full names otherwise: a suffix could match too much."""
    if bank.config.target_modules == "all-linear":
        return sorted({name.rsplit(".", 1)[-1] for name in bank.names})
    return sorted(bank.names)


def write_weights(state: State) -> bytes:
    """safetensors bytes of an adapter, float32, with PEFT's key names."""
    return safetensors.torch.save({PREFIX + k: v.float().cpu().contiguous() for k, v in state.items()})


def read_weights(bank: AdapterBank, weights: bytes) -> State:
    """Decode and check an adapter: PEFT's loader lets missing keys pass, so everything is checked here.

    Returns this rank's part of it, float32. Raises AdapterError on missing, unknown or doubled keys, other shapes,
    types that are no floating point, and values that are not finite in float32 or in the type that serves.
    """
    expected = bank.shapes()
    state = _by_name(_tensors(weights))
    missing, unknown = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or unknown:
        raise AdapterError(
            f"the adapter does not fit: {len(missing)} keys missing {plain(missing[:3])}, {len(unknown)} unknown "
            f"{plain(unknown[:3])}"
        )
    for name, tensor in state.items():
        if tensor.shape != expected[name]:
            raise AdapterError(f"{name} has shape {list(tensor.shape)}, not {list(expected[name])}")
    return bank.local({name: _served(name, tensor, bank.dtype) for name, tensor in state.items()})


def _tensors(weights: bytes) -> State:
    try:
        return safetensors.torch.load(weights)
    except safetensors.SafetensorError as error:
        raise AdapterError(f"the adapter is not a safetensors file: {plain(error)}") from error
    except (KeyError, ValueError, RuntimeError) as error:
        # A type of number that this torch has no name for, or a header whose sizes do not fit together.
        raise AdapterError(
            f"the adapter holds a tensor that cannot be read ({plain(error)}): export it in float32"
        ) from error


def _by_name(given: State) -> State:
    """By names without PEFT's prefix."""
    state: State = {}
    for key, tensor in given.items():
        name = key.removeprefix(PREFIX)
        if name in state:
            raise AdapterError(f"the adapter holds {name} twice, with and without {PREFIX}: leave one out")
        state[name] = tensor
    return state


def _served(name: str, tensor: torch.Tensor, served: torch.dtype) -> torch.Tensor:
    """In float32, checked in what training and serving make of it: a large float64 is finite only as such."""
    if not tensor.is_floating_point():
        kind = str(tensor.dtype).removeprefix("torch.")
        raise AdapterError(f"{name} is {kind}, not floating point: export the adapter in float32")
    master = tensor.float()
    if not torch.isfinite(master).all():
        raise AdapterError(f"{name} holds values that are not finite in float32")
    if not torch.isfinite(master.to(served)).all():
        kind = str(served).removeprefix("torch.")
        raise AdapterError(f"{name} holds values that are not finite in {kind}, the model's type: set model.dtype")
    return master


def read_folder(bank: AdapterBank, folder: Path) -> State:
    """An adapter from a PEFT folder. Raises AdapterError also when its r, alpha or extras differ from ours."""
    config, weights = _read_files(folder)
    for key, ours in (("r", bank.config.r), ("lora_alpha", bank.config.lora_alpha)):
        if config.get(key) != ours:
            raise AdapterError(f"{folder} has {key}={plain(config.get(key))}, the run has {ours}: change adapter.{key}")
    _check_extras(config, folder)
    return read_weights(bank, weights)


def fit_folder(bank: AdapterBank, folder: Path) -> State:
    """An adapter of a PEFT folder for a bank of any scale, of its rank at least, and of its modules or more.

    Rows that the adapter has not got are zero, and so are modules; B takes up the difference between its scale and the
    bank's. Raises AdapterError as read_folder() does, and for a larger rank.
    """
    config, weights = _read_files(folder)
    _check_extras(config, folder)
    rank, state = _rank_of(config, folder), _by_name(_tensors(weights))
    if rank > bank.config.r:
        raise AdapterError(f"{folder} has r={rank}, more than adapter.r {bank.config.r}: raise adapter.r")
    scale = _scale_of(config, rank, folder) / (bank.config.lora_alpha / bank.config.r)
    _check_modules(state, bank, folder)
    whole = {name: torch.zeros(shape, device=bank.shadow.device) for name, shape in bank.shapes().items()}
    for name, tensor in sorted(state.items()):
        # A is [r, in], B [out, r].
        dim = 0 if _A in name else 1
        room = whole[name].narrow(dim, 0, rank)
        if tensor.shape != room.shape:
            raise AdapterError(f"{name} has shape {list(tensor.shape)}, not {list(room.shape)}")
        room.copy_(_served(name, tensor, bank.dtype))
        if dim == 1 and scale != 1:
            room.mul_(scale)
    return bank.local(whole)


def _check_modules(state: State, bank: AdapterBank, folder: Path) -> None:
    """Raises AdapterError for factors of modules that the bank has not got, and for one factor without the other."""
    unknown = sorted(state.keys() - bank.shapes().keys())
    if unknown or not state:
        raise AdapterError(f"{folder} does not fit the model: {len(unknown)} unknown keys {plain(unknown[:3])}")
    pairs = {name: name.replace(_A, _B) if _A in name else name.replace(_B, _A) for name in state}
    lonely = sorted(name for name, other in pairs.items() if other not in state)
    if lonely:
        raise AdapterError(f"{folder} holds {lonely[0]} without its other factor: export the adapter again")


def read_rank(folder: Path) -> int:
    """The rank of an adapter in a PEFT folder. Raises AdapterError."""
    return _rank_of(_read_files(folder)[0], folder)


def _rank_of(config: dict[str, Any], folder: Path) -> int:
    rank = config.get("r")
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise AdapterError(f"{folder} has r={plain(rank)}: correct it to a whole number above 0")
    return rank


def _scale_of(config: dict[str, Any], rank: int, folder: Path) -> float:
    alpha = config.get("lora_alpha")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < math.inf:
        raise AdapterError(f"{folder} has lora_alpha={plain(alpha)}: correct it to a number above 0")
    return alpha / rank


def _read_files(folder: Path) -> tuple[dict[str, Any], bytes]:
    """adapter_config.json and the weights of a LoRA adapter."""
    try:
        config = json.loads((folder / CONFIG_FILE).read_text())
        weights = (folder / WEIGHTS_FILE).read_bytes()
    except OSError as error:
        raise AdapterError(f"{folder} is not a PEFT adapter folder: {error.strerror} ({error.filename})") from error
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{folder / CONFIG_FILE} is damaged: {plain(error)}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise AdapterError(f"{folder / CONFIG_FILE} does not describe a LoRA adapter: export one with peft_type LORA")
    return config, weights


def _check_extras(config: dict[str, Any], folder: Path) -> None:
    for key in ELSEWHERE:
        if config.get(key):
            raise AdapterError(f"{folder} uses {key}, which cannot be served: export it without")
