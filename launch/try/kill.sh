#!/bin/bash
# Kills one process of a run in the middle of a round, to try restarts on the two hosts of netns.sh.
#   VICTIM=3 launch/try/netns.sh launch/try/kill.sh COMMAND [ARGUMENTS]
# VICTIM  a rank, "control" (the control process), or "node02" (COMMAND itself on that host); required
# SIGNAL  what it gets (default KILL)
# AFTER   when: a moment after rank 0's log, or the control process's, has said this (default "clif: round 2:")
set -euo pipefail
[ $# -gt 0 ] && [ -n "${TRY:-}" ] && [ -n "${VICTIM:-}" ] || { sed -n '2,6p' "$0"; exit 2; }

"$@" > >(tee "$TRY/log.$NODE") 2>&1 &
command=$!
echo $command > "$TRY/pid.$(hostname)"

# Both hosts are one machine: a rank is found by its environment, wherever it is.
find_victim() {
    case $VICTIM in
        node*) cat "$TRY/pid.$VICTIM" ;;
        control) pgrep -f "clif[.]control --run-dir" -P "$(VICTIM=0 find_victim)" ;;
        *) for pid in $(pgrep -f "launch/run[.]py --config"); do
               ! tr '\0' '\n' < "/proc/$pid/environ" | grep -qx "RANK=$VICTIM" || echo "$pid"
           done ;;
    esac
}

if [ "$NODE" = 0 ]; then
    until grep -qs "${AFTER:-clif: round 2:}" "$TRY/log.0"; do
        kill -0 $command 2> /dev/null || break
        sleep 0.1
    done
    sleep 0.3
    echo "kill.sh: SIG${SIGNAL:-KILL} to $VICTIM"
    kill -s "${SIGNAL:-KILL}" "$(find_victim)"
fi
code=0
wait $command || code=$?
echo "kill.sh: $(hostname): exit code $code"
exit $code
