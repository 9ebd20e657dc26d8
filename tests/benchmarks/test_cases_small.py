"""Cases latency, bytes, idle, takeover, reshard, reshard_workers, assignment at a tiny scale: shapes, and that they
count honestly."""

from __future__ import annotations

import dataclasses
from contextlib import AsyncExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import anyio
import pytest
from redis.asyncio.cluster import RedisCluster

import shardq
from benchmarks import flow
from benchmarks.cases import assignment, bytes, idle, latency, reshard, reshard_workers, takeover
from benchmarks.harness import Options, Result
from benchmarks.programs.handled import VALUE_BYTES, Handled, Notes, read_notes, value_of
from benchmarks.programs.process import Program
from benchmarks.programs.sender import KEYS_PER_SHARD, keys_of_shards
from shardq.core.hashing import key_hash
from shardq.core.reshard import scale, split_all
from shardq.core.routing import RoutingTable

# What is measured differs between the kinds of server, how does not.
pytestmark = [pytest.mark.anyio, pytest.mark.server_kinds("valkey9")]


def say(_line: str) -> None:
    pass


def check(result: Result, rounds: int) -> None:
    """Every side has a sample for each round and a command or a note; every goal a value that was measured."""
    assert all(len(ones) == rounds and all(one >= 0 for one in ones) for ones in result.samples.values())
    assert result.goals
    assert all(goal.value >= 0 for goal in result.goals)
    assert result.sizes


@pytest.mark.server_kinds("redis7")  # what it counts is the same on every server
async def test_latency_counts_every_message_once_on_both_sides(server_binary: Path) -> None:
    result = await latency.measure(Options(str(server_binary), rounds=1, scale=0.01), say)

    check(result, 1)
    assert len(result.samples) == 8
    for side in ("shardq", "redis-py"):
        for load in ("busy", "idle"):
            assert result.samples.keys() >= {f"{side} {load} p50", f"{side} {load} p99"}
            figure = result.figures[f"{side} {load}, ms"]
            assert 0 < figure["p50"] <= figure["p99"] <= figure["p99.9"] <= figure["max"]


async def test_bytes_shrink_with_fuller_batches_and_with_compression(server_binary: Path) -> None:
    result = await bytes.measure(Options(str(server_binary), rounds=1, scale=0.1), say)

    check(result, 1)
    assert result.figures["entries, XADD"] == result.sizes["messages"]
    assert result.median("shardq, zlib") < result.median("shardq") < result.median("XADD")
    plain = dict(result.curves[0].lines["shardq"])
    assert plain[1] > plain[10] > plain[100]


@pytest.mark.server_kinds("redis7")  # what it counts is the same on every server
async def test_idle_counts_what_a_worker_sends(server_binary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idle, "WINDOW_S", {12: 40.0})  # 2 s of it: a poll of each shard at least
    monkeypatch.setattr(idle, "SHARDS", (12,))
    monkeypatch.setattr(idle, "GOAL_SHARDS", 12)

    result = await idle.measure(Options(str(server_binary), rounds=1, scale=0.05), say)

    check(result, 1)
    calls, commands = (result.figures[f"{what} a shard and second, 12 shards"] for what in ("calls", "commands"))
    assert 0.5 < calls < commands  # a lease of 5 s is renewed every 1.67 s or so, and there are heartbeats


async def test_assignment_counts_moves(server_binary: Path) -> None:
    result = await assignment.measure(Options(str(server_binary), rounds=2, scale=0.02), say)

    check(result, 2)
    assert [goal.value for goal in result.goals[1:]] == [0, 0]


def test_a_plan_that_is_not_balanced_is_no_plan() -> None:
    good, bad = {0: "a", 1: "b"}, {0: "a", 1: "a", 2: "a", 3: "b"}
    assignment.check(good, good, good, 2)

    with pytest.raises(AssertionError):
        assignment.check(good, bad, good, 2)


def test_notes_read_back_as_written_and_a_torn_row_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "notes"
    assert read_notes(path) == []
    notes = Notes(path)
    notes.add(3, value_of(7, 11))
    notes.add(4, value_of(8, 12))
    path.write_bytes(path.read_bytes()[:-1])

    (only,) = read_notes(path)

    assert (only.shard, only.number, only.due_ns) == (3, 7, 11)
    assert only.latency_ms > 0
    assert len(value_of(7, 11)) == VALUE_BYTES


class _Sent:
    """A sender that says it is done."""

    async def tell(self, _line: str) -> None:
        pass

    async def hear(self, _within_s: float = 0) -> str:
        return "sent 2"


class _Twice(_Sent):
    """One whose two messages are handled as the first of them, twice."""

    def __init__(self, notes: Path) -> None:
        self._notes = Notes(notes)

    async def tell(self, _line: str) -> None:
        for _ in range(2):
            self._notes.add(0, value_of(0, 0))


async def test_a_message_handled_twice_makes_no_latency(tmp_path: Path) -> None:
    path = tmp_path / "notes"
    pair = latency.Pair("shardq", cast("Program", _Twice(path)), path)

    with pytest.raises(AssertionError, match="2 handled"):
        await pair.send(1000, 2)


async def test_a_message_that_is_lost_makes_no_latency(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "ALL_WITHIN_S", 0.2)
    pair = latency.Pair("shardq", cast("Program", _Sent()), tmp_path / "none")

    with pytest.raises(TimeoutError):
        await pair.send(1000, 2)


def test_percentiles() -> None:
    times = [float(number) for number in range(1, 101)]

    assert latency.summary(times) == {"p50": 50.0, "p99": 99.0, "p99.9": 100.0, "max": 100.0}
    assert latency.percentile([5.0], 0.5) == 5.0


def test_every_shard_has_keys_of_its_own() -> None:
    keys = keys_of_shards(5)

    assert [len(ones) for ones in keys] == [KEYS_PER_SHARD] * 5
    assert all(key_hash(key) * 5 >> 32 == shard for shard, ones in enumerate(keys) for key in ones)


def test_takeover_takes_the_first_of_each_shard_and_the_usual_gap() -> None:
    handled = [Handled(shard, 0, 0, started) for shard, started in ((1, 30), (2, 15), (1, 10), (1, 20))]

    assert takeover.firsts(handled) == {1: 10, 2: 15}
    assert takeover.usual_gap_ns(Handled(1, 0, 0, started) for started in (10, 20, 30, 90)) == 10
    assert takeover.usual_gap_ns(handled[:1]) == 0


async def test_takeover_tells_messages_lost_handled_again_after_a_crash_and_after_a_handover(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(takeover, "LEASE_S", 0.15)
    fleet = takeover.Fleet(AsyncExitStack(), "", tmp_path)
    for name, killed, numbers in ((1, True, (0, 1)), (2, False, (1, 2)), (3, False, (2, 3))):
        notes = Notes(tmp_path / str(name))
        for number in numbers:
            notes.add(0, value_of(number, 0))
        fleet.gone.append(takeover.Worker(name, cast("Program", None), tmp_path / str(name), killed))

    assert list((await takeover.counted(fleet, 5)).values()) == [5, 1, 1, 1]


@pytest.mark.server_kinds("redis7")  # what it counts is the same on every server
async def test_reshard_counts_the_longest_wait_of_every_key(server_binary: Path) -> None:
    result = await reshard.measure(Options(str(server_binary), rounds=1, scale=0.2), say)

    check(result, 1)
    assert set(result.figures["send_many, messages/s"]) == {"before", "after"}
    for name in ("steady", "split", "merge"):
        assert result.figures[f"longest wait of a key, {name}, ms"]["p50"] > 0


@pytest.mark.server_kinds("redis7")  # what it counts is the same on every server
async def test_reshard_workers_waits_for_every_new_shard_and_counts_all_the_while(
    server_binary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reshard_workers, "WORKERS", 1)
    monkeypatch.setattr(reshard_workers, "BUFFERED_BYTES", 2_000_000)
    result = await reshard_workers.measure(Options(str(server_binary), rounds=1, scale=0.2), say)

    check(result, 1)
    assert set(result.samples) == {"before", "during", "after", reshard_workers.NEW}
    costs = result.figures["of a message"]
    assert costs.keys() == result.samples.keys()
    assert all(costs[side][what] > 0 for side in ("before", "after", reshard_workers.NEW) for what in costs[side])
    assert result.sizes["new shards waited for"] == 8 + 4
    assert result.figures["wait for a new shard, ms"]["p50"] > 0


async def test_a_flow_sees_what_each_shard_begins_from_some_row_on(tmp_path: Path) -> None:
    notes = Notes(tmp_path / "notes")
    crew = flow.Crew([tmp_path / "notes", tmp_path / "none"])
    notes.add(1, value_of(0, 0))
    since = crew.rows()
    with pytest.raises(TimeoutError), anyio.fail_after(0.1):
        await crew.until_seen([1], since)
    notes.add(1, value_of(1, 0))
    notes.add(2, value_of(2, 0))

    await crew.until_seen([1, 2], since)

    assert (crew.count(), sorted(crew.numbers())) == (3, [0, 1, 2])


async def test_a_flow_in_which_a_message_is_handled_twice_does_not_end(tmp_path: Path) -> None:
    twice = _Twice(tmp_path / "notes")
    flowing = flow.Flow(cast("RedisCluster", None), flow.Crew([tmp_path / "notes"]), cast("Program", twice))

    with pytest.raises(AssertionError, match="handled once"):
        await flowing.end()


def test_a_stretch_is_what_came_between_two_marks() -> None:
    first = flow.Mark(at_s=10.0, handled=100, clients_s=1.0, servers_s=2.0, calls=50, batches=5)
    last = flow.Mark(at_s=12.0, handled=2100, clients_s=1.01, servers_s=2.004, calls=60, batches=9)

    found = flow.Stretch.between(first, last)

    assert (found.seconds, found.rate, found.calls, found.batch) == (2.0, 1000.0, 5.0, 500.0)
    assert found.cpu_us == pytest.approx(7.0)
    assert flow.Stretch.between(first, dataclasses.replace(first, at_s=11.0)).rate == 0


def test_reshard_workers_waits_from_the_end_of_every_old_shard() -> None:
    table = scale(split_all(RoutingTable.equal(2)).table, 2)
    assert table is not None
    queue = SimpleNamespace(table=table.table)
    times = {2: (50, 100), 3: (50, 120), 4: (60, 90), 5: (60, 80), 6: (110, 150), 7: (95, 97)}  # due and begun, in ms
    rows = [Handled(shard, 0, due * 10**6, begun * 10**6) for shard, (due, begun) in times.items()]
    assert reshard_workers.waited(cast("shardq.Queue", queue), [6, 7], rows) == [30, 2]


def test_reshard_takes_of_each_key_the_longest_wait_of_a_window() -> None:
    load = reshard.Load(cast("shardq.Producer", None), [(0, 1.0, 5.0), (0, 2.0, 9.0), (1, 2.5, 4.0), (1, 3.0, 99.0)])
    assert load.longest(1.0, 3.0)[:3] == [9.0, 4.0, 0.0]
    assert load.longest(2.5, 4.0)[:3] == [0.0, 99.0, 0.0]
