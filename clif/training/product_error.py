"""The error of averaging A and B apart, exact for any number of members and any weights.

FedAvg takes the means Abar and Bbar of the factors, but the mean of what the members compute is that of the products.
With weights w_i that add up to 1,

    sum_i w_i B_i A_i - Bbar Abar = sum_i w_i (B_i - Bbar)(A_i - Abar) = S T,

    S = [.. sqrt(w_i) (B_i - Bbar) ..]  [out, m r]        T = [.. sqrt(w_i) (A_i - Abar) ..]  [m r, in]

the blocks of all m members side by side in S, and stacked in T. |S T|^2 = <S^T S, T T^T> needs two m r x m r Gram
matrices and no product [out, in]. They need the factors of all members: sums do not give the cross terms. Hence the
layers are dealt out among the members, and one all-to-all gives each member the deviations of all for its layers.

Cost for a member: it sends and receives one vector of the adapter's size, half of what the all-reduce before it takes,
whatever the number of members; it holds two more such vectors meanwhile; and it computes m r^2 (in + out) multiply-adds
per module, averaged over all modules, in slices.

Sources: McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data" (2017), for FedAvg.
"""

from __future__ import annotations

import itertools

import torch

from clif.adapters.bank import AdapterBank


def deal(sizes: list[int], members: int) -> list[range]:
    """The layers of each member: consecutive, and of about equal size in sum. sizes: of the layers."""
    total, before = max(1, sum(sizes)), 0
    owners = []
    for size in sizes:
        owners.append(int((before + size / 2) / total * members))
        before += size
    firsts = [sum(owner < member for owner in owners) for member in range(members + 1)]
    return [range(first, stop) for first, stop in itertools.pairwise(firsts)]


def deviation_(mine: torch.Tensor, mean: torch.Tensor, weight: float) -> torch.Tensor:
    """sqrt(weight) (mine - mean), in place of `mine` [n]. Zeros for weight 0, whatever `mine` holds."""
    return mine.sub_(mean).mul_(weight**0.5) if weight > 0 else mine.zero_()


class ErrorShare:
    """One member's share: squared Frobenius norms, over its layers, of the error and of Bbar Abar.

    Computed module by module, so that slices can cut the work. The shares of all members add up.
    """

    def __init__(self, bank: AdapterBank, mean: torch.Tensor, deviations: torch.Tensor, layers: range) -> None:
        """mean: flat shadow [n]; deviations [members, part of n]: of all members, for these layers."""
        self._bank, self._means = bank, bank.factors(bank.part(mean, layers), layers)
        self._members = [bank.factors(one, layers) for one in deviations]
        self._todo = list(self._means)
        self._squares = torch.zeros(2, dtype=torch.float64, device=mean.device)

    @property
    def modules(self) -> int:
        """Modules that are left."""
        return len(self._todo)

    def add(self, modules: int) -> None:
        """Add so many modules."""
        for _ in range(modules):
            name = self._todo.pop()
            a = torch.cat([factors[name][0] for factors in self._members])
            b = torch.cat([factors[name][1] for factors in self._members], dim=1)
            squares = [_product_norm2(a, b), _product_norm2(*self._means[name])]
            # Each product counts once, however many peers hold the same rows of B or columns of A.
            self._squares += torch.stack(squares) / self._bank.holders(name)

    def result(self) -> tuple[float, float]:
        """(error, Bbar Abar), both squared. Collective over the peers, whose shares of a module add up."""
        error, product = self._bank.tp_group.all_reduce_(self._squares).tolist()
        return error, product


def _product_norm2(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """|B A|^2 of A [k, in] and B [out, k], float64."""
    return ((b.T @ b).double() * (a @ a.T).double()).sum()
