"""The cluster of one run, and what faults ask of it: who is master of what, who replicates whom, whether it is whole.
Starts no client process and judges nothing.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from shardq.core.slots import key_slot
from shardq.errors import StoreError
from shardq.ops.local_cluster import LocalCluster, LocalServer, find_server
from shardq.storage.nodes import cluster_fault, node_command, node_info
from tests.faults import machine
from tests.faults.network import NetworkCluster, open_network

if TYPE_CHECKING:
    from tests.faults.crowd import Crowd

WHOLE_WITHIN_S, _ANSWER_WITHIN_S, _POLL_S = 60.0, 2.0, 0.05
_FAILOVER_GIVEN_UP_S = 6.0  # by the server itself after five, without a word


def until(condition: Callable[[], bool], what: str, within_s: float = 30.0) -> None:
    """Polls until the condition holds; AssertionError at the deadline."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {within_s:g} s for {what}"
        time.sleep(_POLL_S)


@dataclass
class Lab:
    """
    crowd     there while client processes run
    added     masters that joined the cluster later and have not left it
    shares    masters that the slots are shared among, but for `added`
    turn      held by a fault that changes who is master of what, from its strike to the end of its heal
    """

    cluster: LocalCluster
    crowd: Crowd | None = field(default=None)
    added: list[LocalServer] = field(default_factory=list)
    shares: int = 3
    turn: threading.Lock = field(default_factory=threading.Lock)

    @property
    def url(self) -> str:
        return self.cluster.url

    @property
    def servers(self) -> list[LocalServer]:
        return [*self.cluster.processes, *self.added]

    def command(self, server: LocalServer, *args: str | bytes | int, timeout_s: float = 5.0) -> Any:
        """One command to one node; raises StoreError when that fails."""
        return node_command(server.host, server.port, *args, timeout_s=timeout_s)

    def insist(self, server: LocalServer, *args: str | bytes | int, within_s: float = 30.0) -> Any:
        """The same, tried again until the node takes it."""
        deadline = time.monotonic() + within_s
        while True:
            try:
                return self.command(server, *args)
            except StoreError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(_POLL_S)

    def insist_while_master(self, server: LocalServer, *args: str | bytes | int) -> None:
        """The same for what a replica refuses: another fault may have made one of the node meanwhile."""
        deadline = time.monotonic() + 30.0
        while self.info(server, "replication").get("role") != "slave":
            try:
                self.command(server, *args)
            except StoreError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(_POLL_S)
            else:
                return

    def info(self, server: LocalServer, section: str) -> dict[str, str]:
        """One section of a node's INFO; empty when it does not answer."""
        if not server.alive:
            return {}
        try:
            return node_info(server.host, server.port, section, timeout_s=_ANSWER_WITHIN_S)
        except StoreError:
            return {}

    def setting(self, server: LocalServer, name: str) -> str:
        """What CONFIG GET says; empty for a setting that this server does not know."""
        found = self.command(server, "CONFIG", "GET", name)
        return str(found[1]) if found else ""

    def is_master(self, server: LocalServer) -> bool:
        return self.info(server, "replication").get("role") == "master"

    def masters(self) -> list[LocalServer]:
        """The servers that answer and call themselves master, owning slots or not."""
        return [server for server in self.servers if self.is_master(server)]

    def replica_of(self, master: LocalServer) -> LocalServer | None:
        """The first replica that has its link to the master."""
        for server in self.servers:
            link = self.info(server, "replication")
            if link.get("master_port") == str(master.port) and link.get("master_link_status") == "up":
                return server
        return None

    def pairs(self) -> list[tuple[LocalServer, LocalServer]]:
        """Each master that has a replica, with it."""
        found = [(master, self.replica_of(master)) for master in self.masters()]
        return [(master, replica) for master, replica in found if replica is not None]

    def wait_for_promotion(self, replica: LocalServer) -> None:
        until(lambda: self.is_master(replica), f"{replica.port} to be promoted")

    def fail_over(self, replica: LocalServer, *how: str) -> None:
        """Returns when the replica is master. Asked for again: one that hears too little of the others gives up."""
        again_at = 0.0

        def promoted() -> bool:
            nonlocal again_at
            if self.is_master(replica):
                return True
            if time.monotonic() >= again_at:
                with suppress(StoreError):  # not linked yet, or master by now
                    self.command(replica, "CLUSTER", "FAILOVER", *how)
                    again_at = time.monotonic() + _FAILOVER_GIVEN_UP_S
            return False

        until(promoted, f"{replica.port} to be promoted", WHOLE_WITHIN_S)

    def node_id(self, server: LocalServer) -> str:
        return str(self.insist(server, "CLUSTER", "MYID"))

    def used_slots(self, server: LocalServer) -> list[int]:
        """The slots that a node has keys in, in order."""
        keys = self.command(server, "SCAN", 0, "COUNT", 1_000_000)[1]
        return sorted({key_slot(key.encode()) for key in keys})

    def kill_added(self) -> None:
        for server in self.added:
            server.kill()

    def fault(self) -> str:
        """What keeps the servers from being one whole cluster, in words; empty when nothing does."""
        for server in self.servers:
            if not server.alive:
                return f"{server.port} is down"
        return cluster_fault([(server.host, server.port) for server in self.servers], self.shares + len(self.added))

    def wait_until_whole(self, within_s: float = WHOLE_WITHIN_S) -> None:
        """Returns when every node serves, all agree who has which slots, and every replica is linked."""
        deadline = time.monotonic() + within_s
        while fault := self.fault():
            assert time.monotonic() < deadline, f"waited {within_s:g} s for a whole cluster: {fault}"
            time.sleep(_POLL_S)


@contextmanager
def open_lab(
    server: Path | None = None,
    *,
    masters: int = 3,
    replicas: int = 1,
    clocks: bool = False,
    small_disk: bool = False,
    network: bool = False,
    settings: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[Lab]:
    """A cluster of its own that every fault can be done to, with data in a folder that goes with it.

    clocks      the nodes' clocks can be set (`machine.set_clock`); UsageError where they can't
    small_disk  the first node's data lies on a disk of its own that can be filled (`machine.fill_disk`)
    network     each node has a host of its own (`network.Network`); UsageError where that can't be
    """
    binary = server or find_server(None)
    with ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="shardq-faults-"))
        stack.callback(shutil.rmtree, folder)
        if clocks:
            binary = machine.with_own_clock(binary, folder / "server")
        wanted = {"enable-debug-command": "yes" if network else "local", **settings}
        cluster = (
            NetworkCluster(stack.enter_context(open_network()), masters, replicas, binary, folder / "data", wanted)
            if network
            else LocalCluster(masters, replicas, None, binary, folder / "data", settings=wanted)
        )
        stack.enter_context(machine.own_disks())
        lab = Lab(stack.enter_context(cluster), shares=masters)
        stack.callback(lab.kill_added)
        if small_disk:
            first = cluster.processes[0]
            first.kill()
            machine.move_to_own_disk(first.folder)
            first.restart()
            lab.wait_until_whole()
        yield lab
