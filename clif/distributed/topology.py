"""The process groups of a layout. Groups are cached; the default group is never used."""

from __future__ import annotations

import datetime
import os
from concurrent.futures import Future
from dataclasses import dataclass

import torch
import torch.distributed as dist

from clif.config import Config, ConfigError
from clif.config.relevance import check_device
from clif.distributed.addresses import address_towards, in_url, interface_of
from clif.distributed.collectives import Group, GroupMembers, TpGroup, make_group
from clif.distributed.launch_env import RankEnv
from clif.distributed.layout import Layout, check_hosts, make_layout
from clif.distributed.rendezvous import agree_on_start
from clif.distributed.round_groups import RoundGroups
from clif.types import Members


@dataclass
class Topology:
    """The position of this rank, and the groups that it belongs to.

    store: holds the keys of this start of the ranks; job_store: the store around it, which outlives torchrun's
    restarts.
    """

    env: RankEnv
    layout: Layout
    device: torch.device
    timeout: datetime.timedelta
    store: dist.Store
    backend: str
    tp_group: TpGroup
    job_store: dist.Store

    def __post_init__(self) -> None:
        self._groups = RoundGroups(self.env.rank, self.backend, self.store, self.device, self.timeout)

    @property
    def replica(self) -> int:
        return self.layout.replica_of(self.env.rank)

    @property
    def tp_rank(self) -> int:
        return self.layout.tp_rank_of(self.env.rank)

    @property
    def is_leader(self) -> bool:
        return self.tp_rank == 0

    def combined_group(self, members: Members, number: int) -> Future[Group]:
        """The group that averages this rank's shard over the member replicas; all of them must ask for this number.

        Its members alone make it, so that other replicas continue serving, and reuse it while its number is the same.
        The control process gives a member set a new number if a collective may still be pending in its group.
        """
        return self._groups.get(members, self.layout.data_parallel_ranks(members[0], self.tp_rank), number)

    def group_members(self, members: Members, round_id: int) -> GroupMembers:
        """The ranks that average this rank's shard in a round."""
        ranks = self.layout.data_parallel_ranks(members[0], self.tp_rank)
        return GroupMembers(self.store, f"all-reduce of round {round_id}", self.env.rank, ranks)

    def retire_group(self, members: Members) -> None:
        """Close this member set's group: an abandoned all-reduce may still be pending in it."""
        self._groups.retire(members)

    @property
    def can_rebuild_group(self) -> bool:
        """Whether the ranks of this replica can continue after one has failed: on NCCL they would hang in a kernel."""
        return self.tp_group.size == 1 or self.backend == "gloo"

    def rebuild_group(self, incarnation: int) -> None:
        """Give the ranks of this replica a new group, after one of them has failed. Collective over them.

        Groups of rounds are retired as well: the other replicas know this one's incarnation and make new groups.
        Raises RuntimeError if a rank does not arrive.
        """
        self._groups.retire_all()
        if self.tp_group.size > 1:
            self.tp_group.rebuild_group(*_tensor_parallel(self, incarnation))


def _tensor_parallel(topology: Topology, incarnation: int) -> tuple[Group, GroupMembers, Group]:
    """Group of the devices, its members, and a group of theirs on the CPU for control messages."""
    replica, rank = topology.replica, topology.env.rank
    ranks = topology.layout.replicas[replica]
    again = f", incarnation {incarnation}" if incarnation else ""
    members = GroupMembers(topology.store, f"tensor-parallel group of replica {replica}{again}", rank, ranks)
    name = f"clif/tp/{replica}/{incarnation}"
    index, size, timeout = ranks.index(rank), len(ranks), topology.timeout
    group = make_group(topology.backend, topology.store, name, index, size, timeout)
    control = make_group("gloo", topology.store, f"{name}/control", index, size, timeout)
    return group, members, control


def choose_device(wanted: str, local_rank: int, ranks_per_gpu: int = 1) -> torch.device:
    """The GPU of this rank, or its share of one. Raises ConfigError if a GPU is wanted and this rank has none."""
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    gpu = local_rank // ranks_per_gpu
    if gpu >= torch.cuda.device_count():
        raise ConfigError(
            f"local rank {local_rank} has no GPU ({torch.cuda.device_count()} on this host): "
            "start fewer ranks, raise dist.ranks_per_gpu, or set model.device=cpu"
        )
    torch.cuda.set_device(gpu)
    if ranks_per_gpu > 1:
        # Otherwise one rank's cache of free memory would starve the others.
        torch.cuda.set_per_process_memory_fraction(1 / ranks_per_gpu, gpu)
    return torch.device("cuda", gpu)


def choose_backend(wanted: str, device: torch.device, ranks_per_gpu: int = 1) -> str:
    """Raises ConfigError for NCCL without a GPU for each rank."""
    if wanted == "nccl" and (device.type != "cuda" or ranks_per_gpu > 1):
        raise ConfigError("dist.backend nccl needs a GPU for each rank: use gloo or auto")
    if wanted == "auto":
        return "nccl" if device.type == "cuda" and ranks_per_gpu == 1 else "gloo"
    return wanted


def make_topology(config: Config, env: RankEnv, store: dist.Store | None = None) -> Topology:
    """Start torch.distributed and make the tensor-parallel groups. Collective over all ranks.

    Raises LayoutError or ConfigError before anything is started.
    """
    wanted = config.layout
    layout = make_layout(env.world_size, wanted.tp_size, wanted.replicas, wanted.replica_gpus)
    check_hosts(layout, env.local_world_size, wanted.across_hosts)
    share = config.dist.ranks_per_gpu
    device = choose_device(config.model.device, env.local_rank, share)
    check_device(config, device.type)
    timeout = datetime.timedelta(seconds=config.dist.timeout_s)
    job_store = _store(env, timeout) if store is None else store
    if store is None:
        name = agree_on_start(job_store, env.rank, env.world_size, config.dist.timeout_s)
        store = dist.PrefixStore(f"clif/start/{name}", job_store)
    _choose_interface(env)
    backend = choose_backend(config.dist.backend, device, share)
    dist.init_process_group(
        backend,
        rank=env.rank,
        world_size=env.world_size,
        timeout=timeout,
        store=dist.PrefixStore("torch", store),
    )
    topology = Topology(env, layout, device, timeout, store, backend, TpGroup(), job_store)
    if len(layout.replicas[topology.replica]) > 1:
        topology.tp_group = TpGroup(*_tensor_parallel(topology, incarnation=0))
    return topology


def _store(env: RankEnv, timeout: datetime.timedelta) -> dist.Store:
    """The key-value store shared by all ranks, torchrun's or rank 0's; an own one for a single process.

    It is found by address and not by env://, which needs torch's variables where other launchers set their own.
    """
    if env.master is None:
        return dist.HashStore()
    host, port = env.master
    url = f"tcp://{in_url(host)}:{port}?rank={env.rank}&world_size={env.world_size}"
    store, _, _ = next(dist.rendezvous(url, timeout=timeout))
    return store


def _choose_interface(env: RankEnv) -> None:
    """Make gloo use the interface towards rank 0: it would resolve the host's name, often to a loopback address."""
    if env.one_host or env.master is None or "GLOO_SOCKET_IFNAME" in os.environ:
        return
    interface = interface_of(address_towards(env.master[0]))
    if interface is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = interface
