"""The count of replicas that a write may wait for: it rises at once, and falls only when nodes were forgotten."""

from __future__ import annotations

import pytest

from shardq.core.servers import nodes_away, replicas_listed, replicas_spread
from shardq.storage.replicas import Replicas


def test_a_replica_that_dies_counts_on_and_one_that_is_forgotten_does_not() -> None:
    replicas = Replicas()
    assert replicas.in_doubt, "none is known yet"
    replicas.see({"a": 1, "b": 1})
    assert (replicas.count, replicas.in_doubt) == (1, False)
    replicas.see({"a": 1, "b": 0})
    replicas.see_listed(1, 1, 1)
    assert (replicas.count, replicas.in_doubt) == (1, True)
    assert [replicas.looked() for _ in range(3)] == [False] * 3, "it is listed, so it may come back"
    replicas.see_listed(0, 1, 1)
    assert [replicas.looked() for _ in range(3)] == [False] * 3, "it reads its data, and will be back"
    replicas.see_listed(0, 0, 0)
    assert [replicas.looked(), replicas.count] == [False, 1], "one look alone may have met a change"
    assert [replicas.looked(), replicas.count, replicas.falls] == [True, 0, 1]
    assert replicas.looked() is False
    replicas.see({"a": 1, "b": 1})
    assert replicas.count == 1


def test_the_second_look_must_say_so_too() -> None:
    replicas = Replicas()
    replicas.see({"a": 2})
    replicas.see({"a": 0})
    assert [replicas.looked() for _ in range(3)] == [False] * 3, "nobody has shown the list"
    replicas.see_listed(0, 0, 0)
    assert not replicas.looked()
    replicas.see({"a": 2})
    assert not replicas.looked()
    replicas.see({"a": 0})
    assert not replicas.looked()
    replicas.see({"a": 1})
    assert replicas.looked()
    assert replicas.count == 1, "the larger of both"


def test_a_count_falls_on_as_fewer_are_seen() -> None:
    replicas = Replicas()
    replicas.see({"a": 2})
    replicas.see_listed(0, 0, 0)
    replicas.see({"a": 1})
    assert not replicas.looked()
    replicas.see({"a": 0})
    assert [replicas.looked(), replicas.count] == [True, 1], "no fewer than either look saw"
    assert [replicas.looked(), replicas.count] == [True, 0], "the last two looks saw none"


def test_a_list_that_has_fewer_than_the_topology_in_use_is_a_reason_to_look() -> None:
    """The topology is not read at every look; one that is old must not be the last word."""
    replicas = Replicas()
    replicas.see({"a": 1})
    replicas.see_listed(0, 0, 0)
    assert not replicas.looked()
    assert replicas.in_doubt


def test_what_a_master_says_counts_beside_the_topology() -> None:
    replicas = Replicas()
    replicas.tell("a", 1)
    assert replicas.count == 0, "of no master yet"
    replicas.see({"a": 0})
    assert replicas.count == 1
    replicas.tell("a", 0)
    replicas.see_listed(0, 0, 0)
    assert (replicas.count, replicas.in_doubt) == (1, True)
    assert [replicas.looked(), replicas.looked(), replicas.count] == [False, True, 0]


def test_a_write_that_no_replica_confirmed_is_a_reason_to_look_once() -> None:
    replicas = Replicas()
    replicas.see({"a": 1})
    replicas.unconfirmed = True
    assert replicas.in_doubt
    assert not replicas.looked()
    assert not replicas.in_doubt


@pytest.mark.parametrize("known", [0, 1], ids=["the topology leaves them out", "it names them"])
def test_a_node_that_is_away_counts_once(known: int) -> None:
    """Nodes that can't be reached stay in CLUSTER SLOTS until they are given up, and are there again once they are
    back, before the list says so here."""
    lines = [f"m{each} 10.0.0.{each}:7000@17000 master - 0 0 1 connected {each}-{each}" for each in range(3)]
    lines += [f"r{each} 10.0.1.{each}:7000@17000 slave m{each} 0 1 1 disconnected" for each in range(3)]
    text = "\n".join(lines)
    replicas = Replicas()
    replicas.see({f"m{each}": known for each in range(3)})
    replicas.see_listed(nodes_away(text), replicas_listed(text), replicas_spread(text))
    assert (replicas.count, replicas.away) == (1, 3)
    replicas.see({f"m{each}": 1 for each in range(3)})
    assert replicas.count == 1
