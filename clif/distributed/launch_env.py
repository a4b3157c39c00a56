"""This process's rank, the number of ranks and their rendezvous, from the launcher's environment. Free of torch.

The innermost launcher counts, since a process inherits the variables of outer ones:

1. torch's own environment (torchrun, deepspeed), also inside `srun torchrun` or `mpirun torchrun`;
2. mpirun's variables (Open MPI, MVAPICH, Hydra), also inside a Slurm job, where Slurm's describe mpirun's daemons;
3. a Slurm step (srun with one task per rank);
4. mpi4py, if another variable shows that an MPI started this process;
5. none: a single process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from clif.distributed.addresses import in_url, refuse_link_local
from clif.distributed.slurm import first_host, tasks_per_node
from clif.errors import InputError

Environ = Mapping[str, str]
TORCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
TORCHRUN = "torchrun"
ALONE = "single process"
TORCH_PORT = 29500
"""Rank 0's port if MASTER_ADDR is given without MASTER_PORT: torchrun's default."""
SLURM_PORTS = range(15000, 25000)
"""Below the range of Linux's ephemeral ports, so that no client of that host holds the chosen one."""
_SUFFIXES = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
MPIRUN = {
    "mpirun (Open MPI)": tuple(f"OMPI_COMM_WORLD_{suffix}" for suffix in _SUFFIXES),
    "mpirun (MVAPICH)": tuple(f"MV2_COMM_WORLD_{suffix}" for suffix in _SUFFIXES),
    "mpirun (MPICH, Intel MPI)": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
}
"""Variables of rank, world size, rank on this host, ranks on this host."""
MPI_SIGNS = ("PMIX_RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK", "PALS_RANKID")
"""Any of these shows that an MPI started this process; they do not suffice for a RankEnv."""


class LaunchError(InputError):
    """The launcher's environment is incomplete or contradicts itself; the message says what to change."""


@dataclass(frozen=True)
class RankEnv:
    """The position of this process among all. Raises LaunchError for impossible numbers.

    master: host and port where rank 0 keeps the key-value store; None for a single process.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master: tuple[str, int] | None = None
    launcher: str = ALONE

    def __post_init__(self) -> None:
        for name, value, size in (
            ("rank", self.rank, self.world_size),
            ("local rank", self.local_rank, self.local_world_size),
            ("number of ranks on this host less one,", self.local_world_size - 1, self.world_size),
        ):
            if not 0 <= value < size:
                raise LaunchError(f"{self.launcher}: the {name} {value} is not among {size}: correct the start command")

    @property
    def one_host(self) -> bool:
        return self.local_world_size == self.world_size

    def __str__(self) -> str:
        if self.world_size == 1:
            return f"1 rank: {self.launcher}"
        where = "" if self.master is None else f", rank 0 at {in_url(self.master[0])}:{self.master[1]}"
        return f"{self.world_size} ranks, {self.local_world_size} on this host{where}: {self.launcher}"


def discover(environ: Environ, local_rank: int | None = None, ask_mpi: Callable[[], RankEnv] | None = None) -> RankEnv:
    """The position of this process among all.

    local_rank: from the argument that deepspeed adds. ask_mpi: a collective over all MPI ranks that returns a complete
    RankEnv; called only if an MPI started this process and its environment is incomplete.
    Raises LaunchError, and ConfigError for a MASTER_ADDR that is link-local.
    """
    if local_rank is not None:
        environ = {"LOCAL_RANK": str(local_rank), **environ}
    found = from_torch(environ) or from_mpirun(environ) or from_slurm(environ)
    if _needs_mpi(environ, found):
        found = _agreeing(found, _mpi(ask_mpi))
    if found is None:
        _refuse_partial(environ)
        found = RankEnv(0, 1, 0, 1)
    _refuse_contradictions(environ, found, local_rank)
    return found


def restarts_left(environ: Environ) -> int:
    """How many times the launcher will still restart all ranks after one fails; 0 for all but torchrun."""
    if "TORCHELASTIC_MAX_RESTARTS" not in environ:
        return 0
    count = _number(environ, "TORCHELASTIC_RESTART_COUNT")
    return max(0, _number(environ, "TORCHELASTIC_MAX_RESTARTS") - count)


def from_torch(environ: Environ) -> RankEnv | None:
    """From torch's environment, as torchrun and deepspeed set it; None unless it is complete."""
    if any(name not in environ for name in TORCH):
        return None
    # deepspeed sets LOCAL_SIZE instead.
    name = next((name for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if name in environ), None)
    if name is None:
        raise LaunchError("RANK and WORLD_SIZE are set without LOCAL_WORLD_SIZE: set it to the ranks of this host")
    rank, world, local = (_number(environ, name) for name in TORCH[:3])
    launcher = TORCHRUN if "TORCHELASTIC_RUN_ID" in environ else "torch's environment"
    return RankEnv(rank, world, local, _number(environ, name), _master(environ), launcher)


def from_mpirun(environ: Environ) -> RankEnv | None:
    """From the variables that mpirun sets; the master only if MASTER_ADDR is forwarded."""
    for launcher, names in MPIRUN.items():
        if all(name in environ for name in names):
            rank, world, local, local_world = (_number(environ, name) for name in names)
            return RankEnv(rank, world, local, local_world, _master(environ), launcher)
    return None


def from_slurm(environ: Environ) -> RankEnv | None:
    """From the variables of a Slurm step, one task per rank; None outside of a step.

    A batch script has SLURM_PROCID=0 and the SLURM_NTASKS of the whole job, too, but no step: a process that it
    starts without srun is the only one.
    """
    step = environ.get("SLURM_STEP_ID", environ.get("SLURM_STEPID"))
    if step is None or "SLURM_PROCID" not in environ:
        return None
    # The step's own numbers take precedence: an interactive step of one task inherits those of its job.
    world = _first_number(environ, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS")
    rank, local = _number(environ, "SLURM_PROCID"), _number(environ, "SLURM_LOCALID")
    local_world = _slurm_local_world(environ, world)
    master = _master(environ) or (_slurm_master(environ, step) if world > 1 else None)
    return RankEnv(rank, world, local, local_world, master, f"Slurm step {environ.get('SLURM_JOB_ID', '?')}.{step}")


def _slurm_local_world(environ: Environ, world: int) -> int:
    text = environ.get("SLURM_STEP_TASKS_PER_NODE", environ.get("SLURM_TASKS_PER_NODE"))
    if text is None:
        return _first_number(environ, "SLURM_NTASKS_PER_NODE")
    tasks = tasks_per_node(text)
    node = _number(environ, "SLURM_NODEID")
    if sum(tasks) != world or node >= len(tasks):
        raise LaunchError(
            f"Slurm started {world} tasks, this one on node {node}, but says {text} tasks per node: "
            "start them with one srun, and unset SLURM_* variables of other jobs"
        )
    return tasks[node]


def _slurm_master(environ: Environ, step: str) -> tuple[str, int]:
    for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"):
        if name in environ:
            # Two steps of one job may share a host.
            job = _number(environ, "SLURM_JOB_ID") + 997 * _number({"SLURM_STEP_ID": step}, "SLURM_STEP_ID")
            return first_host(environ[name]), SLURM_PORTS[job % len(SLURM_PORTS)]
    raise LaunchError("Slurm started several tasks without SLURM_JOB_NODELIST: pass MASTER_ADDR and MASTER_PORT")


def _needs_mpi(environ: Environ, found: RankEnv | None) -> bool:
    if found is None:
        return any(name in environ for name in MPI_SIGNS)
    return found.master is None and found.world_size > 1


def _mpi(ask_mpi: Callable[[], RankEnv] | None) -> RankEnv:
    if ask_mpi is None:
        raise LaunchError(
            "an MPI started this process, but nothing says where rank 0 is: pass MASTER_ADDR and MASTER_PORT"
        )
    return ask_mpi()


def _agreeing(found: RankEnv | None, asked: RankEnv) -> RankEnv:
    """MPI's own answer, provided that it agrees with mpirun's variables. Raises LaunchError otherwise."""
    if found is None:
        return asked
    if (found.rank, found.world_size) != (asked.rank, asked.world_size):
        raise LaunchError(
            f"{found.launcher} says rank {found.rank} of {found.world_size}, mpi4py rank {asked.rank} of "
            f"{asked.world_size}: install mpi4py for the MPI of this mpirun, or pass MASTER_ADDR and MASTER_PORT"
        )
    return replace(found, master=asked.master)


def _refuse_partial(environ: Environ) -> None:
    """Raises LaunchError for an incomplete environment: no launcher started this process, so it is a mistake."""
    missing = [name for name in TORCH if name not in environ]
    if "RANK" in environ or "WORLD_SIZE" in environ:
        given = [name for name in TORCH if name in environ]
        raise LaunchError(
            f"{', '.join(given)} set without {', '.join(missing)}: start with torchrun, set all of them, or unset them"
        )


def _refuse_contradictions(environ: Environ, found: RankEnv, local_rank: int | None) -> None:
    if local_rank not in (None, found.local_rank):
        raise LaunchError(f"--local_rank is {local_rank}, but by {found.launcher} it is {found.local_rank}: drop it")
    expected = {"RANK": found.rank, "WORLD_SIZE": found.world_size, "LOCAL_RANK": found.local_rank}
    for name, value in expected.items():
        if name in environ and _number(environ, name) != value:
            raise LaunchError(f"{name}={environ[name]}, but by {found.launcher} it is {value}: unset {name}")


def _master(environ: Environ) -> tuple[str, int] | None:
    host = environ.get("MASTER_ADDR")
    if not host:
        return None
    # As in an endpoint, [fd00::1]:29500.
    host = host.removeprefix("[").removesuffix("]")
    refuse_link_local("MASTER_ADDR", host)
    return host, _number(environ, "MASTER_PORT") if "MASTER_PORT" in environ else TORCH_PORT


def _first_number(environ: Environ, *names: str) -> int:
    for name in names:
        if name in environ:
            return _number(environ, name)
    raise LaunchError(f"Slurm started this process without {names[0]}: start it with srun, or with torchrun")


def _number(environ: Environ, name: str) -> int:
    try:
        return int(environ[name])
    except KeyError:
        raise LaunchError(f"the environment lacks {name}: start the ranks with one launcher") from None
    except ValueError:
        raise LaunchError(f"{name}={environ[name]!r} is not a whole number: correct or unset it") from None
