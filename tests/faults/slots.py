"""Moves one slot after another from node to node of a live cluster, the way the servers offer: key by key, or at once
where they can (Valkey 9). Decides nothing about which.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from shardq.errors import StoreError
from shardq.ops.local_cluster import LocalServer
from shardq.storage.nodes import node_command
from tests.faults.lab import Lab, until

_MOVED_WITHIN_S, _POLL_S = 60.0, 0.02


class Move:
    """A slot on its way from one node to another, key by key; `begin`, `move` each key, `end`."""

    def __init__(self, slot: int, source: LocalServer, target: LocalServer) -> None:
        self.slot, self.source, self.target = slot, source, target
        self._ids = {server.port: str(_command(server, "CLUSTER", "MYID")) for server in (source, target)}

    def begin(self) -> list[str]:
        """Opens both ends; returns the keys that must move, the stream first."""
        self._set(self.target, "IMPORTING", self._ids[self.source.port])
        self._set(self.source, "MIGRATING", self._ids[self.target.port])
        return sorted(self.keys(), key=lambda key: not key.endswith(":stream"))

    def keys(self) -> list[str]:
        """What still lies at the source."""
        keys: list[str] = _command(self.source, "CLUSTER", "GETKEYSINSLOT", self.slot, 1000)
        return keys

    def move(self, key: str) -> None:
        _command(self.source, "MIGRATE", self.target.host, self.target.port, key, 0, 5000)

    def end(self) -> None:
        for server in (self.target, self.source):
            self._set(server, "NODE", self._ids[self.target.port])

    def _set(self, server: LocalServer, *args: str) -> None:
        _command(server, "CLUSTER", "SETSLOT", self.slot, *args)


def _command(server: LocalServer, *args: str | int) -> Any:
    return node_command(server.host, server.port, *args)


def move_slots(lab: Lab, slots: Sequence[int], source: LocalServer, target: LocalServer) -> None:
    """Returns when the target has all of them; a node that refuses meanwhile (full, failing) is asked again."""
    if can_move_at_once(lab, source):
        _move_at_once(lab, slots, source, target)
        return
    for slot in slots:
        _move_key_by_key(lab, Move(slot, source, target))


def can_move_at_once(lab: Lab, server: LocalServer) -> bool:
    return any("MIGRATESLOTS" in line for line in lab.command(server, "CLUSTER", "HELP"))


def _move_key_by_key(lab: Lab, move: Move) -> None:
    deadline = time.monotonic() + _MOVED_WITHIN_S
    while move.slot not in owned_slots(lab, move.target):
        try:
            move.begin()
            while keys := move.keys():
                for key in keys:
                    move.move(key)
            move.end()
        except StoreError:  # each step can be done again; a source may have heard of the end from the target, not us
            if time.monotonic() > deadline:
                raise
            time.sleep(_POLL_S)


def _move_at_once(lab: Lab, slots: Sequence[int], source: LocalServer, target: LocalServer) -> None:
    """One job for all; a failed one leaves every slot at the source."""
    ranges: list[int | str] = []
    for first, last in ranges_of(slots):
        ranges += [first, last]
    target_id = lab.node_id(target)
    deadline = time.monotonic() + _MOVED_WITHIN_S
    while not _owns(lab, target, slots):
        assert time.monotonic() < deadline, f"slots {slots} did not reach {target.port}: {_jobs(lab, source)}"
        try:
            lab.command(source, "CLUSTER", "MIGRATESLOTS", "SLOTSRANGE", *ranges, "NODE", target_id)
        except StoreError:  # one is under way, or the source is not ready for one
            time.sleep(_POLL_S)
        until(lambda: _settled(lab, source), f"the end of a slot migration from {source.port}", _MOVED_WITHIN_S)


def _jobs(lab: Lab, server: LocalServer) -> list[dict[str, str]]:
    rows = lab.insist(server, "CLUSTER", "GETSLOTMIGRATIONS")
    return [dict(zip(row[::2], map(str, row[1::2]), strict=True)) for row in rows]


def _settled(lab: Lab, source: LocalServer) -> bool:
    return all(job["state"] in ("success", "failed", "cancelled") for job in _jobs(lab, source))


def _owns(lab: Lab, server: LocalServer, slots: Sequence[int]) -> bool:
    return set(slots) <= owned_slots(lab, server)


def owned_slots(lab: Lab, server: LocalServer) -> set[int]:
    """What a node itself says it serves as a master."""
    own = lab.node_id(server)
    rows = lab.insist(server, "CLUSTER", "SLOTS")
    return {slot for first, last, master, *_ in rows if master[2] == own for slot in range(first, last + 1)}


def ranges_of(slots: Sequence[int]) -> list[tuple[int, int]]:
    """Neighbours together: [1, 2, 5] is (1, 2), (5, 5)."""
    found: list[tuple[int, int]] = []
    for slot in sorted(slots):
        if found and found[-1][1] == slot - 1:
            found[-1] = (found[-1][0], slot)
        else:
            found.append((slot, slot))
    return found
