"""What the robustness tests share: clusters that may be stopped, killed and started anew, and what reached them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shardq.ops.local_cluster import LocalCluster
from shardq.storage.nodes import node_info

HOST = "127.0.0.1"
# For servers that are killed and are to come back with all they had: by default one puts off writing while its disk is
# busy, up to two seconds.
KEPT = {"appendfsync": "always"}


@contextmanager
def breakable(server: Path | None = None, **settings: str) -> Iterator[LocalCluster]:
    """Three masters that may be stopped without being declared dead, and killed without loss. Without `server`,
    whichever kind is found: for tests in which it does not matter."""
    own = {
        "cluster-node-timeout": "60000",
        "appendfsync": "always",
        **{name.replace("_", "-"): value for name, value in settings.items()},
    }
    with LocalCluster(masters=3, port=None, server=server, settings=own) as cluster:
        yield cluster


@contextmanager
def stopped(cluster: LocalCluster, *nodes: int) -> Iterator[None]:
    """Those nodes (all, when none is named) hang: they take connections and answer nothing."""
    pids = [cluster.processes[node].pid for node in nodes or range(len(cluster.processes))]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


@contextmanager
def gone(cluster: LocalCluster, *nodes: int) -> Iterator[None]:
    """Those nodes (all, when none is named) were killed, and are back with their data at the end."""
    processes = [cluster.processes[node] for node in nodes or range(len(cluster.processes))]
    for process in processes:
        process.kill()
    try:
        yield
    finally:
        for process in processes:
            process.restart()


_OF_CLIENTS = ("cmdstat_fcall", "cmdstat_cluster|slots", "cmdstat_ssubscribe", "cmdstat_ping")


def reached(cluster: LocalCluster, node: int) -> tuple[int, int]:
    """Connections that a node ever took, and calls that clients made there (what these did inside not counted)."""
    stats = node_info(HOST, cluster.ports[node], "stats")
    commands = node_info(HOST, cluster.ports[node], "commandstats")
    calls = [commands[name].partition("calls=")[2].partition(",")[0] for name in _OF_CLIENTS if name in commands]
    return int(stats["total_connections_received"]), sum(map(int, calls))


def connected(cluster: LocalCluster, node: int) -> int:
    """Connections that a node has now, the one that asks included."""
    return int(node_info(HOST, cluster.ports[node], "clients")["connected_clients"])
