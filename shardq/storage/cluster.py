"""The connection to the cluster: who owns which slot, one write and its replies on one connection, redirects.

redis-py's cluster client gives topology, connections, TLS and AUTH. Its own command, pipeline and retry paths are not
used: they store messages twice, lose ASK redirects and never wait between tries (measured; see `pipes.py` for ours).
Retries live in `pipes.py`, meaning in the functions. Starts no task.
"""

from __future__ import annotations

import functools
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import anyio
import hiredis
from redis.asyncio.cluster import ClusterNode, RedisCluster
from redis.asyncio.connection import Connection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    RedisClusterException,
    RedisError,
    ResponseError,
)
from redis.maint_notifications import MaintNotificationsConfig

from shardq.errors import StoreTimeout, StoreUnavailable, UsageError
from shardq.storage.functions import function_name, library_source
from shardq.storage.trouble import Trouble, classify, not_replicated, unanswered, unreachable

ANSWER_TIMEOUT_S = 3.0
SLOWEST_LINK_BYTES_PER_S = 512 * 1024  # so much longer may the answer to a large write take
CONNECT_TIMEOUT_S = 2.0
REFRESH_TIMEOUT_S = 2.0
REFRESH_INTERVAL_S = 0.2
WAIT_TIMEOUT_MS = 1000


def pack_command(*args: str | bytes | int) -> bytes:
    """Any command, in wire form."""
    packed: bytes = hiredis.pack_command(args)  # type: ignore[arg-type]  # its stub knows only one-item tuples
    return packed


_ASKING = pack_command("ASKING")


@dataclass(frozen=True, slots=True)
class Confirm:
    """How far a write must have got before its reply counts: the command that asks, and the answer that suffices."""

    packed: bytes
    replicas: int
    fsync: bool = False

    def shortfall(self, reply: Any) -> int | None:
        """How many replicas confirmed, when that is too few; None when it suffices."""
        local, reached = (reply[0], reply[1]) if self.fsync else (1, reply)
        return None if reached >= self.replicas and local >= 1 else int(reached)


@functools.cache
def confirm_replicas(replicas: int) -> Confirm:
    return Confirm(pack_command("WAIT", replicas, WAIT_TIMEOUT_MS), replicas)


@functools.cache
def confirm_fsync(replicas: int) -> Confirm:
    return Confirm(pack_command("WAITAOF", 1, replicas, WAIT_TIMEOUT_MS), replicas, fsync=True)


@dataclass(frozen=True, slots=True)
class Packed:
    """One call on the wire."""

    data: bytes
    asking: bool = False
    confirm: Confirm | None = None


def pack_call(function: str, keys: Sequence[str], args: Sequence[str | bytes | int]) -> bytes:
    """FCALL of one of our functions, in wire form."""
    return pack_command("FCALL", function_name(function), len(keys), *keys, *args)


class Cluster:
    """Topology and single exchanges. Use `connect()` before anything else and `aclose()` at the end."""

    def __init__(self, url: str) -> None:
        try:
            self._redis = RedisCluster.from_url(
                url,
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
        except (ValueError, RedisClusterException, socket.gaierror) as error:
            msg = f"the URL is not usable ({error}): write it as redis://[user:password@]host:port"
            raise UsageError(msg) from error
        self._strangers: dict[str, ClusterNode] = {}
        self._refreshed_monotonic_s = -1e9
        self.topology_version = 0
        # Asked for every shard a worker starts; counting goes over 16384 slots.
        self._least_replicas = (-1, 0)
        self._replicas_told: dict[str, int] = {}

    @property
    def _nodes(self) -> Any:
        return self._redis.nodes_manager

    async def connect(self) -> None:
        """Reads the topology; raises StoreUnavailable when no node of the URL answers."""
        try:
            with anyio.fail_after(CONNECT_TIMEOUT_S * 2):
                # Not the client's own initialize: that also runs COMMAND, which few ACL users may and we don't need.
                await self._nodes.initialize()
            self.topology_version += 1
        except (RedisError, RedisClusterException, OSError, TimeoutError) as error:
            msg = f"no cluster node answers at {self.startup_addresses()}: is it up, and the address right?"
            raise StoreUnavailable(msg) from error

    async def aclose(self) -> None:
        # Also when the caller was cancelled: a socket left open is a leak, and closing one takes no time.
        with anyio.move_on_after(CONNECT_TIMEOUT_S, shield=True):
            await self._close_all()

    async def _close_all(self) -> None:
        for node in self._strangers.values():
            await node.disconnect()
        await self._nodes.aclose()
        await self._nodes.aclose("startup_nodes")

    def startup_addresses(self) -> str:
        return ", ".join(sorted(self._nodes.startup_nodes))

    def startup_nodes(self) -> list[ClusterNode]:
        return list(self._nodes.startup_nodes.values())

    def primaries(self) -> list[ClusterNode]:
        """Every master, in a fixed order."""
        owners = {nodes[0].name: nodes[0] for nodes in self._nodes.slots_cache.values() if nodes}
        return [owners[name] for name in sorted(owners)]

    def told_replicas(self, master: str, count: int) -> None:
        """What a master itself says of its replicas."""
        self._replicas_told[master] = count
        self._least_replicas = (-1, 0)

    def least_replicas(self) -> int:
        """Replicas of the master that has fewest."""
        version, least = self._least_replicas
        if version != self.topology_version:
            known = {nodes[0].name: len(nodes) - 1 for nodes in self._nodes.slots_cache.values() if nodes}
            # CLUSTER SLOTS leaves out a replica that has not replicated anything yet; its master's INFO counts it.
            least = min((max(count, self._replicas_told.get(name, 0)) for name, count in known.items()), default=0)
            self._least_replicas = (self.topology_version, least)
        return least

    def node_of(self, slot: int) -> ClusterNode | None:
        """The master that owns `slot` as far as we know; None while nobody does."""
        nodes = self._nodes.slots_cache.get(slot)
        return nodes[0] if nodes else None

    def node_at(self, address: tuple[str, int]) -> ClusterNode:
        """The node at an address a redirect named, also one that owns nothing yet."""
        host, port = address
        known: ClusterNode | None = self._nodes.get_node(host=host, port=port)
        if known is not None:
            return known
        name = f"{host}:{port}"
        if name not in self._strangers:
            self._strangers[name] = ClusterNode(host, port, **self._nodes.connection_kwargs)
        return self._strangers[name]

    async def follow(self, trouble: Trouble) -> None:
        """Takes a MOVED into the slot table."""
        if trouble.redirect is None:
            return
        try:
            await self._nodes.move_slot(trouble.redirect)
        except (RedisError, KeyError, AttributeError):
            await self.refresh()  # a slot that was not in the table at all
        self.topology_version += 1

    async def refresh(self, failed: str | None = None) -> None:
        """Reads the topology again, at most every REFRESH_INTERVAL_S; a cluster out of reach changes nothing."""
        now = anyio.current_time()
        if now - self._refreshed_monotonic_s < REFRESH_INTERVAL_S:
            return
        self._refreshed_monotonic_s = now
        try:
            with anyio.fail_after(REFRESH_TIMEOUT_S):
                await self._nodes.initialize(last_failed_node_name=failed)
            self.topology_version += 1
        except (RedisError, RedisClusterException, OSError, TimeoutError, IndexError):
            # The callers go on trying until their own deadlines and then say what they could not reach.
            return

    async def load_functions(self, node: ClusterNode, *, replace: bool = False) -> Trouble | None:
        """Puts the functions library on one master; the Trouble when that is refused."""
        args = ("FUNCTION", "LOAD", "REPLACE", library_source()) if replace else ("FUNCTION", "LOAD", library_source())
        (reply,) = await self.exchange(node, [Packed(pack_command(*args))])
        if isinstance(reply, Trouble) and "already exists" not in str(reply.error.__cause__):
            return reply
        return None

    async def exchange(self, node: ClusterNode, calls: Sequence[Packed]) -> list[Any]:
        """Sends all calls in one write on one connection and reads every reply; never raises for a failed call.

        Returns a reply or a Trouble for each call. One WAIT behind the last call covers every call before it.
        """
        confirm = next((call.confirm for call in calls if call.confirm is not None), None)
        write = [part for call in calls for part in ((_ASKING, call.data) if call.asking else (call.data,))]
        if confirm is not None:
            write.append(confirm.packed)
        try:
            connection = node.acquire_connection()
        except RedisError as error:  # more connections than the pool may open
            return [classify(error, node.name)] * len(calls)
        replies: list[Any] = []
        limit_s = ANSWER_TIMEOUT_S + sum(map(len, write)) / SLOWEST_LINK_BYTES_PER_S
        broken: Trouble | None = unanswered(node.name, limit_s)
        try:
            await node.disconnect_if_needed(connection)
            if not await self._connected(connection):
                return [unreachable(node.name)] * len(calls)
            with anyio.move_on_after(limit_s):
                await self._converse(node, connection, write, calls, confirm, replies)
                broken = None
        except (RedisError, OSError) as error:
            broken = classify(error, node.name)
        finally:
            node.release(connection)
        if broken is not None:
            # What was answered but not confirmed may be on one node only: its outcome is unknown too.
            replies = [broken if call.confirm else reply for reply, call in zip(replies, calls, strict=False)]
            replies += [broken] * (len(calls) - len(replies))
        return replies

    @staticmethod
    async def _connected(connection: Connection) -> bool:
        if connection.is_connected:
            return True
        try:
            with anyio.fail_after(CONNECT_TIMEOUT_S):
                await connection.connect()
        except (AuthenticationError, AuthorizationError):
            raise
        except (RedisError, OSError, TimeoutError):
            return False
        return True

    async def _converse(
        self,
        node: ClusterNode,
        connection: Connection,
        write: list[bytes],
        calls: Sequence[Packed],
        confirm: Confirm | None,
        replies: list[Any],
    ) -> None:
        await connection.send_packed_command(write, check_health=False)
        for call in calls:
            if call.asking:
                await connection.read_response()
            try:
                replies.append(await connection.read_response())
            except ResponseError as error:
                trouble = classify(error, node.name)
                trouble.error.__cause__ = error
                replies.append(trouble)
        if confirm is not None:
            late = await self._confirmed(node, connection, confirm)
            for index, call in enumerate(calls):
                if late is not None and call.confirm is not None and not isinstance(replies[index], Trouble):
                    replies[index] = late

    @staticmethod
    async def _confirmed(node: ClusterNode, connection: Connection, confirm: Confirm) -> Trouble | None:
        """Reads the answer to WAIT; the Trouble of every write before it when it does not suffice."""
        try:
            short = confirm.shortfall(await connection.read_response())
        except ResponseError as error:
            # A master that was demoted in between refuses WAIT: what it took may be rolled back.
            return Trouble("refresh", StoreTimeout(f"{node.name} could not confirm a write: {str(error)[:40]}"))
        return None if short is None else not_replicated(node.name, confirm.replicas, short)
