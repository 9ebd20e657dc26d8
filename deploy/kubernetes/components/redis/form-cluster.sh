#!/bin/sh
# Makes one Redis Cluster of the nodes named as HOST:PORT, half of them replicas. Safe to repeat: a cluster that stands
# is left alone. Never used for a cluster that somebody else runs.
set -eu
addresses=""
for node in "$@"; do
    host=${node%:*} port=${node##*:}
    until [ "$(valkey-cli -h "$host" -p "$port" ping 2> /dev/null)" = PONG ]; do sleep 0.2; done
    # CLUSTER MEET takes addresses only.
    addresses="$addresses $(getent ahostsv4 "$host" | head -n 1 | cut -d ' ' -f 1):$port"
done
stands() { valkey-cli -h "${1%:*}" -p "${1##*:}" cluster info | grep -q '^cluster_state:ok'; }
if ! stands "$1"; then
    # shellcheck disable=SC2086 # one argument for each address
    valkey-cli --cluster create $addresses --cluster-replicas 1 --cluster-yes
fi
for node in "$@"; do
    until stands "$node"; do sleep 0.2; done
done
echo "the cluster stands"
