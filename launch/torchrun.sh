#!/bin/bash
# Start CLIF with torchrun. Run it on every host, with the same values:
#   HOSTS=2 RDZV=node01:29400 launch/torchrun.sh --config configs/launch.yaml [key=value ...]
# HOSTS       hosts that take part (default 1)
# RANKS       ranks per host: one per GPU, or CPU slots (default 2)
# RDZV        first host and a free port on it, where the hosts find each other; the same on all hosts
# RDZV_ID     name under which they meet, the same on all hosts; for several runs at one RDZV (default clif)
# LOCAL_ADDR  this host's address, if its name does not resolve to one that the other hosts reach
# RESTARTS    how often all ranks are restarted after one is lost; the run continues (default 0)
# PYTHON      interpreter with CLIF installed (default: the repository's .venv)
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
# For several ranks torch would set this to 1 as well, but with a warning; the ranks share the cores in any case. A
# single rank takes it for a wish, and without it all cores.
[ "${RANKS:-2}" = 1 ] || export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

if [ "${HOSTS:-1}" = 1 ]; then
    meet=(--standalone)
else
    meet=(--nnodes "$HOSTS" --rdzv-backend c10d --rdzv-id "${RDZV_ID:-clif}"
        --rdzv-endpoint "${RDZV:?first host and port, e.g. node01:29400}" ${LOCAL_ADDR:+--local-addr "$LOCAL_ADDR"})
fi
# -P: transformers would mistake the repository's folder kernels/ for Hugging Face's package of that name.
exec "$PYTHON" -P -m torch.distributed.run "${meet[@]}" --nproc-per-node "${RANKS:-2}" \
    --max-restarts "${RESTARTS:-0}" launch/run.py "$@"
