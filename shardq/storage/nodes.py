"""Commands to single nodes, synchronously: for the local cluster, for operators' checks and for tests.

It never follows a redirect, keeps no connection, and carries no message of a queue: whoever calls it names the node and
means that node. Queues go through the cluster connection instead.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from random import randrange
from typing import Any

from redis import Connection, SSLConnection
from redis import exceptions as redis_errors

from shardq.errors import AuthenticationFailed, StoreError, StoreRefused, StoreTimeout, StoreUnavailable
from shardq.storage.reply import shape
from shardq.storage.trouble import NO_REPLY

SLOT_COUNT = 16384
PORTS = range(10300, 22700)
"""That nodes are given: with their bus ports below 32768, from where on Linux gives ports to outgoing connections."""
Address = tuple[str, int]  # host, port
_MEET_WITHIN_S, _POLL_S = 20.0, 0.05

# Redis quotes a command's arguments, which may be a user's data, after this phrase.
_ARGUMENTS_FOLLOW = ", with args beginning with"
_LONGEST_SERVER_TEXT = 200


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files of nodes that speak TLS: who signed their certificates, and what they and their clients show."""

    authority: Path
    certificate: Path
    key: Path

    def of_client(self) -> dict[str, str]:
        """As redis-py's options, and in a URL."""
        return {
            "ssl_ca_certs": str(self.authority),
            "ssl_certfile": str(self.certificate),
            "ssl_keyfile": str(self.key),
        }

    def of_server(self, port: int) -> dict[str, str]:
        """As a node's settings; it listens on `port` for TLS alone."""
        files = {"tls-ca-cert-file": self.authority, "tls-cert-file": self.certificate, "tls-key-file": self.key}
        settings = {name: f'"{path.absolute()}"' for name, path in files.items()}
        everywhere = {"tls-cluster": "yes", "tls-replication": "yes", "tls-auth-clients": "optional"}
        return {"port": "0", "tls-port": str(port), **settings, **everywhere}


def node_command(
    host: str,
    port: int,
    *args: str | bytes | int,
    password: str | None = None,
    tls: TlsFiles | None = None,
    timeout_s: float = 5.0,
) -> Any:
    """Send one command to one node and return its raw reply (RESP2, text decoded); a shardq error when that fails.

    `timeout_s` limits connecting and each wait for bytes of the reply.
    """
    files: dict[str, Any] = {} if tls is None else tls.of_client()
    connection = (Connection if tls is None else SSLConnection)(
        host=host,
        port=port,
        password=password,
        socket_timeout=timeout_s,
        socket_connect_timeout=timeout_s,
        protocol=2,  # raw replies of one shape for every server kind
        decode_responses=True,
        encoding_errors="backslashreplace",
        driver_info=None,  # no CLIENT SETINFO round trip for one command
        **files,
    )
    try:
        connection.connect()
        connection.send_command(*args)
        return connection.read_response()
    except redis_errors.RedisError as error:
        raise _translated(error, str(args[0]), f"{host}:{port}", timeout_s) from error
    except NO_REPLY as error:
        raise StoreRefused(f"{host}:{port} answered {args[0]!s} with what is no reply of Redis: is it one?") from error
    finally:
        connection.disconnect()


def node_info(
    host: str,
    port: int,
    section: str,
    *,
    password: str | None = None,
    tls: TlsFiles | None = None,
    timeout_s: float = 5.0,
) -> dict[str, str]:
    """The fields of one section of INFO, or of CLUSTER INFO when the section is "cluster"."""
    command = ("CLUSTER", "INFO") if section == "cluster" else ("INFO", section)
    text = str(node_command(host, port, *command, password=password, tls=tls, timeout_s=timeout_s))
    pairs = (line.split(":", 1) for line in text.splitlines() if ":" in line)
    return dict(pairs)


def node_slot_map(
    host: str, port: int, *, password: str | None = None, tls: TlsFiles | None = None
) -> dict[tuple[int, int], tuple[str, ...]]:
    """Who serves which slots as this node sees it: (first, last) -> node ids, the master first, replicas sorted."""
    rows = node_command(host, port, "CLUSTER", "SLOTS", password=password, tls=tls)
    slot_map: dict[tuple[int, int], tuple[str, ...]] = {}
    with shape("CLUSTER SLOTS"):
        for first, last, master, *replicas in rows:
            slot_map[int(first), int(last)] = (str(master[2]), *sorted(str(replica[2]) for replica in replicas))
    return slot_map


def bus_port(port: int) -> int:
    """The port for node-to-node traffic beside this one: 10,000 above as usual, or below where that leaves 65,535."""
    return port + 10000 if port <= 55535 else port - 10000


def is_port_free(host: str, port: int) -> bool:
    """Whether a node could listen here now, on this port and on its bus port."""
    for wanted in (port, bus_port(port)):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # its old connections in TIME_WAIT don't matter
            try:
                probe.bind((host, wanted))
            except OSError:
                return False
    return True


def free_ports(host: str, count: int) -> list[int]:
    """Consecutive ports that nodes could listen on now; another program may still take one before they do."""
    while True:
        first = randrange(PORTS.start, PORTS.stop - count)
        ports = list(range(first, first + count))
        if all(is_port_free(host, port) for port in ports):
            return ports


def form_cluster(
    nodes: Sequence[Address], masters: int, *, password: str | None = None, tls: TlsFiles | None = None
) -> None:
    """Ask empty nodes to be one cluster: the first `masters` get even slot ranges, the others replicate them in turn.

    Returns when all was asked for, which is before all of them know: poll `cluster_fault`.
    """
    for index, (host, port) in enumerate(nodes):
        # Nodes that meet with equal epochs argue over them one gossip round at a time; told apart, they need not.
        node_command(host, port, "CLUSTER", "SET-CONFIG-EPOCH", index + 1, password=password, tls=tls)
        if index < masters:
            first, end = SLOT_COUNT * index // masters, SLOT_COUNT * (index + 1) // masters
            node_command(host, port, "CLUSTER", "ADDSLOTSRANGE", first, end - 1, password=password, tls=tls)
    for one, (host, port) in combinations(nodes, 2):  # all pairs: gossip alone would take seconds to introduce them
        node_command(*one, "CLUSTER", "MEET", host, port, bus_port(port), password=password, tls=tls)
    for index, (host, port) in enumerate(nodes[masters:]):
        master_id = node_command(*nodes[index % masters], "CLUSTER", "MYID", password=password, tls=tls)
        _replicate(host, port, master_id, password, tls)


def _replicate(host: str, port: int, master_id: str, password: str | None, tls: TlsFiles | None) -> None:
    deadline = time.monotonic() + _MEET_WITHIN_S
    while True:
        try:
            node_command(host, port, "CLUSTER", "REPLICATE", master_id, password=password, tls=tls)
            return
        except StoreRefused:  # "Unknown node", until the handshake with its master is through
            if time.monotonic() > deadline:
                raise
        time.sleep(_POLL_S)


def cluster_fault(
    nodes: Sequence[Address], masters: int, *, password: str | None = None, tls: TlsFiles | None = None
) -> str:
    """What keeps these nodes from being one whole cluster with that many masters, in words; empty when nothing does."""
    views = set()
    online_replicas = 0
    for host, port in nodes:
        try:
            cluster = node_info(host, port, "cluster", password=password, tls=tls)
            link = node_info(host, port, "replication", password=password, tls=tls)
            views.add(frozenset(node_slot_map(host, port, password=password, tls=tls).items()))
        except StoreError as error:
            return str(error)
        if cluster["cluster_state"] != "ok" or cluster["cluster_slots_ok"] != str(SLOT_COUNT):
            return f"{host}:{port} says cluster_state:{cluster['cluster_state']}"
        if link["role"] == "slave" and link["master_link_status"] != "up":
            return f"{host}:{port} is a replica without a link to its master"
        # The master's word too: only from its "online" on does WAIT count the replica.
        online_replicas += sum("state=online" in text for name, text in link.items() if name.startswith("slave"))
    view, *others = views
    served_by = {node_ids for _, node_ids in view}
    if others or len({node for node_ids in served_by for node in node_ids}) != len(nodes):
        return "the nodes do not agree yet who serves which slots"
    if len(served_by) != masters or online_replicas != len(nodes) - masters:
        wanted = f"{masters} masters with {len(nodes) - masters}"
        return f"{len(served_by)} masters with {online_replicas} replicas online serve the slots, not {wanted}"
    return ""


def _translated(error: redis_errors.RedisError, command: str, address: str, timeout_s: float) -> StoreError:
    said = str(error).split(_ARGUMENTS_FOLLOW)[0][:_LONGEST_SERVER_TEXT]
    if isinstance(error, redis_errors.AuthenticationError | redis_errors.AuthenticationWrongNumberOfArgsError):
        return AuthenticationFailed(f"{address} refused the password ({said}); check the user name and password.")
    if isinstance(error, redis_errors.TimeoutError):
        return StoreTimeout(
            f"{address} did not answer {command} within {timeout_s:g} s; check that the server runs and is not stalled."
        )
    if isinstance(error, redis_errors.ConnectionError):  # LOADING included: waiting helps
        return StoreUnavailable(
            f"{address} can't serve {command} ({said}); check that the server is up, then try again."
        )
    return StoreRefused(f"{address} refused {command}: {said}. Check the command and this user's permissions.")
