"""Adapters in PEFT's format: adapter_config.json and adapter_model.safetensors, in both directions."""

from __future__ import annotations

import json
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from clif.adapters.bank import AdapterBank, State
from clif.adapters.peft_files import ELSEWHERE, PREFIX
from clif.adapters.store import CONFIG_FILE, WEIGHTS_FILE
from clif.errors import InputError, plain


class AdapterError(InputError):
    """An adapter does not fit the model, or holds values that must not be served."""


def config_json(bank: AdapterBank, base: str) -> str:
    """adapter_config.json of the bank's adapters. base: name or path of the base model.

    Not made by peft, whose import takes half of a rank's start; a test holds it against what peft makes.
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
    try:
        config = json.loads((folder / CONFIG_FILE).read_text())
        weights = (folder / WEIGHTS_FILE).read_bytes()
    except OSError as error:
        raise AdapterError(f"{folder} is not a PEFT adapter folder: {error.strerror} ({error.filename})") from error
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{folder / CONFIG_FILE} is damaged: {plain(error)}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise AdapterError(f"{folder / CONFIG_FILE} does not describe a LoRA adapter: export one with peft_type LORA")
    for key, ours in (("r", bank.config.r), ("lora_alpha", bank.config.lora_alpha)):
        if config.get(key) != ours:
            raise AdapterError(f"{folder} has {key}={plain(config.get(key))}, the run has {ours}: change adapter.{key}")
    for key in ELSEWHERE:
        if config.get(key):
            raise AdapterError(f"{folder} uses {key}, which cannot be served: export it without")
    return read_weights(bank, weights)
