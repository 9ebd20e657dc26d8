"""From where on the doctor says something, and of what no server here gives cause: a disk, a network, an allocator."""

from __future__ import annotations

import pytest

from shardq.ops.doctor.facts import Limits
from shardq.ops.doctor.servers import CHECKS
from shardq.storage.node_facts import NodeFacts

MIB = 1024 * 1024
SLAVE = "ip=10.0.0.2,port=7001,state=online,offset={},lag=0"


@pytest.mark.parametrize(
    ("check", "sound", "broken", "found"),
    [
        (
            "fragmentation",
            {"used_memory": 400 * MIB, "mem_fragmentation_bytes": 256 * MIB},
            {"used_memory": 400 * MIB, "mem_fragmentation_bytes": 257 * MIB},
            ("advice", "memory.fragmented", "257 MiB"),
        ),
        (
            "disk",
            {"aof_last_write_status": "ok"},
            {"aof_last_write_status": "err"},
            ("problem", "persistence.failed", "refuses writes"),
        ),
        (
            "disk",
            {"aof_last_bgrewrite_status": "ok"},
            {"aof_last_bgrewrite_status": "err"},
            ("warning", "persistence.rewrite_failed", "grows"),
        ),
        (
            "lag",
            {"master_repl_offset": 5 * MIB, "repl_backlog_size": MIB, "slave0": SLAVE.format(4 * MIB)},
            {"master_repl_offset": 5 * MIB, "repl_backlog_size": MIB, "slave0": SLAVE.format(4 * MIB - 1)},
            ("warning", "replicas.lag", "10.0.0.2:7001 is 1024 KiB behind"),
        ),
        (
            "memory",
            {"used_memory": 79, "maxmemory": 100},
            {"used_memory": 80, "maxmemory": 100},
            ("warning", "memory.full", "at maxmemory sends wait"),
        ),
        (
            "memory",
            {"used_memory": 0, "maxmemory": 100},
            {"used_memory": 95, "maxmemory": 100},
            ("problem", "memory.full", "at maxmemory sends wait"),
        ),
        (
            "clients",
            {"connected_clients": 70, "cluster_connections": 9, "maxclients": 100},
            {"connected_clients": 70, "cluster_connections": 10, "maxclients": 100},
            ("warning", "clients.full", "80 of 100"),
        ),
    ],
)
def test_from_where_on_it_is_said(
    check: str, sound: dict[str, object], broken: dict[str, object], found: tuple[str, str, str]
) -> None:
    (judge,) = (each.judge for each in CHECKS if each.id == check)

    def node(info: dict[str, object]) -> NodeFacts:
        said = {"role": "master", "connected_slaves": "1"} | {name: str(value) for name, value in info.items()}
        return NodeFacts("10.0.0.1:7000", None, info=said)

    assert list(judge(node(sound), Limits())) == []
    (finding,) = judge(node(broken), Limits())
    assert (finding.level, finding.id, finding.subject) == (*found[:2], "10.0.0.1:7000")
    assert found[2] in finding.what
    assert finding.do


def test_every_check_has_its_own_id() -> None:
    ids = [check.id for check in CHECKS]
    assert len(set(ids)) == len(ids)
