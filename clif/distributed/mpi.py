"""Asks MPI for this process's rank and for rank 0's address. Free of torch.

It is the one broadcast outside of clif/distributed/collectives.py: the ranks need the address to make their first
group.
"""

from __future__ import annotations

from typing import Any

from clif.distributed.addresses import free_port, outward_address
from clif.distributed.launch_env import LaunchError, RankEnv


def ask_mpi() -> RankEnv:
    """Collective over all MPI ranks. Raises LaunchError where mpi4py finds no MPI."""
    mpi = _load()
    # MPI is finalized at once: only the address comes by MPI, and a rank that fails later must not hang in MPI's exit.
    mpi.Init()
    try:
        world = mpi.COMM_WORLD
        local = world.Split_type(mpi.COMM_TYPE_SHARED)
        one_host = world.bcast(local.size) == world.size
        offer = (("127.0.0.1" if one_host else outward_address()), free_port()) if world.rank == 0 else None
        return RankEnv(world.rank, world.size, local.rank, local.size, world.bcast(offer), "mpi4py")
    finally:
        mpi.Finalize()


def _load() -> Any:
    try:
        import mpi4py

        mpi4py.rc.initialize = False
        mpi4py.rc.finalize = False
        from mpi4py import MPI
    # mpi4py can be installed without an MPI; its import then raises RuntimeError.
    except (ImportError, RuntimeError) as error:
        raise LaunchError(
            "an MPI started this process, but mpi4py cannot use it: pass MASTER_ADDR and MASTER_PORT "
            f"(see launch/mpirun.sh) or install the MPI's library ({str(error).splitlines()[0]})"
        ) from error
    return MPI
