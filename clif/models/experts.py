"""The MLP of a layer with experts: every row takes a few of many gated MLPs, as the router says.

Invariants: rows are grouped by expert, so that an expert is one product for all rows of a batch, whatever they are
there for; a row's sum over its experts has one order, so that equal batches give equal numbers; rows that serve leave
nothing in the autograd graph.

Sources: sparsely gated mixtures of experts (Shazeer et al. 2017); Mixtral (Jiang et al. 2024) for top-k after softmax;
MegaBlocks (Gale et al. 2023) for rows grouped by expert instead of a capacity of each; Megatron-LM (Shoeybi et al.
2019) for cutting the columns of every expert, as those of a dense MLP.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from clif.distributed.collectives import TpGroup
from clif.models.base_backward import base_backward
from clif.models.base_weight import BaseWeight, Dense
from clif.models.dual_linear import LoraRows
from clif.models.expert_spec import Experts
from clif.models.layer_ops import Activation
from clif.models.shard import shard_of

if TYPE_CHECKING:
    from clif.kernels.cpu.training import TrainingKernels

Router = Callable[[torch.Tensor], tuple[Any, torch.Tensor, torch.Tensor]]
"""transformers' router: hidden [rows, hidden size] -> its scores, and of every row the weights and the numbers of its
experts, both [rows, k]."""


class Choice(NamedTuple):
    """Experts of rows, both [rows, k]: their weights, which need not add up to 1, and their numbers."""

    weights: torch.Tensor
    experts: torch.Tensor


@dataclass
class Expert:
    """The frozen weights of one expert: gate and up, one below the other [2 inner, hidden], and down [hidden, inner].

    With peers the columns of this rank alone.
    """

    gate_up: FrozenLinear
    down: FrozenLinear


@dataclass
class FrozenLinear:
    """A linear layer without adapters."""

    base: BaseWeight


class Groups:
    """(row, choice) pairs of a batch, grouped by expert. Waits for the device.

    order [pairs]: where each lies among the flattened choices; rows [pairs]: row of each; counts: pairs of each expert.
    """

    def __init__(self, experts: torch.Tensor, count: int) -> None:
        """experts [rows, k]: numbers below `count`."""
        flat = experts.flatten()
        self.k = experts.shape[1]
        self.order = flat.argsort(stable=True)
        self.rows = self.order // self.k
        self.counts: list[int] = torch.bincount(flat, minlength=count).tolist()

    def each(self, weights: Sequence[FrozenLinear], *xs: torch.Tensor) -> Any:
        """(weight, this expert's pairs of each x) of every expert that has some."""
        for expert, *parts in zip(weights, *(x.split(self.counts) for x in xs), strict=True):
            if len(parts[0]):
                yield expert, *parts

    def spread(self, pairs: torch.Tensor) -> torch.Tensor:
        """[pairs, n] by expert -> [rows, k, n]."""
        return torch.empty_like(pairs).index_copy_(0, self.order, pairs).view(-1, self.k, pairs.shape[1])


class RoutedMlp:
    """sum over a row's experts of weight * down(activation(gate) * up). experts: all of them; tp_group: the ranks that
    hold their other columns."""

    def __init__(self, router: Router, experts: Sequence[Expert], gate: Activation, tp_group: TpGroup) -> None:
        """gate: [rows, gate | up] -> activation(gate) * up [rows, inner]."""
        self.router, self.experts, self.gate, self.tp_group = router, tuple(experts), gate, tp_group
        self.training: TrainingKernels | None = None

    @property
    def frozen(self) -> list[FrozenLinear]:
        """Its weights, in the order in which a step reads them."""
        return [linear for expert in self.experts for linear in (expert.gate_up, expert.down)]

    def __call__(self, hidden: Sequence[torch.Tensor], rows: Sequence[LoraRows]) -> list[torch.Tensor]:
        """hidden: [rows, hidden size], normalised, for each kind of rows; the same shapes come back."""
        choices = [Choice(*self.router(x)[1:]) for x in hidden]
        if rows[-1].learns and torch.is_grad_enabled():
            learnt, served = _Learn.apply(hidden[-1], *choices[-1], self, list(hidden[:-1]), choices[:-1])
            return [*served.split([len(x) for x in hidden[:-1]]), learnt]
        y, _ = self.forward(_together(hidden), Choice(*map(_together, zip(*choices, strict=True))))
        return list(y.split([len(x) for x in hidden]))

    def forward(self, x: torch.Tensor, choice: Choice) -> tuple[torch.Tensor, torch.Tensor]:
        """x [rows, hidden size] -> the sum over its experts, and what the gate read, [rows, k, 2 inner]."""
        groups = Groups(choice.experts, len(self.experts))
        taken = x.index_select(0, groups.rows)
        wide = torch.cat([one.base.forward(part) for one, part in groups.each(self._gate_ups, taken)])
        gated = self.gate(wide)
        out = torch.cat([one.base.forward(part) for one, part in groups.each(self._downs, gated)])
        weighted = _wide(groups.spread(out)) * _wide(choice.weights).unsqueeze(-1)
        return self.tp_group.all_reduce_(weighted.sum(1).to(x.dtype)), groups.spread(wide)

    def backward(self, grad: torch.Tensor, choice: Choice, wide: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of x [rows, hidden size] and of the weights [rows, k], given that of the sum and what the gate
        read."""
        groups = Groups(choice.experts, len(self.experts))
        carried = self._carry(groups, self._downs, grad.index_select(0, groups.rows))
        with torch.enable_grad():
            read = wide.flatten(0, 1).index_select(0, groups.order).requires_grad_()
            gated = self.gate(read)
        # An expert's output enters by its product with the gradient alone: it is not computed again.
        of_weights = groups.spread((_wide(carried) * _wide(gated.detach())).sum(1, keepdim=True)).squeeze(-1)
        weights = choice.weights.flatten().index_select(0, groups.order).unsqueeze(-1)
        (of_read,) = torch.autograd.grad(gated, read, (carried * weights).to(gated.dtype))
        of_x = _wide(groups.spread(self._carry(groups, self._gate_ups, of_read))).sum(1)
        together = self.tp_group.all_reduce_(torch.cat((of_x, of_weights), 1).to(grad.dtype))
        of_x, of_weights = together.split([grad.shape[1], choice.weights.shape[1]], 1)
        return of_x, of_weights.to(choice.weights.dtype)

    def _carry(self, groups: Groups, linears: Sequence[FrozenLinear], grad: torch.Tensor) -> torch.Tensor:
        """Gradient of the pairs' outputs -> that of their inputs."""
        return torch.cat([base_backward(one.base, part, self.training) for one, part in groups.each(linears, grad)])

    @property
    def _gate_ups(self) -> list[FrozenLinear]:
        return [expert.gate_up for expert in self.experts]

    @property
    def _downs(self) -> list[FrozenLinear]:
        return [expert.down for expert in self.experts]


class _Learn(torch.autograd.Function):
    """All rows through their experts at once; the graph holds the learning rows only."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weights: torch.Tensor,
        experts: torch.Tensor,
        mlp: RoutedMlp,
        others: list[torch.Tensor],
        choices: list[Choice],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        choice = Choice(weights, experts)
        together = Choice(*map(_together, zip(*choices, choice, strict=True)))
        y, wide = mlp.forward(_together([*others, x]), together)
        served, learnt = y.split([len(y) - len(x), len(x)])
        ctx.mlp = mlp
        # A part of a larger tensor would hold all of it.
        ctx.save_for_backward(weights, experts, wide[len(served) :].clone() if len(served) else wide)
        ctx.mark_non_differentiable(served)
        ctx.set_materialize_grads(False)
        return learnt, served

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        weights, experts, wide = ctx.saved_tensors
        return *ctx.mlp.backward(gradients[0], Choice(weights, experts), wide), None, None, None, None


def routed_mlp(spec: Experts, part: Callable[[str], Any], gate: Activation, tp_group: TpGroup) -> RoutedMlp:
    """The MLP of a decoder layer. part: what lies at a dotted path within transformers' layer, which is left no more
    than this rank's columns of the experts."""
    stacks = []
    for name, (shard_dim, shard) in spec.shards(tp_group.rank, tp_group.size).items():
        weight = part(name)
        if weight.shape[-2 if shard_dim == "out" else -1] != shard.size:
            # A copy, so that the whole is freed.
            weight.data = shard_of(weight.data, shard_dim, shard).clone()
        stacks.append([FrozenLinear(Dense(one, None)) for one in weight.data])
    experts = [Expert(*pair) for pair in zip(*stacks, strict=True)]
    return RoutedMlp(part(spec.router), experts, gate, tp_group)


def _together(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _wide(x: torch.Tensor) -> torch.Tensor:
    """In the type in which sums over experts are rounded once: at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
