"""`shardq queue delete`: asks, deletes, and says what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from shardq.cli.app import run
from shardq.ops.local_cluster import LocalCluster, find_server


@pytest.fixture
def url(shared_clusters: object, queue_name: str, capfd: pytest.CaptureFixture[str]) -> str:
    """A shared cluster of the server that is found first, with the test's queue on it."""
    assert callable(shared_clusters)
    cluster = shared_clusters(find_server(None))
    assert isinstance(cluster, LocalCluster)
    assert run(["queue", "create", queue_name, "--shards", "2", "--url", cluster.url]) == 0
    assert run(["group", "create", queue_name, "g", "--url", cluster.url]) == 0
    capfd.readouterr()
    return cluster.url


def listed(url: str, capfd: pytest.CaptureFixture[str]) -> set[str]:
    assert run(["queue", "list", "--json", "--url", url]) == 0
    return {json.loads(line)["queue"] for line in capfd.readouterr().out.splitlines()}


def test_deleted_for_people_and_for_programs(url: str, queue_name: str, capfd: pytest.CaptureFixture[str]) -> None:
    delete = ["queue", "delete", queue_name, "--yes", "--url", url]
    assert run(delete) == 0
    assert capfd.readouterr().out == f"{queue_name}: deleted\n"
    assert queue_name not in listed(url, capfd)
    assert run(delete) == 1
    assert f"error: queue '{queue_name}' does not exist" in capfd.readouterr().err
    assert run(["queue", "create", queue_name, "--shards", "1", "--url", url]) == 0
    capfd.readouterr()
    assert run([*delete, "--json", "--force"]) == 0
    assert json.loads(capfd.readouterr().out) == {"queue": queue_name, "deleted": True}


@pytest.mark.parametrize(("answer", "status"), [("y\n", 0), ("n\n", 130), ("", 130)])
def test_it_asks_first(url: str, queue_name: str, answer: str, status: int, capfd: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-m", "shardq", "queue", "delete", queue_name, "--url", url]
    done = subprocess.run(command, input=answer, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == status
    assert f"Delete queue {queue_name} with all its messages? [y/N]:" in done.stderr
    assert (queue_name in listed(url, capfd)) == (status != 0)


def test_help_shows_an_example(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["queue", "delete", "--help"]) == 0
    assert "Example: shardq queue delete orders --yes" in capfd.readouterr().out
