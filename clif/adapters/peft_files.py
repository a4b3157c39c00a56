"""The two files of an adapter in PEFT's format: checks that need neither torch nor a model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import safetensors

PREFIX = "base_model.model."
FLOAT32 = "F32"
ELSEWHERE = ("modules_to_save", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora")
"""Features of PEFT that CLIF does not serve."""


def describe(shapes: Mapping[str, Sequence[int]]) -> str:
    """A digest of names and shapes: adapters of one model have the same. Names without PEFT's prefix."""
    listed = sorted((name, list(shape)) for name, shape in shapes.items())
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:32]


def config_flaw(text: str, r: int, lora_alpha: float) -> str:
    """Why an adapter_config.json is not one of the run's; empty if it is."""
    try:
        config: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        return f"adapter_config.json is no JSON ({error})"
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        return "adapter_config.json does not describe a LoRA adapter"
    for key, ours in (("r", r), ("lora_alpha", lora_alpha)):
        if config.get(key) != ours:
            return f"adapter_config.json has {key}={config.get(key)}, not {ours}"
    extra = [key for key in ELSEWHERE if config.get(key)]
    return f"adapter_config.json uses {', '.join(extra)}" if extra else ""


def weights_flaw(weights: bytes, described: str) -> str:
    """Why these safetensors bytes are not the run's adapter; empty if they are. described: from describe()."""
    try:
        tensors = dict(safetensors.deserialize(weights))
    except safetensors.SafetensorError as error:
        return f"the weights are no safetensors file ({error})"
    foreign = sorted(name for name in tensors if not name.startswith(PREFIX))
    if foreign:
        return f"the weights hold {foreign[0]}, which is no name of PEFT's"
    if describe({name.removeprefix(PREFIX): tensor["shape"] for name, tensor in tensors.items()}) != described:
        return "the weights have other tensors than the adapters of this run"
    for name, tensor in sorted(tensors.items()):
        if tensor["dtype"] != FLOAT32:
            return f"{name} is {tensor['dtype']}, not {FLOAT32}"
        if not np.isfinite(np.frombuffer(tensor["data"], dtype="<f4")).all():
            return f"{name} holds values that are not finite"
    return ""
