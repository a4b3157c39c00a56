"""Whether this process is one of several that an MPI launcher started. Free of torch, and of MPI if possible.

The number of processes that the launcher announces in the environment counts, not the presence of a batch system: in a
job script of Slurm `clif collect` is one process, although SLURM_NTASKS gives the size of the allocation.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping
from types import FrameType
from typing import Any, Protocol

from clif.errors import InputError

# (variable with the number of processes, variable that must be set, too); the first one that is set counts. Open MPI's
# comes before Slurm's: under Slurm, mpirun starts its own helpers by srun and forwards their variables.
_SIZES = (
    ("OMPI_COMM_WORLD_SIZE", ""),  # Open MPI
    ("PMI_SIZE", ""),  # MPICH, Intel MPI, Cray MPICH
    ("MV2_COMM_WORLD_SIZE", ""),  # MVAPICH
    ("SLURM_STEP_NUM_TASKS", ""),  # srun
    ("WORLD_SIZE", "TORCHELASTIC_RUN_ID"),  # torchrun, which makes no MPI world: refused below
)
_RANK = "PMIX_RANK"  # Of launchers that announce no size.


class Request(Protocol):
    """A transfer under way."""

    def Test(self) -> bool: ...


class Comm(Protocol):
    """The part of mpi4py's communicator that is used: lower case sends small objects, upper case buffers."""

    def Get_rank(self) -> int: ...
    def Get_size(self) -> int: ...
    def send(self, obj: Any, dest: int, tag: int = 0) -> None: ...
    def recv(self, *, source: int = ..., tag: int = ...) -> Any: ...
    def iprobe(self, *, source: int = ..., tag: int = ...) -> bool: ...
    def Isend(self, buf: Any, dest: int, tag: int = 0) -> Request: ...
    def Irecv(self, buf: Any, source: int = ..., tag: int = ...) -> Request: ...
    def Abort(self, errorcode: int = 0) -> Any: ...


class Termination:
    """Raises SystemExit after SIGTERM, so that temporary files are removed.

    Python drops an exception that is raised inside a callback of its memory management, of which h5py has many. So
    code that waits calls check(), which raises again.
    """

    def __init__(self) -> None:
        self._code = 0

    def watch(self) -> None:
        """Start watching. Call it in the main thread."""
        signal.signal(signal.SIGTERM, self._end)

    def check(self) -> None:
        """Raises SystemExit once the signal has come."""
        if self._code:
            raise SystemExit(self._code)

    def _end(self, number: int, frame: FrameType | None) -> None:
        self._code = 128 + number
        self.check()


def announced(environ: Mapping[str, str]) -> int | None:
    """Number of processes that were started together, as the launcher announces; None without an announcement."""
    name = _announcement(environ)
    return None if name is None else int(environ[name])


def world(environ: Mapping[str, str]) -> Comm | None:
    """The communicator of all processes that were started together; None if this is the only one.

    mpi4py is imported only if a launcher announces more than one process. Raises InputError if there is no MPI then, or
    if MPI sees another number of processes: each of them would do all of the work.
    """
    size = announced(environ)
    if size == 1 or (size is None and _RANK not in environ):
        return None
    comm = _load()
    if size is None:
        rank = environ[_RANK]
        size = max(comm.Get_size(), int(rank) + 1 if rank.isdigit() else 1)
    if comm.Get_size() != size:
        name = _announcement(environ) or _RANK
        raise InputError(
            f"{size} processes were started ({name}={environ[name]}), but MPI sees a world of {comm.Get_size()}: "
            "start them by the launcher of the MPI that mpi4py finds, or start one process without a launcher"
        )
    return comm if size > 1 else None


def _announcement(environ: Mapping[str, str]) -> str | None:
    """Name of the variable that holds the number of processes."""
    for size, mark in _SIZES:
        if environ.get(size, "").isdigit() and (not mark or mark in environ):
            return size
    return None


def _load() -> Comm:
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py is installed without an MPI library.
        reason = " ".join(str(error).split())
        raise InputError(
            f"several processes were started, but MPI cannot be used ({reason}): "
            "install an MPI (Debian: openmpi-bin) and mpi4py, or start one process without a launcher"
        ) from error
    comm: Comm = MPI.COMM_WORLD
    return comm
