"""The case `pipeline` on a small scale: shardq's sides on a real cluster, and what becomes of peers that go wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import environments
from benchmarks.cases import pipeline
from benchmarks.harness import Options, Result
from benchmarks.peers import protocol
from benchmarks.runs import Program, one_round
from shardq.errors import CorruptData, StoreTimeout, UsageError
from shardq.ops.local_cluster import LocalCluster

# What is measured differs between the kinds of server, how does not.
pytestmark = [pytest.mark.anyio, pytest.mark.server_kinds("redis8")]

COUNT = 3000
PRETENDER = Program("tests.benchmarks.pretender")


@pytest.fixture
def store(tmp_path: Path) -> str:
    """What the pretender stores its messages in."""
    path = tmp_path / "store"
    path.touch()
    return str(path)


def pretender(**environment: str) -> Program:
    return replace(PRETENDER, environment=environment)


@pytest.mark.parametrize("environment", [{}, {"LISTS": "1"}])
async def test_shardq_is_measured_to_its_last_acknowledgement(
    cluster: LocalCluster, environment: dict[str, str], queue_name: str
) -> None:
    program = Program(pipeline.SHARDQ, environment={**environment, "QUEUE": queue_name})
    assert await one_round(program, cluster.url, COUNT) > 0


async def test_a_round_that_counts_right_has_a_rate(store: str) -> None:
    assert await one_round(pretender(), store, COUNT) > 0


@pytest.mark.parametrize("wrong", ["1", "20"])
async def test_a_wrong_count_is_an_error(store: str, wrong: str) -> None:
    with pytest.raises(CorruptData, match=f"handled {COUNT + int(wrong)} messages, not {COUNT}"):
        await one_round(pretender(WRONG=wrong), store, COUNT)


async def test_messages_that_are_missing_are_an_error(store: str) -> None:
    with pytest.raises(StoreTimeout, match=f"did not finish {COUNT} messages"):
        await one_round(pretender(WRONG="-1"), store, COUNT, within_s=3)


async def test_a_peer_that_breaks_is_quoted(store: str) -> None:
    with pytest.raises(UsageError, match="ended before it said 'ready'; it said: there is no such server"):
        await one_round(pretender(BREAKS="1"), store, COUNT)


def test_messages_are_the_same_ones_in_every_run() -> None:
    values = protocol.messages(100)
    assert values == protocol.messages(100)
    assert {len(value) for value in values} == {protocol.VALUE_BYTES}
    assert len(set(values)) > 90


@pytest.mark.parametrize(
    ("server", "known"),
    [("Redis 8.6.0", True), ("Redis 10.0.1", True), ("Redis 8.4.2", False), ("Valkey 9.1.2", False)],
)
def test_chasquimq_needs_a_redis_that_knows_idmp(server: str, known: bool) -> None:
    assert pipeline.knows_idmp(server) is known


def test_a_peer_that_cannot_be_installed_has_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments, "ENVIRONMENTS", tmp_path)
    monkeypatch.setattr(environments, "PYTHON", "false")
    arq = next(peer for peer in pipeline.PEERS if peer.name == "arq")
    reason = pipeline.why_not(arq, Options(server="-"), lambda _line: None)
    assert reason.startswith("pip can't install benchmarks/peers/arq.txt")


def test_each_peer_is_pinned_and_has_its_goal() -> None:
    samples = {"shardq": [300.0, 100.0, 200.0]} | {peer.name: [10.0, 40.0, 20.0] for peer in pipeline.PEERS}
    result = Result("", "messages/s", samples, {})
    goals = [pipeline.goal(result, peer) for peer in pipeline.PEERS]
    assert {goal.value for goal in goals} == {10.0}
    assert {goal.against: goal.reached for goal in goals} == {
        peer.name: peer.name in ("chasquimq", "nats") for peer in pipeline.PEERS
    }
    for peer in pipeline.PEERS:
        assert environments.version_of(peer.name, peer.package)
        assert (environments.PEERS / f"{peer.name}.py").exists()
