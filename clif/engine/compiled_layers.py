"""All decoder layers of a serving step in one call of the C++ kernels, for a replica of one rank on a CPU.

Invariants: the structures hold addresses of the model's weights, of the adapters' slots and of the KV cache, none of
which moves while the engine lives; a step reads and writes no other memory.
"""

from __future__ import annotations

import ctypes

import torch

from clif.engine.attention import KVCache
from clif.engine.batch import Batch
from clif.kernels.cpu.host import rows_of, scores_of
from clif.kernels.cpu.library import Layer, Linear, Step, load
from clif.kernels.cpu.products import linear
from clif.models.base_weight import Compiled
from clif.models.cpu_ops import CpuGate, CpuNorm, CpuRotary
from clif.models.dual_linear import DualLinear
from clif.models.layer import DecoderLayer
from clif.models.layer_ops import AngleTable
from clif.models.mlp import GatedMlp
from clif.models.stack import CausalStack


class CompiledLayers:
    """The layers of a stack before one KV cache. Take `obstacle` first."""

    def __init__(self, stack: CausalStack, cache: KVCache, level: int) -> None:
        self._stack, self._cache, self._level = stack, cache, level
        structs = [_layer(layer, cache.layers[layer.index]) for layer in stack.decoder_layers]
        self._layers = (Layer * len(structs))(*structs)
        (angles,) = stack.angles
        assert isinstance(angles, AngleTable)
        self._angles = angles.table
        self._scratch = torch.empty(0, dtype=torch.bfloat16)

    @staticmethod
    def obstacle(stack: CausalStack, cache: KVCache) -> str | None:
        """Why a stack cannot be computed so; None: it can."""
        if stack.tp_group.size > 1:
            return "its ranks share each layer"
        if cache.layers[0].dtype != torch.bfloat16:
            return f"the KV cache is of {cache.layers[0].dtype}"
        for layer in stack.decoder_layers:
            if layer.obstacle is not None:
                return layer.obstacle
            if not all(isinstance(linear.base, Compiled) for linear in layer.linears):
                return "its weights are not packed"
            parts = (
                (layer.norm, CpuNorm),
                (layer.mlp_norm, CpuNorm),
                (layer.rotary, CpuRotary),
                (layer.mlp.gate, CpuGate),
            )
            for part, kind in parts:
                if not isinstance(part, kind):
                    return f"a layer has a {type(part).__name__}"
        if len(stack.angles) > 1:
            return "its layers have several rotary embeddings"
        return None if isinstance(stack.angles[0], AngleTable) else "its angles are not those of positions alone"

    def __call__(self, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
        """hidden [rows, hidden size], fresh memory, through all layers in place."""
        table = batch.layout.step
        assert table is not None
        step = Step(
            rows_of(table),
            table.positions.data_ptr(),
            table.cache_slots.data_ptr(),
            table.adapters.data_ptr() if table.adapted else None,
            self._angles.data_ptr(),
            self._cache.layers[0].shape[1],
        )
        load().clif_layers(
            self._layers,
            len(self._layers),
            ctypes.byref(step),
            hidden.data_ptr(),
            self._memory(len(hidden)).data_ptr(),
            self._level,
            torch.get_num_threads(),
        )
        return hidden

    def _memory(self, rows: int) -> torch.Tensor:
        """Scratch for so many rows, kept: fresh memory would cost its first touch in every step."""
        needed = load().clif_layers_scratch(self._layers, rows)
        if len(self._scratch) < needed:
            self._scratch = torch.empty(needed, dtype=torch.bfloat16)
        return self._scratch


def _layer(layer: DecoderLayer, cache: torch.Tensor) -> Layer:
    norm, mlp_norm, rotary = layer.norm, layer.mlp_norm, layer.rotary
    assert isinstance(norm, CpuNorm) and isinstance(mlp_norm, CpuNorm) and isinstance(rotary, CpuRotary)
    assert isinstance(layer.mlp, GatedMlp)
    return Layer(
        *(_linear(linear) for linear in (layer.qkv, layer.out, layer.mlp.gate_up, layer.mlp.down)),
        norm.weight.data_ptr(),
        mlp_norm.weight.data_ptr(),
        norm.eps,
        mlp_norm.eps,
        rotary.shape.as_struct(),
        scores_of(*layer.scores),
        cache.data_ptr(),
    )


def _linear(dual: DualLinear) -> Linear:
    base = dual.base
    assert isinstance(base, Compiled)
    return linear(base.matrix, base.bias, None if dual.lora is None else dual.lora.packed)
