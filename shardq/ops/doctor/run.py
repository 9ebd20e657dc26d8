"""Examines a cluster and its queues: asks every node, looks at every queue twice, runs every check. Changes nothing.

Everything has a time limit: nodes are asked side by side and a node that hangs costs seconds, once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import anyio

from shardq.core.findings import Finding, in_order
from shardq.core.servers import ListedNode
from shardq.errors import ShardqError, StoreUnavailable, UnknownQueue, UsageError
from shardq.ops.doctor import cluster as of_cluster
from shardq.ops.doctor import queues as of_queues
from shardq.ops.doctor import servers as of_servers
from shardq.ops.doctor.check import run_checks
from shardq.ops.doctor.cluster import ClusterFacts
from shardq.ops.doctor.facts import Limits, QueueFacts
from shardq.ops.doctor.read import CALL_S, CALL_WHEN_AWAY_S, Look, look, look_again, orphans
from shardq.runtime.client import Client
from shardq.storage.cluster import Cluster
from shardq.storage.node_facts import NodeFacts, is_denied, listed_by, look_at_node

NAMES_S = 3.0
_QUEUES_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to examine: one queue or all, over how many seconds, and whether to look for what deleted queues left."""

    queue: str | None = None
    over_s: float = 3.0
    deep: bool = False
    prefix: str = "shardq"
    limits: Limits = field(default_factory=Limits)


async def examine(url: str, wanted: Wanted) -> list[Finding]:
    """Everything that was found, the worst first.

    Raises StoreUnavailable when no node of the URL answers, AuthenticationFailed, UsageError, and UnknownQueue when the
    queue that is asked for does not exist.
    """
    client = Client(url, prefix=wanted.prefix, only_looks=True)
    try:
        first = await _first_node(client.cluster)
        if first.info.get("cluster_enabled") == "0":
            return in_order(run_checks(of_servers.CHECKS[:3], [first], wanted.limits, "node"))
        if "+cluster|slots" in first.denied:  # which every client needs: there is no getting further
            return in_order(run_checks(of_servers.CHECKS, [first], wanted.limits, "node"))
        async with client:
            return in_order(await _examine(client, first, wanted))
    finally:
        await client.cluster.aclose()


async def _first_node(cluster: Cluster) -> NodeFacts:
    said = ""
    for node in cluster.startup_nodes():
        facts = await look_at_node(cluster, node.name, None)
        if not facts.away:
            return facts
        said = facts.away
    raise StoreUnavailable(f"no cluster node answers at {cluster.startup_addresses()} ({said}): is the address right?")


async def _examine(client: Client, first: NodeFacts, wanted: Wanted) -> list[Finding]:
    findings: list[Finding] = []
    nodes = await _all_nodes(client.cluster, first)
    names = await _queue_names(client, wanted, first.user, findings)
    call_s = CALL_WHEN_AWAY_S if any(node.away for node in nodes) else CALL_S
    looks = await _first_looks(client, names, wanted, call_s, first.user, findings)
    # Valkey tells replicas of them too; whoever closes a slot does so on the master.
    moving = {node.name: node for node in nodes if node.is_master and _moving(node.nodes)}
    if looks or moving:
        await anyio.sleep(wanted.over_s)
    still = {name: await _still_moving(client.cluster, node) for name, node in moving.items()}
    cluster = ClusterFacts(nodes, first.nodes, {name: slots for name, slots in still.items() if slots})
    queues = await _second_looks(client, looks, wanted, first.user, findings)
    findings += run_checks(of_servers.CHECKS, nodes, wanted.limits, "node")
    findings += run_checks(of_cluster.CHECKS, [cluster], wanted.limits, of_cluster.SUBJECT)
    findings += run_checks(of_queues.CHECKS, queues, wanted.limits, "queue")
    if wanted.deep:
        masters = [node.name for node in nodes if node.serves and not node.away]
        known = await _queue_names(client, replace(wanted, queue=None), first.user, findings) if wanted.queue else names
        findings += await orphans(client.cluster, masters, client.prefix, known, wanted.limits)
    return findings


async def _all_nodes(cluster: Cluster, first: NodeFacts) -> list[NodeFacts]:
    """Every node as the first one lists them; without its list the masters alone, as the topology has them."""
    listed: Mapping[str, ListedNode | None] = {node.name: node for node in first.nodes}
    listed = listed or {node.name: None for node in cluster.primaries()}
    found: list[NodeFacts] = []

    async def ask(name: str, line: ListedNode | None) -> None:
        found.append(await look_at_node(cluster, name, line))

    async with anyio.create_task_group() as tasks:
        for name, line in listed.items():
            tasks.start_soon(ask, name, line)
    return sorted(found, key=lambda node: node.name)


def _moving(nodes: Sequence[ListedNode]) -> list[str]:
    return [slot for node in nodes if "myself" in node.flags for slot in node.moving]


async def _still_moving(cluster: Cluster, node: NodeFacts) -> list[str]:
    again = _moving(await listed_by(cluster, node.name, node.listed))
    return [slot for slot in _moving(node.nodes) if slot in again]


# -- queues -----------------------------------------------------------------------------------------------------------


async def _queue_names(client: Client, wanted: Wanted, user: str, findings: list[Finding]) -> list[str]:
    if wanted.queue is not None:
        return [wanted.queue]
    try:
        with anyio.fail_after(NAMES_S):
            return await client.queue_names()
    except (ShardqError, TimeoutError) as error:
        if is_denied(error):
            findings.append(of_servers.denied_right("cluster", f"+smembers ~{wanted.prefix}:*", user))
            return []
        why = str(error) or "its master does not answer"
        do = "name one with --queue; see what is said of its master, and of rights"
        findings.append(Finding("problem", "queues.names", "cluster", f"the list of queues can't be read: {why}", do))
        return []


async def _first_looks(
    client: Client, names: Sequence[str], wanted: Wanted, call_s: float, user: str, findings: list[Finding]
) -> dict[str, Look]:
    looks: dict[str, Look] = {}
    limit = anyio.CapacityLimiter(_QUEUES_AT_ONCE)

    async def look_at(name: str) -> None:
        async with limit:
            try:
                looks[name] = await look(client, name, call_s)
            except UsageError:
                if wanted.queue is not None:
                    raise
                findings.append(_gone(name))
            except ShardqError as error:
                findings.append(_unreadable(name, error, wanted, user))

    async with anyio.create_task_group() as tasks:
        for name in names:
            tasks.start_soon(look_at, name)
    return dict(sorted(looks.items()))


async def _second_looks(
    client: Client, looks: Mapping[str, Look], wanted: Wanted, user: str, findings: list[Finding]
) -> list[QueueFacts]:
    facts: dict[str, QueueFacts] = {}
    limit = anyio.CapacityLimiter(_QUEUES_AT_ONCE)

    async def look_at(name: str, earlier: Look) -> None:
        async with limit:
            try:
                facts[name] = await look_again(client, earlier, wanted.over_s, wanted.limits, user)
            except UnknownQueue:
                return  # deleted in between
            except ShardqError as error:
                findings.append(_unreadable(name, error, wanted, user))

    async with anyio.create_task_group() as tasks:
        for name, earlier in looks.items():
            tasks.start_soon(look_at, name, earlier)
    return [facts[name] for name in sorted(facts)]


def _unreadable(name: str, error: ShardqError, wanted: Wanted, user: str) -> Finding:
    if is_denied(error):
        return of_servers.denied_right(name, f"+hmget ~{wanted.prefix}:*", user)
    what = f"can't be read: {error}"
    return Finding(
        "problem", "queues.unreadable", name, what, "restore its routing table, or see what is said of its master"
    )


def _gone(name: str) -> Finding:
    what = "is in the list of queues and has no routing table"
    do = f"its master lost its data, or a deletion was cut short: shardq queue create {name} --shards N, delete it then"
    return Finding("problem", "queues.gone", name, what, do)
