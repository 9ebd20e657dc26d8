"""Faults of the cluster's shape: masters that die, freeze and hand over, slots that move, masters that join and leave.

Only one of them changes the cluster at a time (`Lab.turn`); those of other kinds may go on beside it.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Callable
from functools import wraps

from shardq.ops.local_cluster import LocalServer
from shardq.storage.nodes import bus_port, free_ports
from tests.faults.faults import Fault, Heal, register
from tests.faults.lab import WHOLE_WITHIN_S, Lab, until
from tests.faults.slots import move_slots, owned_slots

Strike = Callable[[Lab, random.Random], Heal]

# What a replica had not heard when it was promoted is gone; "fsync" waits for a replica too where there is one.
UNREPLICATED = frozenset({"leader"})
_MOST_MOVED = 20
# Those that wait for one another.
IN_TURN: set[Strike] = set()


def in_turn(strike: Strike) -> Strike:
    """From the strike to the end of its heal no other fault of this kind goes on; heals into a whole cluster."""

    @wraps(strike)
    def waits(lab: Lab, chance: random.Random) -> Heal:
        assert lab.turn.acquire(timeout=2 * WHOLE_WITHIN_S), "another fault of the cluster's shape does not end"
        try:
            lab.wait_until_whole()
            heal = strike(lab, chance)
        except BaseException:
            lab.turn.release()
            raise

        def heals() -> None:
            try:
                heal()
                lab.wait_until_whole()
            finally:
                lab.turn.release()

        return heals

    IN_TURN.add(waits)
    return waits


def needs_replicas(lab: Lab) -> str | None:
    return None if len(lab.pairs()) >= lab.shares else "needs a replica for each master"


def needs_two_masters(lab: Lab) -> str | None:
    return None if lab.shares > 1 else "needs two masters"


def _nothing() -> None:
    return None


# -- masters that fail ---------------------------------------------------------------------------------------------


@in_turn
def kill_master(lab: Lab, chance: random.Random) -> Heal:
    master, replica = chance.choice(lab.pairs())
    master.kill()
    lab.wait_for_promotion(replica)
    return master.restart


@in_turn
def freeze_master(lab: Lab, chance: random.Random) -> Heal:
    master, replica = chance.choice(lab.pairs())
    os.kill(master.pid, signal.SIGSTOP)
    try:
        lab.wait_for_promotion(replica)
    except BaseException:
        os.kill(master.pid, signal.SIGCONT)
        raise
    return lambda: os.kill(master.pid, signal.SIGCONT)


def _fail_over(*how: str) -> Strike:
    @in_turn
    def strike(lab: Lab, chance: random.Random) -> Heal:
        _, replica = chance.choice(lab.pairs())
        lab.fail_over(replica, *how)
        return _nothing

    return strike


@in_turn
def restart_all(lab: Lab, chance: random.Random) -> Heal:
    masters = lab.masters()
    others = [server for server in lab.servers if server not in masters]
    for server in lab.servers:
        # With everysec one whose disk is busy has put off writing what it acknowledged; started again it is as before.
        lab.insist(server, "CONFIG", "SET", "appendfsync", "always")
    for server in lab.servers:
        server.kill()

    def heal() -> None:
        for server in (*masters, *others):  # a replica that is up first might take over, with less than its master has
            server.restart()

    return heal


# -- slots that move -----------------------------------------------------------------------------------------------


@in_turn
def move_some_slots(lab: Lab, chance: random.Random) -> Heal:
    """There in the strike, back in the heal."""
    source, target = chance.sample(lab.masters(), 2)
    slots = _some_slots(lab, source, chance)
    move_slots(lab, slots, source, target)
    return lambda: move_slots(lab, slots, target, source)


def _some_slots(lab: Lab, source: LocalServer, chance: random.Random) -> list[int]:
    """Up to half of those with keys in them; any one where there are none."""
    used = lab.used_slots(source) or sorted(owned_slots(lab, source))[:1]
    return sorted(chance.sample(used, min(_MOST_MOVED, (len(used) + 1) // 2)))


@in_turn
def add_master(lab: Lab, chance: random.Random) -> Heal:
    """An empty one, without the functions; it takes slots of each master, and gives them back before it leaves."""
    new = _join(lab)
    taken: list[tuple[LocalServer, list[int]]] = []

    def heal() -> None:
        for owner, slots in taken:
            move_slots(lab, slots, new, owner)
        _leave(lab, new)

    try:
        for owner in [server for server in lab.masters() if server is not new]:
            taken.append((owner, _some_slots(lab, owner, chance)))
            move_slots(lab, taken[-1][1], owner, new)
        lab.wait_until_whole()
    except BaseException:
        heal()
        raise
    return heal


def _join(lab: Lab) -> LocalServer:
    (port,) = free_ports("127.0.0.1", 1)  # a node with a host of its own has all of that one's
    new = lab.cluster.new_server(port)
    lab.added.append(new)
    new.restart()
    for server in lab.servers[:-1]:
        lab.insist(server, "CLUSTER", "MEET", new.host, port, bus_port(port))

    def known() -> bool:
        views = [lab.info(server, "cluster").get("cluster_known_nodes") for server in lab.servers]
        return set(views) == {str(len(lab.servers))} and lab.info(new, "cluster").get("cluster_state") == "ok"

    until(known, f"all nodes to know {port}")
    return new


def _leave(lab: Lab, gone: LocalServer) -> None:
    node_id = lab.node_id(gone)
    gone.kill()
    lab.added.remove(gone)
    for server in lab.servers:
        lab.insist(server, "CLUSTER", "FORGET", node_id)
    shutil.rmtree(gone.folder)


for fault in (
    Fault("master-killed", "SIGKILL of a master; its replica takes over", kill_master, needs_replicas, UNREPLICATED),
    Fault("master-frozen", "SIGSTOP of a master till failed over", freeze_master, needs_replicas, UNREPLICATED),
    Fault("failover", "a master hands over to its replica", _fail_over(), needs_replicas),
    Fault("failover-forced", "a replica takes over unasked", _fail_over("FORCE"), needs_replicas, UNREPLICATED),
    Fault("cluster-restarted", "SIGKILL of every node, then restarted from their AOF", restart_all),
    Fault("slots-moved", "slots with keys move to another master, and back", move_some_slots, needs_two_masters),
    Fault("master-added", "an empty master joins, takes slots, gives them back and leaves", add_master),
):
    register(fault)
