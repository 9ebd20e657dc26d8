"""What is said of nodes that are away does not hang on what one look at connecting saw."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

from shardq.runtime import replica_watch
from shardq.storage.replicas import Replicas
from tests.runtime.harness import until

pytestmark = pytest.mark.anyio


class Scripted:
    """A cluster whose looks say, one after the other, how many nodes are away; None: nobody answers. Its topology names
    one replica for each master all the while."""

    def __init__(self, *away: int | None) -> None:
        self.replicas, self._away, self.looks = Replicas(), list(away), 0
        self.replicas.see({"a": 1, "b": 1, "c": 1})

    def least_replicas(self) -> int:
        return self.replicas.count

    async def count_replicas(self) -> bool:
        if (away := self._away[min(self.looks, len(self._away) - 1)]) is not None:
            self.replicas.see_listed(away, 1, 1)
        self.looks += 1
        return self.replicas.looked()


@pytest.mark.parametrize("first", [None, 0], ids=["nobody answered", "a link was being tried anew"])
async def test_nodes_that_the_first_look_missed_are_warned_of_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, first: int | None
) -> None:
    monkeypatch.setattr(replica_watch, "COUNT_REPLICAS_EVERY_S", 0.001)
    cluster: Any = Scripted(first, 3)
    await cluster.count_replicas()  # at connecting
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(replica_watch.watch_replicas, cluster)
        await until(lambda: cluster.looks > 5, 20, "some more looks: they are away")
        tasks.cancel_scope.cancel()
    assert [record.getMessage()[:35] for record in caplog.records] == ["3 nodes of the cluster are away. Th"]


async def test_a_sound_cluster_is_looked_at_once_more_and_nothing_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(replica_watch, "COUNT_REPLICAS_EVERY_S", 0.001)
    rounds = 0

    class Counted(Replicas):
        @property
        def in_doubt(self) -> bool:
            nonlocal rounds
            rounds += 1
            return super().in_doubt

    cluster: Any = Scripted(0)
    cluster.replicas = Counted()
    cluster.replicas.see({"a": 1})
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(replica_watch.watch_replicas, cluster)
        await until(lambda: rounds > 5, 20, "some rounds")
        tasks.cancel_scope.cancel()
    assert (cluster.looks, caplog.records) == (1, [])
