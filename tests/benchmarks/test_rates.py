"""The cases that measure rates, at tiny sizes on real clusters: each runs, has its goals and curves, counts what Redis
holds, and takes a lost message for an error. How fast anything is, is never asserted."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

from benchmarks import harness, steady
from benchmarks.cases import (
    backlog,
    consume,
    durability,
    growth,
    processes,
    produce,
    send,
    servers_cpu,
    shards,
)
from benchmarks.harness import Options, Result
from benchmarks.programs.process import Program
from shardq.errors import CorruptData
from shardq.ops import bench_peers
from shardq.ops.local_cluster import LocalCluster
from shardq.runtime.producer import Producer
from shardq.storage.nodes import node_command

pytestmark = pytest.mark.server_kinds("redis8")  # what is measured differs between them, how does not
INSTALLED = shutil.which("redis-benchmark") is not None
CASES: dict[str, Any] = {
    "produce": produce,
    "consume": consume,
    "send": send,
    "durability": durability,
    "shards": shards,
    "backlog": backlog,
    "growth": growth,
    "processes": processes,
    "servers_cpu": servers_cpu,
}
GOALS: dict[str, set[tuple[str, str, float]]] = {
    "produce": {
        ("shardq over redis-benchmark", ">=", 1.5),
        ("shardq over redis-py", ">=", 40.0),
        ("shardq over redis-py-asyncio", ">=", 40.0),
    },
    "consume": {
        ("shardq over redis-py", ">=", 10.0),
        ("shardq over redis-py-asyncio", ">=", 10.0),
        ("shardq-handler over redis-py", ">=", 2.5),
        ("shardq-handler over redis-py-asyncio", ">=", 2.5),
    },
    "send": {("1000 tasks over redis-benchmark", ">=", 0.3)},
    "durability": {("replica over leader", ">=", 0.7)},
    "shards": {
        ("produce 24 over produce 12", ">=", 0.75),
        ("batch_handler 24 over batch_handler 12", ">=", 0.75),
        ("handler 24 over handler 12", ">=", 0.75),
        ("produce 24 over redis-benchmark 24", ">=", 1.0),
    },
    "backlog": {
        ("send, backlog over send, empty", ">=", 0.9),
        ("handle, backlog over handle, empty", ">=", 0.9),
    },
    "growth": set(),
    "processes": {
        ("send_many, 3 masters, 2 processes over what the CPU leaves possible", ">=", 0.8),
        ("batch_handler, 3 masters, 2 processes over what the CPU leaves possible", ">=", 0.8),
    },
    "servers_cpu": {
        ("shardq send_many over redis-py XADD", "<=", 1.0),
        ("shardq batch_handler over redis-py XREADGROUP+XACK", "<=", 1.0),
    },
}
WITH_CPU = {"produce", "consume", "send", "durability", "shards", "backlog", "growth"}
CURVES = {
    "send": ["`await send()` by tasks"],
    "shards": ["By shards"],
    "backlog": ["By backlog"],
    "growth": ["By the size of values", "By the size of values", "By keys", "By groups, each with a worker"],
    "processes": ["send_many by processes", "batch_handler by processes"],
}


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer points to measure, and the shared clusters instead of one for each case."""
    for module, name, value in (
        (bench_peers, "CLIENTS", (3,)),
        (bench_peers, "THREADS", (1,)),
        (shards, "SHARDS", (12, 24)),
        (growth, "SIZES", (10, 1024)),
        (growth, "KEYS", (1, 100)),
        (growth, "GROUPS", (1, 2)),
        (steady, "QUIET_S", 0.05),
        (processes, "PROCESSES", (1, 2)),
        (processes, "MASTERS", (3,)),
    ):
        monkeypatch.setattr(module, name, value)


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Callable[[], list[str]]:
    """Has the cases use the shared clusters; returns what lists the keys of benchmarks that are left there."""
    used: list[LocalCluster] = []

    @contextmanager
    def cluster(_options: Options, masters: int = 3, replicas: int = 0) -> Iterator[LocalCluster]:
        assert masters == 3
        used.append(request.getfixturevalue("cluster_with_replicas" if replicas else "cluster"))
        yield used[-1]

    def left() -> list[str]:
        ports = [port for one in used for port in one.ports[:3]]
        return [key for port in ports for key in node_command("127.0.0.1", port, "KEYS", "shardq-bench-*")]

    monkeypatch.setattr(harness, "cluster", cluster)
    return left


def measure(name: str, server: Path, scale: float = 0.003) -> Result:
    found: Result = anyio.run(CASES[name].measure, Options(str(server), 1, scale), lambda _line: None)
    return found


@pytest.mark.parametrize("name", CASES)
def test_it_runs_and_has_its_goals(name: str, server_binary: Path, shared: Callable[[], list[str]]) -> None:
    result = measure(name, server_binary)
    found = {(goal.what, goal.sense, goal.bound) for goal in result.goals}
    assert found == {goal for goal in GOALS[name] if INSTALLED or "redis-benchmark" not in goal[0]}
    assert all(goal.value > 0 for goal in result.goals)
    assert [curve.title for curve in result.curves] == CURVES.get(name, [])
    assert all(len(points) >= 2 for curve in result.curves for points in curve.lines.values())
    assert all(len(ones) == 1 and ones[0] > 0 for ones in result.samples.values())
    assert shared() == []
    if name in WITH_CPU:
        cpu = result.figures["cpu_us_per_message"]
        assert set(cpu) == set(result.samples)
        assert all(one["client"] > 0 and one["servers"] > 0 for one in cpu.values())
    if name == "durability":
        assert set(result.samples) == {"leader", "replica", "fsync"}


@pytest.mark.parametrize("name", ["durability", "shards", "backlog", "growth", "servers_cpu"])
def test_a_message_that_is_not_stored_is_an_error(
    name: str, server_binary: Path, shared: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    send_many = Producer.send_many

    async def lose_one(producer: Producer, pairs: Any) -> int:
        return await send_many(producer, list(pairs)[:-1])

    monkeypatch.setattr(Producer, "send_many", lose_one)
    fails(name, server_binary)
    assert shared() == []


def test_a_send_that_is_not_stored_is_an_error(
    server_binary: Path, shared: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, sent = Producer.send, 0

    async def lose_one(producer: Producer, value: Any, **how: Any) -> str:
        nonlocal sent
        sent += 1
        return await plain(producer, value, **how) if sent != 5 else ""

    monkeypatch.setattr(Producer, "send", lose_one)
    fails("send", server_binary)
    assert shared() == []


def test_a_process_that_sends_too_few_is_an_error(
    server_binary: Path, shared: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    tell = Program.tell

    async def one_less(program: Program, line: str) -> None:
        words = line.split()
        if words[0] == "send":
            line = f"send {words[1]} {int(words[2]) - 1}"
        await tell(program, line)

    monkeypatch.setattr(Program, "tell", one_less)
    monkeypatch.setattr(processes, "PROCESSES", (1,))
    monkeypatch.setattr(
        processes, "work_side", lambda here, count, pairs: processes.produce_side(here, count, len(pairs))
    )
    fails("processes", server_binary)
    assert shared() == []


def fails(name: str, server: Path) -> None:
    """With an error that says so, alone or in a group."""
    with pytest.raises((CorruptData, BaseExceptionGroup)) as caught:
        measure(name, server, 0.001)
    error: BaseException = caught.value
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, CorruptData)
    assert "messages counted, not" in str(error)


@pytest.mark.parametrize(
    ("version", "has"),
    [("Redis 7.0.15", False), ("Redis 7.2.0", True), ("Redis 8.2.3", True), ("Valkey 9.1.2", True), ("?", False)],
)
def test_which_servers_have_waitaof(version: str, *, has: bool) -> None:
    assert durability.has_fsync(version) is has
