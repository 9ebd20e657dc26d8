"""What a server says of itself, read and judged: versions, refusals, CLUSTER NODES."""

from __future__ import annotations

import pytest

from shardq.core.findings import LEVELS, Finding, in_order, is_fine
from shardq.core.servers import (
    fixed_version,
    nodes_away,
    parse_info,
    parse_nodes,
    refusals,
    replicas_listed,
    replicas_spread,
    version_of,
)


@pytest.mark.parametrize(
    ("info", "wanted"),
    [
        ({"redis_version": "7.0.15"}, "7.2.11"),
        ({"redis_version": "7.2.10"}, "7.2.11"),
        ({"redis_version": "7.2.11"}, None),
        ({"redis_version": "7.4.5"}, "7.4.6"),
        ({"redis_version": "8.0.4"}, None),
        ({"redis_version": "8.1.0"}, "8.2.3"),
        ({"redis_version": "8.2.2"}, "8.2.3"),
        ({"redis_version": "8.2.3"}, None),
        ({"redis_version": "8.4.0"}, None),
        ({"redis_version": "255.255.255"}, None),
        ({"redis_version": "7.2.4", "server_name": "valkey", "valkey_version": "8.1.3"}, "8.1.4"),
        ({"redis_version": "7.2.4", "server_name": "valkey", "valkey_version": "8.0.6"}, None),
        ({"redis_version": "7.2.4", "server_name": "valkey", "valkey_version": "9.1.2"}, None),
        ({"redis_version": "six"}, None),
        ({}, None),
    ],
)
def test_the_release_with_the_fixes(info: dict[str, str], wanted: str | None) -> None:
    assert fixed_version(version_of(info)) == wanted


SOUND = {"cluster_enabled": "1", "redis_version": "7.0.0", "maxmemory_policy": "noeviction"}


@pytest.mark.parametrize(
    ("change", "ids"),
    [
        ({}, []),
        ({"cluster_enabled": "0"}, ["server.no_cluster"]),
        ({"redis_version": "6.2.14"}, ["server.old"]),
        ({"maxmemory_policy": "allkeys-lru"}, ["memory.evicts"]),
        ({"maxmemory_policy": "volatile-lru"}, []),
        ({"cluster_enabled": "0", "redis_version": "5.0.1"}, ["server.no_cluster", "server.old"]),
    ],
)
def test_what_is_refused(change: dict[str, str], ids: list[str]) -> None:
    found = list(refusals("a:1", SOUND | change))
    assert [finding.id for finding in found] == ids
    assert all(finding.subject == "a:1" and finding.what and finding.do for finding in found)


def test_info_is_read_as_redis_writes_it() -> None:
    assert parse_info("# Server\r\na:1\r\nb:x:y\r\n\r\nnot a field\r\n") == {"a": "1", "b": "x:y"}


def test_cluster_nodes() -> None:
    text = (
        "aa :7000@17000 myself,master - 0 0 1 connected 0-99 101 [93->-bb] [94-<-cc]\n"
        "bb 10.0.0.2:7001@17001,host-b,shard-id=x slave aa 0 1 1 connected\n"
        "cc 10.0.0.3:7002@17002,,tls-port=0 master,fail - 0 1 3 disconnected 200-201\n"
        "dd :0@0 master,noaddr - 0 1 3 disconnected\n"
        "broken line\n"
    )
    one, two, three = parse_nodes(text, "10.0.0.1")
    assert (one.name, one.slots, one.moving, one.is_master) == ("10.0.0.1:7000", 101, ("93->-bb", "94-<-cc"), True)
    assert (two.name, two.hostname, two.master_id, two.slots, two.is_master) == (
        "10.0.0.2:7001",
        "host-b",
        "aa",
        0,
        False,
    )
    assert (three.hostname, three.slots, three.flags) == ("", 2, frozenset({"master", "fail"}))


def test_nodes_that_are_away() -> None:
    lines = {
        "aa :7000@17000 myself,master - 0 0 1 connected 0-99": 0,
        "bb 10.0.0.2:7001@17001 slave aa 0 1 1 connected": 0,
        "cc 10.0.0.3:7002@17002 slave,fail aa 0 1 1 connected": 1,
        "dd 10.0.0.3:7003@17002 slave,fail? aa 0 1 1 connected": 1,
        "ee 10.0.0.3:7004@17002 slave aa 0 1 1 disconnected": 1,
        "ff 10.0.0.3:7005@17002 master,fail - 0 1 1 disconnected": 1,
        "gg 10.0.0.3:7006@17002 master,fail - 0 1 1 disconnected 100-200": 0,
        "hh 10.0.0.3:7007@17002 master - 0 1 1 connected": 0,
        "ii :0@0 master,noaddr - 0 1 3 disconnected": 0,
        "jj 10.0.0.3:7008@17002 handshake - 0 1 3 disconnected": 0,
        "broken line": 0,
    }
    for line, away in lines.items():
        assert nodes_away(line) == away, line
    assert nodes_away("\n".join(lines)) == 4


def test_replicas_that_are_listed_in_whatever_state() -> None:
    masters = [
        "aa 10.0.0.1:7000@17000 myself,master - 0 0 1 connected 0-100",
        "bb 10.0.0.2:7000@17000 master,fail - 0 0 1 disconnected 101-200",
        "cc 10.0.0.3:7000@17000 master - 0 0 1 connected",
    ]
    own = ["dd 10.0.0.4:7000@17000 slave aa 0 1 1 connected", "ee 10.0.0.4:7001@17000 slave,fail aa 0 1 1 disconnected"]
    other = "ff 10.0.0.4:7002@17000 slave,fail bb 0 1 1 disconnected"
    assert replicas_listed("\n".join([*masters, *own])) == 0, "bb has none; cc has no slots"
    assert replicas_listed("\n".join([*masters, *own, other])) == 1
    assert replicas_listed("\n".join([masters[0], *own])) == 2
    assert replicas_listed("broken line\n") == 0


def test_replicas_that_are_spread_evenly_count_once() -> None:
    masters = [
        "aa 10.0.0.1:7000@17000 myself,master - 0 0 1 connected 0-100",
        "bb 10.0.0.2:7000@17000 master - 0 0 1 connected 101-200",
    ]
    own = ["dd 10.0.0.4:7000@17000 slave aa 0 1 1 connected", "ee 10.0.0.4:7001@17000 slave,fail aa 0 1 1 disconnected"]
    old = "cc 10.0.0.3:7000@17000 master,fail - 0 0 1 disconnected"
    empty = "ff 10.0.0.3:7001@17000 master - 0 0 1 connected"
    assert replicas_spread("\n".join([*masters, *own])) == 1
    assert replicas_spread("\n".join([*masters, own[0], empty])) == 0, "an empty master is no replica"
    assert replicas_spread("\n".join([*masters, own[0], old])) == 1, "one that was failed over comes back as one"
    assert replicas_spread("\n".join([masters[0], *own, old])) == 3
    assert replicas_spread("broken line\n") == 0


def test_the_worst_comes_first() -> None:
    found = in_order(Finding(level, "x.y", "s", "w") for level in reversed(LEVELS))
    assert [finding.level for finding in found] == ["problem", "warning", "unknown", "advice", "ok"]
    assert not is_fine(found)
    assert is_fine(finding for finding in found if finding.level in ("ok", "advice", "unknown"))
