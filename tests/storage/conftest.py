"""One opened shard of the shared cluster for the tests of the functions."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from shardq.ops.local_cluster import LocalCluster
from tests.storage.rig import Rig, rig


@pytest.fixture
async def shard(cluster: LocalCluster, queue_name: str) -> AsyncIterator[Rig]:
    """A shard with group "g"; whatever the test did, the counters of "g" must add up in the end."""
    async with rig(cluster.url, queue_name) as made:
        await made.open_group()
        yield made
        await made.backlog()
