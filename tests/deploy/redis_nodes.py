"""The Redis Cluster of compose.yaml, its very commands and its very script, on this machine: 172.30.76.N becomes
127.0.76.N, and the port a free one. Never used where 127.0.0.0/8 is not all loopback (only Linux has that).
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from shardq.ops.processes import die_with_parent
from shardq.storage.nodes import free_ports
from tests.deploy.manifests import DEPLOY, compose, find

THERE, HERE, PORT = "172.30.76.", "127.0.76.", "6379"


@dataclass(frozen=True)
class Nodes:
    """The running cluster; `there` is how compose.yaml names its first node."""

    addresses: tuple[str, ...]
    port: str
    programs: Path

    @property
    def url(self) -> str:
        return self.here(f"redis://{THERE}11:{PORT}")

    def here(self, text: str) -> str:
        return text.replace(THERE, HERE).replace(PORT, self.port)

    def cli(self, address: str, *arguments: str) -> str:
        command = [str(self.programs / "valkey-cli"), "-h", address, "-p", self.port, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout


@contextmanager
def compose_cluster(server: Path, folder: Path) -> Iterator[Nodes]:
    """The six nodes and what form-cluster makes of them."""
    programs = folder / "programs"
    programs.mkdir()
    (programs / "valkey-server").symlink_to(server)
    cli = shutil.which("valkey-cli") or find("redis-cli", "Debian's package redis-tools")
    (programs / "valkey-cli").symlink_to(cli)
    names = [name for name in compose()["services"] if name.startswith("redis-")]
    places = [compose()["services"][name]["networks"]["default"]["ipv4_address"] for name in names]
    nodes = Nodes(tuple(place.replace(THERE, HERE) for place in places), str(free_ports(HERE + "11", 1)[0]), programs)
    started: list[subprocess.Popen[bytes]] = []
    try:
        for name, address in zip(names, nodes.addresses, strict=True):
            data = folder / name
            data.mkdir()
            words = [nodes.here(word) for word in compose()["services"][name]["command"]]
            with (data / "log").open("wb") as log:
                started.append(
                    subprocess.Popen(
                        [
                            programs / words[0],
                            *words[1:],
                            "--bind",
                            address,
                            "--bind-source-addr",
                            address,
                            "--dir",
                            str(data),
                        ],
                        stdout=log,
                        preexec_fn=partial(die_with_parent, os.getpid()),
                    )
                )
        _form(nodes)
        yield nodes
    finally:
        for process in started:
            process.kill()
            process.wait()


def _form(nodes: Nodes) -> None:
    found = compose()["services"]["form-cluster"]
    (mounted,) = found["volumes"]
    source, target, _ = mounted.split(":")
    shell, script, *words = found["command"]
    assert script == target
    command = [shell, str(DEPLOY / source), *[nodes.here(word) for word in words]]
    environment = os.environ | {"PATH": f"{nodes.programs}{os.pathsep}{os.environ['PATH']}"}
    for _ in range(2):  # safe to repeat
        said = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        assert said.returncode == 0, said.stdout + said.stderr
