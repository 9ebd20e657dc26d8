"""The network of the lab, and each of its faults under traffic. One server kind each: they differ in how they elect and
replicate, not in how packets get lost.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio
import pytest

from shardq.core.slots import key_slot
from shardq.ops.local_cluster import LocalCluster, LocalServer
from tests.faults import network as net
from tests.faults.faults import FAULTS
from tests.faults.faults_network import network_of
from tests.faults.lab import Lab, open_lab
from tests.faults.lab import until as until_sync
from tests.faults.network import Host, Network, open_network, why_no_network
from tests.faults.slots import owned_slots
from tests.faults.survival import KEYS, Survival, survival
from tests.runtime.harness import GROUP, ROOT, owners, until

pytestmark = pytest.mark.anyio

# Says what it hears, and says it back to where it came from.
_ECHO = """
import socket, sys
ear = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
ear.bind((sys.argv[1], 7))
print("ready", flush=True)
while True:
    said, who = ear.recvfrom(99)
    print(said.decode(), flush=True)
    ear.sendto(said, who)
"""


@pytest.fixture(scope="module")
def needs_network() -> None:
    if why := why_no_network():
        if os.environ.get("CI") == "true":
            pytest.fail(why)
        pytest.skip(why)


@pytest.fixture(scope="module")
def lab(needs_network: None, server_binary: Path) -> Iterator[Lab]:
    """Three masters with a replica each, every node on a host of its own."""
    with open_lab(server_binary, network=True, settings={"cluster-allow-reads-when-down": "yes"}) as made:
        yield made


@contextmanager
def echo(host: Host) -> Iterator[subprocess.Popen[str]]:
    command = [*host.enter, sys.executable, "-c", _ECHO, host.address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert _line(process) == "ready"
            yield process
        finally:
            process.kill()


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


async def test_packets_get_lost_one_way_or_both(needs_network: None) -> None:
    with open_network() as network:
        host = network.add_host()
        with echo(host) as process:
            async with await anyio.create_connected_udp_socket(host.address, 7) as mouth:
                network.silence([network.machine], [host])
                await mouth.send(b"lost on its way")
                network.mend()
                await mouth.send(b"heard")
                with anyio.fail_after(10):
                    assert _line(process) == "heard"
                    assert await mouth.receive() == b"heard"
                network.silence([host], [network.machine])
                await mouth.send(b"heard, its echo lost")
                assert _line(process) == "heard, its echo lost"
                network.mend()
                await mouth.send(b"both")
                with anyio.fail_after(10):
                    assert await mouth.receive() == b"both"


def names() -> list[str]:
    return [name for name in (*net._namespaces(), *net._devices()) if name.startswith("sq")]


def test_what_a_killed_process_left_is_removed_and_nothing_else(needs_network: None) -> None:
    code = (
        "import os, signal\nfrom tests.faults.network import open_network\n"
        "with open_network() as network:\n    network.add_host()\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    with open_network() as own:
        own.add_host()
        kept = {own.machine.device, *(host.namespace for host in own.hosts)}
        assert kept <= set(names())
        died = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)
        assert died.returncode == -signal.SIGKILL
        assert _dead_names()
        with open_network() as second:
            until_sync(lambda: not _dead_names(), "what is stale to be gone")
            assert second.machine.address != own.machine.address
        assert kept <= set(names())
    until_sync(lambda: not kept & set(names()), "the own network to be gone")


def _dead_names() -> list[str]:
    """Of networks whose process is gone. Others may run networks of theirs meanwhile."""
    return [name for name, pid in net._names() if not Path(f"/proc/{pid}").exists()]


def test_where_there_is_no_network_it_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(os, "geteuid", lambda: 1000)
        assert "root" in str(why_no_network())
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("PATH", "/nowhere")
    assert "iproute2" in str(why_no_network())


@pytest.mark.server_kinds("redis7")
def test_faults_of_the_network_need_one(lab: Lab) -> None:
    bare = Lab(LocalCluster())
    for name in ("master-cut-off", "master-unheard", "master-deaf", "clients-cut-off", "line-slow"):
        assert FAULTS[name].needs(lab) is None
        assert "root" in str(FAULTS[name].needs(bare))


# Redis 7.0 knows least of a failover; in Valkey the election and replication are its own.
@pytest.mark.server_kinds("redis7")
@pytest.mark.parametrize("name", ["master-cut-off", "line-slow"])
async def test_the_oldest_server(name: str, lab: Lab, queue_name: str, tmp_path: Path) -> None:
    async with survival(lab, queue_name, tmp_path) as running:
        await running.under(name, running.flows)


@pytest.mark.server_kinds("valkey9")
@pytest.mark.parametrize("name", ["master-deaf", "master-unheard"])
async def test_one_way(name: str, lab: Lab, queue_name: str, tmp_path: Path) -> None:
    async with survival(lab, queue_name, tmp_path) as running:
        await running.under(name, running.flows)


# What waits here is shardq's own code.
@pytest.mark.server_kinds("redis7")
@pytest.mark.parametrize("name", ["clients-cut-off", "replica-cut-off"])
async def test_sends_wait(name: str, lab: Lab, queue_name: str, tmp_path: Path) -> None:
    async with survival(lab, queue_name, tmp_path) as running:
        await running.under(name, running.sends_wait)


# -- a worker on the side of the old master -------------------------------------------------------------------------


def effects_on(lab: Lab, running: Survival, server: LocalServer, slots: set[int]) -> int:
    """How many effects a node itself holds, in its memory, for slots that were its own."""
    keys = (f"key-{key}" for key in range(KEYS))
    lists = [running.queue.local_key(f"done:{GROUP}:{key}", key) for key in keys]
    return sum(lab.insist(server, "LLEN", name) for name in lists if key_slot(name.encode()) in slots)


def cut_off_with(network: Network, minority: list[Host]) -> None:
    """Between the two sides nothing gets through. This machine, where the producer and the other worker are, reaches
    both, so that what is sent to the old master arrives there too."""
    network.cut(minority, [host for host in network.hosts if host not in minority])


@pytest.mark.server_kinds("redis8")
async def test_effects_made_beside_an_old_master_do_not_survive(lab: Lab, queue_name: str, tmp_path: Path) -> None:
    """A worker that sees the old master only goes on, and what it does there is gone with what that master had; the
    same messages are handled by the other side. In the end each has its effects once, in order by key."""
    cluster = network_of(lab)
    await anyio.to_thread.run_sync(lab.wait_until_whole)
    async with survival(lab, queue_name, tmp_path, crew=0) as running:
        home = cluster.network.add_host()
        running.start(launcher=home.enter)
        await running.flows()

        async def has_all() -> bool:
            return len(await owners(running.queue)) == len(running.queue.shards)

        await until(has_all, 20, "the worker to own every shard")
        master, replica = lab.pairs()[0]
        slots = owned_slots(lab, master)
        cut_off_with(cluster.network, [home, cluster.host_of(master)])
        try:
            before = effects_on(lab, running, master, slots)
            running.start()
            await anyio.to_thread.run_sync(lab.wait_for_promotion, replica)
            await running.flows()  # on the other side, all shards
            beside = effects_on(lab, running, master, slots)
        finally:
            cluster.network.mend()
        assert beside > before, "the worker beside the old master made effects there"
        await anyio.to_thread.run_sync(lab.wait_until_whole)
        await running.flows()
