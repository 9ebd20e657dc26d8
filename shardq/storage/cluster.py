"""The connection to the cluster: which nodes there are, who owns which slot and how many replicas there are, looked at
anew when something failed; and the functions library on each node.

redis-py's cluster client gives topology, connections, TLS and AUTH. What goes over one connection and back is
exchange.py's, retries are those of pipes.py, what a call means is said by the functions. Starts no task.
"""

from __future__ import annotations

import random
import socket
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any

import anyio
from redis.asyncio.cluster import ClusterNode, RedisCluster
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisClusterException, RedisError
from redis.maint_notifications import MaintNotificationsConfig

from shardq.core.backoff import backoff_s
from shardq.core.servers import nodes_away, replicas_listed, replicas_spread
from shardq.errors import StoreUnavailable, UsageError
from shardq.storage import topology
from shardq.storage.address import HOW, parse
from shardq.storage.commands import Packed, pack_call, pack_command
from shardq.storage.exchange import CONNECT_TIMEOUT_S, REPLICATION, Exchanges
from shardq.storage.functions import BUILD, library_source
from shardq.storage.mastership import parsed
from shardq.storage.trouble import NO_REPLY, Trouble, no_functions, refused_topology

REFRESH_TIMEOUT_S = 2.0
REFRESH_ASK_S = 0.7  # one node's share of it: the next one is asked when it hangs
REFRESH_FIRST_S, REFRESH_LAST_S = 0.2, 1.0  # between two of them, growing while they bring no news
MOST_STRANGERS = 16

_SLOTS = pack_command("CLUSTER", "SLOTS")
_NODES = pack_command("CLUSTER", "NODES")


class Cluster(Exchanges):
    """Topology and single exchanges. Use `connect()` before anything else and `aclose()` at the end.

    `chance` gives numbers in [0, 1): it spreads what many clients would else do at the same moment. `may_load` says
    whether a node without the functions library gets it.
    """

    def __init__(self, url: str, chance: Callable[[], float] = random.random, *, may_load: bool = True) -> None:
        super().__init__()
        self._chance = chance
        self._may_load = may_load
        try:
            self._redis = RedisCluster(
                **parse(url),
                retry=Retry(NoBackoff(), 0),
                reinitialize_steps=0,
                socket_timeout=None,
                socket_connect_timeout=CONNECT_TIMEOUT_S,
                maint_notifications_config=MaintNotificationsConfig(enabled=False),
                decode_responses=False,
                require_full_coverage=False,
                driver_info=None,
                protocol=2,
                max_connections=1000,
            )
        except (ValueError, RedisClusterException, socket.gaierror):
            # Not what it says: it may quote the URL, and that may hold a password.
            raise UsageError(f"the URL is not usable (its host is unknown): {HOW}") from None
        self._strangers: dict[str, ClusterNode] = {}
        self._refreshing: anyio.Event | None = None
        self._refresh_from_monotonic_s = -1e9
        self._refreshes_without_news = 0
        self.topology_version = 0
        # Asked for every shard a worker starts; counting goes over 16384 slots.
        self._replicas_seen = -1
        self._primaries: tuple[int, list[ClusterNode]] = (-1, [])
        self._agreed: tuple[int, dict[str, Any]] = (-1, {})  # topology version, what each node said that agreed

    @property
    def _nodes(self) -> Any:
        return self._redis.nodes_manager

    async def connect(self) -> None:
        """Reads the topology; raises StoreUnavailable when no node of the URL answers."""
        where = self.startup_addresses()  # which a reading that fails may leave empty
        try:
            with anyio.fail_after(CONNECT_TIMEOUT_S * 2):
                # Not the client's own initialize: that also runs COMMAND, which few ACL users may and we don't need.
                await self._nodes.initialize()
            self.topology_version += 1
        except (RedisError, RedisClusterException, OSError, TimeoutError, *NO_REPLY) as error:
            msg = f"no cluster node answers at {where}: is it up, and the address right?"
            raise refused_topology(error, where) or StoreUnavailable(msg) from None

    async def aclose(self) -> None:
        # Also when the caller was cancelled: a socket left open is a leak, and closing one takes no time.
        with anyio.move_on_after(CONNECT_TIMEOUT_S, shield=True):
            await self._close_all()

    async def _close_all(self) -> None:
        for node in (*self._strangers.values(), *self._dropped):
            await node.disconnect()
        await self._nodes.aclose()
        await self._nodes.aclose("startup_nodes")

    def startup_addresses(self) -> str:
        return ", ".join(sorted(self._nodes.startup_nodes))

    def startup_nodes(self) -> list[ClusterNode]:
        return list(self._nodes.startup_nodes.values())

    def primaries(self) -> list[ClusterNode]:
        """Every master, in a fixed order."""
        version, known = self._primaries
        if version != self.topology_version:
            owners = {nodes[0].name: nodes[0] for nodes in self._nodes.slots_cache.values() if nodes}
            known = [owners[name] for name in sorted(owners)]
            self._primaries = (self.topology_version, known)
        return list(known)

    def told_replicas(self, master: str, count: int) -> None:
        """What a master itself says of its replicas."""
        self.replicas.tell(master, count)

    async def count_away(self) -> None:
        """Asks a master for the nodes that are away. Where the user may not ask, only those that are seen count."""
        for node in self.primaries():
            (reply,) = await self.exchange(node, [Packed(_NODES)], within_s=REFRESH_ASK_S)
            if isinstance(reply, bytes):
                text = reply.decode(errors="replace")
                self.replicas.see_listed(nodes_away(text), replicas_listed(text), replicas_spread(text))
                return

    async def count_replicas(self) -> bool:
        """Looks at everything that `least_replicas` goes by; true when that fell (see replicas.py)."""
        await self.refresh()
        for node in self.primaries():
            (reply,) = await self.exchange(node, [Packed(REPLICATION)], within_s=REFRESH_ASK_S)
            if (found := parsed(reply).get("connected_slaves", "")).isdigit():
                self.replicas.tell(node.name, int(found))
        await self.count_away()
        self.least_replicas()
        return self.replicas.looked()

    def least_replicas(self) -> int:
        """Replicas of the master that has fewest, those that are away included."""
        if self._replicas_seen != self.topology_version:
            known = {nodes[0].name: len(nodes) - 1 for nodes in self._nodes.slots_cache.values() if nodes}
            self.replicas.see(known)
            self._replicas_seen = self.topology_version
        return self.replicas.count

    def node_of(self, slot: int) -> ClusterNode | None:
        """The master that owns `slot` as far as we know; None while nobody does."""
        nodes = self._nodes.slots_cache.get(slot)
        return nodes[0] if nodes else None

    def still_has(self, node: ClusterNode) -> bool:
        """Whether this very node may still be sent to: false once it has left the cluster, or was made anew."""
        name, nodes = node.name, self._nodes
        if nodes.nodes_cache.get(name) is node:
            return True
        return self._strangers.get(name) is node or nodes.startup_nodes.get(name) is node

    def lists(self, address: tuple[str, int]) -> bool:
        """Whether the topology has a node by that name and port."""
        return self._nodes.get_node(host=address[0], port=address[1]) is not None

    def node_at(self, address: tuple[str, int]) -> ClusterNode:
        """The node at an address a redirect named, also one that owns nothing yet."""
        host, port = address
        # get_node() itself refuses port 0, which a broken redirect may name.
        known: ClusterNode | None = self._nodes.get_node(host=host, port=port) if host and port else None
        if known is not None:
            return known
        name = f"{host}:{port}"
        if name not in self._strangers:
            if len(self._strangers) >= MOST_STRANGERS:
                self._dropped.append(self._strangers.pop(next(iter(self._strangers))))
                self.topology_version += 1
            self._strangers[name] = ClusterNode(host, port, **self._nodes.connection_kwargs)
        return self._strangers[name]

    async def follow(self, trouble: Trouble) -> None:
        """Takes a MOVED into the slot table."""
        if trouble.redirect is None:
            return
        try:
            await self._nodes.move_slot(trouble.redirect)
        except (RedisError, KeyError, AttributeError, ValueError):
            await self.refresh()  # a slot that was not in the table at all
        self.topology_version += 1

    async def refresh(self, failed: str | None = None) -> None:
        """Looks whether the topology has changed, at most every REFRESH_FIRST_S and less often while it has not.

        Whoever comes while that is under way waits for it. A cluster out of reach changes nothing. Takes
        REFRESH_TIMEOUT_S at most.
        """
        if self._refreshing is not None:
            await self._refreshing.wait()
            return
        now = monotonic()
        if now < self._refresh_from_monotonic_s:
            return
        if now - self._refresh_from_monotonic_s > 5 * REFRESH_LAST_S:
            self._refreshes_without_news = 0  # the trouble is a new one
        ended = self._refreshing = anyio.Event()
        news = False
        try:
            with anyio.move_on_after(REFRESH_TIMEOUT_S):
                news = await self._read_topology(failed)
        except (RedisError, RedisClusterException, OSError, *NO_REPLY):
            pass  # the callers go on trying until their own deadlines and then say what they could not reach
        finally:
            self._refreshes_without_news = 0 if news else self._refreshes_without_news + 1
            pause = backoff_s(self._refreshes_without_news, REFRESH_FIRST_S, REFRESH_LAST_S, self._chance())
            self._refresh_from_monotonic_s = monotonic() + pause
            self._refreshing = None
            ended.set()

    async def _read_topology(self, failed: str | None) -> bool:
        """Asks one node after the other until one answers; true when that was news."""
        nodes: dict[str, ClusterNode] = {**self._nodes.startup_nodes, **self._nodes.nodes_cache}
        for node in sorted(nodes.values(), key=lambda node: (node.name == failed, self._chance())):
            (reply,) = await self.exchange(node, [Packed(_SLOTS)], within_s=REFRESH_ASK_S)
            if isinstance(reply, Trouble):
                continue
            if self._agrees(node, reply):
                return False
            await self._nodes.initialize(last_failed_node_name=failed)
            self._part_with([name for name in self._strangers if name in self._nodes.nodes_cache])
            self.topology_version += 1
            return True
        return False

    def _agrees(self, node: ClusterNode, reply: Any) -> bool:
        """Whether what a node says of the topology is what is known. Each node lists it in another order, and comparing
        goes over 16384 slots: so what each said that agreed is remembered."""
        version, agreed = self._agreed
        if version != self.topology_version:
            version, agreed = self._agreed = (self.topology_version, {})
        if node.name not in agreed or agreed[node.name] != reply:
            if not topology.agrees(reply, self._nodes.slots_cache, node.host):
                return False
            agreed[node.name] = reply
        return True

    def _part_with(self, strangers: Sequence[str]) -> None:
        self._dropped += [self._strangers.pop(name) for name in strangers]

    async def load_functions(self, node: ClusterNode, *, replace: bool = False) -> Trouble | None:
        """Puts the functions library on one master; the Trouble when that is refused."""
        if not self._may_load:
            return no_functions(node.name)
        args = ("FUNCTION", "LOAD", "REPLACE", library_source()) if replace else ("FUNCTION", "LOAD", library_source())
        (reply,) = await self.exchange(node, [Packed(pack_command(*args))])
        if not isinstance(reply, Trouble):
            return None
        if "already exists" not in str(reply.error.__cause__):
            return reply
        # Another client was faster; or one of an older version was, and its build lacks what was called.
        return await self.load_functions(node, replace=True) if await self._is_older(node) else None

    async def update_functions(self, node: ClusterNode) -> bool:
        """Puts our build of the library on a master that has an older one; false when it has not, or refuses."""
        return await self._is_older(node) and await self.load_functions(node, replace=True) is None

    async def _is_older(self, node: ClusterNode) -> bool:
        (build,) = await self.exchange(node, [Packed(pack_call("build", (), ()))])
        return type(build) is int and build < BUILD
