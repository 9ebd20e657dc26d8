"""The connection to the cluster: who owns which slot, one write and its replies on one connection, redirects.

redis-py's cluster client gives topology, connections, TLS and AUTH. Its own command, pipeline and retry paths are not
used: they store messages twice, lose ASK redirects and never wait between tries (measured; see `pipes.py` for ours).
Retries live in `pipes.py`, meaning in the functions. Starts no task.
"""

from __future__ import annotations

import functools
import random
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic
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
    NoPermissionError,
    RedisClusterException,
    RedisError,
    ResponseError,
)
from redis.maint_notifications import MaintNotificationsConfig

from shardq.core.backoff import backoff_s
from shardq.core.servers import nodes_away, replicas_listed
from shardq.errors import StoreRefused, StoreTimeout, StoreUnavailable, UsageError
from shardq.storage import topology
from shardq.storage.address import HOW, parse
from shardq.storage.functions import BUILD, READERS, function_name, library_source
from shardq.storage.mastership import ROLES_CHANGE_S, Histories, parsed, replicas_confirming
from shardq.storage.replicas import Replicas
from shardq.storage.tls import tls_failure
from shardq.storage.trouble import (
    NO_REPLY,
    Trouble,
    classify,
    doubtful,
    no_functions,
    not_replicated,
    redacted,
    refused_topology,
    unanswered,
    unreachable,
)
from shardq.storage.wire import Room, Wire

ANSWER_TIMEOUT_S = 3.0
SLOWEST_LINK_BYTES_PER_S = 512 * 1024  # so much longer may the answer to a large write take
CONNECT_TIMEOUT_S = 2.0
REFRESH_TIMEOUT_S = 2.0
REFRESH_ASK_S = 0.7  # one node's share of it: the next one is asked when it hangs
REFRESH_FIRST_S, REFRESH_LAST_S = 0.2, 1.0  # between two of them, growing while they bring no news
MOST_STRANGERS = 16
ROOM_BYTES = 256 * 1024  # of replies that are taken from a socket at once
WAIT_TIMEOUT_S = 1.0
WAIT_TIMEOUT_MS = int(WAIT_TIMEOUT_S * 1000)
FSYNC_TIMEOUT_MS = 2500  # `appendfsync everysec` takes a second, on master and replica side by side, and a bad one two


def pack_command(*args: str | bytes | int) -> bytes:
    """Any command, in wire form."""
    packed: bytes = hiredis.pack_command(args)  # type: ignore[arg-type]  # its stub knows only one-item tuples
    return packed


_ASKING = pack_command("ASKING")
_SLOTS = pack_command("CLUSTER", "SLOTS")
_NODES = pack_command("CLUSTER", "NODES")
_REPLICATION = pack_command("INFO", "replication")


@dataclass(frozen=True, slots=True)
class Confirm:
    """How far a write must have got before its reply counts: the command that asks, and the answer that suffices."""

    packed: bytes
    replicas: int
    fsync: bool = False

    def shortfall(self, reply: Any) -> int | None:
        """How many replicas confirmed, when that is too few; None when it suffices."""
        counts = reply if self.fsync else [1, reply]
        if type(counts) is not list or len(counts) < 2 or not {int}.issuperset(map(type, counts)):
            return 0  # no answer of a server that is in order
        return None if counts[1] >= self.replicas and counts[0] >= 1 else int(counts[1])


@functools.cache
def confirm_replicas(replicas: int) -> Confirm:
    return Confirm(pack_command("WAIT", replicas, WAIT_TIMEOUT_MS), replicas)


@functools.cache
def confirm_fsync(replicas: int) -> Confirm:
    """On the master's disk and on those of so many replicas."""
    return Confirm(pack_command("WAITAOF", 1, replicas, FSYNC_TIMEOUT_MS), replicas, fsync=True)


@dataclass(frozen=True, slots=True)
class Packed:
    """One call on the wire."""

    data: bytes
    asking: bool = False
    confirm: Confirm | None = None


def pack_call(function: str, keys: Sequence[str], args: Sequence[str | bytes | int]) -> bytes:
    """One of our functions in wire form; those that only read take no right to write."""
    command = "FCALL_RO" if function in READERS else "FCALL"
    return pack_command(command, function_name(function), len(keys), *keys, *args)


def _unconfirmable(error: ResponseError, node: str) -> str:
    """Why asking again how far a write got can't help, or nothing."""
    text = str(error)
    if "unknown command" in text:
        return f"{node} has no WAITAOF: durability='fsync' needs Redis 7.2 or newer, or Valkey"
    if "appendonly is disabled" in text:
        return f"{node} writes nothing to disk: set appendonly yes there, or choose another durability than 'fsync'"
    return ""


SETTLED = object()
"""In place of a reply that was handed on already."""

Settle = Callable[[int, Any], None]


class _Replies:
    """The replies to what one write carried, in the order of its calls."""

    def __init__(self, node: str, calls: Sequence[Packed], confirm: Confirm | None, settle: Settle | None) -> None:
        self._node, self._calls, self._confirm = node, calls, confirm
        self._settle = settle if confirm is None else None
        self._asked = False
        self.taken: list[Any] = []
        self.confirmation: Any = None
        self.failure: Exception | None = None
        self.short = False

    @property
    def unconfirmed(self) -> bool:
        """Whether all was answered but the WAIT behind it."""
        return len(self.taken) == len(self._calls) and self.confirmation is None

    def hear(self, reply: Any) -> bool:
        """Takes the next one; true when it was the last."""
        taken, calls = self.taken, self._calls
        if len(taken) == len(calls):
            self.confirmation = reply
            return True
        if calls[len(taken)].asking and not self._asked:
            self._asked = True
            if isinstance(reply, ResponseError):
                raise reply
            return False
        self._asked = False
        if isinstance(reply, ResponseError):
            trouble = classify(reply, self._node)
            trouble.error.__cause__ = redacted(reply)
            taken.append(trouble)
        elif self._settle is None:
            taken.append(reply)
        else:
            taken.append(SETTLED)
            try:
                self._settle(len(taken) - 1, reply)
            except Exception as error:  # no fault of the connection's, which has more to say
                self.failure = self.failure or error
        return len(taken) == len(calls) and self._confirm is None

    def confirmed(self) -> Trouble | None:
        """The Trouble of every write before the answer to WAIT when that does not suffice."""
        confirm, reply = self._confirm, self.confirmation
        if confirm is None:
            return None
        if isinstance(reply, ResponseError):
            if refused := _unconfirmable(reply, self._node):
                return Trouble("fail", StoreRefused(refused))
            # A master that was demoted in between refuses WAIT: what it took may be rolled back.
            return Trouble("refresh", StoreTimeout(f"{self._node} could not confirm a write: {str(reply)[:40]}"))
        short = confirm.shortfall(reply)
        self.short = short is not None
        return None if short is None else not_replicated(self._node, confirm.replicas, short)


class Cluster:
    """Topology and single exchanges. Use `connect()` before anything else and `aclose()` at the end.

    `chance` gives numbers in [0, 1): it spreads what many clients would else do at the same moment. `may_load` says
    whether a node without the functions library gets it.
    """

    def __init__(self, url: str, chance: Callable[[], float] = random.random, *, may_load: bool = True) -> None:
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
        self._room = Room(ROOM_BYTES)
        self._strangers: dict[str, ClusterNode] = {}
        self._dropped: list[ClusterNode] = []
        self._refreshing: anyio.Event | None = None
        self._refresh_from_monotonic_s = -1e9
        self._refreshes_without_news = 0
        self.topology_version = 0
        # Asked for every shard a worker starts; counting goes over 16384 slots.
        self._replicas_seen = -1
        self._primaries: tuple[int, list[ClusterNode]] = (-1, [])
        self._agreed: tuple[int, dict[str, Any]] = (-1, {})  # topology version, what each node said that agreed
        self.histories = Histories()
        self.replicas = Replicas()

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
                self.replicas.see_listed(nodes_away(text), replicas_listed(text))
                return

    async def count_replicas(self) -> bool:
        """Looks at everything that `least_replicas` goes by; true when that fell (see replicas.py)."""
        await self.refresh()
        for node in self.primaries():
            (reply,) = await self.exchange(node, [Packed(_REPLICATION)], within_s=REFRESH_ASK_S)
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

    async def exchange(
        self,
        node: ClusterNode,
        calls: Sequence[Packed],
        *,
        within_s: float = float("inf"),
        settle: Settle | None = None,
    ) -> list[Any]:
        """Sends all calls in one write on one connection and reads every reply; never raises for a failed call.

        Returns a reply or a Trouble for each call. One WAIT behind the last call covers every call before it, if it is
        about them (mastership.py). Takes CONNECT_TIMEOUT_S, then ANSWER_TIMEOUT_S and more for a large write, and never
        longer than `within_s`.

        `settle(index, reply)` is given each reply in the turn of the loop in which it comes, where none waits for
        another's confirmation; SETTLED is returned in its place.
        """
        confirm = next((call.confirm for call in calls if call.confirm is not None), None)
        write = [part for call in calls for part in ((_ASKING, call.data) if call.asking else (call.data,))]
        if confirm is not None:
            write.append(confirm.packed)
        until = monotonic() + within_s
        try:
            connection = node.acquire_connection()
        except RedisError:  # more connections than the pool may open
            return [unreachable(node.name)] * len(calls)
        wire = Wire.of(connection, self._room)
        replies = _Replies(node.name, calls, confirm, settle)
        broken: Trouble | None = None
        late: Trouble | None = None
        try:
            if not await self._connected(connection, wire, min(CONNECT_TIMEOUT_S, within_s)):
                return [unreachable(node.name)] * len(calls)
            limit_s = ANSWER_TIMEOUT_S + sum(map(len, write)) / SLOWEST_LINK_BYTES_PER_S
            began, history = monotonic(), self.histories.of(node.name)
            until = min(began + limit_s, until)
            await wire.read(replies.hear, write, max(0.0, until - began))
            late = replies.confirmed()
            self.replicas.unconfirmed = self.replicas.unconfirmed or replies.short
            if confirm is not None and late is None and monotonic() - began > ROLES_CHANGE_S:
                late = await self._checked(node, wire, confirm, history, max(0.0, until - monotonic()))
        except (RedisError, OSError, *NO_REPLY) as error:
            broken = unanswered(node.name, wire.limit_s) if wire.late else classify(error, node.name)
            if wire.late and confirm is not None and replies.unconfirmed and wire.limit_s < WAIT_TIMEOUT_S:
                broken = not_replicated(node.name, confirm.replicas, "fewer")  # its own time for that was not over
        finally:
            await self._give_back(node, connection)
        if replies.failure is not None:
            raise replies.failure
        late = broken or late
        if late is None:
            return replies.taken
        # What was answered but not confirmed may be on one node only: its outcome is unknown too.
        taken = [
            late if call.confirm and not (late is not broken and isinstance(reply, Trouble)) else reply
            for reply, call in zip(replies.taken, calls, strict=False)
        ]
        return taken + [late] * (len(calls) - len(taken))

    async def _give_back(self, node: ClusterNode, connection: Connection) -> None:
        if not self.still_has(node):
            # Nobody would ever close what is kept there. Without waiting: this must not be cut short by a cancellation.
            with anyio.CancelScope(shield=True):
                await connection.disconnect(nowait=True)
        node.release(connection)
        while self._dropped:
            with anyio.CancelScope(shield=True), anyio.move_on_after(CONNECT_TIMEOUT_S):
                await self._dropped.pop().disconnect_free_connections()

    @staticmethod
    async def _connected(connection: Connection, wire: Wire, within_s: float) -> bool:
        try:
            if connection.is_connected and not await wire.is_clean():
                await connection.disconnect(nowait=True)
            if not connection.is_connected:
                with anyio.fail_after(within_s):
                    await connection.connect()
        except (AuthenticationError, AuthorizationError):
            raise
        except (RedisError, OSError, TimeoutError, ValueError, OverflowError) as error:
            if tls_failure(error, "") is not None:
                raise
            return False  # ValueError, OverflowError: a redirect may name any host and port
        return True

    async def _checked(
        self, node: ClusterNode, wire: Wire, confirm: Confirm, history: str, within_s: float
    ) -> Trouble | None:
        """Asks whether an answer to WAIT was about the write before it, from when the node was master of `history`; the
        Trouble when it may not have been. A user who may not ask goes without: `check_primaries` has said so."""
        said: list[Any] = []

        def hear(reply: Any) -> bool:
            said.append(reply)
            return True

        await wire.read(hear, [_REPLICATION], within_s)
        if isinstance(said[0], NoPermissionError):
            return None
        info = {} if isinstance(said[0], ResponseError) else parsed(said[0])
        same = self.histories.told(node.name, info) == history != ""
        return None if same and replicas_confirming(info) >= confirm.replicas else doubtful(node.name)
