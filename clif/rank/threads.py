"""CPU threads of a rank: its share of the physical cores that it and its neighbours may use. Free of torch."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from clif.distributed.launch_env import ALONE, TORCHRUN, RankEnv

OMP = "OMP_NUM_THREADS"
SHARING = (ALONE, TORCHRUN, "torch's environment")
"""Launchers that bind no rank to cores of its own: what one rank may use, its neighbours on the host may use, too."""
CGROUP, CPU_FILES = Path("/sys/fs/cgroup"), Path("/sys/devices/system/cpu")
Read = Callable[[Path], str | None]
"""The content of a file; None where it cannot be read."""


@dataclass(frozen=True)
class Machine:
    """host: physical cores of all CPUs; usable: of those that this process is bound to. quota: CPUs' worth of time that
    its control group has; None: no limit."""

    host: int
    usable: int
    quota: float | None = None


def choose_threads(asked: int | None, environ: Mapping[str, str], env: RankEnv, machine: Machine) -> tuple[int, str]:
    """Threads of a rank, and why. asked: dist.threads_per_rank.

    Hyperthreads of one core share the units that multiply, so that cores are counted. mpirun and Slurm bind each rank
    to cores of its own, if they bind; what other launchers inherit is shared by the ranks of the host, as is a quota.
    """
    if asked is not None:
        return asked, "dist.threads_per_rank"
    given = _given(environ, env)
    if given is not None:
        return given, OMP
    ranks = env.local_world_size
    shared = "" if ranks == 1 else f" for the {ranks} ranks of this host"
    if env.launcher in SHARING:
        cores, why = machine.usable // ranks, f"{machine.usable} cores{shared}"
    elif machine.usable < machine.host // ranks:
        cores, why = machine.usable, f"{machine.usable} cores, to which {env.launcher} has bound it"
    else:
        cores, why = machine.host // ranks, f"{machine.host} cores{shared}"
    if machine.quota is not None and machine.quota / ranks < cores:
        cores, why = math.floor(machine.quota / ranks), f"a quota of {machine.quota:g} CPUs{shared}"
    return max(1, cores), why


def _given(environ: Mapping[str, str], env: RankEnv) -> int | None:
    """The user's own OMP_NUM_THREADS. torchrun sets 1 for several ranks of a host, and so do the scripts in launch/:
    a 1 that they may have set says nothing."""
    first = environ.get(OMP, "").split(",")[0].strip()
    if not first.isdecimal() or int(first) < 1:
        return None
    theirs = env.local_world_size > 1 or env.launcher not in (ALONE, TORCHRUN)
    return None if int(first) == 1 and theirs else int(first)


def read_machine() -> Machine:
    """What this process sees of its host."""
    every = range(os.cpu_count() or 1)
    # Not every system can bind processes to CPUs.
    bound = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(every)
    return Machine(_cores(every, _read), _cores(bound, _read), read_quota(_read))


def _cores(cpus: range | set[int], read: Read) -> int:
    """Physical cores of these CPUs. A CPU that does not say which core it belongs to counts as one."""
    siblings = (read(CPU_FILES / f"cpu{cpu}" / "topology" / "thread_siblings_list") or str(cpu) for cpu in cpus)
    return len(set(siblings))


def read_quota(read: Read) -> float | None:
    """CPUs' worth of time of this process's control group and those around it, the least; None: no limit."""
    found = list[float]()
    for line in (read(Path("/proc/self/cgroup")) or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = CGROUP / controllers
        # In a container the path is that on the host, and the container's own group is the root.
        own = root / path.lstrip("/")
        for folder in {root, own, *(parent for parent in own.parents if parent.is_relative_to(root))}:
            limit = _second(folder, read) if not controllers else _first(folder, read)
            found += [] if limit is None else [limit]
    return min(found, default=None)


def _second(folder: Path, read: Read) -> float | None:
    """Of version 2: the time in a period, or max, and the period."""
    quota, _, period = (read(folder / "cpu.max") or "max").partition(" ")
    return None if quota == "max" else int(quota) / int(period)


def _first(folder: Path, read: Read) -> float | None:
    """Of version 1: -1 is no limit."""
    quota, period = int(read(folder / "cpu.cfs_quota_us") or -1), int(read(folder / "cpu.cfs_period_us") or 0)
    return None if quota < 0 or not period else quota / period


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
