"""`shardq bench` at tiny sizes: the shape of its result, that it counts what Redis holds, that a wrong count is an
error, and that it leaves nothing behind. How fast anything is, is never asserted."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shardq.cli.app import run
from shardq.ops import bench_peers, bench_shardq
from shardq.ops.bench import READ_SHARE, ratios
from shardq.ops.bench_peers import Counted, Peers, Setting
from shardq.ops.local_cluster import LocalCluster
from shardq.runtime.producer import Producer
from shardq.storage.nodes import node_command

# What is measured differs between the kinds of server, how does not; what it is made of is tested on each.
pytestmark = pytest.mark.server_kinds("valkey9")

HOST = "127.0.0.1"
MESSAGES, ROUNDS, SHARDS = 3000, 2, 5
SIDES = {
    "produce": {"shardq", "redis-py", "redis-py-asyncio", "redis-benchmark"},
    "consume": {"shardq", "shardq-handler", "redis-py", "redis-py-asyncio"},
}
INSTALLED = shutil.which("redis-benchmark") is not None


@pytest.fixture(autouse=True)
def as_found(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Few of redis-benchmark's settings to choose from, and the signal handler as it was."""
    monkeypatch.setattr(bench_peers, "CLIENTS", (3,))
    monkeypatch.setattr(bench_peers, "THREADS", (1,))
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


def bench(kind: str, url: str, *more: str) -> int:
    sizes = ["--messages", str(MESSAGES), "--rounds", str(ROUNDS), "--shards", str(SHARDS)]
    return run(["bench", kind, "--json", "--url", url, *sizes, *more])


def keys_left(cluster: LocalCluster) -> list[str]:
    return [key for port in cluster.ports for key in node_command(HOST, port, "KEYS", "shardq-bench-*")]


def held_in_redis(peers: Peers) -> int:
    """Messages stored now, counted without shardq's own counters: entries of peers, record batches of shardq."""
    total = 0
    for key in peers.redis.scan_iter(match=f"{peers._prefix}:*", _type="stream"):
        entries: Any = peers.redis.xrange(key)
        for _, fields in entries:
            batch = fields.get(b"batch")
            total += int.from_bytes(batch[2:4], "big") if batch else 1
    return total


@pytest.mark.parametrize("kind", ["produce", "consume"])
def test_json_has_its_shape_and_nothing_is_left(
    kind: str, cluster: LocalCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(kind, cluster.url) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    sides = SIDES[kind] if INSTALLED else SIDES[kind] - {"redis-benchmark"}
    rates = result["rates"]
    assert {name for name, rate in rates.items() if rate is not None} == sides
    assert {"shardq", "redis-py", "redis-benchmark"} <= set(rates)
    assert all(rate > 0 for rate in rates.values() if rate is not None)
    assert set(result["rounds"]) == set(result["commands"]) == set(result["cpu_us_per_message"]) == sides
    assert all(len(each) == ROUNDS for each in result["rounds"].values())
    for name in sides - {"shardq"}:
        assert result["ratios"][name] == pytest.approx(rates["shardq"] / rates[name], abs=0.01)
    assert result["messages"]["shardq"] == MESSAGES
    assert result["sizes"] == {
        "messages": MESSAGES,
        "rounds": ROUNDS,
        "shards": SHARDS,
        "value_bytes": 100,
        "keys": 10_000,
    }
    assert set(result["versions"]) >= {"server", "python", "shardq", "redis-py"}
    assert captured.err.count("\n") >= len(sides) * (ROUNDS + 1)  # progress
    assert keys_left(cluster) == []


def test_counts_are_what_redis_holds(
    cluster: LocalCluster, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []
    clean = Peers.clean

    def count_and_clean(peers: Peers) -> None:
        held.append(held_in_redis(peers))
        clean(peers)

    monkeypatch.setattr(Peers, "clean", count_and_clean)
    monkeypatch.setattr(bench_peers, "has_redis_benchmark", lambda: False)
    assert bench("produce", cluster.url) == 0
    messages: dict[str, int] = json.loads(capsys.readouterr().out)["messages"]
    expected = sorted(count for count in messages.values() for _ in range(ROUNDS + 1))
    assert sorted(count for count in held if count) == expected


@pytest.mark.skipif(not INSTALLED, reason="redis-benchmark is not installed")
def test_redis_benchmark_stores_what_it_says_on_every_master(cluster: LocalCluster) -> None:
    peers = Peers(cluster.url, "shardq-bench-test", SHARDS)
    try:
        counted = peers.benchmark(Setting(3, 1), 6000, 100)
        assert counted.messages == 6000
        assert 6000 <= held_in_redis(peers) < 7500  # whole pipelines of 500 from three connections
        streams = [node_command(HOST, port, "KEYS", "shardq-bench-test:*") for port in cluster.ports]
        assert all(streams)
    finally:
        peers.close()


def test_fill_leaves_exactly_that_many(cluster: LocalCluster) -> None:
    peers = Peers(cluster.url, "shardq-bench-test", SHARDS)
    try:
        peers.fill(10_007, b"x")
        assert held_in_redis(peers) == 10_007
        assert peers.consume().messages == 10_007
    finally:
        peers.close()


def test_without_redis_benchmark_its_rate_is_null(
    cluster: LocalCluster, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert bench("produce", cluster.url) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert result["rates"]["redis-benchmark"] is None
    assert result["ratios"]["redis-benchmark"] is None
    assert "redis-benchmark" not in result["rounds"]


def test_a_lost_message_is_an_error(
    cluster: LocalCluster, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    send_many = Producer.send_many

    async def lose_one(producer: Producer, pairs: Any) -> int:
        return await send_many(producer, list(pairs)[:-1])

    monkeypatch.setattr(Producer, "send_many", lose_one)
    monkeypatch.setattr(bench_peers, "has_redis_benchmark", lambda: False)
    assert_refused(bench("produce", cluster.url), capsys, f"shardq: {MESSAGES - 1} messages counted, not {MESSAGES}")
    assert_refused(bench("consume", cluster.url), capsys, f"{MESSAGES - 1} messages counted, not {MESSAGES}")
    assert keys_left(cluster) == []


def test_a_peer_that_loses_a_message_is_an_error(
    cluster: LocalCluster, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    consume = Peers.consume

    def lose_one(peers: Peers) -> Counted:
        counted = consume(peers)
        return Counted(counted.messages - 1, counted.seconds)

    monkeypatch.setattr(Peers, "consume", lose_one)
    read = MESSAGES // READ_SHARE
    assert_refused(bench("consume", cluster.url), capsys, f"redis-py: {read - 1} messages counted, not {read}")


def test_an_error_of_a_peer_is_one_line(
    cluster: LocalCluster, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(peers: Peers) -> Counted:
        peers.redis.xadd("shardq-bench-test", {})
        raise AssertionError

    monkeypatch.setattr(Peers, "consume", fail)
    assert_refused(bench("consume", cluster.url), capsys, "error: redis-py gave up (DataError")
    assert keys_left(cluster) == []


def test_messages_not_acknowledged_in_redis_are_an_error(
    cluster: LocalCluster, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_shardq, "ACKED_WITHIN_S", 0.0)  # handled, but Redis was not asked yet
    assert_refused(bench("consume", cluster.url), capsys, f": 0 messages counted, not {MESSAGES}")


def assert_refused(status: int, capsys: pytest.CaptureFixture[str], why: str) -> None:
    captured = capsys.readouterr()
    assert (status, captured.out) == (1, "")
    assert why in captured.err


def test_ratios_are_over_each_other_side() -> None:
    found = ratios({"shardq": 900.0, "shardq-handler": 300.0, "redis-py": 100.0, "redis-benchmark": None})
    assert found == {"shardq-handler": 3.0, "redis-py": 9.0, "redis-benchmark": None, "shardq-handler/redis-py": 3.0}


def test_starts_and_stops_a_cluster_of_its_own(server_binary: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "shardq", "bench", "consume", "--server-binary", str(server_binary)]
    sizes = ["--messages", "500", "--rounds", "1"]
    environment = {"PATH": "", "TMPDIR": str(tmp_path)}
    done = subprocess.run([*command, *sizes], env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert "redis-py" in done.stdout
    assert "messages/s" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_url_and_a_server_are_too_much(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "produce", "--url", "redis://127.0.0.1:1", "--server-binary", "redis-server"]) == 2
    assert "leave out --server-binary" in capsys.readouterr().err


def test_no_cluster_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "produce", "--url", "redis://127.0.0.1:1"]) == 1
    assert capsys.readouterr().err.startswith("error: no cluster node answers")
