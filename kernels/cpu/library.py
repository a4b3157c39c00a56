"""Loads the C++ kernels for CPUs and declares their functions: see clif_cpu.h for what each computes."""

from __future__ import annotations

import ctypes
import sysconfig
from ctypes import POINTER, Structure, c_char_p, c_float, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch

from clif.kernels.cpu.interface import interface_of

NONE, AVX512, AMX = 0, 1, 2
"""Levels: neither; AVX512 with bfloat16; AMX besides."""
LEVELS = {AVX512: "AVX512 with bfloat16", AMX: "AMX"}
TYPES = {torch.float32: 0, torch.bfloat16: 1}
SILU, GELU = 0, 1
"""Activations of gates: GELU is the one with tanh."""
SCALE_TYPES = {**TYPES, torch.float16: 2, torch.int8: 3}
BY_OUTPUT = 62
"""clif_linear's group_shift of one group, as wide as the matrix."""
HEAD_BYTES, MAX_HEAD_DIM = 16, 256
"""Attention reads heads in pieces of so many bytes, and has memory for heads of so many numbers."""


class Linear(Structure):
    """clif_linear. Pointers are addresses of tensors, whose owner keeps them alive."""

    _fields_ = [
        ("in_", c_int64),
        ("out", c_int64),
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("rank", c_int64),
        ("a", c_void_p),
        ("b", c_void_p),
        ("a_stride", c_int64),
        ("b_stride", c_int64),
        ("bits", c_int64),
        ("scales", c_void_p),
        ("least", c_void_p),
        ("scale_type", c_int64),
        ("least_type", c_int64),
        ("group_shift", c_int64),
    ]


class Norm(Structure):
    """clif_norm."""

    _fields_ = [("weight", c_void_p), ("eps", c_float), ("wide", c_int)]


class Heads(Structure):
    """clif_heads."""

    _fields_ = [
        ("heads", c_int64),
        ("kv_heads", c_int64),
        ("head_dim", c_int64),
        ("rotary_dim", c_int64),
        ("q_norm", Norm),
        ("k_norm", Norm),
    ]


class Scores(Structure):
    """clif_scores."""

    _fields_ = [
        ("scale", c_float),
        ("softcap", c_float),
        ("window", c_int64),
        ("sinks", c_void_p),
    ]


class StepRows(Structure):
    """clif_rows."""

    _fields_ = [
        ("rows", c_int64),
        ("sequence", c_void_p),
        ("context", c_void_p),
        ("blocks", c_void_p),
        ("max_blocks", c_int64),
        ("block_size", c_int64),
    ]


class Layer(Structure):
    """clif_layer."""

    _fields_ = [
        ("qkv", Linear),
        ("attention_out", Linear),
        ("gate_up", Linear),
        ("down", Linear),
        ("norm", Norm),
        ("mlp_norm", Norm),
        ("post_norm", Norm),
        ("post_mlp_norm", Norm),
        ("q_all", Norm),
        ("k_all", Norm),
        ("residual_scale", c_float),
        ("activation", c_int),
        ("heads", Heads),
        ("scores", Scores),
        ("cache", c_void_p),
        ("angles", c_void_p),
    ]


class Step(Structure):
    """clif_step."""

    _fields_ = [
        ("rows", StepRows),
        ("positions", c_void_p),
        ("slots", c_void_p),
        ("adapters", c_void_p),
        ("cache_slots", c_int64),
    ]


class Learning(Structure):
    """clif_learning, of training.h."""

    _fields_ = [
        ("in_", c_int64),
        ("out", c_int64),
        ("weight", c_void_p),
        ("rank", c_int64),
        ("r", c_int64),
        ("members", c_int64),
        ("outputs", c_void_p),
        ("a", c_void_p),
        ("b", c_void_p),
        ("scale", c_float),
    ]


class Sequences(Structure):
    """clif_sequences, of training.h."""

    _fields_ = [
        ("heads", c_int64),
        ("kv_heads", c_int64),
        ("head_dim", c_int64),
        ("sequences", c_int64),
        ("ends", c_void_p),
        ("query", c_void_p),
        ("key", c_void_p),
        ("value", c_void_p),
        ("stride", c_int64),
        ("scores", Scores),
    ]


SIGNATURES: dict[str, tuple[type | None, list[type]]] = {
    "clif_level": (c_int, []),
    "clif_interface": (c_char_p, []),
    "clif_packed_size": (c_int64, [c_int64, c_int64]),
    "clif_pack": (None, [c_void_p, c_int64, c_int64, c_int64, c_float, c_void_p]),
    "clif_widen": (None, [POINTER(Linear), c_int64, c_int64, c_void_p, c_int]),
    "clif_linear_forward": (
        None,
        [POINTER(Linear), c_void_p, c_int64, c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_int, c_int],
    ),
    "clif_linear_gated": (
        None,
        [POINTER(Linear), c_int, c_void_p, c_int64, c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_int, c_int],
    ),
    "clif_rms_norm": (
        None,
        [c_int, c_void_p, c_void_p, POINTER(Norm), c_void_p, c_void_p, c_int64, c_int64, c_int],
    ),
    "clif_rotate": (
        None,
        [c_int, POINTER(Heads), c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_int64, c_int],
    ),
    "clif_gate": (None, [c_int, c_int, c_void_p, c_void_p, c_int64, c_int64, c_int]),
    "clif_argmax": (None, [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int]),
    "clif_attention": (
        None,
        [
            *(c_int, POINTER(Heads), c_void_p, c_int64, c_void_p, c_int64, POINTER(StepRows), POINTER(Scores)),
            *(c_void_p, c_int),
        ],
    ),
    "clif_linear_backward_scratch": (c_int64, [POINTER(Learning), c_int64, c_int]),
    "clif_linear_backward": (
        None,
        [
            *(POINTER(Learning), c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_int64, c_void_p),
            *(c_void_p, c_void_p, c_int64, c_void_p, c_int, c_int),
        ],
    ),
    "clif_causal_scratch": (c_int64, [POINTER(Sequences), c_int, c_int]),
    "clif_causal": (None, [POINTER(Sequences), c_void_p, c_void_p, c_void_p, c_int, c_int]),
    "clif_causal_backward": (
        None,
        [POINTER(Sequences), *[c_void_p] * 6, c_int64, c_void_p, c_int, c_int],
    ),
    "clif_rms_norm_backward": (
        None,
        [c_void_p, POINTER(Norm), c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_int],
    ),
    "clif_gate_backward": (None, [c_int, c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_int]),
    "clif_rotate_backward": (None, [c_void_p, c_void_p, *[c_int64] * 5, c_int]),
    "clif_cross_entropy": (None, [c_void_p, c_void_p, c_float, c_void_p, c_int64, c_int64, c_int]),
    "clif_layers_scratch": (c_int64, [POINTER(Layer), c_int64]),
    "clif_layers": (None, [POINTER(Layer), c_int64, POINTER(Step), c_void_p, c_void_p, c_int, c_int]),
}
"""Result and arguments of each function."""


class Absent(Exception):
    """The kernels cannot be used here; the message says why."""


@cache
def load() -> ctypes.CDLL:
    """The library. Raises Absent where it was not built, does not load, or was built from other sources."""
    # torch comes first: its OpenMP threads are the library's as well, which has none of its own.
    built = Path(__file__).with_name(f"_clif_cpu{sysconfig.get_config_var('EXT_SUFFIX')}")
    if not built.is_file():
        raise Absent("they were not built when CLIF was installed: install a C++ compiler, then CLIF again")
    try:
        library = ctypes.CDLL(str(built))
    except OSError as error:
        raise Absent(f"{built.name} does not load ({error})") from error
    declare(library, interface_of(built.parent))
    return library


def declare(library: ctypes.CDLL, interface: str | None) -> None:
    """Declare the functions. interface: which they must have; None: the library came with these sources.

    Raises Absent for a library of other sources: it would read structures wrongly.
    """
    missing = [name for name in SIGNATURES if not hasattr(library, name)]
    for name, (result, arguments) in SIGNATURES.items() if not missing else ():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    if missing or interface not in (None, library.clif_interface().decode()):
        raise Absent("they were built from other sources than CLIF has now: install CLIF again")


def level() -> int:
    """What this machine allows. Raises Absent where the kernels cannot be used."""
    found: int = load().clif_level()
    if found == NONE:
        raise Absent("this CPU has no AVX512 with bfloat16")
    return found
