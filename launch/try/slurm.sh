#!/bin/bash
# A Slurm of two nodes for the length of one command, on the two hosts of netns.sh. Needs root, slurm-wlm and munge.
#   launch/try/netns.sh launch/try/slurm.sh COMMAND [ARGUMENTS]      e.g. sbatch --wait launch/slurm.sbatch ...
# The first host runs munged, slurmctld, slurmd and COMMAND; the second one slurmd. State is in the folder $TRY.
set -euo pipefail
[ $# -gt 0 ] && [ -n "${TRY:-}" ] || { sed -n '2,4p' "$0"; exit 2; }
export SLURM_CONF=$TRY/slurm.conf
node=$(hostname)

wait_for() {
    for _ in $(seq 150); do "$@" > /dev/null 2>&1 && return; sleep 0.2; done
    echo "slurm.sh: gave up waiting for: $*" >&2
    return 1
}

if [ "$NODE" = 0 ]; then
    head -c 128 /dev/urandom > "$TRY/munge.key"
    chmod 600 "$TRY/munge.key"
    munged --force --key-file "$TRY/munge.key" --socket "$TRY/munge.sock" --pid-file "$TRY/munge.pid" \
        --log-file "$TRY/munge.log" --seed-file "$TRY/munge.seed"
    mkdir "$TRY/state"
    cat > "$TRY/slurm.tmp" <<END
ClusterName=try
SlurmctldHost=node01(10.77.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$TRY/munge.sock
CredType=cred/munge
StateSaveLocation=$TRY/state
SlurmdSpoolDir=$TRY/spool.%n
SlurmctldPidFile=$TRY/slurmctld.pid
SlurmdPidFile=$TRY/slurmd.%n.pid
SlurmctldLogFile=$TRY/slurmctld.log
SlurmdLogFile=$TRY/slurmd.%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
NodeName=node01 NodeAddr=10.77.0.1 CPUs=4
NodeName=node02 NodeAddr=10.77.0.2 CPUs=4
PartitionName=main Nodes=ALL Default=YES State=UP
END
    # Control groups are not needed; with a plugin named, Slurm does not look for them.
    echo "CgroupPlugin=cgroup/v1" > "$TRY/cgroup.conf"
    mv "$TRY/slurm.tmp" "$SLURM_CONF"
    slurmctld
fi
wait_for test -e "$SLURM_CONF"
mkdir -p "$TRY/spool.$node"
slurmd -D -N "$node" > /dev/null 2>&1 &
daemon=$!
# However it ends here, the other host must end, too.
trap 'touch "$TRY/over"; kill "$daemon" 2>/dev/null || true' EXIT
trap 'exit 130' INT TERM
if [ "$NODE" = 0 ]; then
    wait_for sh -c '[ "$(sinfo -h -t idle -o %D)" = 2 ]'
    "$@"
else
    while [ ! -e "$TRY/over" ]; do sleep 0.2; done
fi
