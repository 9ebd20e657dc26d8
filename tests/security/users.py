"""A cluster whose only users are those that `shardq acl` prints (and an administrator's, to look on)."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import redis

from shardq.core.acl import user_rules
from shardq.ops.local_cluster import LocalCluster
from shardq.storage.acl import Wanted, grants

HOST = "127.0.0.1"
PASSWORD = "canary-password"


class Users:
    """Users by name, the same on every node. Their lines are what an aclfile holds."""

    def __init__(self, cluster: LocalCluster, file: Path) -> None:
        self.cluster, self._file = cluster, file
        self._lines = [f"user admin on >{PASSWORD} ~* &* +@all"]

    def add(self, name: str, wanted: Wanted, *more: str) -> None:
        rules = user_rules(grants(wanted), PASSWORD)
        self._lines.append(f"user {name} {' '.join([*rules, *more])}")

    def add_printed(self, *command: str) -> None:
        """What `shardq acl` prints with these arguments, in a process of its own."""
        called = [sys.executable, "-m", "shardq", "acl", *command, "--password-env", "PASSWORD"]
        self._lines.append(subprocess.check_output(called, text=True, env=os.environ | {"PASSWORD": PASSWORD}).strip())

    def load(self) -> None:
        """Every node forgets all users but these; nobody gets in without a name any more."""
        self._file.write_text("\n".join([*self._lines, "user default off", ""]))
        for port in self.cluster.ports:
            with redis.Redis(HOST, port) as node:
                node.execute_command("ACL", "LOAD")

    def url(self, name: str) -> str:
        return f"redis://{name}:{PASSWORD}@{HOST}:{self.cluster.ports[0]}"

    def ask(self, name: str, *command: str, port: int | None = None) -> Any:
        """Sends one command as that user; returns its reply or the error that it raised. A node of another slot says
        MOVED, which Redis does behind the check of rights."""
        with redis.Redis(HOST, port or self.cluster.ports[0], username=name, password=PASSWORD) as node:
            try:
                return node.execute_command(*command)
            except redis.ResponseError as error:
                return error

    def refused(self) -> set[tuple[str, str]]:
        """Whom the nodes refused what, since the last time."""
        found = set()
        for port in self.cluster.ports:
            with redis.Redis(HOST, port, username="admin", password=PASSWORD, decode_responses=True) as node:
                entries: Any = node.acl_log(1000)
                found |= {(entry["username"], f"{entry['reason']}: {entry['object']}") for entry in entries}
                node.acl_log_reset()
        return found


@contextmanager
def users(server: Path, folder: Path) -> Iterator[Users]:
    """Three masters without replicas. Add users, then load() them."""
    file = folder / "users.acl"
    file.touch()
    with LocalCluster(masters=3, replicas=0, port=None, server=server, settings={"aclfile": str(file)}) as cluster:
        yield Users(cluster, file)
