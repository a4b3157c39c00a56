"""What a dry run shows: replicas, process groups, memory of a rank. Free of torch."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import asdict

from clif.config import Config
from clif.distributed.layout import Layout
from clif.distributed.roles import role_of
from clif.models.estimate import Device, EstimateError, Room, dtype_of, estimate, read_spec


def plan_lines(
    config: Config, layout: Layout, device: Device, room: Room | None = None, flags: Collection[str] = ()
) -> Iterator[str]:
    """The layout, the groups and the estimate, a line each. device: of the ranks of this host.

    room: the memory of this host; None if it is unknown. flags: of its CPU.
    """
    for replica, ranks in enumerate(layout.replicas):
        role = role_of(replica, len(layout.replicas), config.run)
        only = "" if role.serves and role.trains else f", only {'serves' if role.serves else 'trains'}"
        yield f"replica {replica}: ranks {list(ranks)}, leader {ranks[0]}{only}"
    yield from group_lines(config, layout)
    yield from memory_lines(config, layout, device, room, flags)


def group_lines(config: Config, layout: Layout) -> Iterator[str]:
    """Tensor-parallel groups, and the groups of a round in which all trainers are members."""
    for replica, ranks in enumerate(layout.replicas):
        if len(ranks) > 1:
            yield f"tensor-parallel group of replica {replica}: ranks {list(ranks)}"
    count = len(layout.replicas)
    members = tuple(r for r in range(count) if config.train.enabled and role_of(r, count, config.run).trains)
    for tp_rank in range(len(layout.replicas[members[0]]) if members else 0):
        group = list(layout.data_parallel_ranks(members, tp_rank))
        yield f"federation group of tp_rank {tp_rank}, all members: ranks {group}"


def memory_lines(
    config: Config, layout: Layout, device: Device, room: Room | None = None, flags: Collection[str] = ()
) -> Iterator[str]:
    """An estimate for a rank of each size of replica, or why there is none; activations count as their budget.

    Raises LayoutError for a model that a replica's ranks cannot share.
    """
    try:
        spec = read_spec(config.model.path)
    except EstimateError as error:
        yield f"no estimate of memory: {error}"
        return
    for tp_size in sorted({len(ranks) for ranks in layout.replicas}):
        spec.check_divisible(tp_size)
        memory = estimate(config, spec, tp_size, device, flags)
        share = f", 1 of {tp_size} of its replica" if tp_size > 1 else ""
        where = "a GPU" if device == "cuda" else "the CPU"
        dtype = f"{dtype_of(config, device, flags)} on {where}{_measured(config, device)}"
        yield f"memory of a rank{share}, {dtype}: about {_mib(memory.total)}"
        for name, size in asdict(memory).items():
            if size:
                yield f"  {name.replace('_', ' '):<18}{_mib(size):>12}{_at_least(name, config)}"
        yield _fits(memory.total, device, room)


def _measured(config: Config, device: Device) -> str:
    return " (model.dtype auto: a start measures)" if config.model.dtype == "auto" and device == "cpu" else ""


def _at_least(name: str, config: Config) -> str:
    if name != "kv_cache" or config.engine.kv_tokens != "auto":
        return ""
    return f"  at least: engine.kv_tokens auto takes what is left, for {config.kv_tokens_bound} tokens at most"


def _fits(size: int, device: Device, room: Room | None) -> str:
    what = "GPU" if device == "cuda" else "host"
    if room is None:
        return f"whether that fits is not known: no {what} to ask"
    whole = f"{room.ranks} such rank{'s' if room.ranks > 1 else ''} on a {what} of {_mib(room.bytes)}"
    if size * room.ranks <= room.bytes:
        return f"fits: {whole}, {_mib(room.bytes - size * room.ranks)} left for what is not counted"
    return f"does not fit: {whole}, {_mib(size * room.ranks - room.bytes)} too much"


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
