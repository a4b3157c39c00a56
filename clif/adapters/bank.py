"""All dual layers of one model, and what can be done with their adapters as a whole.

Invariant: the shadow lives in one flat float32 vector of which every layer's factors are views (gradients
likewise), so that the optimizer, FedAvg, snapshots and finiteness checks are single vector operations.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import nn

from clif.adapters.layers import BatchRows, DualLoraLinear
from clif.config import AdapterConfig, ConfigError

State = dict[str, torch.Tensor]


class AdapterBank:
    """The dual layers of a model by module name, and the flat shadow.

    shadow: the trained vector [n]; gradient [n]: its .grad, allocated once and accumulated in place.
    """

    def __init__(self, layers: dict[str, DualLoraLinear], rows: BatchRows, config: AdapterConfig) -> None:
        self.layers, self.rows, self.config = layers, rows, config
        sizes = [p.numel() for _, p in self._factors()]
        device = next(iter(layers.values())).weight.device
        self.shadow = nn.Parameter(torch.empty(sum(sizes), device=device))
        self.gradient = self.shadow.grad = torch.zeros_like(self.shadow)
        at = 0
        for (_, factor), size in zip(self._factors(), sizes, strict=True):
            view = self.shadow.data[at : at + size].view_as(factor)
            view.copy_(factor.data)
            factor.data = view
            factor.grad = self.gradient[at : at + size].view_as(factor)
            at += size

    def _factors(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, layer in self.layers.items():
            yield f"{name}.lora_A.weight", layer.shadow_a
            yield f"{name}.lora_B.weight", layer.shadow_b

    def shadow_state(self) -> State:
        """The shadow's factors by PEFT's names without its prefix, as views, float32."""
        return {name: factor.detach() for name, factor in self._factors()}

    def set_shadow(self, state: State) -> None:
        """Overwrite the shadow. The caller has checked names, shapes and finiteness (see peft_io.read_weights)."""
        for name, factor in self._factors():
            factor.data.copy_(state[name])

    def fill_slot(self, slot: int, state: State) -> None:
        """Copy an adapter into a serving slot, rounding to the base dtype once."""
        for name, layer in self.layers.items():
            layer.serving_a[slot].copy_(state[f"{name}.lora_A.weight"])
            layer.serving_b[slot].copy_(state[f"{name}.lora_B.weight"])

    def product_error(self, mean: torch.Tensor, mine: torch.Tensor) -> tuple[float, float]:
        """Squared Frobenius norms, summed over layers, of (B_i - Bbar)(A_i - Abar) and of Bbar Abar.

        mean, mine: flat shadows. From r x r Gram matrices: |B A|^2 = <B^T B, A A^T>.
        """
        error = total = 0.0
        at = 0
        for layer in self.layers.values():
            sizes = (layer.shadow_a.shape, layer.shadow_b.shape)
            parts = []
            for shape in sizes:
                n = shape.numel()
                parts.append((mean[at : at + n].view(shape), mine[at : at + n].view(shape)))
                at += n
            (a_mean, a_mine), (b_mean, b_mine) = parts
            error += _product_norm2(a_mine - a_mean, b_mine - b_mean)
            total += _product_norm2(a_mean, b_mean)
        return error, total


def _product_norm2(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(((b.T @ b) * (a @ a.T)).sum())


def inject(model: nn.Module, config: AdapterConfig) -> AdapterBank:
    """Replace the targeted linear layers of a frozen model by dual layers that share their weights.

    Raises ConfigError when no linear layer matches adapter.target_modules.
    """
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    names = [name for name in linears if _is_target(name, config.target_modules, model)]
    if not names:
        leaves = ", ".join(sorted({n.rsplit(".", 1)[-1] for n in linears}))
        raise ConfigError(
            f"adapter.target_modules {config.target_modules!r} matches no linear layer: there are {leaves}"
        )
    rows = BatchRows()
    layers = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        layers[name] = DualLoraLinear(linears[name], config.r, config.lora_alpha / config.r, config.serving_slots, rows)
        setattr(model.get_submodule(parent), leaf, layers[name])
    return AdapterBank(layers, rows, config)


def _is_target(name: str, targets: str | tuple[str, ...], model: nn.Module) -> bool:
    """peft's rules: "all-linear" is all but the output head; a string is a regular expression; a list is suffixes."""
    if targets == "all-linear":
        return model.get_submodule(name) is not model.get_output_embeddings()  # type: ignore[operator]
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == t or name.endswith(f".{t}") for t in targets)
