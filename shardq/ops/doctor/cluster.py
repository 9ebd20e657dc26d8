"""Checks that take all nodes together: slots, failed nodes, replicas, one build everywhere. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from shardq.core.findings import Finding, Level
from shardq.core.servers import ListedNode
from shardq.core.slots import SLOTS
from shardq.ops.doctor.check import Check
from shardq.ops.doctor.facts import Limits
from shardq.storage.node_facts import NodeFacts

SUBJECT = "cluster"


@dataclass(frozen=True, slots=True)
class ClusterFacts:
    """All nodes; `listed` as one of them lists them, [] when none did; `still_moving` are slots, by node, that stood
    open in both looks."""

    nodes: Sequence[NodeFacts]
    listed: Sequence[ListedNode] = ()
    still_moving: Mapping[str, Sequence[str]] = field(default_factory=dict)


def covered(cluster: ClusterFacts, _limits: Limits) -> Iterator[Finding]:
    missing = SLOTS - sum(node.slots for node in cluster.listed if node.is_master)
    if missing > 0:
        what = f"{missing} of {SLOTS} slots belong to nobody: their shards can't be reached"
        yield Finding("problem", "cluster.slots_uncovered", SUBJECT, what, "redis-cli --cluster fix HOST:PORT")


def failed(cluster: ClusterFacts, _limits: Limits) -> Iterator[Finding]:
    for node in cluster.listed:
        if node.flags & {"fail", "fail?"}:
            serves = node.is_master and node.slots > 0
            level: Level = "problem" if serves and "fail" in node.flags else "warning"
            what = f"the others {'see it as failed' if 'fail' in node.flags else 'do not hear from it'}"
            if serves:
                what += f"; {node.slots} slots are away with it"
            else:
                what += "; it counts as a replica, and sends with durability='replica' may wait for it"
            do = "start it; one that is gone for good: CLUSTER FORGET on every node"
            yield Finding(level, "cluster.node_failed", node.name, what, do)


def moving(cluster: ClusterFacts, _limits: Limits) -> Iterator[Finding]:
    for node, slots in cluster.still_moving.items():
        what = f"slots that are being moved, and stand open: {', '.join(slots[:5])}{', ...' if len(slots) > 5 else ''}"
        do = f"unless somebody moves them right now: redis-cli --cluster fix {node}"
        yield Finding("warning", "cluster.slots_open", node, what, do)


def replicas(cluster: ClusterFacts, _limits: Limits) -> Iterator[Finding]:
    for node in cluster.nodes:
        if node.info and node.serves and node.info.get("connected_slaves", "0") == "0":
            what = "has no replica: its shards are lost with it, and away while it is"
            do = "redis-cli --cluster add-node NEW:PORT HOST:PORT --cluster-slave, for each"
            yield Finding("warning", "replicas.none", node.name, what, do)


def same_host(cluster: ClusterFacts, _limits: Limits) -> Iterator[Finding]:
    masters = {node.id: node for node in cluster.listed if node.is_master}
    for node in cluster.listed:
        master = masters.get(node.master_id)
        if master is not None and master.host == node.host:
            what = "shares the host of its master: one failure takes both"
            yield Finding("advice", "replicas.same_host", node.name, what, "put it on another machine")


def one_build(cluster: ClusterFacts, _limits: Limits) -> Iterator[Finding]:
    builds = {node.build for node in cluster.nodes if node.serves and node.build}
    if len(builds) > 1:
        what = f"masters have different builds of the functions: {', '.join(map(str, sorted(builds)))}"
        yield Finding("warning", "functions.differ", SUBJECT, what, "shardq install, with the newest shardq")


def _listed(cluster: ClusterFacts) -> bool:
    return bool(cluster.listed)


CHECKS: tuple[Check[ClusterFacts], ...] = (
    Check("slots", "every slot has its master", covered, _listed),
    Check("failed", "no node is seen as failed", failed, _listed),
    Check("moving", "no slot stands half moved", moving, _listed),
    Check("replicas", "every master has a replica", replicas, lambda cluster: any(n.info for n in cluster.nodes)),
    Check(
        "hosts",
        "no replica shares its master's host",
        same_host,
        lambda cluster: any(node.master_id != "-" for node in cluster.listed),
    ),
    Check(
        "one_build",
        "all masters have the same functions",
        one_build,
        lambda cluster: any(node.build for node in cluster.nodes),
    ),
)
