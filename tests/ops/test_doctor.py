"""The doctor on a cluster of its own: each defect is made, found, mended, and not found any more."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import pytest

import shardq
from shardq.core.findings import Finding
from shardq.core.slots import SLOTS
from shardq.errors import StoreError, StoreUnavailable
from shardq.ops.doctor.run import Wanted, examine
from shardq.ops.install import install
from shardq.ops.local_cluster import LocalCluster, LocalServer
from shardq.storage.functions import BUILD, library_source
from shardq.storage.keys import Keys
from shardq.storage.nodes import node_command, node_info
from tests.runtime.harness import until
from tests.runtime.outages_rig import KEPT
from tests.storage.test_safety import plain_server

# The oldest and the newest kind: what differs is what INFO and CONFIG know.
pytestmark = [pytest.mark.anyio, pytest.mark.server_kinds("redis7", "valkey9")]

HOST = "127.0.0.1"
SHORT = 0.2


@pytest.fixture(scope="module")
def own_cluster(server_binary: Path) -> Iterator[LocalCluster]:
    """Two masters with a replica each, whose settings are changed and whose nodes are killed here."""
    settings = {"cluster-replica-no-failover": "yes", **KEPT}  # a master that is away stays away while a test looks
    with LocalCluster(2, 1, None, server_binary, settings=settings) as cluster:
        yield cluster


@pytest.fixture
def masters(own_cluster: LocalCluster) -> list[LocalServer]:
    return own_cluster.processes[:2]


@pytest.fixture
def replicas(own_cluster: LocalCluster) -> list[LocalServer]:
    return own_cluster.processes[2:]


@pytest.fixture
async def sound(own_cluster: LocalCluster) -> LocalCluster:
    """With the functions, and without limits of memory or of the replication backlog that are worth advice."""
    async with shardq.connect(own_cluster.url) as client:
        await install(client)
    for process in own_cluster.processes:
        say(process, "CONFIG", "SET", "repl-backlog-size", "64mb", "maxmemory", "4gb")
    return own_cluster


def say(process: LocalServer, *words: str | bytes | int) -> Any:
    return node_command(HOST, process.port, *words)


def name(process: LocalServer) -> str:
    return f"{HOST}:{process.port}"


async def look(cluster: LocalCluster, **wanted: Any) -> list[Finding]:
    with anyio.fail_after(30):
        return await examine(cluster.url, Wanted(**({"over_s": SHORT} | wanted)))


def bad(findings: list[Finding]) -> dict[str, set[str]]:
    """What was found, by id: its subjects."""
    found: dict[str, set[str]] = {}
    for finding in findings:
        if finding.level != "ok":
            assert finding.do, finding
            found.setdefault(finding.id, set()).add(finding.subject)
    return found


async def test_a_sound_cluster_has_advice_only(sound: LocalCluster) -> None:
    findings = await look(sound, deep=True)
    assert set(bad(findings)) <= {"replicas.same_host", "server.security"}
    assert {finding.level for finding in findings} == {"advice", "ok"}
    fine = {finding.id for finding in findings if finding.level == "ok"}
    assert {"persistence.ok", "functions.ok", "slots.ok", "replicas.ok", "clock.ok", "orphans.ok", "access.ok"} <= fine
    assert bad(findings)["replicas.same_host"] == {name(process) for process in sound.processes[2:]}


async def test_settings(sound: LocalCluster, masters: list[LocalServer], replicas: list[LocalServer]) -> None:
    used = int(node_info(HOST, masters[1].port, "memory")["used_memory"])
    clients = node_info(HOST, replicas[0].port, "clients")
    taken = int(clients["connected_clients"]) + int(clients["cluster_connections"])
    # By server: settings, what they were, and what is found of them.
    cases: list[tuple[LocalServer, dict[str, str | int], dict[str, str | int], set[str]]] = [
        (
            masters[0],
            {"appendonly": "no", "min-replicas-to-write": 2, "timeout": 60, "repl-backlog-size": "1mb"},
            {"appendonly": "yes", "min-replicas-to-write": 0, "timeout": 0, "repl-backlog-size": "64mb"},
            {"persistence.off", "replicas.too_few", "clients.idle_timeout", "replicas.backlog_small"},
        ),
        (
            masters[1],
            {"appendfsync": "no", "maxmemory": used + 200_000, "client-output-buffer-limit": "normal 1mb 0 0"},
            {"appendfsync": "everysec", "maxmemory": "4gb", "client-output-buffer-limit": "normal 0 0 0"},
            {"persistence.fsync", "memory.full", "clients.output_buffer"},
        ),
        (
            replicas[0],
            {"maxmemory-policy": "volatile-lru", "cluster-require-full-coverage": "yes", "maxclients": taken + 1},
            {"maxmemory-policy": "noeviction", "cluster-require-full-coverage": "no", "maxclients": 1000},
            {"memory.policy", "cluster.full_coverage", "clients.full"},
        ),
        (
            replicas[1],
            {"maxmemory-policy": "allkeys-lru", "maxmemory": 0},
            {"maxmemory-policy": "noeviction", "maxmemory": "4gb"},
            {"memory.evicts", "memory.unbounded"},
        ),
    ]
    for server, wrong, _, _ in cases:
        say(server, "CONFIG", "SET", *(word for pair in wrong.items() for word in pair))
    try:
        found = bad(await look(sound))
        for server, _, _, ids in cases:
            for each in ids:
                assert found.get(each) == {name(server)}, each
        say(masters[0], "CONFIG", "SET", "save", "900 1")
        found = bad(await look(sound))
        assert "persistence.off" not in found
        assert found["persistence.snapshots"] == {name(masters[0])}
    finally:
        say(masters[0], "CONFIG", "SET", "save", "")
        for server, _, right, _ in cases:
            say(server, "CONFIG", "SET", *(word for pair in right.items() for word in pair))
    assert set(bad(await look(sound))) <= {"replicas.same_host", "server.security"}


async def test_a_disk_that_fails(sound: LocalCluster, masters: list[LocalServer]) -> None:
    in_the_way = masters[0].folder / "dump.rdb"
    in_the_way.unlink(missing_ok=True)
    in_the_way.mkdir()

    def saved(status: str) -> bool:
        with suppress(StoreError):  # one is under way
            say(masters[0], "BGSAVE")
        return node_info(HOST, masters[0].port, "persistence")["rdb_last_bgsave_status"] == status

    try:
        await until(lambda: saved("err"), 20, "a snapshot to fail")
        (finding,) = (each for each in await look(sound) if each.id == "persistence.failed")
        assert (finding.subject, finding.level) == (name(masters[0]), "warning")
        say(masters[0], "CONFIG", "SET", "save", "900 1")  # now it refuses writes for it
        (finding,) = (each for each in await look(sound) if each.id == "persistence.failed")
        assert finding.level == "problem"
    finally:
        say(masters[0], "CONFIG", "SET", "save", "")
        in_the_way.rmdir()
    await until(lambda: saved("ok"), 20, "a snapshot to succeed")
    assert "persistence.failed" not in bad(await look(sound))


async def test_functions_are_looked_for_and_never_loaded(sound: LocalCluster, masters: list[LocalServer]) -> None:
    say(masters[0], "FUNCTION", "FLUSH")
    for _ in range(2):
        assert bad(await look(sound))["functions.missing"] == {name(masters[0])}
    for build, found_id in ((BUILD - 1, "functions.old"), (BUILD + 1, "functions.newer")):
        other = library_source().replace(f"LIBRARY_BUILD = {BUILD}", f"LIBRARY_BUILD = {build}")
        say(masters[0], "FUNCTION", "LOAD", "REPLACE", other)
        found = bad(await look(sound))
        assert found[found_id] == {name(masters[0])}
        assert "functions.differ" in found
    say(masters[0], "FUNCTION", "FLUSH")
    async with shardq.connect(sound.url) as client:
        await install(client)
    assert not {"functions.missing", "functions.old", "functions.newer", "functions.differ"} & set(
        bad(await look(sound))
    )


async def test_slots(sound: LocalCluster, masters: list[LocalServer]) -> None:
    other = say(masters[1], "CLUSTER", "MYID")
    say(masters[0], "CLUSTER", "SETSLOT", 0, "MIGRATING", other)
    assert bad(await look(sound))["cluster.slots_open"] == {name(masters[0])}
    say(masters[0], "CLUSTER", "SETSLOT", 0, "STABLE")
    say(masters[0], "CONFIG", "SET", "cluster-require-full-coverage", "yes", "cluster-node-timeout", 500)
    say(masters[0], "CLUSTER", "DELSLOTS", 0)
    try:
        await until(lambda: node_info(HOST, masters[0].port, "cluster")["cluster_state"] == "fail", 20, "the state")
        found = bad(await look(sound))
        assert found["cluster.slots_uncovered"] == {"cluster"}
        assert found["cluster.down"] == {name(masters[0])}
    finally:
        say(masters[0], "CLUSTER", "ADDSLOTS", 0)
        say(masters[0], "CONFIG", "SET", "cluster-require-full-coverage", "no")
    await until(lambda: node_info(HOST, masters[0].port, "cluster")["cluster_state"] == "ok", 20, "the state")
    say(masters[0], "CONFIG", "SET", "cluster-node-timeout", 2000)
    assert not {"cluster.slots_open", "cluster.slots_uncovered", "cluster.down"} & set(bad(await look(sound)))


async def test_slow_calls(sound: LocalCluster, masters: list[LocalServer]) -> None:
    say(masters[0], "CONFIG", "SET", "slowlog-log-slower-than", 0)
    await look(sound)  # its own calls are in the slow log now
    (finding,) = (each for each in await look(sound) if each.id == "slowlog.ours")
    assert (finding.subject, finding.level) == (name(masters[0]), "advice")
    assert "build" in finding.what
    say(masters[0], "CONFIG", "SET", "slowlog-log-slower-than", 10_000)
    say(masters[0], "SLOWLOG", "RESET")
    assert "slowlog.ours" not in bad(await look(sound))


@pytest.mark.parametrize(("ahead_s", "word"), [(90.0, "behind"), (-90.0, "ahead of")])
async def test_clocks_that_differ(
    sound: LocalCluster, monkeypatch: pytest.MonkeyPatch, ahead_s: float, word: str
) -> None:
    with monkeypatch.context() as patch:
        wrong = SimpleNamespace(time=lambda: time.time() + ahead_s, monotonic=time.monotonic)
        patch.setattr("shardq.storage.node_facts.time", wrong)
        found = [finding for finding in await look(sound) if finding.id == "clock.skew"]
    assert {finding.subject for finding in found} == {name(process) for process in sound.processes}
    assert all(word in finding.what for finding in found)
    assert "clock.skew" not in bad(await look(sound))


async def test_a_replica_that_is_away(
    sound: LocalCluster, masters: list[LocalServer], replicas: list[LocalServer]
) -> None:
    replicas[1].kill()
    try:
        await until_found(sound, {"node.away": name(replicas[1]), "cluster.node_failed": name(replicas[1])})
        await until_found(sound, {"replicas.none": name(masters[1])})
        assert not [each for each in await look(sound) if each.level == "problem"]
    finally:
        replicas[1].restart()
        for process in sound.processes:
            say(
                process, "CONFIG", "SET", "cluster-node-timeout", 15000, "repl-backlog-size", "64mb", "maxmemory", "4gb"
            )
    await until_gone(sound, {"node.away", "cluster.node_failed", "replicas.none", "replicas.unlinked"})


async def test_a_master_that_is_away(
    sound: LocalCluster, masters: list[LocalServer], replicas: list[LocalServer], queue_name: str
) -> None:
    async with shardq.connect(sound.url) as client:
        slots = {number: Keys("shardq", f"{queue_name}-{number}").control_slot for number in range(64)}
        # Its routing table lies on the first master, so that it is a shard that can't be read.
        queue_name += f"-{next(number for number, slot in slots.items() if slot < SLOTS // 2)}"
        queue = await client.queue(queue_name, shards=2)
        await queue.open_group("g")
    masters[1].kill()
    try:
        findings = await look(sound, queue=queue_name)
        found = bad(findings)
        assert found["node.away"] == {name(masters[1])}
        assert next(each for each in findings if each.id == "node.away").level == "problem"
        assert found["replicas.unlinked"] == {name(replicas[1])}
        assert found["shard.unreadable"] == {f"{queue_name} shard 1"}
    finally:
        masters[1].restart()
    await until_gone(sound, {"node.away", "replicas.unlinked", "shard.unreadable", "shard.missing"})


async def until_found(cluster: LocalCluster, wanted: dict[str, str]) -> None:
    async def there() -> bool:
        found = bad(await look(cluster))
        return all(subject in found.get(each, set()) for each, subject in wanted.items())

    await until(there, 30, f"{wanted} to be found")


async def until_gone(cluster: LocalCluster, ids: set[str]) -> None:
    async def gone() -> bool:
        return not ids & set(bad(await look(cluster)))

    await until(gone, 30, f"{ids} to be gone")


# -- rights, and what is no cluster -----------------------------------------------------------------------------------

RULES = ("on", ">pw", "~*", "&*", "+cluster|slots", "+cluster|nodes", "+ping")
ALLOWED: list[tuple[tuple[str, ...], set[str]]] = [
    ((), {"+info", "+cluster|info", "+config|get", "+slowlog|get", "+time", "+fcall", "+smembers ~shardq:*"}),
    (("+info", "+fcall", "+time"), {"+config|get", "+smembers ~shardq:*"}),
    (("+@all", "-config"), {"+config|get"}),
    (("-cluster|slots",), {"+cluster|slots"}),
]


@pytest.mark.parametrize(("more", "missing"), ALLOWED)
async def test_what_a_user_may_not_ask(sound: LocalCluster, more: tuple[str, ...], missing: set[str]) -> None:
    for process in sound.processes:
        say(process, "ACL", "SETUSER", "limited", "reset", *RULES, *more)
    try:
        url = sound.url.replace("redis://", "redis://limited:pw@")
        findings = await examine(url, Wanted(over_s=SHORT))
    finally:
        for process in sound.processes:
            say(process, "ACL", "DELUSER", "limited")
    denied = [finding for finding in findings if finding.id == "access.denied"]
    for right in missing:
        assert any(f"lacks {right}:" in each.what and f"{right}" in each.do for each in denied), (right, denied)
    assert {each.level for each in denied} == {"unknown"}
    assert not {each.id for each in findings} & {"access.ok"}
    of_servers = [each for each in findings if not each.subject.startswith("q-")]  # other tests' queues are here too
    assert not [each for each in of_servers if each.level in ("warning", "problem")]


async def test_a_queue_that_a_user_may_not_read(sound: LocalCluster, queue_name: str) -> None:
    async with shardq.connect(sound.url) as client:
        await (await client.queue(queue_name, shards=2)).open_group("g")
    rights = ("+@all", "-exists", "-xinfo", "-hgetall")
    for process in sound.processes:
        say(process, "ACL", "SETUSER", "limited", "reset", "on", ">pw", "~*", "&*", *rights)
    try:
        url = sound.url.replace("redis://", "redis://limited:pw@")
        found = [each for each in await examine(url, Wanted(queue_name, SHORT)) if each.subject == queue_name]
        for process in sound.processes:
            say(process, "ACL", "SETUSER", "limited", "-hmget")
        blind = [each for each in await examine(url, Wanted(queue_name, SHORT)) if each.subject == queue_name]
    finally:
        for process in sound.processes:
            say(process, "ACL", "DELUSER", "limited")
    assert {each.id for each in found} == {"access.denied"}
    assert [[right in each.what for each in found].count(True) for right in ("+exists", "+xinfo", "+hgetall")] == [
        1,
        1,
        1,
    ]
    assert [each.id for each in blind] == ["access.denied"]
    assert "+hmget" in blind[0].what


async def test_a_server_that_is_no_cluster(server_binary: Path, tmp_path: Path) -> None:
    with plain_server(server_binary, tmp_path) as port:
        findings = await examine(f"redis://{HOST}:{port}", Wanted(over_s=SHORT))
    assert ("problem", "server.no_cluster", f"{HOST}:{port}") in {(f.level, f.id, f.subject) for f in findings}
    with pytest.raises(StoreUnavailable, match="is the address right"):
        await examine(f"redis://{HOST}:{port}", Wanted(over_s=SHORT))
