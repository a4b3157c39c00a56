"""The frozen base of a replica with its adapter layers: what outlives the lives of a replica."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from clif.adapters.bank import AdapterBank, inject
from clif.collectives import Peers
from clif.config import Config, EngineConfig
from clif.models.causal import CausalSequences
from clif.models.dual_linear import Rows
from clif.models.loading import LoadedModel
from clif.models.stack import CausalStack, check_stack
from clif.ops import choose_decode, choose_kernels
from clif.replica.runner import ModelRunner

if TYPE_CHECKING:
    from clif.kernels.paged import PagedDecode

PROBE = 32
"""So many tokens that one odd one does not decide. Measured in bfloat16: 0.015 apart for 32 tokens, 0.03 to 0.04 for 8;
transformers' own eager and fused attention differ by 0.013 and 0.02 to 0.05."""
SAME = 1e-3


@dataclass(frozen=True)
class Base:
    """A model taken apart, its adapters, and how it is run.

    told: logits [vocabulary] after the probe, when the model was loaded.
    """

    stack: CausalStack
    bank: AdapterBank
    loaded: LoadedModel
    paged: PagedDecode | None
    told: torch.Tensor

    def runner(self, config: EngineConfig) -> ModelRunner:
        """A runner of its own KV cache."""
        return ModelRunner(self.stack, self.bank, config, self.loaded.device, self.loaded.dtype, self.paged)

    def renew(self, seed: int) -> None:
        """Make the adapters as they were when the model was loaded. Collective over the peers.

        Raises RuntimeError when the model does not compute any more what it did: its memory is damaged.
        """
        self.bank.reset(seed)
        error = float((_tell(self.stack, self.loaded) - self.told).norm() / self.told.norm())
        if not error < SAME:
            raise RuntimeError(f"the base model has changed in memory (relative difference {error:.2g})")


def build_base(config: Config, loaded: LoadedModel, peers: Peers | None = None) -> Base:
    """The model with dual layers; with peers, this rank's part of it. Collective over the peers.

    Raises ConfigError for a model that we would compute wrongly, LayoutError for one that the peers cannot share.
    """
    with torch.no_grad():
        probe, plan = _probe(loaded), CausalSequences([PROBE], loaded.device)
        # A model of which no rank holds the whole has nothing to be compared with.
        expected = loaded.model(probe.unsqueeze(0), use_cache=False).logits[0] if loaded.whole else None
        shared = peers is not None and peers.size > 1
        if expected is not None and shared:
            # Before it is cut: parts are rounded before they are added, which is no fault of the model's make.
            check_stack(CausalStack(loaded.model), plan, probe, expected)
        stack = CausalStack(loaded.model, peers)
        # The same first A on every replica: FedAvg averages factors, which only makes sense from one start.
        torch.manual_seed(config.run.seed)
        bank = inject(stack, config.adapter)
        launcher = choose_kernels(config.engine.lora_kernel, loaded.device, loaded.dtype, config.adapter.r)
        for layer in bank.layers if launcher else ():
            layer.fuse(launcher)
        if config.engine.pack_weights:
            stack.pack()
        if expected is not None and not shared:
            check_stack(stack, plan, probe, expected)
    paged = choose_decode(config.engine.decode_kernel, loaded.device, loaded.dtype)
    return Base(stack, bank, loaded, paged, _tell(stack, loaded))


def build_runner(config: Config, loaded: LoadedModel, peers: Peers | None = None) -> tuple[ModelRunner, AdapterBank]:
    """The base and a runner of it. Collective over the peers. Raises as build_base() does."""
    base = build_base(config, loaded, peers)
    return base.runner(config.engine), base.bank


def _probe(loaded: LoadedModel) -> torch.Tensor:
    return torch.arange(1, PROBE + 1, device=loaded.device) * 997 % loaded.model.config.vocab_size


@torch.no_grad()
def _tell(stack: CausalStack, loaded: LoadedModel) -> torch.Tensor:
    """Logits [vocabulary] after the probe, float32, by the base alone."""
    positions = torch.arange(PROBE, device=loaded.device)
    part = stack.part(Rows(PROBE), positions, CausalSequences([PROBE], loaded.device))
    (hidden,) = stack.layers(0, stack.num_layers, [stack.embed(_probe(loaded))], [part])
    return stack.logits(stack.norm(hidden[-1:]))[0].float()
