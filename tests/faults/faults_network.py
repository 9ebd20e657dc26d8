"""Faults of the network between nodes and clients: a master cut off from its peers, both ways or one, from clients, and
a node on a slow line. Each needs a lab whose nodes have hosts of their own (`open_lab(network=True)`).
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Sequence

from shardq.ops.local_cluster import LocalServer
from tests.faults.faults import Fault, Heal, register
from tests.faults.faults_cluster import UNREPLICATED, in_turn, needs_replicas
from tests.faults.lab import Lab, until
from tests.faults.network import Host, NetworkCluster

_SLOW_KBIT_PER_S = 512
_BEHIND_S = 0.5  # less than the nodes take to call one another failed

Loss = Callable[[NetworkCluster, Host, list[Host]], None]


def network_of(lab: Lab) -> NetworkCluster:
    assert isinstance(lab.cluster, NetworkCluster), "this fault needs hosts of their own for the nodes"
    return lab.cluster


def needs_network(lab: Lab) -> str | None:
    return None if isinstance(lab.cluster, NetworkCluster) else "the nodes have no hosts of their own (needs root)"


def needs_network_and_replicas(lab: Lab) -> str | None:
    return needs_network(lab) or needs_replicas(lab)


def cut_from_peers(lab: Lab, master: LocalServer, loss: Loss | None = None) -> Heal:
    """Clients still reach it, and all others. Returns at once; what was cut is whole again after the heal."""
    cluster = network_of(lab)
    (loss or both_ways)(cluster, cluster.host_of(master), cluster.hosts_but(master))
    return cluster.network.mend


def replicas_of(lab: Lab, master: LocalServer) -> list[LocalServer]:
    wanted = str(master.port)
    return [server for server in lab.servers if lab.info(server, "replication").get("master_port") == wanted]


def wait_for_one_of(lab: Lab, replicas: Sequence[LocalServer]) -> None:
    until(lambda: any(map(lab.is_master, replicas)), "a replica to be promoted")


def both_ways(cluster: NetworkCluster, one: Host, others: Iterable[Host]) -> None:
    cluster.network.cut([one], others)


def unheard(cluster: NetworkCluster, one: Host, others: Iterable[Host]) -> None:
    cluster.network.silence([one], others)


def deaf(cluster: NetworkCluster, one: Host, others: Iterable[Host]) -> None:
    cluster.network.silence(others, [one])


def _a_master(loss: Loss) -> Callable[[Lab, random.Random], Heal]:
    """A replica of its takes over while it goes on serving whoever reaches it."""

    @in_turn
    def strike(lab: Lab, chance: random.Random) -> Heal:
        master, _ = chance.choice(lab.pairs())
        replicas = replicas_of(lab, master)
        mend = cut_from_peers(lab, master, loss)
        try:
            wait_for_one_of(lab, replicas)
        except BaseException:
            mend()
            raise
        return mend

    return strike


@in_turn
def cut_off_with_replica(lab: Lab, chance: random.Random) -> Heal:
    """The replica that answers WAIT is then not the one that is promoted."""
    cluster = network_of(lab)
    master, replica = chance.choice(lab.pairs())
    (other,) = [server for server in replicas_of(lab, master) if server is not replica][:1]
    minority = [cluster.host_of(master), cluster.host_of(replica)]
    cluster.network.cut(minority, [host for host in cluster.hosts.values() if host not in minority])
    try:
        lab.wait_for_promotion(other)
    except BaseException:
        cluster.network.mend()
        raise
    return cluster.network.mend


def needs_two_replicas(lab: Lab) -> str | None:
    if why := needs_network(lab):
        return why
    enough = all(len(replicas_of(lab, master)) >= 2 for master in lab.masters())
    return None if enough else "needs two replicas for each master"


@in_turn
def kill_with_replica_behind(lab: Lab, chance: random.Random) -> Heal:
    """SIGKILL alone, on one machine, loses nothing: what was written still leaves the sockets' buffers."""
    cluster = network_of(lab)
    master, _ = chance.choice(lab.pairs())
    replicas = replicas_of(lab, master)
    cluster.network.silence([cluster.host_of(master)], map(cluster.host_of, replicas))
    try:
        time.sleep(_BEHIND_S)
        master.kill()
        wait_for_one_of(lab, replicas)  # till then nothing is mended: the kernel still sends what the dead had written
    finally:
        cluster.network.mend()
    return master.restart


@in_turn
def restart_master(lab: Lab, chance: random.Random) -> Heal:
    """SIGKILL, and back with its append-only file before anybody misses it."""
    master = chance.choice(lab.masters())
    master.restart()
    return lambda: None


@in_turn
def cut_off_replica(lab: Lab, chance: random.Random) -> Heal:
    _, replica = chance.choice(lab.pairs())
    return cut_from_peers(lab, replica)


@in_turn
def cut_off_clients(lab: Lab, chance: random.Random) -> Heal:
    """Clients' connections stay open and are silent; the cluster notices nothing."""
    cluster = network_of(lab)
    cluster.network.cut([cluster.network.machine], [cluster.host_of(chance.choice(lab.masters()))])
    return cluster.network.mend


@in_turn
def slow_line(lab: Lab, chance: random.Random) -> Heal:
    cluster = network_of(lab)
    host = cluster.host_of(chance.choice(lab.masters()))
    cluster.network.slow(host, _SLOW_KBIT_PER_S)
    return lambda: cluster.network.quicken(host)


_NO_LOSS: frozenset[str] = frozenset()

for _fault in (
    Fault(
        "master-cut-off",
        "a master and its peers lose one another; clients reach both sides",
        _a_master(both_ways),
        needs_network_and_replicas,
        UNREPLICATED,
    ),
    Fault(
        "master-unheard",
        "what a master sends to its peers gets lost",
        _a_master(unheard),
        needs_network_and_replicas,
        UNREPLICATED,
    ),
    Fault(
        "master-deaf",
        "what its peers send to a master gets lost",
        _a_master(deaf),
        needs_network_and_replicas,
        UNREPLICATED,
    ),
    Fault(
        "master-cut-off-with-replica",
        "a master and one of two replicas are cut off; the other replica takes over",
        cut_off_with_replica,
        needs_two_replicas,
        frozenset({"leader", "replica", "fsync"}),
    ),
    Fault(
        "master-killed-behind",
        f"SIGKILL of a master {_BEHIND_S:g} s after its replica stopped hearing it; the replica takes over",
        kill_with_replica_behind,
        needs_network_and_replicas,
        UNREPLICATED,
    ),
    Fault(
        "replica-cut-off",
        "a replica and its peers lose one another",
        cut_off_replica,
        needs_network_and_replicas,
        _NO_LOSS,
    ),
    Fault("master-restarted", "SIGKILL of a master; it is back at once with its file", restart_master),
    Fault("clients-cut-off", "clients and a master lose one another", cut_off_clients, needs_network, _NO_LOSS),
    Fault("line-slow", f"a master's line carries {_SLOW_KBIT_PER_S} kbit/s", slow_line, needs_network, _NO_LOSS),
):
    register(_fault)
