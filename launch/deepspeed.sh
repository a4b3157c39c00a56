#!/bin/bash
# Start CLIF with deepspeed's launcher: by pdsh and ssh on the hosts of a file, or on this host alone. Run it once.
#   HOSTFILE=configs/hostfile.example launch/deepspeed.sh --config configs/launch.yaml [key=value ...]
# HOSTFILE     lines like "node01 slots=8"; the hosts must accept ssh without a password and see this folder at the
#              same path. Without it: RANKS ranks (default 2) on this host.
# MASTER_ADDR  address of the first host that the others reach (default: the first that its `hostname -I` prints)
# MASTER_PORT  free port there (default 29500)
# DS_ACCELERATOR=cpu  on hosts without GPUs; forwarded to all hosts
# PYTHON       interpreter with CLIF installed, at the same path on all hosts (default: the repository's .venv)
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
python=$(realpath -s "${PYTHON:-.venv/bin/python}")
arguments=(--master_port "${MASTER_PORT:-29500}")
if [ -n "${HOSTFILE:-}" ]; then
    arguments+=(--hostfile "$HOSTFILE" --launcher pdsh ${MASTER_ADDR:+--master_addr "$MASTER_ADDR"})
    # pdsh forwards only variables that deepspeed knows; deepspeed reads the others from a file in this folder.
    exports=$(mktemp)
    trap 'rm -f "$exports"' EXIT
    for name in OMP_NUM_THREADS DS_ACCELERATOR GLOO_SOCKET_IFNAME NCCL_SOCKET_IFNAME; do
        [ -z "${!name:-}" ] || echo "$name=${!name}" >> "$exports"
    done
    export DS_ENV_FILE=$exports
else
    arguments+=(--num_gpus "${RANKS:-2}")
fi
"$python" -P -m deepspeed.launcher.runner "${arguments[@]}" launch/run.py "$@"
