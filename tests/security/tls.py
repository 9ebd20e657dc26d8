"""A cluster that speaks TLS only and asks everybody for a certificate: clients, replicas and the bus."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import redis
import trustme

from shardq.storage.nodes import SLOT_COUNT, bus_port, free_ports

HOST = "127.0.0.1"
MASTERS = 3
READY_WITHIN_S = 40


@dataclass(frozen=True)
class Files:
    """What one side shows and trusts."""

    authority: Path
    certificate: Path
    key: Path

    def query(self) -> str:
        files = {"ssl_ca_certs": self.authority, "ssl_certfile": self.certificate, "ssl_keyfile": self.key}
        return urlencode(files)


def make_files(folder: Path, name: str, authority: trustme.CA, *hosts: str) -> Files:
    """A certificate for these hosts, and the authority that it is to be checked against."""
    certificate = authority.issue_cert(*hosts)
    found = Files(folder / f"{name}-ca.pem", folder / f"{name}.pem", folder / f"{name}.key")
    authority.cert_pem.write_to_path(str(found.authority))
    found.certificate.write_bytes(b"".join(blob.bytes() for blob in certificate.cert_chain_pems))
    certificate.private_key_pem.write_to_path(str(found.key))
    return found


def speaks_tls(server: Path) -> bool:
    """Whether the server was built with TLS: one that was not stops before it looks for certificates."""
    command = [str(server), "--port", "0", "--tls-port", str(free_ports(HOST, 1)[0]), "--save", ""]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False, cwd="/tmp").stdout
    except subprocess.TimeoutExpired as error:  # it listens, which it can't without certificates
        raise AssertionError(f"{server} listens on a TLS port without certificates") from error
    return "No tls-cert-file configured" in said


@contextmanager
def tls_cluster(server: Path, folder: Path, files: Files, replicas: int = 1) -> Iterator[list[int]]:
    """Three masters with `replicas` each; the ports."""
    ports = free_ports(HOST, MASTERS * (1 + replicas))
    with ExitStack() as stack:
        for port in ports:
            stack.callback(_stop, _start(server, folder / str(port), port, files))
        nodes = [stack.enter_context(_node(port, files)) for port in ports]
        for node in nodes:
            _until(lambda node=node: _answers(node))
        _form(nodes, ports)
        yield ports


def _start(server: Path, folder: Path, port: int, files: Files) -> subprocess.Popen[bytes]:
    folder.mkdir()
    settings = {
        "port": "0", "tls-port": port, "cluster-port": bus_port(port), "bind": HOST, "cluster-enabled": "yes",
        "tls-ca-cert-file": files.authority, "tls-cert-file": files.certificate, "tls-key-file": files.key,
        "tls-auth-clients": "yes", "tls-cluster": "yes", "tls-replication": "yes", "cluster-node-timeout": "2000",
        "appendonly": "yes", "save": '""', "repl-diskless-sync-delay": "0", "repl-ping-replica-period": "1",
    }  # fmt: skip
    config = folder / "server.conf"
    config.write_text("".join(f"{name} {value}\n" for name, value in settings.items()))
    with (folder / "server.log").open("wb") as log:
        return subprocess.Popen([server, config.name], cwd=folder, stdout=log, stderr=log)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def _node(port: int, files: Files) -> redis.Redis:
    return redis.Redis(
        HOST, port, ssl=True, ssl_ca_certs=str(files.authority), ssl_certfile=str(files.certificate),
        ssl_keyfile=str(files.key), socket_timeout=5,
    )  # fmt: skip


def _answers(node: redis.Redis) -> bool:
    try:
        return bool(node.ping())
    except redis.ConnectionError:
        return False


def _form(nodes: list[redis.Redis], ports: list[int]) -> None:
    for index, node in enumerate(nodes):  # all of them before the first is introduced to another
        node.execute_command("CLUSTER SET-CONFIG-EPOCH", index + 1)
    for index, node in enumerate(nodes):
        if index < MASTERS:
            first, end = SLOT_COUNT * index // MASTERS, SLOT_COUNT * (index + 1) // MASTERS
            node.execute_command("CLUSTER ADDSLOTSRANGE", first, end - 1)
        for other in ports[index + 1 :]:
            node.execute_command("CLUSTER MEET", HOST, other, bus_port(other))
    for index, node in enumerate(nodes[MASTERS:]):
        master: Any = nodes[index % MASTERS].execute_command("CLUSTER MYID")
        _until(lambda node=node, master=master: _replicates(node, master))
    _until(lambda: all(_is_whole(node, len(nodes)) for node in nodes))


def _replicates(node: redis.Redis, master: Any) -> bool:
    try:
        node.execute_command("CLUSTER REPLICATE", master)
    except redis.ResponseError:  # not introduced yet
        return False
    return True


def _is_whole(node: redis.Redis, count: int) -> bool:
    info: Any = node.execute_command("CLUSTER INFO")
    link: Any = node.info("replication")
    linked = link.get("master_link_status", "up") == "up"
    if link["role"] == "master":
        linked = link["connected_slaves"] == count // MASTERS - 1
    return bool(info["cluster_state"] == "ok" and info["cluster_known_nodes"] == str(count) and linked)


def _until(condition: Any) -> None:
    deadline = time.monotonic() + READY_WITHIN_S
    while not condition():
        assert time.monotonic() < deadline, "the TLS cluster is not ready in time"
        time.sleep(0.05)
