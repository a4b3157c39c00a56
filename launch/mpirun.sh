#!/bin/bash
# Start CLIF with Open MPI's mpirun, one MPI rank per CLIF rank:
#   RANKS=4 launch/mpirun.sh --config configs/launch.yaml [key=value ...]
# RANKS        ranks in all (default 2)
# HOSTFILE     Open MPI's host file, lines like "node01 slots=2" (default: this host, or the hosts of the Slurm job)
# MASTER_ADDR, MASTER_PORT  address of rank 0's host and a free port on it; needed where mpi4py cannot use this MPI,
#              otherwise the ranks get it from mpi4py
# MPIRUN_ARGS  more arguments, e.g. --allow-run-as-root in a container
# PYTHON       interpreter with CLIF installed (default: the repository's .venv)
# MPICH and Intel MPI: use their mpirun -n RANKS -genvlist MASTER_ADDR,MASTER_PORT PYTHON launch/run.py ...
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
arguments=(-n "${RANKS:-2}")
[ -z "${HOSTFILE:-}" ] || arguments+=(--hostfile "$HOSTFILE")
for name in OMP_NUM_THREADS MASTER_ADDR MASTER_PORT; do
    [ -z "${!name:-}" ] || arguments+=(-x "$name")
done
# mpirun would bind each rank to one core, with all its threads.
# shellcheck disable=SC2086
exec mpirun "${arguments[@]}" --bind-to none ${MPIRUN_ARGS:-} "${PYTHON:-.venv/bin/python}" launch/run.py "$@"
