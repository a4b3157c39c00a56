"""All dual layers of one model, and what can be done with their adapters as a whole.

Invariant: the shadow lives in one flat float32 vector of which every layer's factors are views (gradients
likewise), so that the optimizer, FedAvg, snapshots and finiteness checks are single vector operations.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import nn

from clif.config import AdapterConfig, ConfigError
from clif.models.dual_linear import DualLinear
from clif.models.stack import CausalStack

State = dict[str, torch.Tensor]


class AdapterBank:
    """The adapted dual layers of a model, and the flat shadow.

    shadow: the trained vector [n]; gradient [n]: its .grad, allocated once and accumulated in place.
    """

    def __init__(self, layers: list[DualLinear], config: AdapterConfig) -> None:
        self.layers, self.config = layers, config
        masters = [m for layer in layers for m in (layer.shadow_a, layer.shadow_b)]
        self.shadow = nn.Parameter(torch.cat([m.data.flatten() for m in masters]))
        self.gradient = self.shadow.grad = torch.zeros_like(self.shadow)
        for master, view, grad in zip(masters, self._views(self.shadow.data), self._views(self.gradient), strict=True):
            master.data, master.grad = view, grad
        self.refresh()

    def _views(self, flat: torch.Tensor) -> Iterator[torch.Tensor]:
        """A and B of every layer in turn, as views of a vector that is laid out like the shadow."""
        at = 0
        for layer in self.layers:
            for shape in (layer.shadow_a.shape, layer.shadow_b.shape):
                yield flat[at : at + shape.numel()].view(shape)
                at += shape.numel()

    def factors(self, flat: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """A [r, in] and B [out, r] by module name, as views of a vector that is laid out like the shadow."""
        views, found = self._views(flat), {}
        for layer in self.layers:
            found.update(layer.factors(next(views), next(views)))
        return found

    @property
    def names(self) -> list[str]:
        """Names of the adapted modules."""
        return list(self.factors(self.shadow.data))

    def shadow_state(self) -> State:
        """The shadow's factors by PEFT's names without its prefix, as views, float32."""
        state = {}
        for name, (a, b) in self.factors(self.shadow.data).items():
            state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"] = a, b
        return state

    def set_shadow(self, state: State) -> None:
        """Overwrite the shadow. The caller has checked names, shapes and finiteness (see peft_io.read_weights)."""
        for name, factor in self.shadow_state().items():
            factor.copy_(state[name])

    def refresh(self) -> None:
        """Round the masters to what the shadow's rows are multiplied with; to be called after they have changed."""
        for layer in self.layers:
            layer.refresh()

    def fill_slot(self, slot: int, state: State) -> None:
        """Copy an adapter into a serving slot, rounding to the base dtype once."""
        factors = {name: (state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"]) for name in self.names}
        for layer in self.layers:
            layer.fill_slot(slot, factors)

    def product_error(self, mean: torch.Tensor, mine: torch.Tensor) -> tuple[float, float]:
        """Squared Frobenius norms, summed over layers, of (B_i - Bbar)(A_i - Abar) and of Bbar Abar.

        mean, mine: flat shadows. From r x r Gram matrices: |B A|^2 = <B^T B, A A^T>.
        """
        apart, whole = self.factors(mine - mean).values(), self.factors(mean).values()
        return sum(_product_norm2(a, b) for a, b in apart), sum(_product_norm2(a, b) for a, b in whole)


def _product_norm2(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(((b.T @ b) * (a @ a.T)).sum())


def inject(stack: CausalStack, config: AdapterConfig) -> AdapterBank:
    """Give the targeted linear layers of a frozen model adapters.

    Raises ConfigError when adapter.target_modules matches no linear layer, or one outside the decoder layers.
    """
    model = stack.model
    linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    names = {name for name in linears if _is_target(name, config.target_modules, model)}
    if not names:
        leaves = ", ".join(sorted({n.rsplit(".", 1)[-1] for n in linears}))
        raise ConfigError(
            f"adapter.target_modules {config.target_modules!r} matches no linear layer: there are {leaves}"
        )
    layers = []
    for layer in stack.linears:
        adapted = [i for i, name in enumerate(layer.names) if name in names]
        if adapted:
            layer.adapt(adapted, config.r, config.lora_alpha / config.r, config.serving_slots)
            layers.append(layer)
    outside = names - {name for layer in layers for name in layer.names}
    if outside:
        raise ConfigError(
            f"adapter.target_modules {config.target_modules!r} matches {', '.join(sorted(outside))}, which lies "
            "outside the decoder layers: leave it out"
        )
    return AdapterBank(layers, config)


def _is_target(name: str, targets: str | tuple[str, ...], model: nn.Module) -> bool:
    """peft's rules: "all-linear" is all but the output head; a string is a regular expression; a list is suffixes."""
    if targets == "all-linear":
        return model.get_submodule(name) is not model.get_output_embeddings()  # type: ignore[operator]
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == t or name.endswith(f".{t}") for t in targets)
