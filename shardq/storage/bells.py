"""One subscription connection to one node: sharded channels and patterns in, what the node says of them out.

Uses a plain connection per primary (redis-py's ClusterPubSub walks the nodes one by one and stalls, measured). Decides
nothing: re-subscribing after a broken connection or a moved slot is the runtime's (runtime/subscriptions.py).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Literal, NamedTuple

import anyio
from redis.asyncio.cluster import ClusterNode
from redis.exceptions import AuthenticationError, AuthorizationError, RedisError, ResponseError

from shardq.errors import StoreUnavailable
from shardq.storage.commands import pack_command
from shardq.storage.exchange import ANSWER_TIMEOUT_S, CONNECT_TIMEOUT_S
from shardq.storage.trouble import NO_REPLY, Trouble, classify
from shardq.storage.wire import Room, Wire

ROOM_BYTES = 16 * 1024

Node = ClusterNode  # by this name for those who only hand one on


class Told(NamedTuple):
    """What a node said, but for messages. `channel` is the channel or pattern as it was asked for, `trouble` why a
    subscription was refused. A node ends one by itself when the slot goes elsewhere."""

    kind: Literal["stands", "ended", "refused", "other"]
    channel: str = ""
    trouble: Trouble | None = None


class Subscription:
    """A connection to one node while it is entered. Raises StoreUnavailable when it can't be made or breaks."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._unanswered: deque[str] = deque()  # a node answers in the order it was asked
        try:
            self._connection = node.acquire_connection()
        except RedisError as error:  # more connections than the pool may open
            raise self._broken() from error

    async def __aenter__(self) -> Subscription:
        try:
            with anyio.fail_after(CONNECT_TIMEOUT_S):
                await self._connection.connect()
        except BaseException as error:
            await self._give_back()
            if isinstance(error, AuthenticationError | AuthorizationError):
                raise classify(error, self._node.name).error from error
            if isinstance(error, RedisError | OSError):  # TimeoutError is an OSError
                raise self._broken() from error
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._give_back()

    async def _give_back(self) -> None:
        # A connection that subscribed can't go back to the pool as it is: close it, the pool opens it anew.
        with anyio.CancelScope(shield=True):
            await self._connection.disconnect(nowait=True)
        self._node.release(self._connection)

    async def subscribe(self, channels: Sequence[str], patterns: Sequence[str] = ()) -> None:
        """Asks for sharded channels, each in a command of its own as they may lie in different slots, and patterns.

        Safe to repeat: asking for what is subscribed already has it confirmed once more."""
        self._unanswered += (*channels, *patterns)
        wanted = [pack_command("SSUBSCRIBE", channel) for channel in channels]
        wanted += [pack_command("PSUBSCRIBE", pattern) for pattern in patterns]
        try:
            with anyio.fail_after(ANSWER_TIMEOUT_S):
                await self._connection.send_packed_command(wanted, check_health=False)
        except (RedisError, OSError) as error:
            raise self._broken() from error

    async def hear(self, tell: Callable[[Told], None], came: Callable[[str, str, bytes], None]) -> None:
        """While it lives, in the turn of the event loop in which it comes: calls `came` for each message, with the
        channel or pattern as it was asked for, the channel it was published on and its payload; `tell` for all else
        that the node says."""

        def heard(reply: Any) -> bool:
            match reply:
                case [b"smessage", bytes() as channel, bytes() as payload]:
                    name = channel.decode("utf-8", "replace")
                    came(name, name, payload)
                    return False
                case [b"pmessage", bytes() as pattern, bytes() as channel, bytes() as payload]:
                    came(_text(pattern), _text(channel), payload)
                    return False
            if not isinstance(reply, ResponseError):
                told = _told(reply)
            elif self._unanswered:
                told = Told("refused", self._unanswered[0], trouble=classify(reply, self._node.name))
            else:
                raise reply
            if told.kind in ("stands", "refused") and self._unanswered:
                self._unanswered.popleft()
            tell(told)
            return False

        try:
            await Wire.of(self._connection, Room(ROOM_BYTES)).read(heard)
        except (RedisError, OSError, *NO_REPLY) as error:
            raise self._broken() from error

    def _broken(self) -> StoreUnavailable:
        return StoreUnavailable(f"the subscription at {self._node.name} broke; it is made again")


def _told(reply: Any) -> Told:
    match reply:
        case [b"ssubscribe" | b"psubscribe", bytes() as channel, *_]:
            return Told("stands", _text(channel))
        case [b"sunsubscribe" | b"punsubscribe", bytes() as channel, *_]:
            return Told("ended", _text(channel))
        case _:
            return Told("other")


def _text(name: bytes) -> str:
    return name.decode("utf-8", "replace")
