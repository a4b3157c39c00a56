"""All adapters of one model, and operations on them as a whole.

Invariant: the shadow is one flat float32 vector of which every layer's factors are views, and so are its gradients.
The optimizer, FedAvg, snapshots and finiteness checks are therefore single vector operations.

Sources: LoRA (Hu et al. 2021).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

from clif.adapters.rounding import Rounding
from clif.config import AdapterConfig, ConfigError
from clif.distributed.collectives import TpGroup
from clif.models.lora_factors import Factors, LoraFactors
from clif.models.shard import ShardSpec
from clif.models.stack import CausalStack
from clif.models.targets import ALL, Targets, each, is_target

State = dict[str, torch.Tensor]


class AdapterBank:
    """The adapted dual layers of a model, and the flat shadow.

    shadow: the trained vector [n]; gradient [n]: its .grad, allocated once and accumulated in place. on_fill: called
    when a serving slot has been filled; the device may do it later.
    """

    def __init__(self, layers: list[LoraFactors], config: AdapterConfig, tp_group: TpGroup | None = None) -> None:
        self.layers, self.config, self.tp_group = layers, config, tp_group or TpGroup()
        self.on_fill: Callable[[], None] = lambda: None
        masters = [m for layer in layers for m in (layer.shadow_a, layer.shadow_b)]
        self.shadow = nn.Parameter(torch.cat([m.data.flatten() for m in masters]))
        self.gradient = self.shadow.grad = torch.zeros_like(self.shadow)
        for master, view, grad in zip(masters, self._views(self.shadow.data), self._views(self.gradient), strict=True):
            master.data, master.grad = view, grad
        self._specs = {name: spec for layer in layers for name, spec in layer.shard_specs().items()}
        self._shares = self._share_of_each()
        self._rounding = Rounding(layers, self.shadow.data)
        self.refresh()

    def _share_of_each(self) -> torch.Tensor | None:
        """1 / how many peers hold a coordinate, [n]; None without peers."""
        if self.tp_group.size == 1:
            return None
        shares = torch.empty_like(self.shadow.data)
        for name, pair in self.factors(shares).items():
            for factor, spec in zip(pair, self._specs[name], strict=True):
                factor.fill_(1 / spec.holders(self.tp_group.size))
        return shares

    def _views(self, flat: torch.Tensor, layers: range | None = None) -> Iterator[torch.Tensor]:
        """A and B of every layer in turn, as views of a vector that is laid out like the shadow."""
        at = 0
        for layer in self._chosen(layers):
            for shape in (layer.shadow_a.shape, layer.shadow_b.shape):
                yield flat[at : at + shape.numel()].view(shape)
                at += shape.numel()

    def _chosen(self, layers: range | None) -> list[LoraFactors]:
        return self.layers if layers is None else self.layers[layers.start : layers.stop]

    def factors(self, flat: torch.Tensor, layers: range | None = None) -> dict[str, Factors]:
        """A [r, in] and B [out, r] by module name, as views of a vector that is laid out like the shadow.

        layers: of these alone; the vector holds nothing else.
        """
        views, found = self._views(flat, layers), {}
        for layer in self._chosen(layers):
            found.update(layer.by_module(next(views), next(views)))
        return found

    def sizes(self, layers: range | None = None) -> list[int]:
        """Coordinates of each layer in the shadow."""
        return [layer.shadow_a.numel() + layer.shadow_b.numel() for layer in self._chosen(layers)]

    def part(self, flat: torch.Tensor, layers: range) -> torch.Tensor:
        """The coordinates of these layers, as a view of a vector that is laid out like the shadow."""
        start = sum(self.sizes(range(layers.start)))
        return flat[start : start + sum(self.sizes(layers))]

    def holders(self, name: str) -> int:
        """How many of the peers compute the same part of a module's product B A."""
        of_a, of_b = self._specs[name]
        return (of_b if of_b.shard is not None else of_a).holders(self.tp_group.size)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the numbers that serve."""
        return self.layers[0].serving_a.dtype

    @property
    def names(self) -> list[str]:
        """Names of the adapted modules."""
        return list(self.factors(self.shadow.data))

    def shadow_state(self) -> State:
        """The shadow's factors by PEFT's names without its prefix, as views, float32."""
        return self.state(self.shadow.data)

    def shapes(self) -> dict[str, torch.Size]:
        """Shapes of the whole adapter's factors by PEFT's names."""
        shapes = {}
        for name, pair in self.factors(self.shadow.data).items():
            for key, factor, spec in zip("AB", pair, self._specs[name], strict=True):
                sizes = list(factor.shape)
                if spec.shard is not None:
                    sizes[spec.dim] = spec.shard.total
                shapes[f"{name}.lora_{key}.weight"] = torch.Size(sizes)
        return shapes

    def local(self, whole: State) -> State:
        """This rank's part of a whole adapter."""
        parts = {}
        for name, pair in self._specs.items():
            for key, spec in zip("AB", pair, strict=True):
                parts[f"{name}.lora_{key}.weight"] = spec.take(whole[f"{name}.lora_{key}.weight"])
        return parts

    def whole(self, flat: torch.Tensor) -> State:
        """The whole adapter, of which this rank's part lies in `flat` like the shadow. Collective over the peers.

        By PEFT's names, on every peer.
        """
        state = {name: flat.new_empty(shape) for name, shape in self.shapes().items()}
        for rank, part in enumerate(self.tp_group.all_gather(flat)):
            for name, pair in self.factors(part).items():
                for key, factor, spec in zip("AB", pair, self._specs[name], strict=True):
                    spec.of_rank(rank, self.tp_group.size).put(state[f"{name}.lora_{key}.weight"], factor)
        return state

    def join_gradient(self) -> None:
        """Sum the gradients of factors that several peers hold and of which each has seen a part. Collective."""
        if self.tp_group.size == 1:
            return
        held: list[tuple[torch.Tensor, ShardSpec, torch.Tensor]] = []
        for name, pair in self.factors(self.gradient).items():
            for factor, spec in zip(pair, self._specs[name], strict=True):
                if spec.holders(self.tp_group.size) > 1:
                    # A KV head that some hold: at its position among all, so that one sum serves all ranks.
                    sizes = list(factor.shape)
                    if spec.shard is not None:
                        sizes[spec.dim] = spec.shard.total
                    whole = factor.new_zeros(sizes)
                    spec.put(whole, factor)
                    held.append((factor, spec, whole))
        if not held:
            return
        joined = self.tp_group.all_reduce_(torch.cat([whole.flatten() for _, _, whole in held]))
        for (factor, spec, whole), part in zip(held, joined.split([w.numel() for _, _, w in held]), strict=True):
            factor.copy_(spec.take(part.view(whole.shape)))

    def norm(self, flat: torch.Tensor) -> torch.Tensor:
        """Euclidean norm of the whole vector of which `flat` is this rank's part. Collective over the peers."""
        if self._shares is None:
            return flat.norm()
        return self.tp_group.all_reduce_((flat * flat).dot(self._shares).view(1))[0].sqrt()

    def own(self, stride: int) -> torch.Tensor | slice:
        """Every stride-th coordinate that no other rank holds: its gradient is never a partial sum."""
        if self._shares is None:
            return slice(None, None, stride)
        return torch.nonzero(self._shares == 1).flatten()[::stride]

    def reset(self, seed: int) -> None:
        """Reset the shadow to what it was before any training, and its gradient to zero."""
        torch.manual_seed(seed)
        for layer in self.layers:
            layer.draw()
        self.gradient.zero_()
        self.refresh()

    def set_shadow(self, state: State) -> None:
        """Overwrite the shadow. The caller has checked names, shapes and finiteness (see peft_io.read_weights)."""
        for name, factor in self.shadow_state().items():
            factor.copy_(state[name])
        self.refresh()

    def flat(self, state: State) -> torch.Tensor:
        """This rank's part of an adapter as a vector [n] that is laid out like the shadow, in the host's memory."""
        flat = torch.empty(self.shadow.shape)
        for name, (a, b) in self.factors(flat).items():
            a.copy_(state[f"{name}.lora_A.weight"])
            b.copy_(state[f"{name}.lora_B.weight"])
        return flat

    def state(self, flat: torch.Tensor) -> State:
        """Factors by PEFT's names without its prefix, as views of a vector that is laid out like the shadow."""
        state = {}
        for name, (a, b) in self.factors(flat).items():
            state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"] = a, b
        return state

    def load_shadow(self, flat: torch.Tensor) -> None:
        """Overwrite the shadow by a vector [n] of its own layout."""
        self.shadow.data.copy_(flat)
        self.refresh()

    def refresh(self) -> None:
        """Round the masters to what the shadow's rows are multiplied with: whatever changes them calls it once."""
        self._rounding.apply()
        for layer in self.layers:
            layer.pack_shadow()

    def fill_slot(self, slot: int, state: State) -> None:
        """Copy an adapter into a serving slot, rounding to the base dtype once."""
        factors = {name: (state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"]) for name in self.names}
        for layer in self.layers:
            layer.fill_slot(slot, factors)
        self.on_fill()


def inject(stack: CausalStack, config: AdapterConfig) -> AdapterBank:
    """Give the targeted linear layers of a frozen model adapters.

    Raises ConfigError when adapter.target_modules, or one name of its list, matches no linear layer, and when it
    matches one outside the decoder layers.
    """
    names = _targets(stack, config.target_modules)
    layers = []
    for layer in stack.linears:
        adapted = [i for i, name in enumerate(layer.names) if name in names]
        if adapted:
            layers.append(layer.adapt(adapted, config.r, config.lora_alpha / config.r, config.serving_slots))
    outside = names - {name for layer in layers for name in layer.shard_specs()}
    if outside:
        raise ConfigError(
            f"adapter.target_modules {config.target_modules!r} matches {', '.join(sorted(outside))}, which lies "
            "outside the decoder layers: leave it out"
        )
    return AdapterBank(layers, config, stack.tp_group)


def _targets(stack: CausalStack, targets: Targets) -> set[str]:
    """Names of the linear layers that targets mean. Raises ConfigError for a target that means none."""
    head = stack.model.get_output_embeddings()  # type: ignore[operator]
    linears = {name: module for name, module in stack.model.named_modules() if isinstance(module, nn.Linear)}
    if targets == ALL:
        return {name for name, module in linears.items() if module is not head}
    found = {target: {name for name in linears if is_target(name, alone)} for target, alone in each(targets).items()}
    idle = [target for target, names in found.items() if not names]
    if idle or not found:
        leaves = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linears}))
        wrong = ", ".join(map(repr, idle)) or "an empty list"
        raise ConfigError(f"adapter.target_modules: {wrong} matches no linear layer of the model: there are {leaves}")
    return set().union(*found.values())
