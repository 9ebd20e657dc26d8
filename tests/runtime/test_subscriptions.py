"""Subscriptions at moments that a real cluster seldom shows."""

from __future__ import annotations

from typing import cast

import anyio
import pytest

from shardq.runtime import subscriptions
from shardq.runtime.subscriptions import Channel, Subscriptions
from shardq.storage.bells import Node, Subscription

pytestmark = pytest.mark.anyio


class Asked:
    """In place of a node's connection: what it was asked for."""

    def __init__(self) -> None:
        self.names: list[str] = []

    async def subscribe(self, names: list[str], patterns: list[str]) -> None:
        self.names += names


class LeavesAtTheEnd(subscriptions._Link):
    """The last channel leaves at the very moment at which the round ends."""

    def take_fresh(self) -> list[Channel]:
        taken = super().take_fresh()
        self.changed = cast("anyio.Event", self)
        return taken

    async def wait(self) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            self.channels.clear()


async def test_the_last_channel_leaves_as_a_round_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subscriptions, "ROUND_S", 0.01)
    link, asked = LeavesAtTheEnd(cast("Node", None)), Asked()
    channel = Channel("bell", 7)
    link.channels["bell"] = channel
    link.fresh = [channel]
    with anyio.fail_after(10):
        await Subscriptions._keep(link, cast("Subscription", asked))
    assert asked.names == ["bell"]
