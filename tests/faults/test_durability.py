"""What the README says that a send survives, measured: a master cut off from its peers, where clients reach both sides.
On one kind, the oldest with WAITAOF; `python -m tests.faults.durability` measures all.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import shardq
from shardq.errors import StoreRefused, UsageError
from shardq.ops.local_cluster import LocalCluster
from tests.faults import durability
from tests.faults.durability import PROMISES, Count, cell, measure_all, table
from tests.faults.lab import Lab, open_lab
from tests.faults.test_network import needs_network

__all__ = ["needs_network"]
pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def lab(needs_network: None, server_binary: Path) -> Iterator[Lab]:
    with open_lab(server_binary, network=True) as made:
        yield made


@pytest.mark.server_kinds("redis8")
async def test_what_replicas_confirmed_is_there_after_a_partition(lab: Lab) -> None:
    said: list[str] = []
    found = await measure_all(lab, ["master-cut-off"], 1, 1, said.append)
    counts = found["master-cut-off"]
    assert list(counts) == [name for name in PROMISES if name != "replica, replicas=2"], "there is one replica"
    assert len(said) == 1
    assert all(count.acknowledged > 0 and count.twice == 0 for count in counts.values())
    assert counts["replica"].lost == counts["fsync"].lost == 0
    assert counts["leader"].lost > 0, "the partition made nobody lose anything: it proves nothing"


# Sends that return, sends that are refused: the same words on every kind, so each kind that can and the one that can't.
@pytest.mark.server_kinds("redis8", "valkey9")
async def test_fsync_waits_for_a_replica_where_there_is_one(
    cluster: LocalCluster, cluster_with_replicas: LocalCluster, queue_name: str
) -> None:
    for nodes, wanted in ((cluster, 0), (cluster_with_replicas, 1)):
        async with shardq.connect(nodes.url) as client:
            confirm = client.confirm("fsync")
            assert confirm is not None
            assert confirm.replicas == wanted
            assert client.confirm("fsync", 0) is not confirm or wanted == 0
            with pytest.raises(UsageError, match="add replicas"):
                client.confirm("fsync", 2)
            queue = await client.queue(queue_name, shards=2)
            async with queue.producer(durability="fsync", delivery_timeout=20) as producer:
                retried: list[str] = []
                producer.pipes._on_retry = retried.append
                for number in range(3):
                    await producer.send(number, key="a")
            assert retried == [], "a second, as long as a write may take to the disk, is not too late"
            assert [record.value async for record in queue.history()] == [0, 1, 2]


@pytest.mark.server_kinds("redis7")
async def test_fsync_is_refused_where_there_is_no_waitaof(cluster: LocalCluster, queue_name: str) -> None:
    async with shardq.connect(cluster.url) as client:
        queue = await client.queue(queue_name, shards=2)
        async with queue.producer(durability="fsync") as producer:
            with pytest.raises(StoreRefused, match=r"needs Redis 7\.2"):
                await producer.send(1, key="a")


def test_a_table_has_a_line_for_each_fault_and_a_column_for_each_promise_measured() -> None:
    counts = {"leader": Count(1, 2000, 3), "replica": Count(1, 10, 0, twice=1)}
    lines = table({"master-killed": counts, "failover": {"leader": Count(1, 5)}}).splitlines()
    assert [line.count("|") for line in lines] == [4, 4, 4, 4]
    assert lines[2].endswith("| 3 of 2,000 | 0 of 10, 1 twice |")
    assert lines[3].endswith("| 0 of 5 | - |")


def test_counts_add_up() -> None:
    assert Count(1, 10, 2, 1) + Count(1, 5, 1) == Count(2, 15, 3, 1)
    assert cell(None) == "-"


@pytest.mark.parametrize("arguments", [["--faults", "none-such"], ["--repeat", "0"], ["--repeat", "x"]])
def test_wrong_usage_ends_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        durability.main(arguments)
    assert ended.value.code == 2
