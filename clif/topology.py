"""Process groups: what make_layout computed, made real. Groups are cached; nobody uses the default group."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from clif.addresses import address_towards, in_url, interface_of
from clif.collectives import Group, Peers, Roll, make_group
from clif.config import Config, ConfigError
from clif.launchers import RankEnv
from clif.layout import Layout, check_hosts, make_layout
from clif.starts import agree_on_start


@dataclass
class Topology:
    """Where this rank stands, and the groups that it belongs to.

    store: keys of this start of the ranks; launch_store: the one around it, which outlives restarts by torchrun.
    """

    env: RankEnv
    layout: Layout
    device: torch.device
    timeout: datetime.timedelta
    store: dist.Store
    backend: str
    peers: Peers
    launch_store: dist.Store
    _combined: dict[tuple[int, ...], Group] = field(default_factory=dict)
    _retired: list[Group] = field(default_factory=list)

    @property
    def replica(self) -> int:
        return self.layout.replica_of(self.env.rank)

    @property
    def tp_rank(self) -> int:
        return self.layout.tp_rank_of(self.env.rank)

    @property
    def is_leader(self) -> bool:
        return self.tp_rank == 0

    def combined_group(self, members: tuple[int, ...], round_id: int) -> Group:
        """The group that averages this rank's shard over the member replicas; all of them must ask for it.

        Made by its members alone, so that non-members go on serving, and once per member set, under the id of the
        first round that needs it.
        """
        if members not in self._combined:
            ranks = self.layout.peers(members, self.tp_rank)
            name = f"clif/combined/{round_id}/{'-'.join(map(str, ranks))}"
            place = ranks.index(self.env.rank)
            self._combined[members] = make_group(self.backend, self.store, name, place, len(ranks), self.timeout)
        return self._combined[members]

    def roll(self, members: tuple[int, ...], round_id: int) -> Roll:
        """Who averages this rank's shard in a round."""
        ranks = self.layout.peers(members, self.tp_rank)
        return Roll(self.store, f"all-reduce of round {round_id}", self.env.rank, ranks)

    def retire_group(self, members: tuple[int, ...]) -> None:
        """Never use this member set's group again: an all-reduce that was given up may still be pending in it.

        Else that old one could meet the next round's. The group is kept, since closing it would wait for it.
        """
        group = self._combined.pop(members, None)
        if group is not None:
            self._retired.append(group)


def choose_device(wanted: str, local_rank: int, ranks_per_gpu: int = 1) -> torch.device:
    """The GPU of this rank, or its share of one. Raises ConfigError when a GPU is asked for and this rank has none."""
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
        # Else one rank's cache of free memory would starve the others.
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
    timeout = datetime.timedelta(seconds=config.dist.timeout_s)
    launch_store = _store(env, timeout) if store is None else store
    if store is None:
        name = agree_on_start(launch_store, env.rank, env.world_size, config.dist.timeout_s)
        store = dist.PrefixStore(f"clif/start/{name}", launch_store)
    _choose_interface(env)
    backend = choose_backend(config.dist.backend, device, share)
    dist.init_process_group(
        backend,
        rank=env.rank,
        world_size=env.world_size,
        timeout=timeout,
        store=dist.PrefixStore("torch", store),
    )
    mine = list(layout.replicas[layout.replica_of(env.rank)])
    # Every rank makes exactly this one group by torch's own means, so all agree on its name (see make_group).
    tp_group = dist.new_group(mine, timeout=timeout, use_local_synchronization=True, group_desc=f"tp {mine}")
    roll = Roll(store, f"tensor-parallel group of replica {layout.replica_of(env.rank)}", env.rank, tuple(mine))
    peers = Peers(tp_group, roll) if len(mine) > 1 else Peers()
    return Topology(env, layout, device, timeout, store, backend, peers, launch_store)


def _store(env: RankEnv, timeout: datetime.timedelta) -> dist.Store:
    """The key-value store shared by all ranks, torchrun's or rank 0's; one of our own for a single process.

    By address and not by env://, which would need torch's variables where other launchers set their own.
    """
    if env.master is None:
        return dist.HashStore()
    host, port = env.master
    url = f"tcp://{in_url(host)}:{port}?rank={env.rank}&world_size={env.world_size}"
    store, _, _ = next(dist.rendezvous(url, timeout=timeout))
    return store


def _choose_interface(env: RankEnv) -> None:
    """Let gloo use the interface towards rank 0: by itself it takes the host's name, often a loopback address."""
    if env.one_host or env.master is None or "GLOO_SOCKET_IFNAME" in os.environ:
        return
    interface = interface_of(address_towards(env.master[0]))
    if interface is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = interface
