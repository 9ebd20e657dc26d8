"""The bells of one worker: a bell carries no message and decides nothing, it only says "look now". A lost bell costs at
most one slow poll.

Whenever a channel is (re)subscribed its bell rings once: something may have come before the subscription stood.
"""

from __future__ import annotations

from collections.abc import Callable

from anyio.abc import TaskGroup

from shardq.runtime.subscriptions import Channel, Subscriptions
from shardq.storage.cluster import Cluster

Ring = Callable[[str], None]


class _Bell(Channel):
    def __init__(self, slot: int, name: str, ring: Ring, lost: Callable[[], None]) -> None:
        super().__init__(name, slot)
        self._ring, self._lost = ring, lost

    def stands(self) -> None:
        self._ring("")

    def lost(self) -> None:
        self._lost()

    def came(self, origin: str, payload: bytes) -> None:
        self._ring(payload.decode("utf-8", "replace"))


class Bells:
    """Listens until its task is cancelled: `tasks.start_soon(bells.run, tasks)`."""

    def __init__(self, cluster: Cluster) -> None:
        self._subscriptions = Subscriptions(cluster)

    def listen(self, slot: int, channel: str, ring: Ring, lost: Callable[[], None] = lambda: None) -> None:
        """From now on `ring(payload)` is called when the channel's bell rings, and `lost` when it can be heard no more,
        until it rings again."""
        self._subscriptions.add(_Bell(slot, channel, ring, lost))

    def drop(self, channel: str) -> None:
        """The channel's bell is not needed any more; the subscription ends with its connection."""
        self._subscriptions.drop(channel)

    def hears(self, channel: str) -> bool:
        """Whether the channel is subscribed right now; if not, poll faster."""
        return self._subscriptions.standing(channel)

    async def run(self, tasks: TaskGroup) -> None:
        """Keeps every bell subscribed on the node that owns its slot."""
        await self._subscriptions.run(tasks)
