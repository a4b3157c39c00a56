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
from typing import Any, NamedTuple

import torch

from clif.distributed.collectives import TpGroup
from clif.models.dual_linear import LoraRows
from clif.models.expert_linears import ExpertLinears, Groups
from clif.models.expert_spec import Experts
from clif.models.layer_ops import Activation
from clif.models.shard import axis_of, shard_of

Router = Callable[[torch.Tensor], tuple[Any, torch.Tensor, torch.Tensor]]
"""transformers' router: hidden [rows, hidden size] -> its scores, and of every row the weights and the numbers of its
experts, both [rows, k]."""


class Choice(NamedTuple):
    """Experts of rows, both [rows, k]: their weights, which need not add up to 1, and their numbers."""

    weights: torch.Tensor
    experts: torch.Tensor


class RoutedMlp:
    """sum over a row's experts of weight * down(activation(gate) * up).

    gate_up: gate and up of every expert, one below the other [2 inner, hidden size]; tp_group: the ranks that hold the
    other columns.
    """

    def __init__(
        self, router: Router, gate_up: ExpertLinears, down: ExpertLinears, gate: Activation, tp_group: TpGroup
    ) -> None:
        """gate: [rows, gate | up] -> activation(gate) * up [rows, inner]."""
        self.router, self.gate_up, self.down, self.gate, self.tp_group = router, gate_up, down, gate, tp_group

    @property
    def linears(self) -> tuple[ExpertLinears, ExpertLinears]:
        """In the order in which a step reads them."""
        return self.gate_up, self.down

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
        groups = self._groups(choice)
        wide = self.gate_up.forward(groups, x.index_select(0, groups.rows))
        out = groups.spread(self.down.forward(groups, self.gate(wide)))
        weighted = _wide(out) * _wide(choice.weights).unsqueeze(-1)
        return self.tp_group.all_reduce_(weighted.sum(1).to(x.dtype)), groups.spread(wide)

    def backward(self, grad: torch.Tensor, choice: Choice, wide: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of x [rows, hidden size] and of the weights [rows, k], given that of the sum and what the gate
        read."""
        groups = self._groups(choice)
        of_out = grad.index_select(0, groups.rows)
        carried = self.down.backward(groups, of_out)
        with torch.enable_grad():
            read = wide.flatten(0, 1).index_select(0, groups.order).requires_grad_()
            gated = self.gate(read)
        # An expert's output enters by its product with the gradient alone: it is not computed again.
        products, of_biases = (_wide(carried) * _wide(gated.detach())).sum(1), self.down.of_biases(groups, of_out)
        products = products if of_biases is None else products + of_biases
        of_weights = groups.spread(products.unsqueeze(-1)).squeeze(-1)
        weights = choice.weights.flatten().index_select(0, groups.order).unsqueeze(-1)
        (of_read,) = torch.autograd.grad(gated, read, (carried * weights).to(gated.dtype))
        of_x = _wide(groups.spread(self.gate_up.backward(groups, of_read))).sum(1)
        together = self.tp_group.all_reduce_(torch.cat((of_x, of_weights), 1).to(grad.dtype))
        of_x, of_weights = together.split([grad.shape[1], choice.weights.shape[1]], 1)
        return of_x, of_weights.to(choice.weights.dtype)

    def _groups(self, choice: Choice) -> Groups:
        return Groups(choice.experts, len(self.down.each))


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


def routed_mlp(
    spec: Experts, part: Callable[[str], Any], gate: Callable[[Any], Activation], tp_group: TpGroup
) -> RoutedMlp:
    """The MLP of a decoder layer. part: what lies at a dotted path within transformers' layer, which is left no more
    than this rank's columns of the experts. gate: makes the gate of an activation."""
    for name, (shard_dim, shard) in spec.shards(tp_group.rank, tp_group.size).items():
        whole = part(name)
        if whole.shape[axis_of(shard_dim, whole.dim())] != shard.size:
            # A copy, so that the whole is freed.
            whole.data = shard_of(whole.data, shard_dim, shard).clone()
    if spec.paired and tp_group.rank > 0:
        # Of summed outputs one rank adds the bias.
        part(spec.biases[1]).data.zero_()
    stacks = [part(name).data for name in (spec.gate_up, spec.down)]
    biases = [part(name).data for name in spec.biases] or [None, None]
    gate_up, down = (
        ExpertLinears(weights.transpose(1, 2) if spec.paired else weights, bias)
        for weights, bias in zip(stacks, biases, strict=True)
    )
    activation = part(spec.activation)
    return RoutedMlp(part(spec.router), gate_up, down, activation if spec.paired else gate(activation), tp_group)


def _together(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _wide(x: torch.Tensor) -> torch.Tensor:
    """In the type in which sums over experts are rounded once: at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
