"""`shardq doctor` as a command, and what `queue list` and `status` do about a queue that can't be read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

import anyio
import pytest

import shardq
from shardq.cli.app import run
from shardq.ops.local_cluster import LocalCluster
from shardq.storage.commands import pack_command
from shardq.storage.keys import Keys
from shardq.storage.nodes import free_ports

# What it finds on the two other kinds is tested in ops/test_doctor.py.
pytestmark = pytest.mark.server_kinds("redis8")


def over(url: str, *words: str) -> list[str]:
    return ["doctor", "--over", "0.5", "--url", url, *words]


def test_a_cluster_with_advice_only_is_fine(
    cluster_with_replicas: LocalCluster, queue_name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    url = cluster_with_replicas.url
    assert run(["queue", "create", queue_name, "--shards", "2", "--url", url]) == 0
    capfd.readouterr()
    assert run(over(url, "--queue", queue_name)) == 0
    shown = capfd.readouterr().out
    assert "PROBLEMS" not in shown
    assert "WARNINGS" not in shown
    assert "ADVICE\n  memory.unbounded  127.0.0.1:" in shown
    assert "    -> CONFIG SET maxmemory" in shown
    assert shown.splitlines()[-1].startswith("0 problems, 0 warnings, 0 unknown, ")
    assert run(over(url, "--queue", queue_name, "--json")) == 0
    objects = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert all(set(each) == {"level", "id", "subject", "what", "do"} for each in objects)
    assert {each["level"] for each in objects} == {"advice", "ok"}


def test_warnings_end_with_status_1(cluster: LocalCluster, queue_name: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["queue", "create", queue_name, "--shards", "2", "--url", cluster.url]) == 0
    capfd.readouterr()
    assert run(over(cluster.url, "--queue", queue_name)) == 1
    shown = capfd.readouterr().out
    assert shown.startswith("WARNINGS\n  replicas.none  127.0.0.1:")
    nodes = ", ".join(f"127.0.0.1:{port}" for port in cluster.ports)
    assert nodes in shown.splitlines()[1]


def test_what_can_not_be_examined(cluster: LocalCluster, queue_name: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(over(cluster.url, "--queue", queue_name)) == 1
    assert f"queue '{queue_name}' does not exist" in capfd.readouterr().err
    (port,) = free_ports("127.0.0.1", 1)
    assert run(over(f"redis://127.0.0.1:{port}")) == 1
    assert "no cluster node answers" in capfd.readouterr().err
    assert run(over(cluster.url, "--over", "0")) == 2
    assert run(over(cluster.url, "--queue", "not a name")) == 1
    assert "not valid" in capfd.readouterr().err


@contextmanager
def corrupt(url: str, queue: str) -> Iterator[None]:
    """The queue's routing table is junk meanwhile."""
    keys = Keys("shardq", queue)

    async def put(table: bytes) -> bytes:
        async with shardq.connect(url) as client:
            read = pack_command("HGET", keys.routing, "table")
            before = await client.pipes.command(keys.control_slot, read)
            await client.pipes.command(keys.control_slot, pack_command("HSET", keys.routing, "table", table))
            return bytes(before)

    before = anyio.run(put, b"junk")
    try:
        yield
    finally:
        anyio.run(put, before)


@pytest.mark.parametrize("command", [["queue", "list"], ["status", "--over", "0"], ["status", "--over", "0.1"]])
def test_one_unreadable_queue_does_not_hide_the_others(
    cluster: LocalCluster, queue_name: str, command: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    url = ["--url", cluster.url]
    bad = f"{queue_name}-bad"
    for each in (queue_name, bad):
        assert run(["queue", "create", each, "--shards", "2", *url]) == 0
    capfd.readouterr()
    with corrupt(cluster.url, bad):
        for more in ([], ["--json"]):
            assert run([*command, *url, *more]) == 1
            printed = capfd.readouterr()
            assert queue_name in printed.out.replace(bad, "")
            assert bad not in printed.out
            (line,) = (line for line in printed.err.splitlines() if bad in line)
            assert line.startswith(f"queue {bad} can't be read: the routing table starts with")
        assert run(["status", bad, *url]) == 1  # named, it is an error as before
        assert "error: the routing table starts with" in capfd.readouterr().err
    assert run([*command, *url]) == 0
    assert bad in capfd.readouterr().out
