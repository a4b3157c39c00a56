"""Memory that a rank will hold, from the model's description and the configuration. Free of torch.

For models without biases. Not counted: temporaries of a forward, logits, message buffers, the Python process and, on
a GPU, its context.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple

from clif.config import AdapterConfig, Config
from clif.errors import ConfigError, InputError
from clif.models.expert_spec import Experts
from clif.models.layer_spec import LinearGroup, ModelSpec
from clif.models.spec import spec_of
from clif.models.targets import is_target
from clif.models.weights.files import locate, read_model
from clif.models.weights.forms import Form
from clif.models.weights.kept_forms import FormOf, kept_forms

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
MASTER = 4
"""Bytes of a number of the shadow and of its training state: float32."""
PACKED = 32
"""The C++ kernels for CPUs pad outputs and inputs of a packed matrix to multiples of it."""
QUANTISED = ("int8", "int4", "fp8", "nf4")
"""Values of model.weight_dtype that are not the model's type."""
GROUP, SCALE = 32, 2
"""Numbers of 4 bits that share a scale, and bytes of one; numbers of 8 bits have one for each output."""
NF4_BLOCK, WIDE_SCALE = 64, 4
"""The same of NF4, and bytes of its scales and of those of FP8."""
Device = Literal["cpu", "cuda"]
BFLOAT16 = frozenset({"avx512_bf16", "amx_bf16"})
"""CPU instructions, as Linux names them, that multiply numbers of bfloat16."""


class EstimateError(InputError):
    """The sizes of the model are not known here; the message says why."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank. prepacked_weights: copies of weights and adapters in the layout of a CPU's matrix kernels;
    activations: the most that training forwards keep; snapshot: during a round."""

    weights: int
    prepacked_weights: int
    kv_cache: int
    adapter_slots: int
    shadow: int
    gradient: int
    moments: int
    snapshot: int
    activations: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Room:
    """Memory in bytes, of a host or of a GPU, that `ranks` ranks share."""

    bytes: int
    ranks: int


def read_spec(path: str) -> ModelSpec:
    """The description of the model that model.path names: a folder, a GGUF file, or random:<folder or config.json>.

    Raises EstimateError where there is none here, or it lacks a size.
    """
    try:
        local = locate(path)
    except ConfigError as error:
        raise EstimateError(str(error)) from error
    if local is None:
        raise EstimateError(f"model.path {path} has no config.json here to read sizes from")
    try:
        return spec_of(read_model(local))
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise EstimateError(f"{local} is not that of a Llama-style model ({error})") from error


def dtype_of(config: Config, device: Device, flags: Collection[str] = ()) -> str:
    """The dtype to count with. flags: of the host's CPU.

    On a CPU a start measures what auto becomes: bfloat16 where the CPU multiplies it by itself.
    """
    if config.model.dtype != "auto":
        return config.model.dtype
    return "bfloat16" if device == "cuda" or not BFLOAT16.isdisjoint(flags) else "float32"


def estimate(config: Config, spec: ModelSpec, tp_size: int, device: Device, flags: Collection[str] = ()) -> Memory:
    """Bytes of a rank of a replica of tp_size ranks, which share linear layers, KV heads and the output head.

    engine.kv_tokens auto counts as one request of full length, the least with which a replica starts.
    """
    dtype, kv_tokens = dtype_of(config, device, flags), config.engine.kv_tokens
    if kv_tokens == "auto":
        kv_tokens = config.model.max_context
    # A spare block, for rows of padding.
    kv_tokens += config.engine.block_size
    prepacked = config.engine.prepack_weights and device == "cpu" and dtype == "bfloat16"
    slot, shadow = _adapters(config.adapter, spec, tp_size)
    trains = config.train.enabled
    kv_bytes = 1 if config.engine.kv_dtype == "fp8" else BYTES[dtype]
    kv_heads = -(-spec.layer.attention.kv_heads // tp_size)
    return Memory(
        weights=_weights(config, spec, tp_size, BYTES[dtype], prepacked and config.engine.cpu_kernels == "auto"),
        prepacked_weights=BYTES[dtype] * _packed(config, spec, tp_size) if prepacked else 0,
        kv_cache=kv_bytes * spec.num_layers * 2 * kv_heads * spec.layer.attention.head_dim * kv_tokens,
        # One more than serve: the shadow, rounded to the dtype of the base.
        adapter_slots=BYTES[dtype] * slot * (config.adapter.serving_slots + 1),
        shadow=MASTER * shadow,
        gradient=MASTER * shadow,
        moments=2 * MASTER * shadow if trains else 0,
        # Shadow and moments from before the round, and the vector that is averaged.
        snapshot=4 * MASTER * shadow if trains else 0,
        activations=config.engine.activation_mib << 20 if trains else 0,
    )


def _weights(config: Config, spec: ModelSpec, tp_size: int, number: int, padded: bool) -> int:
    """Bytes of all weights where a dense number takes `number`. padded: quantised ones as the C++ kernels read them.

    A quantised head is no view of the embedding.
    """
    kind, layers = config.model.weight_dtype, spec.num_layers
    forms = kept_forms(config.model)
    shapes, head = _shapes(spec, tp_size), _head(spec, tp_size)
    # Rows of the hidden size: embedding and norms.
    rest = number * (spec.vocab_size + layers * len(spec.layer.all_norms) + 1) * spec.hidden_size
    rest += number * layers * _choosing(spec, tp_size)
    if forms is not None:
        kept = [
            number * math.prod(shape) if form is None else form.bytes(*shape, padded)
            for shape, form in _kept(spec, forms, tp_size)
        ]
        return rest + sum(kept)
    if kind in QUANTISED:
        unit = PACKED if padded else 1
        of_layer, of_head = (sum(quantised_bytes(*one, kind, unit) for one in some) for some in (shapes, [head]))
        return rest + layers * of_layer + of_head
    # Where the head is tied, it is a view of the embedding.
    return rest + number * (layers * sum(map(math.prod, shapes)) + (0 if spec.tied else math.prod(head)))


def _kept(spec: ModelSpec, forms: FormOf, tp_size: int) -> Iterator[tuple[tuple[int, int], Form | None]]:
    """Outputs and inputs on a rank, and form, of each linear layer and the head, unless that is a view."""
    for name, group, i in spec.linears():
        yield (_rows(group, tp_size)[i], _width(group, tp_size)), forms(f"{name}.weight")
    form = forms(f"{spec.embedding if spec.tied else spec.head}.weight")
    if form is not None or not spec.tied:
        yield _head(spec, tp_size), form


def _choosing(spec: ModelSpec, tp_size: int) -> int:
    """Numbers of what chooses a layer's experts, and of their biases."""
    mlp = spec.layer.mlp
    if not isinstance(mlp, Experts):
        return 0
    biases = -(-2 * mlp.inner // tp_size) + spec.hidden_size if mlp.biases else 0
    return mlp.count * (spec.hidden_size + biases)


def _shapes(spec: ModelSpec, tp_size: int) -> list[tuple[int, int]]:
    """Outputs and inputs of a decoder layer's merged linear layers on a rank, and of the matrices of its experts."""
    merged = [(sum(_rows(group, tp_size)), _width(group, tp_size)) for group in spec.layer.linears]
    return merged + _matrices(spec, tp_size)


def _head(spec: ModelSpec, tp_size: int) -> tuple[int, int]:
    """Outputs and inputs of a rank's part of the head: the largest."""
    return -(-spec.vocab_size // tp_size), spec.hidden_size


def quantised_bytes(out: int, width: int, kind: str, unit: int = 1) -> int:
    """Bytes of a matrix [out, width] of one of QUANTISED, both padded to multiples of `unit`, scales included.

    See clif.kernels.quantised, and fp8_matrix and nf4_matrix, which have no padded forms. Least numbers, which few
    weights have, are not counted.
    """
    if kind == "fp8":
        return out * (width + WIDE_SCALE)
    if kind == "nf4":
        return out * -(-width // NF4_BLOCK) * (NF4_BLOCK // 2 + WIDE_SCALE)
    out, width = -(-out // unit) * unit, -(-width // unit) * unit
    if kind == "int8":
        return out * (width + SCALE)
    return out * -(-width // GROUP) * (GROUP // 2 + SCALE)


def _packed(config: Config, spec: ModelSpec, tp_size: int) -> int:
    """Numbers of all weights as the kernels for CPUs read them, and of the adapters. Quantised ones are no copies."""
    shapes, head, compiled = _shapes(spec, tp_size), _head(spec, tp_size), config.engine.cpu_kernels == "auto"
    size = _padded if compiled else lambda *shape: math.prod(shape)
    weights = 0
    if config.model.weight_dtype == "auto":
        weights = spec.num_layers * sum(size(*shape) for shape in shapes) + size(*head)
    forms = kept_forms(config.model)
    if forms is not None:
        weights = sum(size(*shape) for shape, form in _kept(spec, forms, tp_size) if form is None)
    if not compiled:
        return weights
    slot = 0
    for out, width, modules in _layers(config.adapter, spec, tp_size):
        rank = config.adapter.r * len(modules)
        slot += _padded(rank, width) + _padded(out, rank)
    return weights + (config.adapter.serving_slots + 1) * slot


def _matrices(spec: ModelSpec, tp_size: int) -> list[tuple[int, int]]:
    """Outputs and inputs, on a rank, of the matrices of a layer's experts."""
    mlp = spec.layer.mlp
    if not isinstance(mlp, Experts):
        return []
    inner = -(-mlp.inner // tp_size)
    return [(2 * inner, spec.hidden_size), (spec.hidden_size, inner)] * mlp.count


def _padded(out: int, width: int) -> int:
    """Numbers of a matrix in the layout of the C++ kernels."""
    return -(-out // PACKED) * PACKED * -(-width // PACKED) * PACKED


def _rows(group: LinearGroup, tp_size: int) -> tuple[int, ...]:
    """Outputs of each module on a rank."""
    sizes = tuple(module.size for module in group.modules)
    return tuple(-(-size // tp_size) for size in sizes) if group.shard_dim == "out" else sizes


def _width(group: LinearGroup, tp_size: int) -> int:
    """Inputs on a rank."""
    return group.inputs.size if group.shard_dim == "out" else -(-group.inputs.size // tp_size)


class _Adapted(NamedTuple):
    """A merged layer [out, width] on a rank. modules: outputs of those that are adapted."""

    out: int
    width: int
    modules: tuple[int, ...]


def _layers(config: AdapterConfig, spec: ModelSpec, tp_size: int) -> Iterator[_Adapted]:
    """The merged linear layers that have an adapter."""
    for layer in range(spec.num_layers):
        for group in spec.layer.linears:
            rows, names = _rows(group, tp_size), [f"{spec.layers}.{layer}.{module.name}" for module in group.modules]
            adapted = [n for n, name in zip(rows, names, strict=True) if is_target(name, config.target_modules)]
            if adapted:
                yield _Adapted(sum(rows), _width(group, tp_size), tuple(adapted))


def _adapters(config: AdapterConfig, spec: ModelSpec, tp_size: int) -> tuple[int, int]:
    """Numbers of one slot, in the merged form of LoraFactors, and of the shadow."""
    slot = shadow = 0
    for out, width, modules in _layers(config, spec, tp_size):
        rank = config.r * len(modules)
        slot += rank * (width + out)
        shadow += rank * width + config.r * sum(modules)
    return slot, shadow
