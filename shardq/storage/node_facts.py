"""What single nodes say of themselves, for `shardq doctor`. Reads only; judges nothing; a node that is away or a
command that is not allowed is an answer, not an error.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from redis.asyncio.cluster import ClusterNode

from shardq.core.servers import ListedNode, parse_info, parse_nodes
from shardq.errors import AuthenticationFailed, ShardqError, StoreRefused
from shardq.storage.cluster import Cluster
from shardq.storage.commands import Packed, pack_call, pack_command
from shardq.storage.functions import LIBRARY
from shardq.storage.trouble import Trouble

SLOWLOG_ENTRIES = 128
_SETTINGS = (
    "save",
    "appendfsync",
    "stop-writes-on-bgsave-error",
    "cluster-require-full-coverage",
    "min-replicas-to-write",
    "client-output-buffer-limit",
    "timeout",
)
# What is asked: the words of the command, and the right to run it as an ACL rule has it.
_QUESTIONS = {
    "info": (("INFO",), "+info"),
    "cluster_info": (("CLUSTER", "INFO"), "+cluster|info"),
    "nodes": (("CLUSTER", "NODES"), "+cluster|nodes"),
    "config": (("CONFIG", "GET", *_SETTINGS), "+config|get"),
    "slowlog": (("SLOWLOG", "GET", str(SLOWLOG_ENTRIES)), "+slowlog|get"),
    "clock": (("TIME",), "+time"),
    "slots": (("CLUSTER", "SLOTS"), "+cluster|slots"),
    "user": (("ACL", "WHOAMI"), "+acl|whoami"),
}


@dataclass(frozen=True, slots=True)
class SlowCall:
    """A call of one of our functions in the slow log; `at` is Unix time by the node's clock, in seconds."""

    function: str
    at: int
    took_us: int


@dataclass(slots=True)
class NodeFacts:
    """One node. What could not be asked is empty or None, and named in `denied` (the right that is missing) or
    `refused` (what the server does not offer); `away` says why a node did not answer at all.

    build          of the functions library; 0: it is not there
    clock_ahead_s  its clock before this machine's, give or take `clock_error_s`
    """

    name: str
    listed: ListedNode | None
    away: str = ""
    denied: set[str] = field(default_factory=set)
    refused: set[str] = field(default_factory=set)
    info: dict[str, str] = field(default_factory=dict)
    cluster_info: dict[str, str] = field(default_factory=dict)
    config: dict[str, str] = field(default_factory=dict)
    nodes: list[ListedNode] = field(default_factory=list)
    slow: list[SlowCall] = field(default_factory=list)
    user: str = ""
    build: int | None = None
    clock_ahead_s: float | None = None
    clock_error_s: float = 0.0

    @property
    def is_master(self) -> bool:
        """As it says itself, or else as the others say."""
        role = self.info.get("role")
        return role == "master" if role is not None else self.listed is None or self.listed.is_master

    @property
    def serves(self) -> bool:
        """Whether it is a master with slots, as far as is known."""
        return self.is_master and (self.listed is None or self.listed.slots > 0)


async def look_at_node(cluster: Cluster, name: str, listed: ListedNode | None) -> NodeFacts:
    """Asks one node, given as host:port, everything; within seconds, whatever it does. Raises AuthenticationFailed."""
    facts = NodeFacts(name, listed)
    node = _node(cluster, name, listed)
    calls = [*(pack_command(*words) for words, _ in _QUESTIONS.values()), pack_call("build", (), ())]
    *replies, build = await cluster.exchange(node, [Packed(call) for call in calls])
    for question, reply in zip(_QUESTIONS, replies, strict=True):
        _take(facts, question, reply)
    _take_build(facts, build)
    if not facts.away and "+time" not in facts.denied:
        await _compare_clocks(cluster, node, facts)
    return facts


async def listed_by(cluster: Cluster, name: str, listed: ListedNode | None) -> list[ListedNode]:
    """CLUSTER NODES of one node; [] when it does not say."""
    (reply,) = await cluster.exchange(_node(cluster, name, listed), [Packed(pack_command("CLUSTER", "NODES"))])
    return parse_nodes(reply.decode(errors="replace"), name.rpartition(":")[0]) if isinstance(reply, bytes) else []


def _node(cluster: Cluster, name: str, listed: ListedNode | None) -> ClusterNode:
    # Where nodes announce names instead of addresses, certificates may hold for the names alone.
    if listed is not None and listed.hostname and cluster.lists((listed.hostname, listed.port)):
        return cluster.node_at((listed.hostname, listed.port))
    host, _, port = name.rpartition(":")
    return cluster.node_at((host, int(port)))


def is_denied(error: BaseException) -> bool:
    """Whether it means that the user lacks a right."""
    return isinstance(error, StoreRefused) and "NOPERM" in str(error)


def _take(facts: NodeFacts, question: str, reply: Any) -> None:
    if isinstance(reply, Trouble):
        _refuse(facts, _QUESTIONS[question][1], reply)
        return
    try:
        _read(facts, question, reply)
    except (TypeError, ValueError, IndexError, AttributeError):
        facts.refused.add(_QUESTIONS[question][1])  # no answer of a server that is in order


def _read(facts: NodeFacts, question: str, reply: Any) -> None:
    match question:
        case "info":
            facts.info = parse_info(reply.decode(errors="replace"))
        case "cluster_info":
            facts.cluster_info = parse_info(reply.decode(errors="replace"))
        case "nodes":
            facts.nodes = parse_nodes(reply.decode(errors="replace"), facts.name.rpartition(":")[0])
        case "config":
            words = [word.decode(errors="replace") for word in reply]
            facts.config = dict(zip(words[::2], words[1::2], strict=True))
        case "slowlog":
            facts.slow = [call for entry in reply if (call := _slow_call(entry)) is not None]
        case "user":
            facts.user = reply.decode(errors="replace")
        case _:
            pass  # of these only whether they are allowed: others ask them in earnest


def _refuse(facts: NodeFacts, right: str, trouble: Trouble) -> None:
    error: ShardqError = trouble.error
    if isinstance(error, AuthenticationFailed):
        raise error
    if is_denied(error):
        facts.denied.add(right)
    elif trouble.action == "fail":
        facts.refused.add(right)
    else:
        facts.away = str(error)


def _take_build(facts: NodeFacts, reply: Any) -> None:
    if isinstance(reply, int):
        facts.build = reply
    elif not isinstance(reply, Trouble):
        facts.refused.add("+fcall")
    elif reply.action == "load":
        facts.build = 0
    else:
        _refuse(facts, "+fcall", reply)


def _slow_call(entry: Sequence[Any]) -> SlowCall | None:
    at, took_us, words = entry[1], entry[2], entry[3]
    function = words[1].decode(errors="replace") if len(words) > 1 and words[0].upper().startswith(b"FCALL") else ""
    if not function.startswith(f"{LIBRARY}_"):
        return None
    return SlowCall(function.removeprefix(f"{LIBRARY}_"), int(at), int(took_us))


async def _compare_clocks(cluster: Cluster, node: ClusterNode, facts: NodeFacts) -> None:
    sent, sent_monotonic_s = time.time(), time.monotonic()
    (reply,) = await cluster.exchange(node, [Packed(pack_command("TIME"))])
    half_s = (time.monotonic() - sent_monotonic_s) / 2
    if not isinstance(reply, Trouble):
        facts.clock_ahead_s = int(reply[0]) + int(reply[1]) / 1e6 - (sent + half_s)
        facts.clock_error_s = half_s


async def keys_under(cluster: Cluster, node_name: str, prefix: str, most: int) -> tuple[list[str], bool] | Trouble:
    """Keys of one master under a prefix, at most about `most` of them; and whether that was all."""
    host, _, port = node_name.rpartition(":")
    node, cursor, found = cluster.node_at((host, int(port))), b"0", []
    while True:
        scan = pack_command("SCAN", cursor, "MATCH", f"{prefix}:*", "COUNT", 1000)
        (reply,) = await cluster.exchange(node, [Packed(scan)])
        if isinstance(reply, Trouble):
            return reply
        cursor, keys = reply
        found += [key.decode(errors="replace") for key in keys]
        if cursor == b"0" or len(found) >= most:
            return found, cursor == b"0"
