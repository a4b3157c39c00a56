"""Types of the KV cache: the model's own, or numbers of eight bits without scales. Free of Triton.

float8_e4m3fn has a sign, four bits of exponent and three of mantissa: relative roundings of up to 1/16, numbers from
2^-9 to 448. Larger ones saturate; a NaN stays one. Without calibration no scale is known, and 1 is what the field
takes: keys and values of usual models are far below 448.

Sources: FP8 formats (Micikevicius et al. 2022).
"""

from __future__ import annotations

from typing import Literal

import torch

FP8 = torch.float8_e4m3fn
FP8_MOST = 448.0
"""The largest number, beyond which there is only NaN."""


def cache_dtype(wanted: Literal["auto", "fp8"], dtype: torch.dtype) -> torch.dtype:
    """The type of the cache of a model of type dtype."""
    return FP8 if wanted == "fp8" else dtype


def to_cache_type(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x as a cache of this type holds it."""
    # The cast alone would make a NaN of what is too large. clamp() leaves a NaN as it is.
    return x.clamp(-FP8_MOST, FP8_MOST).to(FP8) if dtype == FP8 and x.dtype != FP8 else x.to(dtype)


def as_cached(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x in its own type, with the roundings of a cache of this type."""
    return x if x.dtype == dtype else to_cache_type(x, dtype).to(x.dtype)


def write_slots(cache: torch.Tensor, slots: torch.Tensor, x: torch.Tensor) -> None:
    """Write x [2 * kv_heads, rows, d] to slots [rows] of a cache [2 * kv_heads, slots, d] of its type or of FP8."""
    _bytes(cache).index_copy_(1, slots, _bytes(to_cache_type(x, cache.dtype)))


def read_slots(cache: torch.Tensor, slots: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What lies in slots [n] of a cache [2 * kv_heads, slots, d], in the type of the computation: a copy."""
    return _bytes(cache).index_select(1, slots).view(cache.dtype).to(dtype)


def _bytes(x: torch.Tensor) -> torch.Tensor:
    """FP8 as the bytes that it is: not every operator of every torch knows the type."""
    return x.view(torch.uint8) if x.dtype == FP8 else x
