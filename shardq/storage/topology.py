"""Compares what a node says of the cluster with the slot table in use. Does no I/O and changes nothing.

redis-py closes every connection it has whenever it reads the topology, changed or not; in an outage, when it is read
again and again, each client would reconnect to every healthy node each time. So it is told to only when there is news.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from redis.asyncio.cluster import ClusterNode


def agrees(reply: Any, table: Mapping[int, Sequence[ClusterNode]], asked_host: str) -> bool:
    """Whether CLUSTER SLOTS, as the node at `asked_host` answered it, says what the table has.

    A reply that can't be read agrees with nothing.
    """
    try:
        said = {
            slot: names
            for first, last, *nodes in reply
            for names in [_names(nodes, asked_host)]
            for slot in range(first, last + 1)
        }
    except (TypeError, ValueError, IndexError, AttributeError):
        return False
    if said.keys() != table.keys():
        return False
    known: dict[int, tuple[str, frozenset[str]]] = {}  # the slots of a range share one list
    for slot, nodes in table.items():
        names = known.get(id(nodes))
        if names is None:
            names = known[id(nodes)] = nodes[0].name, frozenset(node.name for node in nodes[1:])
        if names != said[slot]:
            return False
    return True


def _names(nodes: Sequence[Any], asked_host: str) -> tuple[str, frozenset[str]]:
    """The master, and its replicas in whatever order they were listed."""
    master, *replicas = (f"{bytes(node[0]).decode() or asked_host}:{int(node[1])}" for node in nodes)
    return master, frozenset(replicas)
