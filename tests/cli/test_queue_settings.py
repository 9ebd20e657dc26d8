"""Settings on the command line: created with, shown, changed; and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from shardq.cli.app import run
from shardq.ops.local_cluster import LocalCluster, find_server


@pytest.fixture
def any_cluster(shared_clusters: object) -> LocalCluster:
    """A shared cluster of the server that is found first, for what no server kind changes."""
    assert callable(shared_clusters)
    cluster = shared_clusters(find_server(None))
    assert isinstance(cluster, LocalCluster)
    return cluster


class Queue:
    """`shardq queue COMMAND NAME ...` on one queue."""

    def __init__(self, name: str, url: str, capfd: pytest.CaptureFixture[str]) -> None:
        self._name, self._url, self._capfd = name, url, capfd

    def __call__(self, command: str, *options: str) -> str:
        """What it prints."""
        assert run(["queue", command, self._name, *options, "--url", self._url]) == 0
        return self._capfd.readouterr().out

    def settings(self, command: str, *options: str) -> dict[str, Any]:
        lines = [json.loads(line) for line in self(command, *options, "--json").splitlines()]
        assert all(line["settings"] == lines[0]["settings"] for line in lines)
        return dict(lines[0]["settings"])

    def refused(self, command: str, *options: str) -> str:
        """The error of what ends with status 1."""
        assert run(["queue", command, self._name, *options, "--url", self._url]) == 1
        return self._capfd.readouterr().err


@pytest.fixture
def queue(any_cluster: LocalCluster, queue_name: str, capfd: pytest.CaptureFixture[str]) -> Queue:
    return Queue(queue_name, any_cluster.url, capfd)


def test_created_with_settings_shown_and_changed(queue: Queue, queue_name: str) -> None:
    bound = ("--max-backlog", "1000", "--overflow", "reject")
    assert queue("create", "--shards", "2", "--retention", "7d", *bound) == f"{queue_name}: 2 shards\n"
    words = "retention 7d, max-backlog 1000, overflow reject, compression none, jobs no"
    assert queue("show").splitlines()[0] == f"{queue_name}: {words}"
    assert "existed already" in queue("create", "--shards", "2", *bound)

    changed = queue("change", "--retention", "done", "--compression", "zstd", "--jobs")
    assert changed == f"{queue_name}: retention done, max-backlog 1000, overflow reject, compression zstd, jobs yes\n"
    settings = queue.settings("change", "--max-backlog", "none", "--overflow", "block", "--no-jobs")
    assert settings == {
        "retention": "done",
        "max_backlog": None,
        "overflow": "block",
        "compression": "zstd",
        "jobs": False,
    }
    assert queue.settings("show") == settings
    assert queue.settings("change", "--compression", "none")["compression"] is None
    # Names mean themselves where none does not mean "no such thing".
    assert "retention 'none' is not one" in queue.refused("change", "--retention", "none")


def test_a_queue_without_settings_has_the_defaults(queue: Queue, queue_name: str) -> None:
    settings = queue.settings("create", "--shards", "2")
    assert settings == {
        "retention": "done",
        "max_backlog": None,
        "overflow": "block",
        "compression": None,
        "jobs": False,
    }
    assert queue.settings("create", "--shards", "2", "--max-backlog", "none", "--no-jobs") == settings


def test_what_differs_or_is_wrong_is_refused(queue: Queue, queue_name: str) -> None:
    queue("create", "--shards", "2", "--retention", "7d")
    error = queue.refused("create", "--shards", "2", "--retention", "12h")
    assert error.startswith(f"error: queue '{queue_name}' has retention='7d', not '12h': ")
    assert f"shardq queue change {queue_name}" in error
    assert "write 'done', a time like '7d'" in queue.refused("change", "--retention", "forever")
    assert "needs max_backlog=N" in queue.refused("change", "--overflow", "reject")
    assert "1 or more" in queue.refused("change", "--max-backlog", "0")
    assert queue.settings("show")["retention"] == "7d"


def test_a_queue_that_does_not_exist_is_not_changed(queue: Queue) -> None:
    assert "does not exist" in queue.refused("change", "--retention", "7d")
