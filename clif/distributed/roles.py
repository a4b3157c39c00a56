"""Which replicas serve and which train in each run.mode: CLIF itself, or a baseline to compare with. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass

from clif.config import Config, ConfigError, RunConfig
from clif.distributed.layout import Layout


@dataclass(frozen=True)
class Role:
    """serves: requests are routed to it. trains: it may become a member of a round."""

    serves: bool = True
    trains: bool = True


BOTH = Role()


def role_of(replica: int, replicas: int, run: RunConfig) -> Role:
    """Role of one of `replicas` replicas. In split the last run.trainers of them train and the others serve."""
    if run.mode == "serve_only":
        return Role(trains=False)
    if run.mode == "split":
        trainer = replica >= replicas - run.trainers
        return Role(serves=not trainer, trains=trainer)
    # train_only has no load, but quality probes are answered.
    return BOTH


def fewest_replicas(config: Config) -> int:
    """The least number of replicas that run.mode and federation need."""
    trainers = config.federation.min_members if config.train.enabled else 1
    return config.run.trainers + 1 if config.run.mode == "split" else trainers


def check_roles(config: Config, layout: Layout) -> None:
    """Raises ConfigError if the replicas that were started are too few for run.mode and federation."""
    _check_coserving(config, layout)
    run, least, replicas = config.run, config.federation.min_members, len(layout.replicas)
    trainers = [r for r in range(replicas) if config.train.enabled and role_of(r, replicas, run).trains]
    sizes = {len(layout.replicas[r]) for r in trainers}
    if len(sizes) > 1:
        raise ConfigError(
            f"the replicas that train have {sorted(sizes)} ranks: rank i of each averages with rank i of the others, "
            "so give them equally many in layout.replica_gpus"
        )
    if run.mode == "split" and run.trainers >= replicas:
        raise ConfigError(
            f"run.mode split with run.trainers {run.trainers} needs at least {run.trainers + 1} replicas, not "
            f"{replicas}: start more ranks, or lower run.trainers (at least 1)"
        )
    if config.train.enabled and least > len(trainers):
        which = "trainers" if run.mode == "split" else "replicas"
        more = "raise run.trainers" if run.mode == "split" else "start more ranks"
        raise ConfigError(f"federation.min_members {least} exceeds the {len(trainers)} {which}: lower it or {more}")


def _check_coserving(config: Config, layout: Layout) -> None:
    """What can be known of it before a model is loaded: that the replica's ranks and device allow it."""
    mode, way = config.run.mode, config.engine.coserving
    clocked = f"run.mode {mode}" if mode == "time_slice" else f"engine.coserving {way}" if way == "concurrent" else ""
    if clocked and any(len(ranks) > 1 for ranks in layout.replicas):
        # Both are paced by the clock of each rank; and collectives belong to one thread and one stream.
        raise ConfigError(f"{clocked} needs replicas of one rank: set layout.tp_size=1, or change it")
    if way == "concurrent" and config.model.device != "cuda" and config.dist.threads_per_rank == 1:
        raise ConfigError(
            "engine.coserving concurrent needs at least 2 threads of a rank on a CPU: raise dist.threads_per_rank, or "
            "set engine.coserving=interleaved, or model.device=cuda"
        )
