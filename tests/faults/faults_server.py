"""Faults of single servers: lost or replaced functions, killed connections, pauses, full memory, full disks, clocks
that step. The cluster keeps its shape, unless a pause outlasts its patience.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence

from shardq.errors import StoreError
from shardq.ops.local_cluster import LocalServer
from shardq.storage.functions import BUILD, library_source
from tests.faults import machine
from tests.faults.faults import Fault, Heal, register
from tests.faults.faults_cluster import in_turn
from tests.faults.lab import Lab, until

_STORM_PAUSE_S = (0.02, 0.2)
# Little ahead: a pause that a master sets while its clock is ahead lasts so much longer once that is put right.
_CLOCK_STEPS_S = (-3600, -600, -30, -2, 2, 10)


def _nothing() -> None:
    return None


def one_or_all(lab: Lab, chance: random.Random) -> Sequence[LocalServer]:
    masters = lab.masters()
    return [chance.choice(masters)] if chance.random() < 0.5 else masters


class Repeated:
    """Does something again and again in a thread of its own, until `stop`; nodes that do not answer are passed over."""

    def __init__(self, action: Callable[[], None], pause_s: Callable[[], float]) -> None:
        self._action, self._pause_s = action, pause_s
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="shardq-fault", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                self._action()
            except StoreError:
                pass  # another fault has the node
            if self._stopping.wait(self._pause_s()):
                return

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()


# -- functions -----------------------------------------------------------------------------------------------------


def flush_functions(lab: Lab, chance: random.Random) -> Heal:
    """Clients that may load them put them back."""
    for server in one_or_all(lab, chance):
        lab.insist_while_master(server, "FUNCTION", "FLUSH")
    return _nothing


def library_of(build: int) -> str:
    """This library as another build of it would be; it does the same."""
    return library_source().replace(f"LIBRARY_BUILD = {BUILD}\n", f"LIBRARY_BUILD = {build}\n", 1)


def deploy_functions(lab: Lab, chance: random.Random) -> Heal:
    """One master after another gets a newer build, as the first process of a newer version would do it; back in the
    heal, which a version that is taken back does not do by itself."""

    def load(build: int) -> None:
        masters = lab.masters()
        for server in chance.sample(masters, len(masters)):
            lab.insist_while_master(server, "FUNCTION", "LOAD", "REPLACE", library_of(build))

    load(BUILD + 1)
    return lambda: load(BUILD)


# -- connections and pauses ----------------------------------------------------------------------------------------


def kill_clients(lab: Lab, chance: random.Random) -> Heal:
    """Of all nodes in turn, subscriptions too, until healed."""

    def kill() -> None:
        server = chance.choice(lab.servers)
        for kind in ("normal", "pubsub"):
            lab.command(server, "CLIENT", "KILL", "TYPE", kind)

    return Repeated(kill, lambda: chance.uniform(*_STORM_PAUSE_S)).stop


def pause_clients(lab: Lab, chance: random.Random) -> Heal:
    """A master answers no client, but its peers, again and again until healed: while it pauses for all it can't be told
    to go on."""
    server = chance.choice(lab.masters())
    mode = chance.choice(("ALL", "WRITE"))

    def pause() -> None:
        lab.command(server, "CLIENT", "PAUSE", chance.randrange(200, 2000), mode)

    pausing = Repeated(pause, lambda: chance.uniform(0.01, 0.3))

    def heal() -> None:
        pausing.stop()
        lab.insist(server, "CLIENT", "UNPAUSE")

    return heal


def needs_debug(lab: Lab) -> str | None:
    allowed = lab.setting(lab.cluster.processes[0], "enable-debug-command")
    return None if allowed in ("yes", "local") else "needs servers with `enable-debug-command local`"


def sleep_often(lab: Lab, chance: random.Random) -> Heal:
    """A master stops for a moment, shorter than its peers' patience, and again, until healed."""
    server = chance.choice(lab.masters())

    def sleep() -> None:
        lab.command(server, "DEBUG", "SLEEP", f"{chance.uniform(0.1, 1.2):.2f}")

    return Repeated(sleep, lambda: chance.uniform(0.05, 0.5)).stop


# -- memory, disks, clocks -----------------------------------------------------------------------------------------


def fill_memory(lab: Lab, chance: random.Random) -> Heal:
    """No room for appends; nor is there when workers have made some, so that it lasts until healed."""
    servers = one_or_all(lab, chance)
    for server in servers:
        lab.insist(server, "CONFIG", "SET", "maxmemory", 1)

    def heal() -> None:
        for server in servers:
            lab.insist(server, "CONFIG", "SET", "maxmemory", 0)

    return heal


def on_own_disk(lab: Lab) -> LocalServer | None:
    return next((server for server in lab.servers if machine.has_own_disk(server.folder)), None)


def needs_own_disk(lab: Lab) -> str | None:
    return None if on_own_disk(lab) else machine.why_no_disks() or "needs open_lab(small_disk=True)"


@in_turn
def fill_disk(lab: Lab, chance: random.Random) -> Heal:
    """In its turn: a node that can't write down who is master of what ends itself. Then its file lacks what it took
    last, so its replica has to take over before it is back (docs/guide/memory.md)."""
    server = on_own_disk(lab)
    assert server is not None
    if not lab.is_master(server):
        lab.fail_over(server)
    replica = _linked_replica(lab, server) if len(lab.cluster.processes) > lab.shares else None
    machine.fill_disk(server.folder)

    def heal() -> None:
        machine.empty_disk(server.folder)
        if not server.alive:
            if replica is not None:
                lab.wait_for_promotion(replica)
            server.restart()
        _rewrite_file(lab, server)

    return heal


def _linked_replica(lab: Lab, master: LocalServer) -> LocalServer:
    """Waits for it: who became master a moment ago may have none that is linked yet."""
    found: list[LocalServer] = []

    def linked() -> bool:
        found.extend(filter(None, [lab.replica_of(master)]))
        return bool(found)

    until(linked, f"a replica of {master.port}")
    return found[0]


def _rewrite_file(lab: Lab, server: LocalServer) -> None:
    """As docs/guide/memory.md says: a write that the full disk cut short leaves a file that can't be read again."""

    def is_new() -> bool:
        info = lab.info(server, "persistence")
        busy = {info.get("aof_rewrite_in_progress"), info.get("aof_rewrite_scheduled")}
        return busy == {"0"} and info.get("aof_last_bgrewrite_status") == "ok"

    until(lambda: lab.info(server, "persistence").get("aof_last_write_status") == "ok", "writes to the disk")
    lab.insist(server, "BGREWRITEAOF")
    until(is_new, "a new append-only file")


def with_clock(lab: Lab) -> list[LocalServer]:
    return [server for server in lab.cluster.processes if machine.has_own_clock(server.folder)]


def needs_own_clocks(lab: Lab) -> str | None:
    if with_clock(lab):
        return None
    binary = lab.cluster.server
    return (binary and machine.why_no_clocks(binary)) or "needs open_lab(clocks=True)"


@in_turn
def step_clock(lab: Lab, chance: random.Random) -> Heal:
    """A master's clock jumps, and back. In its turn: a node that jumps takes its peers for gone for a while."""
    server = chance.choice([server for server in with_clock(lab) if lab.is_master(server)])
    step_s = chance.choice(_CLOCK_STEPS_S)
    machine.set_clock(server.folder, step_s)
    until(lambda: abs(int(lab.insist(server, "TIME")[0]) - time.time() - step_s) < 1.5, "the clock to step")
    return lambda: machine.set_clock(server.folder, 0)


# -- everything ----------------------------------------------------------------------------------------------------


def needs_no_persistence(lab: Lab) -> str | None:
    kept = lab.setting(lab.cluster.processes[0], "appendonly") == "yes"
    return "loses what was stored: only for servers with `appendonly no`" if kept else None


@in_turn
def lose_data(lab: Lab, chance: random.Random) -> Heal:
    """A master comes back empty before its peers miss it, and its replica follows it."""
    server = chance.choice(lab.masters())
    server.restart()
    return _nothing


for fault in (
    Fault("functions-flushed", "FUNCTION FLUSH on one or all masters", flush_functions),
    Fault("functions-replaced", "a newer build of the functions on all masters, and back", deploy_functions),
    Fault("clients-killed", "CLIENT KILL of every connection, node by node, again and again", kill_clients),
    Fault("clients-paused", "CLIENT PAUSE on a master", pause_clients),
    Fault("node-slow", "DEBUG SLEEP on a master, again and again", sleep_often, needs_debug),
    Fault("memory-full", "maxmemory below what one or all masters use", fill_memory),
    Fault("disk-full", "no space left for a master's AOF", fill_disk, needs_own_disk),
    Fault("clock-stepped", "a master's clock jumps, and back", step_clock, needs_own_clocks),
    Fault(
        "data-lost",
        "a master without persistence restarts empty",
        lose_data,
        needs_no_persistence,
        frozenset({"leader", "replica", "fsync"}),
    ),
):
    register(fault)
