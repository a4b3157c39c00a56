"""Arithmetic of ranks, replicas and groups. Free of torch and of any communication.

Ranks are dense: 0 .. world_size-1. A replica is an ordered tuple of ranks; its first rank is the leader.
"""

from __future__ import annotations

from dataclasses import dataclass

from clif.errors import InputError


class LayoutError(InputError):
    """The requested replicas do not fit the ranks that were started."""


@dataclass(frozen=True)
class Layout:
    """Which rank belongs to which replica.

    replicas: one tuple of ranks per replica, in tensor-parallel order.
    """

    replicas: tuple[tuple[int, ...], ...]

    @property
    def world_size(self) -> int:
        return sum(len(ranks) for ranks in self.replicas)

    def replica_of(self, rank: int) -> int:
        """Replica id of a rank."""
        return self._positions[rank][0]

    def tp_rank_of(self, rank: int) -> int:
        """Index of a rank within its replica: 0 is the leader."""
        return self._positions[rank][1]

    def data_parallel_ranks(self, members: tuple[int, ...], tp_rank: int) -> tuple[int, ...]:
        """Ranks that average the same shard: rank tp_rank of each member replica, sorted."""
        return tuple(sorted(self.replicas[m][tp_rank] for m in members))

    @property
    def _positions(self) -> dict[int, tuple[int, int]]:
        return {rank: (i, j) for i, ranks in enumerate(self.replicas) for j, rank in enumerate(ranks)}


def make_layout(
    world_size: int,
    tp_size: int = 1,
    replicas: int | None = None,
    replica_gpus: tuple[tuple[int, ...], ...] | None = None,
) -> Layout:
    """Assign ranks to replicas: by explicit lists, or in world_size / tp_size equal blocks.

    Raises LayoutError if they do not cover every rank exactly once.
    """
    if replica_gpus is not None:
        return _explicit(world_size, tp_size, replicas, replica_gpus)
    if world_size % tp_size:
        raise LayoutError(
            f"layout.tp_size {tp_size} does not divide the {world_size} ranks that were started: "
            f"start a multiple of {tp_size} ranks or change layout.tp_size"
        )
    count = world_size // tp_size
    if replicas is not None and replicas != count:
        raise LayoutError(
            f"layout.replicas {replicas} x layout.tp_size {tp_size} needs {replicas * tp_size} ranks, but "
            f"{world_size} were started: start {replicas * tp_size} or set layout.replicas={count}"
        )
    return Layout(tuple(tuple(range(i * tp_size, (i + 1) * tp_size)) for i in range(count)))


def check_divisible(heads: int, kv_heads: int, inner: int, size: int) -> None:
    """Raises LayoutError for a model that `size` ranks cannot share evenly. inner: columns of its MLP."""
    for what, count, good in (
        ("attention heads", heads, heads % size == 0),
        ("key/value heads", kv_heads, kv_heads % size == 0 or size % kv_heads == 0),
        ("MLP columns", inner, inner % size == 0),
    ):
        if not good:
            raise LayoutError(
                f"{size} ranks cannot share the model's {count} {what} evenly: change layout.tp_size or "
                "layout.replica_gpus"
            )


def check_hosts(layout: Layout, ranks_per_host: int, across_hosts: bool) -> None:
    """Raises LayoutError for a replica on several hosts, unless across_hosts. All hosts have equally many ranks."""
    for replica, ranks in enumerate(layout.replicas):
        hosts = sorted({rank // ranks_per_host for rank in ranks})
        if len(hosts) > 1 and not across_hosts:
            raise LayoutError(
                f"replica {replica} would have its ranks {list(ranks)} on hosts {hosts}: start a multiple of its "
                "ranks on each host, or set layout.across_hosts=true"
            )


def _explicit(world_size: int, tp_size: int, replicas: int | None, replica_gpus: tuple[tuple[int, ...], ...]) -> Layout:
    if not all(replica_gpus):
        raise LayoutError("layout.replica_gpus has a replica without ranks: give it at least one or remove it")
    ranks = [rank for group in replica_gpus for rank in group]
    if sorted(ranks) != list(range(world_size)):
        raise LayoutError(
            f"layout.replica_gpus {[list(g) for g in replica_gpus]} must name each of the ranks "
            f"0..{world_size - 1} exactly once: {world_size} ranks were started"
        )
    if replicas is not None and replicas != len(replica_gpus):
        raise LayoutError(
            f"layout.replicas is {replicas} but layout.replica_gpus lists {len(replica_gpus)} replicas: "
            "drop one of them"
        )
    sizes = {len(group) for group in replica_gpus}
    if tp_size != 1 and sizes != {tp_size}:
        raise LayoutError(
            f"layout.tp_size is {tp_size} but layout.replica_gpus has replicas of {sorted(sizes)} ranks: "
            "drop layout.tp_size or make them agree"
        )
    return Layout(tuple(tuple(group) for group in replica_gpus))
