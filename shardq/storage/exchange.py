"""One exchange: a write on one connection, every reply to it, and whether what was written is confirmed. Sends nothing
twice and follows no redirect: it returns what became of each call, and pipes.py does what is to be done.

redis-py's own command and pipeline paths are not used: they store messages twice, lose ASK redirects and never wait
between tries (measured). What it gives are connections, with TLS and AUTH; wire.py reads what comes on them.

Invariants:
- A connection goes back to its node with no reply due, or closed.
- What was answered but not confirmed counts as unknown: it may be on one node only.
- No exception for a failed call: each call has its reply or its Trouble.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any

import anyio
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.connection import Connection
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    NoPermissionError,
    RedisError,
    ResponseError,
)

from shardq.errors import StoreRefused, StoreTimeout
from shardq.storage.commands import WAIT_TIMEOUT_S, Confirm, Packed, pack_command
from shardq.storage.mastership import ROLES_CHANGE_S, Histories, parsed, replicas_confirming
from shardq.storage.replicas import Replicas
from shardq.storage.tls import tls_failure
from shardq.storage.trouble import (
    NO_REPLY,
    Trouble,
    classify,
    doubtful,
    not_replicated,
    redacted,
    unanswered,
    unreachable,
)
from shardq.storage.wire import Room, Wire

ANSWER_TIMEOUT_S = 3.0
SLOWEST_LINK_BYTES_PER_S = 512 * 1024  # so much longer may the answer to a large write take
CONNECT_TIMEOUT_S = 2.0
ROOM_BYTES = 256 * 1024  # of replies that are taken from a socket at once

_ASKING = pack_command("ASKING")
REPLICATION = pack_command("INFO", "replication")


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


def _joined(calls: Sequence[Packed]) -> tuple[Confirm | None, list[bytes], int]:
    """What one write carries, its size, and how far it must get."""
    confirm: Confirm | None = None
    write: list[bytes] = []
    size = 0
    for data, asking, wanted in calls:
        if asking:
            write.append(_ASKING)
        write.append(data)
        size += len(data)
        confirm = confirm or wanted
    if confirm is not None:
        write.append(confirm.packed)
    return confirm, write, size


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


class Exchanges:
    """Single exchanges with nodes. Which nodes there are is for the subclass to know: `Cluster`."""

    def __init__(self) -> None:
        self._room = Room(ROOM_BYTES)
        self._dropped: list[ClusterNode] = []  # nodes that are sent to no longer, whose connections are to be closed
        self.histories = Histories()
        self.replicas = Replicas()

    def still_has(self, node: ClusterNode) -> bool:
        """Whether this very node may still be sent to: false once it has left the cluster, or was made anew."""
        raise NotImplementedError

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
        confirm, write, size = _joined(calls)
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
            if not (connection.is_connected and wire.is_clean()) and not await self._connected(
                connection, min(CONNECT_TIMEOUT_S, within_s)
            ):
                return [unreachable(node.name)] * len(calls)
            limit_s = ANSWER_TIMEOUT_S + size / SLOWEST_LINK_BYTES_PER_S
            began, history = monotonic(), self.histories.of(node.name)
            until = min(began + limit_s, until)
            await wire.read(replies.hear, write, max(0.0, until - began))
            if confirm is not None:
                late = replies.confirmed()
                self.replicas.unconfirmed = self.replicas.unconfirmed or replies.short
            if confirm is not None and late is None and monotonic() - began > ROLES_CHANGE_S:
                late = await self._checked(node, wire, confirm, history, max(0.0, until - monotonic()))
        except (RedisError, OSError, *NO_REPLY) as error:
            broken = unanswered(node.name, wire.limit_s) if wire.late else classify(error, node.name)
            if wire.late and confirm is not None and replies.unconfirmed and wire.limit_s < WAIT_TIMEOUT_S:
                broken = not_replicated(node.name, confirm.replicas, "fewer")  # its own time for that was not over
        finally:
            if self._dropped or not self.still_has(node):
                await self._put_away(node, connection)
            else:
                node.release(connection)
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

    async def _put_away(self, node: ClusterNode, connection: Connection) -> None:
        if not self.still_has(node):
            # Nobody would ever close what is kept there. Without waiting: this must not be cut short by a cancellation.
            with anyio.CancelScope(shield=True):
                await connection.disconnect(nowait=True)
        node.release(connection)
        while self._dropped:
            with anyio.CancelScope(shield=True), anyio.move_on_after(CONNECT_TIMEOUT_S):
                await self._dropped.pop().disconnect_free_connections()

    @staticmethod
    async def _connected(connection: Connection, within_s: float) -> bool:
        """Connects anew where it was connected before."""
        try:
            if connection.is_connected:
                await connection.disconnect(nowait=True)
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

        await wire.read(hear, [REPLICATION], within_s)
        if isinstance(said[0], NoPermissionError):
            return None
        info = {} if isinstance(said[0], ResponseError) else parsed(said[0])
        same = self.histories.told(node.name, info) == history != ""
        return None if same and replicas_confirming(info) >= confirm.replicas else doubtful(node.name)
