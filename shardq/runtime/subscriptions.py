"""Subscriptions of one listener, to bells or to notices: one connection per Redis node, whatever the number of
channels. Knows where each channel has to be subscribed and keeps it so; what comes in is for the channels themselves.

Invariants:
- A channel is told `stands` when its subscription begins to stand and `lost` when it ceases to, in turn. In between it
  is given every message that its node passes on, in that order.
- A sharded channel is subscribed on the node that owns its slot; patterns all on one node, for every node passes on
  what is published at any. A slot that moves takes its channels along; a node that fails loses the patterns to another.
- Each node is asked again and again for one of the channels it has: the answer shows that the node lives, a refusal
  that the slot has gone. A node silent for SILENT_ROUNDS counts as failed: a connection that was cut without an end
  would be deaf for ever.
- A node in trouble holds up its own channels only.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable

import anyio
from anyio.abc import TaskGroup

from shardq.core.backoff import backoff_s
from shardq.errors import StoreError, StoreUnavailable
from shardq.runtime.tasks import one_error
from shardq.storage.bells import Node, Subscription, Told
from shardq.storage.cluster import Cluster
from shardq.storage.trouble import Trouble

REGROUP_INTERVAL_S = 0.5
RETRY_FIRST_S, RETRY_LAST_S = 0.2, 2.0
ROUND_S = 2.0
SILENT_ROUNDS = 3

_log = logging.getLogger("shardq")


class Channel:
    """One channel that is to be subscribed; a pattern when it has no slot. Subclasses do what is to be done."""

    def __init__(self, name: str, slot: int | None) -> None:
        self.name = name
        self.slot = slot
        self.node = ""
        self.standing = False

    def stands(self) -> None:
        """From now on every message comes."""

    def lost(self) -> None:
        """From now on messages may pass unheard."""

    def came(self, origin: str, payload: bytes) -> None:
        """A message, and the channel it was published on."""


class _Link:
    """One node: the channels that belong there, and those it is still to be asked for."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.channels: dict[str, Channel] = {}
        self.fresh: list[Channel] = []
        self.changed = anyio.Event()
        self.answered = False
        self._rounds = 0

    def join(self, channel: Channel) -> None:
        channel.node = self.node.name
        self.channels[channel.name] = channel
        self.fresh.append(channel)
        self.changed.set()

    def leave(self, channel: Channel) -> None:
        if self.channels.get(channel.name) is channel:
            del self.channels[channel.name]
            self.changed.set()

    def take_fresh(self) -> list[Channel]:
        taken, self.fresh, self.changed = self.fresh, [], anyio.Event()
        return taken

    def next_probe(self) -> Channel:
        """Another channel in each round."""
        self._rounds += 1
        return list(self.channels.values())[self._rounds % len(self.channels)]


class Subscriptions:
    """Listens until its task is cancelled: `tasks.start_soon(subscriptions.run, tasks)`.

    `refused` is told of errors that trying again does not mend (permissions); it is tried again all the same.
    """

    def __init__(self, cluster: Cluster, refused: Callable[[StoreError], None] | None = None) -> None:
        self._cluster = cluster
        self._refused = refused or (lambda error: None)
        self._channels: dict[str, Channel] = {}
        self._links: dict[str, _Link] = {}
        self._patterns_at: Node | None = None
        self._outdated = False
        self._settled_version = -1  # of the topology by which every channel is where it belongs
        self._changed = anyio.Event()

    def add(self, channel: Channel) -> None:
        """Subscribes; another channel of the same name is dropped."""
        self.drop(channel.name)
        self._channels[channel.name] = channel
        self._unsettle()

    def _unsettle(self) -> None:
        self._settled_version = -1
        self._changed.set()

    def drop(self, name: str) -> None:
        """The channel is told nothing more; its subscription ends with the node's connection."""
        channel = self._channels.pop(name, None)
        if channel is not None and channel.node in self._links:
            self._links[channel.node].leave(channel)

    def standing(self, name: str) -> bool:
        """Whether the channel is subscribed right now."""
        channel = self._channels.get(name)
        return channel is not None and channel.standing

    async def run(self, tasks: TaskGroup) -> None:
        """Keeps every channel on the node where it belongs."""
        while True:
            if self._outdated:
                self._outdated = False
                await self._cluster.refresh()
            self._regroup(tasks)
            with anyio.move_on_after(REGROUP_INTERVAL_S):
                await self._changed.wait()
            self._changed = anyio.Event()

    def _regroup(self, tasks: TaskGroup) -> None:
        if self._settled_version == self._cluster.topology_version:
            return
        self._settled_version = self._cluster.topology_version
        for channel in self._channels.values():
            node = self._cluster.node_of(channel.slot) if channel.slot is not None else self._node_for_patterns()
            if node is None:
                self._settled_version = -1
            if node is None or node.name == channel.node:
                continue
            self._detach(channel)
            link = self._links.get(node.name)
            if link is None:
                link = self._links[node.name] = _Link(node)
                tasks.start_soon(self._attend, link)
            link.node = node
            link.join(channel)

    def _node_for_patterns(self) -> Node | None:
        if self._patterns_at is None:
            nodes = self._cluster.primaries()
            self._patterns_at = random.choice(nodes) if nodes else None
        return self._patterns_at

    def _detach(self, channel: Channel) -> None:
        link = self._links.get(channel.node)
        if link is not None:
            link.leave(channel)
        channel.node = ""
        self._settled_version = -1
        self._lose(channel)

    @staticmethod
    def _lose(channel: Channel) -> None:
        if channel.standing:
            channel.standing = False
            channel.lost()

    async def _attend(self, link: _Link) -> None:
        """One node, while it has channels: subscribe, pass on what comes, start over when the connection breaks."""
        tries = 0
        while link.channels:
            link.answered = False
            try:
                await self._serve(link)
                continue  # it had no channels left; others may have come since
            except StoreError as error:
                _log.debug("%s", error)
                if not error.retryable:
                    self._refused(error)
            finally:
                for channel in link.channels.values():
                    self._lose(channel)
            self._move_patterns(link)
            await self._cluster.refresh(link.node.name)
            self._changed.set()
            tries = 1 if link.answered else tries + 1
            await anyio.sleep(backoff_s(tries, RETRY_FIRST_S, RETRY_LAST_S, random.random()))
        del self._links[link.node.name]

    def _move_patterns(self, failed: _Link) -> None:
        others = [node for node in self._cluster.primaries() if node.name != failed.node.name]
        if others and self._patterns_at is not None and self._patterns_at.name == failed.node.name:
            self._patterns_at = random.choice(others)
            self._settled_version = -1

    async def _serve(self, link: _Link) -> None:
        async with Subscription(link.node) as subscription:
            link.fresh = list(link.channels.values())
            with one_error():
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(self._hear, link, subscription, tasks)
                    await self._keep(link, subscription)
                    tasks.cancel_scope.cancel()

    @staticmethod
    async def _keep(link: _Link, subscription: Subscription) -> None:
        """Asks for what is new at once, and for something each round. Ends when the node has no channels left."""
        silent_rounds = 0
        while link.channels:
            await _ask(subscription, link.take_fresh())
            with anyio.move_on_after(ROUND_S) as whole_round:
                await link.changed.wait()
            if not whole_round.cancelled_caught or not link.channels:  # the last one may leave as the round ends
                continue
            silent_rounds = 0 if link.answered else silent_rounds + 1
            if silent_rounds >= SILENT_ROUNDS:
                msg = f"{link.node.name} is silent; its subscriptions are made again"
                raise StoreUnavailable(msg)
            link.answered = False
            await _ask(subscription, [link.next_probe()])

    async def _hear(self, link: _Link, subscription: Subscription, tasks: TaskGroup) -> None:
        def tell(told: Told) -> None:
            link.answered = True
            channel = link.channels.get(told.channel)
            if channel is None:
                return
            if told.kind == "stands" and not channel.standing:
                channel.standing = True
                channel.stands()
            elif told.kind == "ended":
                self._detach(channel)
                self._outdated = True
                self._changed.set()
            elif told.trouble is not None:
                self._detach(channel)
                tasks.start_soon(self._cope, told.trouble)

        def came(name: str, origin: str, payload: bytes) -> None:
            link.answered = True
            channel = link.channels.get(name)
            if channel is not None:
                channel.came(origin, payload)

        await subscription.hear(tell, came)

    async def _cope(self, trouble: Trouble) -> None:
        """A node refused a channel: it is tried again where the slot went, or when the channels are regrouped."""
        if trouble.action == "moved":
            await self._cluster.follow(trouble)
            self._changed.set()
        elif trouble.action == "fail" and isinstance(trouble.error, StoreError):
            self._refused(trouble.error)
        else:
            self._outdated = True


async def _ask(subscription: Subscription, wanted: list[Channel]) -> None:
    names = [channel.name for channel in wanted if channel.slot is not None]
    patterns = [channel.name for channel in wanted if channel.slot is None]
    if wanted:
        await subscription.subscribe(names, patterns)
