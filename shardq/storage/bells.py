"""One subscription connection to one node: sharded Pub/Sub channels in, names of those that rang out.

Uses a plain connection per primary (redis-py's ClusterPubSub walks the nodes one by one and stalls, measured). Decides
nothing: re-subscribing after a broken connection or a moved slot is the runtime's (runtime/bells.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from redis.asyncio.cluster import ClusterNode
from redis.exceptions import RedisError

from shardq.errors import StoreUnavailable
from shardq.storage.cluster import pack_command


class Subscription:
    """Subscribes on one node while it is entered. Raises StoreUnavailable when the connection breaks."""

    def __init__(self, node: ClusterNode) -> None:
        self._node = node
        self._connection = node.acquire_connection()

    async def __aenter__(self) -> Subscription:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A connection that subscribed can't go back to the pool as it is: close it, the pool opens it anew.
        await self._connection.disconnect(nowait=True)
        self._node.release(self._connection)

    async def subscribe(self, channels: Sequence[str]) -> None:
        """Asks for channels, each in a command of its own: they may lie in different slots."""
        try:
            await self._connection.send_packed_command(
                [pack_command("SSUBSCRIBE", channel) for channel in channels], check_health=False
            )
        except (RedisError, OSError) as error:
            raise self._broken() from error

    async def next(self) -> tuple[str, str, str]:
        """Waits for the next event: (kind, channel, payload), kind one of ssubscribe, sunsubscribe, smessage."""
        try:
            kind, channel, payload = (await self._connection.read_response())[:3]
        except (RedisError, OSError, TypeError, ValueError) as error:
            raise self._broken() from error
        text = payload.decode(errors="replace") if isinstance(payload, bytes) else ""
        return kind.decode(), (channel or b"").decode(errors="replace"), text

    def _broken(self) -> StoreUnavailable:
        return StoreUnavailable(f"the subscription at {self._node.name} broke; it is made again")
