"""The frozen base of an engine with its adapter layers: several engines may be built on it, one after the other."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from clif.adapters.bank import AdapterBank, inject
from clif.config import Config, EngineConfig
from clif.distributed.collectives import TpGroup
from clif.engine.guide import Guides
from clif.engine.runner import ModelRunner
from clif.kernels.cpu.host import HeadShape
from clif.kernels.kv_types import cache_dtype
from clif.models.backends import (
    choose_captured_kernels,
    choose_cpu_kernels,
    choose_decode,
    choose_kernels,
    choose_ops,
    choose_prefill,
    choose_varlen,
)
from clif.models.decode_kernel import decode_kernel_of
from clif.models.dual_linear import LoraRows
from clif.models.expert_linears import choose_grouped
from clif.models.kept import kept
from clif.models.proof import PROBE, ask_ends, compare, probe_ids
from clif.models.quantising import FORMATS, assert_stored, choose_quantised, quantise, use_kernels
from clif.models.spec import spec_of
from clif.models.stack import CausalStack
from clif.models.weights.loading import LoadedModel

if TYPE_CHECKING:
    from clif.kernels.paged_decode_host import PagedDecode
    from clif.kernels.paged_prefill_host import PagedPrefill

log = logging.getLogger(__name__)
SAME = 1e-3


@dataclass(frozen=True)
class Base:
    """A model taken apart, its adapters, and how it is run.

    probe_logits: logits [vocabulary] after the probe, when the model was loaded. guides: of its vocabulary. cpu_level:
    of the C++ kernels for CPUs; None: torch's operators.
    """

    stack: CausalStack
    bank: AdapterBank
    loaded: LoadedModel
    paged: PagedDecode | None
    probe_logits: torch.Tensor
    guides: Guides
    cpu_level: int | None = None
    prefill: PagedPrefill | None = None

    def runner(self, config: EngineConfig) -> ModelRunner:
        """A runner with its own KV cache."""
        return ModelRunner(
            self.stack,
            self.bank,
            config,
            self.loaded.device,
            self.loaded.dtype,
            self.paged,
            self.cpu_level,
            self.prefill,
        )

    def renew(self, seed: int) -> None:
        """Reset the adapters to what they were when the model was loaded. Collective over the peers.

        Raises RuntimeError if the model computes other logits than before: its memory is damaged.
        """
        self.bank.reset(seed)
        error = float((_probe(self.stack, self.loaded) - self.probe_logits).norm() / self.probe_logits.norm())
        if not error < SAME:
            raise RuntimeError(f"the base model has changed in memory (relative difference {error:.2g})")


def build_base(config: Config, loaded: LoadedModel, tp_group: TpGroup | None = None) -> Base:
    """The model with dual layers; with peers, this rank's part of it. Collective over the peers.

    Raises ConfigError for a model whose results would be wrong, LayoutError for one that the peers cannot share.
    """
    assert_stored(config.model.weight_dtype, loaded.device)
    with torch.no_grad():
        # Where no rank holds the whole model, no result exists to compare with; its architecture is checked instead.
        expected = ask_ends(loaded.model, config.model.max_context) if loaded.whole else None
        shared = tp_group is not None and tp_group.size > 1
        if expected is not None and shared:
            # Before it is sharded: shards are rounded before they are added, which is no fault of the architecture.
            compare(CausalStack(loaded.model), expected)
        kv_dtype = cache_dtype(config.engine.kv_dtype, loaded.dtype)
        head_dim = spec_of(loaded.model.config).layer.attention.head_dim
        cpu_level = choose_cpu_kernels(config.engine, loaded.device, loaded.dtype, head_dim)
        ops = choose_ops(loaded.device, loaded.dtype, max(config.model.max_context, PROBE), kv_dtype, cpu_level)
        stack = CausalStack(loaded.model, tp_group, ops, config.model.max_context)
        stack.varlen = choose_varlen(loaded.device, loaded.dtype, stack.head_dim) if stack.plain else None
        # The same first A on every replica: FedAvg averages factors, which makes sense from a common start only.
        torch.manual_seed(config.run.seed)
        bank = inject(stack, config.adapter)
        kind = config.model.weight_dtype
        quantised = kind in FORMATS
        if quantised:
            if expected is not None and not shared:
                # Before it is quantised: that changes results, which is no fault of the architecture.
                compare(stack, expected)
            kernels = choose_quantised(kind, loaded.device, loaded.dtype)
            log.info("%s", quantise(stack, kind, kernels))
        elif (as_kept := kept(stack)) is not None:
            log.info("%s", as_kept)
            kernels = choose_quantised(kind, loaded.device, loaded.dtype)
            if kernels is not None:
                use_kernels(stack, kernels)
        if stack.routed and choose_grouped(loaded.device, loaded.dtype):
            stack.group_experts()
        _choose_lora_kernels(stack, config, loaded)
        if config.engine.prepack_weights:
            stack.prepack() if cpu_level is None else stack.pack()
        if expected is not None and not shared and not quantised:
            compare(stack, expected)
    if not stack.plain:
        log.info("attention: no Triton kernel, for windows, caps or sinks of scores")
    paged = choose_decode(decode_kernel_of(config.engine, stack.spec), loaded.device, loaded.dtype, kv_dtype)
    prefill = None if paged is None or shared else _choose_prefill(stack, config.engine, loaded, kv_dtype)
    guides = Guides(loaded.tokenizer, stack.vocab_size)
    if config.online:
        guides.prepare()
    return Base(stack, bank, loaded, paged, _probe(stack, loaded), guides, cpu_level, prefill)


def _choose_lora_kernels(stack: CausalStack, config: Config, loaded: LoadedModel) -> None:
    """Layers with adapters compute by kernels from now on, where these can run."""
    launcher = choose_kernels(config.engine.lora_kernel, loaded.device, loaded.dtype, config.adapter.r)
    captured = choose_captured_kernels(config.engine, loaded.device, loaded.dtype, config.adapter.r)
    for linear in stack.linears if launcher or captured else ():
        linear.use_kernels(launcher, captured)


def _choose_prefill(
    stack: CausalStack, config: EngineConfig, loaded: LoadedModel, kv_dtype: torch.dtype
) -> PagedPrefill | None:
    heads = HeadShape(stack.num_heads, stack.num_kv_heads, stack.head_dim)
    return choose_prefill(config, loaded.device, loaded.dtype, heads, kv_dtype)


@torch.no_grad()
def _probe(stack: CausalStack, loaded: LoadedModel) -> torch.Tensor:
    """Logits [vocabulary] after the probe, float32, by the base alone."""
    positions = torch.arange(PROBE, device=loaded.device)
    sub_batch = stack.sub_batch(LoraRows(PROBE), positions, stack.sequences([PROBE]))
    ids = probe_ids(PROBE, stack.vocab_size, loaded.device)
    (hidden,) = stack.layers(0, stack.num_layers, [stack.embed(ids)], [sub_batch])
    return stack.logits(stack.norm(hidden[-1:]))[0].float()
