"""What the MLP of a layer with experts is made of: which tensors hold them, how files have these, and how peers share
them. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from clif.models.shard import Shard, ShardDim, even_shard, joined

Pieces = tuple[tuple[str, ...], ...]
"""Tensors of files that one tensor of the model is put together from: of each expert, those that lie one below the
other. One that is alone is the same tensor under another name."""


@dataclass(frozen=True)
class ExpertFiles:
    """Names in weight files, within the decoder layer: of the router, and of one expert's matrices, its number {}."""

    router: str
    gate: str
    up: str
    down: str


@dataclass(frozen=True)
class Experts:
    """Gated MLPs of which each token takes some. inner: columns of each; activation: the module that computes the gate.

    router: the module that chooses. gate_up [count, 2 inner, hidden size] and down [count, hidden size, inner]: the
    tensors that hold all experts. files: how files have them where they do not have these; None: they do.

    paired: each column of gate lies beside that of up, both tensors are transposed and have biases (named so), and
    activation computes all of the gate, from [rows, 2 inner].
    """

    count: int
    per_token: int
    inner: int
    files: ExpertFiles | None = None
    router: str = "mlp.gate"
    gate_up: str = "mlp.experts.gate_up_proj"
    down: str = "mlp.experts.down_proj"
    activation: str = "mlp.experts.act_fn"
    paired: bool = False

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of what a layer must have for them."""
        return self.router, *self.stacked, self.activation

    @property
    def stacked(self) -> tuple[str, ...]:
        """Names of the tensors that hold all experts."""
        return (self.gate_up, self.down, *self.biases)

    @property
    def biases(self) -> tuple[str, ...]:
        """Of gate_up [count, 2 inner] and down [count, hidden size], if there are any."""
        return (f"{self.gate_up}_bias", f"{self.down}_bias") if self.paired else ()

    def shards(self, rank: int, size: int) -> dict[str, tuple[ShardDim, Shard]]:
        """Cut side and part of what is cut on a rank among `size` of them: of every expert the same columns."""
        columns = even_shard(self.inner, rank, size)
        if not self.paired:
            return {self.gate_up: ("out", joined([columns, columns])), self.down: ("in", columns)}
        pairs = even_shard(2 * self.inner, rank, size)
        return {self.gate_up: ("in", pairs), self.biases[0]: ("in", pairs), self.down: ("out", columns)}

    def tensors(self, hidden_size: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes, within the layer."""
        yield f"{self.router}.weight", (self.count, hidden_size)
        shapes = ((2 * self.inner, hidden_size), (hidden_size, self.inner))
        for name, (out, width) in zip((self.gate_up, self.down), shapes, strict=True):
            yield name, (self.count, width, out) if self.paired else (self.count, out, width)
        for name, (out, _) in zip(self.biases, shapes, strict=False):
            yield name, (self.count, out)

    def pieces(self) -> dict[str, Pieces]:
        """By name within the layer, what files may have instead."""
        files, numbers = self.files, range(self.count)
        if files is None:
            return {}
        return {
            f"{self.router}.weight": ((f"{files.router}.weight",),),
            self.gate_up: tuple(tuple(f"{one.format(n)}.weight" for one in (files.gate, files.up)) for n in numbers),
            self.down: tuple((f"{files.down.format(n)}.weight",) for n in numbers),
        }
