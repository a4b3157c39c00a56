"""All decoder layers of a serving step in one call of the C++ kernels, for a replica of one rank on a CPU.

Invariants: the structures hold addresses of the model's weights, of the adapters' slots and of the KV cache, none of
which moves while the engine lives; a step reads and writes no other memory.
"""

from __future__ import annotations

import ctypes

import torch

from clif.engine.attention import KVCache
from clif.engine.batch import Batch
from clif.kernels.cpu.host import RmsNorm, rows_of, scores_of
from clif.kernels.cpu.library import Layer, Linear, Norm, Step, load
from clif.kernels.cpu.products import linear
from clif.models.base_weight import Compiled
from clif.models.cpu_ops import CpuGate, CpuNorm, CpuRotary
from clif.models.dual_linear import DualLinear
from clif.models.layer import DecoderLayer
from clif.models.layer_ops import AngleTable, Unnormed
from clif.models.mlp import GatedMlp
from clif.models.qk_norm import ProjectionNorm
from clif.models.stack import CausalStack


class CompiledLayers:
    """The layers of a stack before one KV cache. Take `obstacle` first."""

    def __init__(self, stack: CausalStack, cache: KVCache, level: int) -> None:
        self._stack, self._cache, self._level = stack, cache, level
        tables = [angles.table for angles in stack.angles if isinstance(angles, AngleTable)]
        # Of both norms of each layer, whose weights have to live.
        self._all = [_over_all_heads(layer) for layer in stack.decoder_layers]
        structs = [
            _layer(layer, cache.layers[layer.index], tables[layer.rope], norms)
            for layer, norms in zip(stack.decoder_layers, self._all, strict=True)
        ]
        self._layers = (Layer * len(structs))(*structs)
        self._scratch = torch.empty(0, dtype=torch.bfloat16)

    @staticmethod
    def obstacle(stack: CausalStack, cache: KVCache) -> str | None:
        """Why a stack cannot be computed so; None: it can."""
        if stack.tp_group.size > 1:
            return "its ranks share each layer"
        if cache.layers[0].dtype != torch.bfloat16:
            return f"the KV cache is of {cache.layers[0].dtype}"
        for layer in stack.decoder_layers:
            if not isinstance(layer.mlp, GatedMlp):
                return "a layer has experts"
            if not all(isinstance(linear.base, Compiled) for linear in layer.linears):
                return "its weights are not packed"
            norms = layer.norm, layer.mlp_norm, layer.post_norm, layer.post_mlp_norm
            kinds = [*((norm, CpuNorm | Unnormed) for norm in norms if norm is not None)]
            for part, kind in (*kinds, (layer.rotary, CpuRotary), (layer.mlp.gate, CpuGate)):
                if not isinstance(part, kind):
                    return f"a layer has a {type(part).__name__}"
        tables = all(isinstance(angles, AngleTable) for angles in stack.angles)
        return None if tables else "its angles are not those of positions alone"

    def __call__(self, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
        """hidden [rows, hidden size], fresh memory, through all layers in place."""
        table = batch.layout.step
        assert table is not None
        step = Step(
            rows_of(table),
            table.positions.data_ptr(),
            table.cache_slots.data_ptr(),
            table.adapters.data_ptr() if table.adapted else None,
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


def _layer(layer: DecoderLayer, cache: torch.Tensor, angles: torch.Tensor, all_heads: tuple[RmsNorm, ...]) -> Layer:
    """all_heads: norms of query and key over all heads of a row, or none."""
    mlp, rotary = layer.mlp, layer.rotary
    assert isinstance(rotary, CpuRotary) and isinstance(mlp, GatedMlp) and isinstance(mlp.gate, CpuGate)
    return Layer(
        *(_linear(linear) for linear in (layer.qkv, layer.out, mlp.gate_up, mlp.down)),
        *(_norm(norm) for norm in (layer.norm, layer.mlp_norm, layer.post_norm, layer.post_mlp_norm)),
        *([norm.as_struct() for norm in all_heads] or (Norm(), Norm())),
        layer.residual_scale,
        mlp.gate.code,
        rotary.shape.as_struct(),
        scores_of(*layer.scores),
        cache.data_ptr(),
        angles.data_ptr(),
    )


def _norm(norm: object) -> Norm:
    return norm.norm.as_struct() if isinstance(norm, CpuNorm) else Norm()


def _over_all_heads(layer: DecoderLayer) -> tuple[RmsNorm, ...]:
    """Norms of query and key over the whole projection; none where there are none."""
    if layer.projection_norms is None:
        return ()
    return tuple(_wide(norm) for norm in (layer.projection_norms.query, layer.projection_norms.key))


def _wide(norm: ProjectionNorm) -> RmsNorm:
    return RmsNorm(norm.weight.float(), norm.eps)


def _linear(dual: DualLinear) -> Linear:
    base = dual.base
    assert isinstance(base, Compiled)
    return linear(base.matrix, base.bias, None if dual.lora is None else dual.lora.packed)
