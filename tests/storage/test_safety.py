"""What a connection refuses: each wrong server, password or URL has its own error, and its text names the way out."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import shardq
from shardq.errors import AuthenticationFailed, ShardqError, StoreError, StoreUnavailable, UnsafeStore, UsageError
from shardq.ops.local_cluster import LocalCluster, LocalServer
from shardq.storage.nodes import free_ports, node_command
from shardq.storage.safety import check_info

HOST = "127.0.0.1"
PASSWORD = "correct horse"
WITHIN_S = 30.0


async def refused(url: str) -> ShardqError:
    """The error of entering a client of this URL."""
    with pytest.raises(ShardqError, match=r".") as caught:
        async with shardq.connect(url):
            raise AssertionError("it was let in")
    return caught.value


@pytest.fixture(scope="module")
def guarded_cluster(server_binary: Path) -> Iterator[LocalCluster]:
    """One master behind a password."""
    with LocalCluster(masters=1, port=None, server=server_binary, password=PASSWORD) as cluster:
        yield cluster


@contextmanager
def plain_server(binary: Path, folder: Path) -> Iterator[int]:
    """A server that is not in cluster mode; gives its port."""
    (port,) = free_ports(HOST, 1)
    command = [str(binary), "--port", str(port), "--bind", HOST, "--save", "", "--dir", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + WITHIN_S
        while True:
            try:
                node_command(HOST, port, "PING")
                break
            except StoreError:
                assert time.monotonic() < deadline, "the server does not answer"
                assert process.poll() is None, "the server ended"
                time.sleep(0.02)
        yield port
    finally:
        process.kill()
        process.wait()


@pytest.mark.anyio
async def test_a_node_that_has_no_slots_yet_is_named(server_binary: Path, tmp_path: Path) -> None:
    (port,) = free_ports(HOST, 1)
    server = LocalServer(server_binary, port, tmp_path / "server", "", {})
    server.launch()
    try:
        server.wait_until_answering(time.monotonic() + WITHIN_S)
        error = await refused(f"redis://{HOST}:{port}")
    finally:
        server.kill()
    assert isinstance(error, StoreUnavailable)
    assert f"at {HOST}:{port}" in str(error)


@pytest.mark.anyio
async def test_a_server_that_is_no_cluster(server_binary: Path, tmp_path: Path) -> None:
    with plain_server(server_binary, tmp_path) as port:
        error = await refused(f"redis://{HOST}:{port}")
    assert isinstance(error, UnsafeStore)
    assert "cluster-enabled yes" in str(error)
    assert "shardq up" in str(error)


@pytest.mark.anyio
async def test_a_wrong_password(guarded_cluster: LocalCluster) -> None:
    error = await refused(f"redis://:wrong-one@{HOST}:{guarded_cluster.ports[0]}")
    assert isinstance(error, AuthenticationFailed)
    assert "password" in str(error)
    assert "wrong-one" not in str(error)


@pytest.mark.anyio
async def test_an_unknown_user(guarded_cluster: LocalCluster) -> None:
    error = await refused(f"redis://nobody:wrong-one@{HOST}:{guarded_cluster.ports[0]}")
    assert isinstance(error, AuthenticationFailed)
    assert "user name" in str(error)


@pytest.mark.anyio
async def test_a_missing_password(guarded_cluster: LocalCluster) -> None:
    error = await refused(f"redis://{HOST}:{guarded_cluster.ports[0]}")
    assert isinstance(error, AuthenticationFailed)
    assert "redis://user:password@host:port" in str(error)


@pytest.mark.anyio
@pytest.mark.parametrize("policy", ["allkeys-lru", "allkeys-lfu", "allkeys-random"])
async def test_a_server_that_evicts_messages(guarded_cluster: LocalCluster, policy: str) -> None:
    def set_policy(value: str) -> None:
        port = guarded_cluster.ports[0]
        node_command(HOST, port, "CONFIG", "SET", "maxmemory-policy", value, password=PASSWORD)

    set_policy(policy)
    try:
        error = await refused(guarded_cluster.url)
    finally:
        set_policy("noeviction")
    assert isinstance(error, UnsafeStore)
    assert "maxmemory-policy noeviction" in str(error)
    assert policy in str(error)
    async with shardq.connect(guarded_cluster.url) as client:
        assert await client.queue_names() == []


@pytest.mark.anyio
async def test_nobody_listens() -> None:
    (port,) = free_ports(HOST, 1)
    error = await refused(f"redis://{HOST}:{port}")
    assert isinstance(error, StoreUnavailable)
    assert error.retryable
    assert f"{HOST}:{port}" in str(error)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:7000",
        "http://localhost:7000",
        "redis://localhost:port",
        "redis://localhost:99999999",
        "redis:///0x",
    ],
)
def test_a_malformed_url(url: str) -> None:
    with pytest.raises(UsageError, match="redis://"):
        shardq.connect(url)


SOUND = {"cluster_enabled": "1", "redis_version": "7.0.0", "maxmemory_policy": "noeviction"}


@pytest.mark.parametrize("version", ["6.2.14", "6.9.9", "5.0.0", "2.8"])
def test_a_server_that_is_too_old(version: str) -> None:
    with pytest.raises(UnsafeStore, match=r"7\.0 or newer") as caught:
        check_info("a:1", SOUND | {"redis_version": version})
    assert version in str(caught.value)
    assert "a:1" in str(caught.value)


@pytest.mark.parametrize(
    "info",
    [
        SOUND,
        SOUND | {"redis_version": "7.2.4", "server_name": "valkey"},
        SOUND | {"redis_version": "10.1"},
        SOUND | {"maxmemory_policy": "volatile-lru"},
        {},
    ],
)
def test_a_sound_server(info: dict[str, str]) -> None:
    check_info("a:1", info)
    with pytest.raises(UnsafeStore, match="cluster-enabled"):
        check_info("a:1", info | {"cluster_enabled": "0"})
