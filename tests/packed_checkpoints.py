"""Small checkpoints in the packed formats that people have, written from the formats' documentation, and the same
models with the weights that the numbers stand for."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from families import SIZES
from numpy.typing import NDArray
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

Numbers = NDArray[Any]
AWQ_WORD = [0, 2, 4, 6, 1, 3, 5, 7]
"""Which of eight outputs each number of a word is, from the lowest bits on."""


@dataclass(frozen=True)
class Checkpoint:
    """write: numbers from 0 on [out, in], zero points [out, groups], scales, order of groups -> tensors of a module."""

    name: str
    bits: int
    group: int | None
    quantisation: dict[str, Any]
    write: Callable[[Checkpoint, Numbers, Numbers, torch.Tensor, Numbers], dict[str, torch.Tensor]]
    zeros: bool = False
    order: bool = False
    scales: torch.dtype = torch.float16
    fields: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> dict[str, Any]:
        return {**SIZES, "model_type": "llama", **self.fields}


def words(numbers: Numbers, bits: int) -> torch.Tensor:
    """Each 32 / bits numbers of a row in a word, the first in the lowest bits."""
    fit = 32 // bits
    packed = np.zeros((len(numbers), numbers.shape[1] // fit), np.uint64)
    for i in range(fit):
        packed |= numbers[:, i::fit].astype(np.uint64) << np.uint64(bits * i)
    return torch.from_numpy(packed.astype(np.uint32).view(np.int32).copy())


def _gptq(one: Checkpoint, q: Numbers, z: Numbers, scales: torch.Tensor, groups: Numbers) -> dict[str, torch.Tensor]:
    less = 0 if one.quantisation.get("checkpoint_format") == "gptq_v2" else 1
    found = {"qweight": words(q, one.bits).T, "qzeros": words(z.T - less, one.bits), "scales": scales.T}
    return {**found, "g_idx": torch.from_numpy(groups.astype(np.int32))}


def _awq(one: Checkpoint, q: Numbers, z: Numbers, scales: torch.Tensor, groups: Numbers) -> dict[str, torch.Tensor]:
    def shuffled(by_input: Numbers) -> torch.Tensor:
        return words(by_input.reshape(len(by_input), -1, 8)[..., AWQ_WORD].reshape(by_input.shape), 4)

    return {"qweight": shuffled(q.T), "qzeros": shuffled(z.T), "scales": scales.T}


def _packed(one: Checkpoint, q: Numbers, z: Numbers, scales: torch.Tensor, groups: Numbers) -> dict[str, torch.Tensor]:
    found = {"weight_packed": words(q, one.bits), "weight_scale": scales, "weight_shape": torch.tensor(q.shape)}
    if one.zeros:
        found["weight_zero_point"] = words(z.T, one.bits).T
    return found | ({"weight_g_idx": torch.from_numpy(groups.astype(np.int32))} if one.order else {})


def _signed(one: Checkpoint, q: Numbers, z: Numbers, scales: torch.Tensor, groups: Numbers) -> dict[str, torch.Tensor]:
    found = {"weight": torch.from_numpy((q.astype(np.int16) - 128).astype(np.int8)), "weight_scale": scales}
    return found | ({"weight_zero_point": torch.from_numpy((z - 128).astype(np.int8))} if one.zeros else {})


def _compressed(form: str, bits: int, group: int | None, symmetric: bool, order: bool = False) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "group_size": group}
    weights["actorder"] = "group" if order else None
    weights["strategy"] = "channel" if group is None else "group"
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups, "ignore": ["lm_head"]}


BF16, PACK = torch.bfloat16, "pack-quantized"
CHECKPOINTS = (
    Checkpoint("gptq", 4, 32, {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}, _gptq),
    Checkpoint(
        "gptq, desc_act",
        4,
        16,
        {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": False, "desc_act": True},
        _gptq,
        zeros=True,
        order=True,
        fields={"attention_bias": True},
    ),
    Checkpoint(
        "gptq v2, 8 bits",
        8,
        None,
        {"quant_method": "gptq", "bits": 8, "group_size": -1, "sym": False, "checkpoint_format": "gptq_v2"},
        _gptq,
        zeros=True,
    ),
    Checkpoint("awq", 4, 32, {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}, _awq, zeros=True),
    Checkpoint("compressed, 4 bits", 4, 32, _compressed(PACK, 4, 32, True), _packed, scales=BF16),
    Checkpoint("compressed, zero points", 4, 32, _compressed(PACK, 4, 32, False), _packed, zeros=True, scales=BF16),
    Checkpoint("compressed, order", 4, 32, _compressed(PACK, 4, 32, True, True), _packed, order=True, scales=BF16),
    Checkpoint("compressed, 4 bits by output", 4, None, _compressed(PACK, 4, None, True), _packed, scales=BF16),
    Checkpoint("compressed, 8 bits", 8, None, _compressed("int-quantized", 8, None, True), _signed, scales=BF16),
    Checkpoint(
        "compressed, 8 bits, zero points", 8, None, _compressed("int-quantized", 8, None, False), _signed, zeros=True
    ),
)


def write_checkpoint(one: Checkpoint, folder: Path) -> tuple[str, str]:
    """Two folders: the packed model, and the same one with plain weights in float32."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**one.config), dtype=torch.float32)
    tensors: dict[str, torch.Tensor] = {}
    plain: dict[str, torch.Tensor] = {}
    rng = np.random.default_rng(0)
    for name, weight in model.state_dict().items():
        if weight.dim() != 2 or "layers" not in name:
            tensors[name] = plain[name] = torch.randn_like(weight) * 0.2 + (1.0 if "norm" in name else 0.0)
            continue
        found, dense = _module(one, *weight.shape, rng)
        plain[name] = dense
        module = name.removesuffix("weight")
        tensors |= {f"{module}{leaf}": tensor.contiguous() for leaf, tensor in found.items()}
    for kind, state, extra in (("packed", tensors, {"quantization_config": one.quantisation}), ("plain", plain, {})):
        (folder / kind).mkdir(parents=True)
        save_file(state, folder / kind / "model.safetensors", metadata={"format": "pt"})
        described = {**one.config, **extra, "architectures": ["LlamaForCausalLM"]}
        (folder / kind / "config.json").write_text(json.dumps(described))
    return str(folder / "packed"), str(folder / "plain")


def _module(
    one: Checkpoint, out: int, in_: int, rng: np.random.Generator
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    group, most = one.group or in_, 1 << one.bits
    groups = np.arange(in_) // group
    if one.order:
        rng.shuffle(groups)
    count = -(-in_ // group)
    numbers = rng.integers(0, most, (out, in_))
    zeros = rng.integers(most // 4, 3 * most // 4, (out, count)) if one.zeros else np.full((out, count), most // 2)
    scales = torch.from_numpy(rng.uniform(0.5, 1.5, (out, count)) * 0.3 / most).to(one.scales)
    dense = torch.from_numpy(numbers - zeros[:, groups]).float() * scales.float()[:, torch.from_numpy(groups)]
    return one.write(one, numbers, zeros, scales, groups), dense
