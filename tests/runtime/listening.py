"""What the tests of broadcasts share: reading notices with a deadline, and what the nodes know of the listeners."""

from __future__ import annotations

from collections.abc import Callable

import anyio

from shardq import Missed, Notice, Notices
from shardq.ops.local_cluster import LocalCluster
from shardq.storage.keys import CastNames
from shardq.storage.nodes import node_command

HOST = "127.0.0.1"
DEADLINE_S = 30.0


async def read(notices: Notices, count: int) -> list[Notice | Missed]:
    """So many items; fails the test when they do not come."""
    items: list[Notice | Missed] = []
    with anyio.fail_after(DEADLINE_S):
        while len(items) < count:
            items.append(await anext(notices))
    return items


async def read_until(notices: Notices, wanted: Callable[[Notice | Missed], bool]) -> list[Notice | Missed]:
    """Everything up to the first item that is wanted."""
    items: list[Notice | Missed] = []
    with anyio.fail_after(DEADLINE_S):
        while not items or not wanted(items[-1]):
            items.append(await anext(notices))
    return items


async def read_gaps(notices: Notices, *labels: str) -> list[Notice]:
    """Everything until each of these channels and patterns was reported missed; returns the notices among it."""
    came: list[Notice] = []
    left = set(labels)
    with anyio.fail_after(DEADLINE_S):
        while left:
            item = await anext(notices)
            if isinstance(item, Missed):
                left -= set(item.channels)
            else:
                came.append(item)
    return came


def subscribers(cluster: LocalCluster) -> int:
    """Connections that are subscribed to something, on all nodes."""
    return connections(cluster, "TYPE", "pubsub")


def connections(cluster: LocalCluster, *which: str) -> int:
    """Connections of clients, on all nodes."""
    texts = [str(node_command(HOST, port, "CLIENT", "LIST", *which)) for port in cluster.ports]
    return sum(len(text.splitlines()) for text in texts)


def by_node(cluster: LocalCluster, name: str) -> dict[int, str]:
    """For each master of a cluster of three, a channel whose slot it owns."""
    found: dict[int, str] = {}
    number = 0
    while len(found) < 3:
        channel = f"{name}-{number}"
        found.setdefault(CastNames("shardq").exact_slot(channel) * 3 // 16384, channel)
        number += 1
    return {cluster.ports[index]: channel for index, channel in found.items()}
