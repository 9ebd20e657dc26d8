"""Each fault of the cluster's shape on its own, under traffic. One server kind each, two where servers differ."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.lab import Lab
from tests.faults.survival import survival

pytestmark = pytest.mark.anyio


async def survives(name: str, lab: Lab, queue_name: str, folder: Path) -> None:
    async with survival(lab, queue_name, folder) as running:
        await running.under(name, running.flows)


# Redis 7.0 replicates the state of groups worst (no entries-read): what takes over knows least.
@pytest.mark.server_kinds("redis7")
@pytest.mark.parametrize("name", ["master-killed", "failover-forced"])
async def test_the_oldest_server(name: str, lab: Lab, queue_name: str, tmp_path: Path) -> None:
    await survives(name, lab, queue_name, tmp_path)


@pytest.mark.server_kinds("redis8")
@pytest.mark.parametrize("name", ["master-frozen", "failover"])
async def test_a_newer_server(name: str, lab: Lab, queue_name: str, tmp_path: Path) -> None:
    await survives(name, lab, queue_name, tmp_path)


# Redis moves slots key by key, Valkey 9 at once.
@pytest.mark.server_kinds("redis7", "valkey9")
async def test_slots_move(lab: Lab, queue_name: str, tmp_path: Path) -> None:
    await survives("slots-moved", lab, queue_name, tmp_path)


@pytest.mark.server_kinds("redis8", "valkey9")
async def test_a_master_joins_and_leaves(lab: Lab, queue_name: str, tmp_path: Path) -> None:
    await survives("master-added", lab, queue_name, tmp_path)


# The functions come back from the AOF, which Valkey 9 writes with an engine of its own.
@pytest.mark.server_kinds("valkey9")
async def test_every_node_restarts(lab: Lab, queue_name: str, tmp_path: Path) -> None:
    async with survival(lab, queue_name, tmp_path) as running:
        await running.under("cluster-restarted")
