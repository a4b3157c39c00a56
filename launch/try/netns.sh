#!/bin/bash
# Two hosts on one machine, to try launchers: network namespaces node01 and node02, joined by a virtual cable.
# Each has a name and an address of its own, reaches the other, and nothing else. Needs root and iproute2.
#   launch/try/netns.sh COMMAND [ARGUMENTS]      runs COMMAND on both at the same time, then removes them
#   launch/try/netns.sh --first COMMAND ...      runs it on node01 only, for launchers that start the others
# COMMAND finds its host's number, 0 or 1, in NODE and an empty folder for both hosts in TRY. Names resolve by
# /etc/netns/NAME/hosts, where, as on Debian, a host's own name is 127.0.1.1; with LOOPBACK_NAMES=0 its real address.
# The addresses are 10.77.0.1 and 10.77.0.2; with IPV6=1 fd00::1 and fd00::2 and, but for loopback, no IPv4.
set -euo pipefail

nodes="0 1"
if [ "${IPV6:-0}" = 1 ]; then net=fd00:: bits="64 nodad"; else net=10.77.0. bits=24; fi
if [ "${1:-}" = --first ]; then nodes=0; shift; fi
[ $# -gt 0 ] || { sed -n '2,8p' "$0"; exit 2; }
if ip netns list | grep -qE '^node0[12]\b'; then echo "namespaces node01 or node02 exist already" >&2; exit 2; fi

TRY=$(mktemp -d)
export TRY
clean_up() {
    for node in node01 node02; do
        for signal in TERM KILL; do
            ip netns pids $node 2>/dev/null | xargs -r kill -s $signal 2>/dev/null || true
            sleep 0.5
        done
        ip netns del $node 2>/dev/null || true
        rm -rf /etc/netns/$node
    done
    rm -rf "$TRY"
}
trap clean_up EXIT
trap 'exit 130' INT TERM

for i in 1 2; do
    ip netns add node0$i
    mkdir -p /etc/netns/node0$i
    {
        echo "127.0.0.1 localhost"
        echo "::1 localhost"
        for other in 1 2; do
            if [ $other = $i ] && [ "${LOOPBACK_NAMES:-1}" = 1 ]; then address=127.0.1.1; else address=$net$other; fi
            echo "$address node0$other"
        done
    } > /etc/netns/node0$i/hosts
done
ip link add cable1 netns node01 type veth peer name cable2 netns node02
for i in 1 2; do
    # shellcheck disable=SC2086
    ip -n node0$i address add $net$i/$bits dev cable$i
    ip -n node0$i link set lo up
    ip -n node0$i link set cable$i up
done

# unshare --uts: a host name of its own, too.
on_node() {
    NODE=$1 ip netns exec node0$(($1 + 1)) unshare --uts \
        sh -c 'hostname "$0"; exec "$@"' node0$(($1 + 1)) "${@:2}"
}
running=()
for node in $nodes; do on_node "$node" "$@" & running+=($!); done
code=0
for process in "${running[@]}"; do wait "$process" || code=$?; done
exit $code
