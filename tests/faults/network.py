"""Hosts of their own for the nodes of a cluster: network namespaces with veth pairs on a bridge, so that a node can be
cut off from its peers and still talk to clients, both ways or one. Linux with iproute2, and root. It never changes what
belongs to the machine's own network, and drops packets silently, as a network does: nobody is told.

Names carry the process id; what a process left behind that was killed is removed when the next network opens.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from shardq.errors import UsageError
from shardq.ops.local_cluster import LocalCluster, LocalServer

_NAME = re.compile(r"^(sq(\d+)n\d+)(?:h\d+|b)?$")
_NOBODY = "02:00:00:00:00:01"  # no host has this address: what is sent there goes nowhere
_SUBNETS, _MOST_HOSTS = 512, 200
_count = itertools.count()


def why_no_network() -> str | None:
    """Why hosts of their own can't be had here; None when they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "the command `ip` is missing: install iproute2"
    try:
        with open_network() as network:
            network.add_host()
    except UsageError as error:
        return str(error)
    return None


@dataclass(frozen=True, slots=True)
class Host:
    """`namespace` is empty for the machine itself, where clients are."""

    namespace: str
    address: str
    device: str

    @property
    def enter(self) -> tuple[str, ...]:
        """A command that becomes, on this host, the command behind it."""
        return ("ip", "netns", "exec", self.namespace) if self.namespace else ()

    def ip(self, *args: str) -> str:
        return _ip(*(("-n", self.namespace) if self.namespace else ()), *args)


class Network:
    """One bridge. `machine` is how its hosts reach this machine, and this machine them."""

    def __init__(self, subnet: str) -> None:
        self._name = f"sq{os.getpid()}n{next(_count)}"
        self._subnet = subnet
        self.machine = Host("", f"{subnet}.1", f"{self._name}b")
        self.hosts: list[Host] = []
        self._silenced: set[tuple[Host, Host]] = set()

    def open(self) -> None:
        bridge = self.machine.device
        _ip("link", "add", bridge, "type", "bridge")
        _ip("addr", "add", f"{self.machine.address}/24", "dev", bridge)
        _ip("link", "set", bridge, "up")

    def close(self) -> None:
        remove(self._name)
        self.hosts = []

    def add_host(self) -> Host:
        number = len(self.hosts)
        assert number < _MOST_HOSTS, "a network has no more addresses"
        name = f"{self._name}h{number}"
        host = Host(name, f"{self._subnet}.{number + 2}", "eth0")
        _ip("netns", "add", name)
        _ip("link", "add", name, "type", "veth", "peer", "name", host.device, "netns", name)
        _ip("link", "set", name, "master", self.machine.device, "up")
        host.ip("link", "set", "lo", "up")
        host.ip("addr", "add", f"{host.address}/24", "dev", host.device)
        host.ip("link", "set", host.device, "up")
        self.hosts.append(host)
        return host

    def silence(self, senders: Iterable[Host], receivers: Iterable[Host]) -> None:
        """From now on what any of `senders` sends to any of `receivers` gets lost; the other way nothing changes."""
        for sender, receiver in itertools.product(senders, receivers):
            assert sender != receiver, "a host always hears itself"
            sender.ip("neigh", "replace", receiver.address, "lladdr", _NOBODY, "dev", sender.device, "nud", "permanent")
            self._silenced.add((sender, receiver))

    def cut(self, ones: Iterable[Host], others: Iterable[Host]) -> None:
        """Both ways."""
        ones, others = list(ones), list(others)
        self.silence(ones, others)
        self.silence(others, ones)

    def mend(self) -> None:
        """Everybody hears everybody again. Safe to repeat."""
        for sender, receiver in list(self._silenced):
            sender.ip("neigh", "del", receiver.address, "dev", sender.device)
            self._silenced.remove((sender, receiver))

    def slow(self, host: Host, kbit_per_s: int) -> None:
        """From now on the host sends no faster than this; `quicken` ends it."""
        shape = ("tbf", "rate", f"{kbit_per_s}kbit", "burst", "4kb", "latency", "2s")
        _run("tc", "-n", host.namespace, "qdisc", "replace", "dev", host.device, "root", *shape)

    def quicken(self, host: Host) -> None:
        _run("tc", "-n", host.namespace, "qdisc", "del", "dev", host.device, "root")


@contextmanager
def open_network() -> Iterator[Network]:
    """Raises UsageError when this machine does not allow it."""
    remove_stale()
    network = Network(_free_subnet())
    try:
        network.open()
        yield network
    finally:
        network.close()


class NetworkCluster(LocalCluster):
    """A LocalCluster whose every node is a host of its own in `network`."""

    def __init__(
        self,
        network: Network,
        masters: int = 3,
        replicas: int = 1,
        server: Path | None = None,
        data_dir: Path | None = None,
        settings: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        # Without a password a server is closed to all but its own machine, unless it is told that this is meant.
        super().__init__(masters, replicas, None, server, data_dir, settings={"protected-mode": "no", **settings})
        self.network = network
        self.hosts: dict[int, Host] = {}

    def new_server(self, port: int) -> LocalServer:
        assert self.server is not None
        assert self.data_dir is not None
        if port not in self.hosts:
            self.hosts[port] = self.network.add_host()
        host = self.hosts[port]
        settings = {**self._settings, "bind": host.address}
        folder = self.data_dir / str(port)
        return LocalServer(self.server, port, folder, "", settings, host=host.address, launcher=host.enter)

    def host_of(self, server: LocalServer) -> Host:
        return self.hosts[server.port]

    def hosts_but(self, server: LocalServer) -> list[Host]:
        """The hosts of all other nodes."""
        return [host for port, host in self.hosts.items() if port != server.port]


# -- what is there ---------------------------------------------------------------------------------------------------


def remove_stale() -> None:
    """Removes what processes that are gone have left."""
    for name, pid in _names():
        if not Path(f"/proc/{pid}").exists():
            remove(name)


def remove(network: str) -> None:
    """The namespaces and devices of one network, by the beginning of their names."""
    for name in _namespaces():
        if name.startswith(f"{network}h"):
            _ip("netns", "del", name)
    # A veth goes with its namespace, but that ends in the background, and later still while a process lives in it.
    for name in _devices():
        if name.startswith(f"{network}h") or name == f"{network}b":
            subprocess.run(["ip", "link", "del", name], capture_output=True, check=False)


def _names() -> set[tuple[str, str]]:
    """Networks and the processes that opened them."""
    found = (_NAME.match(name) for name in (*_namespaces(), *_devices()))
    return {(match[1], match[2]) for match in found if match}


def _namespaces() -> list[str]:
    return [line.split()[0] for line in _ip("netns", "list").splitlines() if line.strip()]


def _devices() -> list[str]:
    return [line.split()[1].rstrip(":").partition("@")[0] for line in _ip("-o", "link").splitlines()]


def _free_subnet() -> str:
    """One of 198.18.0.0/15, which is set aside for tests."""
    taken = _ip("-o", "-4", "addr")
    for number in range(os.getpid(), os.getpid() + _SUBNETS):
        subnet = f"198.{18 + number // 256 % 2}.{number % 256}"
        if f" {subnet}." not in taken:
            return subnet
    raise UsageError("Every subnet of 198.18.0.0/15 is in use on this machine: remove some interfaces.")


def _ip(*args: str) -> str:
    return _run("ip", *args)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise UsageError(f"`{' '.join(command)}` failed: {done.stderr.strip()}; it needs root and its kernel module.")
    return done.stdout
