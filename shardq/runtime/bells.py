"""The bells of one worker: one subscription connection per Redis node, whatever the number of shards. Carries no
message and decides nothing: a bell only says "look now". A lost bell costs at most one slow poll.

Whenever a channel is (re)subscribed its bell rings once: something may have come before the subscription stood.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import anyio
from anyio.abc import TaskGroup

from shardq.errors import StoreError
from shardq.storage.bells import Subscription
from shardq.storage.cluster import Cluster

Ring = Callable[[str], None]

REGROUP_INTERVAL_S = 0.5
RETRY_PAUSE_S = 0.2

_log = logging.getLogger("shardq")


@dataclass(eq=False)
class _Bell:
    slot: int
    channel: str
    ring: Ring
    node: str = ""
    heard: bool = False


@dataclass(eq=False)
class _Listener:
    node: str
    bells: dict[str, _Bell] = field(default_factory=dict)
    subscription: Subscription | None = None


class Bells:
    """Listens until its task is cancelled: `tasks.start_soon(bells.run, tasks)`."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._bells: dict[str, _Bell] = {}
        self._listeners: dict[str, _Listener] = {}
        self._changed = anyio.Event()

    def listen(self, slot: int, channel: str, ring: Ring) -> None:
        """From now on `ring(payload)` is called when the channel's bell rings."""
        self._bells[channel] = _Bell(slot, channel, ring)
        self._changed.set()

    def drop(self, channel: str) -> None:
        """The channel's bell is not needed any more; the subscription ends with its connection."""
        bell = self._bells.pop(channel, None)
        if bell is not None and bell.node in self._listeners:
            self._listeners[bell.node].bells.pop(channel, None)

    def hears(self, channel: str) -> bool:
        """Whether the channel is subscribed right now; if not, poll faster."""
        bell = self._bells.get(channel)
        return bell is not None and bell.heard

    async def run(self, tasks: TaskGroup) -> None:
        """Keeps every bell subscribed on the node that owns its slot."""
        while True:
            await self._regroup(tasks)
            with anyio.move_on_after(REGROUP_INTERVAL_S):
                await self._changed.wait()
            self._changed = anyio.Event()

    async def _regroup(self, tasks: TaskGroup) -> None:
        fresh: dict[str, list[_Bell]] = {}
        for bell in self._bells.values():
            node = self._cluster.node_of(bell.slot)
            if node is None or node.name == bell.node:
                continue
            if bell.node in self._listeners:
                self._listeners[bell.node].bells.pop(bell.channel, None)
            bell.node, bell.heard = node.name, False
            fresh.setdefault(node.name, []).append(bell)
        for name, bells in fresh.items():
            listener = self._listeners.get(name)
            if listener is None:
                listener = self._listeners[name] = _Listener(name)
                tasks.start_soon(self._attend, listener)
            listener.bells.update((bell.channel, bell) for bell in bells)
            if listener.subscription is not None:
                try:
                    await listener.subscription.subscribe([bell.channel for bell in bells])
                except StoreError as error:
                    _log.debug("%s", error)  # the listener's own read fails too and subscribes everything anew

    async def _attend(self, listener: _Listener) -> None:
        """One node: subscribe, pass on what rings, start over when the connection breaks."""
        while True:
            node = next((node for node in self._cluster.primaries() if node.name == listener.node), None)
            if node is not None and listener.bells:
                try:
                    async with Subscription(node) as subscription:
                        listener.subscription = subscription
                        await subscription.subscribe(list(listener.bells))
                        await self._pass_on(listener, subscription)
                except StoreError as error:
                    _log.debug("%s", error)
                finally:
                    listener.subscription = None
                    for bell in listener.bells.values():
                        bell.heard = False
                await self._cluster.refresh(listener.node)
            await anyio.sleep(RETRY_PAUSE_S)

    @staticmethod
    async def _pass_on(listener: _Listener, subscription: Subscription) -> None:
        while True:
            kind, channel, payload = await subscription.next()
            bell = listener.bells.get(channel)
            if bell is None:
                continue
            if kind == "sunsubscribe":
                # The slot went to another node: forget where it was, the next regroup subscribes there.
                bell.heard, bell.node = False, ""
                listener.bells.pop(channel, None)
                continue
            if kind == "ssubscribe":
                bell.heard = True
            bell.ring(payload)
