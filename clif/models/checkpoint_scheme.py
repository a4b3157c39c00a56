"""How a checkpoint's weights are quantised, from its config.json: what is read packed, and what is not. Free of torch.

Sources: the quantization_config of GPTQ (GPTQModel, AutoGPTQ), of AutoAWQ, and of compressed-tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Method = Literal["gptq", "awq", "compressed-tensors"]
MARKS: dict[Method, tuple[str, ...]] = {
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
    "awq": ("qweight", "qzeros", "scales"),
    "compressed-tensors": (
        *("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx", "input_scale"),
        *("input_zero_point", "weight"),
    ),
}
"""Tensors that stand in files for the weight of a linear layer."""
FIELDS = ("quantization_config", "compression_config")


@dataclass(frozen=True)
class Scheme:
    """bits: of a whole number; group: inputs that share a scale, None: all of an output's; zeros: there are zero
    points; as_stored: those of GPTQ are what files say, and not one more; ordered: groups may be of inputs that do not
    lie together."""

    method: Method
    bits: int
    group: int | None
    zeros: bool
    as_stored: bool = False
    ordered: bool = False


class UnreadSchemeError(ValueError):
    """The text says what of it is not read."""


def scheme_of(tree: Mapping[str, Any]) -> Scheme | None:
    """That of a config.json; None: its weights are plain. Raises UnreadSchemeError for one that is not read."""
    found = next((tree[field] for field in FIELDS if tree.get(field)), None)
    if found is None:
        return None
    fields = found if isinstance(found, dict) else getattr(found, "__dict__", {})
    method = fields.get("quant_method")
    method = str(getattr(method, "value", method) or "of a method that is not named")[:40]
    if method not in READERS:
        raise UnreadSchemeError(method)
    try:
        return READERS[method](fields)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UnreadSchemeError(f"{method}, {error if isinstance(error, ValueError) else f'no {error}'}") from error


def _gptq(fields: Mapping[str, Any]) -> Scheme:
    layout = fields.get("checkpoint_format", "gptq")
    _expect("checkpoint_format", layout, "gptq", "gptq_v2")
    _expect("pack_dtype", fields.get("pack_dtype", "int32"), "int32")
    if fields.get("dynamic"):
        raise ValueError("other bits in some modules (dynamic)")
    zeros = not fields.get("sym", True)
    return Scheme(
        "gptq",
        _bits(fields["bits"]),
        _group(fields["group_size"]),
        zeros,
        layout == "gptq_v2",
        bool(fields.get("desc_act")),
    )


def _awq(fields: Mapping[str, Any]) -> Scheme:
    _expect("version", str(fields.get("version", "gemm")).lower(), "gemm")
    _expect("bits", fields["bits"], 4)
    return Scheme("awq", 4, _group(fields["group_size"]), bool(fields.get("zero_point", True)))


def _compressed(fields: Mapping[str, Any]) -> Scheme:
    _expect("format", fields["format"], "pack-quantized", "int-quantized")
    if fields.get("kv_cache_scheme"):
        raise ValueError("a quantised KV cache (kv_cache_scheme)")
    sparsity = (fields.get("sparsity_config") or {}).get("format", "dense")
    _expect("sparsity_config.format", sparsity, "dense")
    if (fields.get("transform_config") or {}).get("config_groups"):
        raise ValueError("transforms of weights (transform_config)")
    found = {_group_of(group["weights"]) for group in fields["config_groups"].values()}
    if len(found) != 1:
        raise ValueError("several kinds of weights (config_groups)")
    return found.pop()


def _group_of(weights: Mapping[str, Any]) -> Scheme:
    _expect("type", weights.get("type", "int"), "int")
    strategy = weights.get("strategy") or ("group" if weights.get("group_size") else "channel")
    _expect("strategy", strategy, "group", "channel")
    group = _group(weights["group_size"]) if strategy == "group" else None
    ordered, zeros = weights.get("actorder") == "group", not weights.get("symmetric", True)
    return Scheme("compressed-tensors", _bits(weights["num_bits"]), group, zeros, ordered=ordered)


def _bits(bits: Any) -> int:
    _expect("bits", bits, 4, 8)
    return int(bits)


def _group(size: Any) -> int | None:
    if size == -1:
        return None
    if not isinstance(size, int) or size < 16 or size % 16:
        raise ValueError(f"groups of {size} inputs, which are no multiple of 16")
    return size


def _expect(field: str, value: Any, *wanted: Any) -> None:
    if value not in wanted:
        raise ValueError(f"{field} {str(value)[:40]}")


READERS: dict[str, Callable[[Mapping[str, Any]], Scheme]] = {
    "gptq": _gptq, "awq": _awq, "compressed-tensors": _compressed,
}  # fmt: skip
