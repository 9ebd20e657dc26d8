"""Faults of client processes: workers, producers and coordinators that are killed, stopped for a while, or replaced one
by one. Strikes nothing when no process of the kind is free, because other faults have them all.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from shardq.errors import StoreError
from shardq.storage.keys import Keys
from tests.faults.clients import GROUP
from tests.faults.crowd import Crowd, Member, Role
from tests.faults.faults import Fault, Heal, register
from tests.faults.lab import Lab

ENDS_WITHIN_S = 45.0  # a worker's drain limit, a lease, and a slow machine

Choose = Callable[[Lab, random.Random], Member | None]
Strike = Callable[[Lab, random.Random], Heal]


def crowd_of(lab: Lab) -> Crowd:
    assert lab.crowd is not None, "no client processes run"
    return lab.crowd


def needs_crowd(lab: Lab) -> str | None:
    return None if lab.crowd is not None else "no client processes run"


def one(role: Role) -> Choose:
    return lambda lab, chance: crowd_of(lab).one_of(role, chance)


def leader(lab: Lab, chance: random.Random) -> Member | None:
    """Who leads the group right now, a worker or a coordinator on its own."""
    crowd = crowd_of(lab)
    key = Keys("shardq", crowd.queue).control(GROUP)
    for server in lab.masters():
        try:
            return crowd.named(str(lab.command(server, "HGET", key, "leader") or ""))
        except StoreError:
            continue  # not the one that has it
    return None


def _nothing() -> None:
    return None


def strike_at(choose: Choose, do: Callable[[Crowd, Member], None], undo: Callable[[Crowd, Member], None]) -> Strike:
    """Does something to who is chosen, and undoes it in the heal."""

    def strike(lab: Lab, chance: random.Random) -> Heal:
        crowd, member = crowd_of(lab), choose(lab, chance)
        if member is None:
            return _nothing
        do(crowd, member)
        return lambda: undo(crowd, member)

    return strike


def kill(choose: Choose) -> Strike:
    """Replaced in the heal."""
    return strike_at(choose, Crowd.kill, lambda crowd, member: crowd.fill_up(member.role))


def pause(choose: Choose) -> Strike:
    """SIGSTOP; SIGCONT in the heal, when its leases may be others' and its sends overdue."""
    return strike_at(choose, Crowd.pause, Crowd.resume)


def roll(lab: Lab, chance: random.Random) -> Heal:
    """As a deployment does it: one after another is told to end, and replaced when it has."""
    crowd = crowd_of(lab)
    for member in crowd.of("worker"):
        if member.alive and not member.paused and not member.expected:
            crowd.tell(member)
            crowd.wait(member, ENDS_WITHIN_S)
            crowd.fill_up("worker")
    return _nothing


for fault in (
    Fault("worker-killed", "SIGKILL of a worker, replaced after a while", kill(one("worker")), needs_crowd),
    Fault("worker-stopped", "SIGSTOP of a worker, SIGCONT after a while", pause(one("worker")), needs_crowd),
    Fault("producer-killed", "SIGKILL of a producer", kill(one("producer")), needs_crowd, repeats=False),
    Fault("producer-stopped", "SIGSTOP of a producer", pause(one("producer")), needs_crowd, repeats=False),
    Fault("leader-killed", "SIGKILL of the member that leads the group", kill(leader), needs_crowd),
    Fault("leader-stopped", "SIGSTOP of the member that leads the group", pause(leader), needs_crowd),
    Fault("coordinator-killed", "SIGKILL of a coordinator", kill(one("coordinator")), needs_crowd, repeats=False),
    Fault("coordinator-stopped", "SIGSTOP of a coordinator", pause(one("coordinator")), needs_crowd, repeats=False),
    Fault("workers-rolled", "SIGTERM of every worker in turn, each replaced", roll, needs_crowd, repeats=False),
):
    register(fault)
