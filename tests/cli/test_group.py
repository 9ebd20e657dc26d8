"""`shardq group`: what it prints for people and for programs, what it changes, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import anyio
import pytest

import shardq
from shardq.cli.app import run
from shardq.ops.local_cluster import LocalCluster, find_server
from tests.cli.support import commands, until

WORKER = """
import shardq

worker = shardq.Worker({queue!r}, group="g", name="w1", lease=1)

@worker.handler
async def handle(message):
    pass
"""


@pytest.fixture
def url(shared_clusters: object, queue_name: str) -> str:
    """A shared cluster of the server that is found first, with a queue of ten messages on it."""
    assert callable(shared_clusters)
    cluster = shared_clusters(find_server(None))
    assert isinstance(cluster, LocalCluster)
    return cluster.url


@pytest.fixture
def ids(url: str, queue_name: str) -> list[str]:
    """The ids of ten messages on the test's queue of two shards; messages are retained there."""

    async def send() -> list[str]:
        async with shardq.connect(url) as client:
            queue = await client.queue(queue_name, shards=2, retention="1h")
            async with queue.producer() as producer:
                return [await producer.send(number, key="k") for number in range(10)]

    return anyio.run(send)


Group = Callable[..., str]


@pytest.fixture
def group(url: str, queue_name: str, ids: list[str], capfd: pytest.CaptureFixture[str]) -> Group:
    """`shardq group COMMAND QUEUE ...`: what it prints; its error when it ends with status 1 or 2."""

    def call(command: str, *arguments: str, status: int = 0) -> str:
        assert run(["group", command, queue_name, *arguments, "--url", url]) == status
        printed = capfd.readouterr()
        return printed.err if status else printed.out

    return call


def objects(printed: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in printed.splitlines()]


def backlogs(group: Group) -> dict[str, int]:
    return {each["name"]: each["backlog"] for each in objects(group("list", "--json"))}


def test_create_list_reset_and_delete(group: Group, queue_name: str) -> None:
    assert group("list").split() == ["GROUP", "BACKLOG", "WAITING", "DEAD", "LEASES", "WORKERS"]
    assert group("create", "a") == "a: created\n"
    assert group("create", "a", "--start", "latest") == "a: it existed already\n"
    assert objects(group("create", "b", "--start", "latest", "--json")) == [
        {"queue": queue_name, "group": "b", "created": True}
    ]
    assert [line.split() for line in group("list").splitlines()[1:]] == [
        ["a", "10", "0", "0", "0/2", "-"],
        ["b", "0", "0", "0", "0/2", "-"],
    ]
    assert objects(group("list", "--json"))[0] == {
        "queue": queue_name,
        "name": "a",
        "backlog": 10,
        "paused": False,
        "waiting": 0,
        "dead": 0,
        "shards": 2,
        "owned": 0,
        "workers": [],
    }
    assert group("reset", "b", "--to", "earliest") == "b: 10 messages to do\n"
    assert objects(group("reset", "a", "--to", "latest", "--json")) == [
        {"queue": queue_name, "group": "a", "backlog": 0}
    ]
    assert backlogs(group) == {"a": 0, "b": 10}
    assert group("delete", "a") == "a: deleted\n"
    assert objects(group("delete", "b", "--json")) == [{"queue": queue_name, "group": "b", "deleted": True}]
    assert backlogs(group) == {}


def test_every_form_of_a_position(group: Group, ids: list[str]) -> None:
    tomorrow = datetime.now(UTC) + timedelta(days=1)
    offset = tomorrow.astimezone().isoformat()
    for number, (start, count) in enumerate(
        [
            ("earliest", 10),
            ("latest", 0),
            ("0", 10),
            ("1700000000.5", 10),
            ("2024-01-31T08:00Z", 10),
            ("2024-01-31T08:00:00.5+02:00", 10),
            (offset, 0),
            (str(int(tomorrow.timestamp())), 0),
            (ids[4], 6),
        ]
    ):
        group("create", f"g{number}", "--start", start)
        assert backlogs(group)[f"g{number}"] == count, start
        assert group("reset", "g0", "--to", start) == f"g0: {count} messages to do\n"


@pytest.mark.parametrize(
    ("position", "says"),
    [
        ("yesterday", "'yesterday' is none of: earliest, latest"),
        ("2024-01-31T08:00", "says no time zone: write 2024-01-31T08:00Z or"),
        ("2024-01-31", "says no time zone"),
        ("", "'' is none of"),
    ],
)
def test_what_is_no_position_is_wrong_usage(group: Group, position: str, says: str) -> None:
    assert says in group("create", "g", "--start", position, status=2)
    assert says in group("reset", "g", "--to", position, status=2)
    assert "Missing option '--to'" in group("reset", "g", status=2)
    assert backlogs(group) == {}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["create", "g", "--start", "7/1-0/0"], "error: 7/1-0/0 names shard 7, which this queue does not have\n"),
        (["create", "g", "--start", "7/8"], "error: '7/8' is not a message id; it looks like 3/"),
        (["create", "g", "--start", "1795231414661"], "error: 1795231414661.0 is no time: give Unix seconds (not"),
        (["create", "no name"], "error: group name 'no name' is not valid"),
        (["reset", "g", "--to", "latest"], "has no group 'g'"),
        (["delete", "g"], "has no group 'g'"),
        (["delete", "g", "--force"], "has no group 'g'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refusals_are_one_line(group: Group, arguments: list[str], says: str) -> None:
    error = group(*arguments, status=1)
    assert says in error
    assert error.count("\n") == 1


def test_a_queue_that_is_not_there(url: str, capfd: pytest.CaptureFixture[str]) -> None:
    for arguments in (["list", "none"], ["create", "none", "g"], ["delete", "none", "g"]):
        assert run(["group", *arguments, "--url", url]) == 1
        assert "queue 'none' does not exist" in capfd.readouterr().err


def test_a_group_in_use_needs_force(group: Group, url: str, queue_name: str, tmp_path: Path) -> None:
    (tmp_path / "billing.py").write_text(WORKER.format(queue=queue_name))
    with commands(tmp_path) as start:
        worker = start("work", "billing:worker", "--url", url)
        until(lambda: backlogs(group).get("g") == 0, "all to be handled")
        (listed,) = objects(group("list", "--json"))
        assert (listed["owned"], listed["workers"]) == (2, ["w1"])
        for arguments in (["reset", "g", "--to", "earliest"], ["delete", "g"]):
            error = group(*arguments, status=1)
            assert "error: group 'g' is in use, nothing was changed: worker w1 holds shard 0" in error
            assert "--force" in error
        assert group("reset", "g", "--to", "earliest", "--force") == "g: 10 messages to do\n"
        until(lambda: backlogs(group)["g"] == 0, "all to be handled again")
        assert worker.stop() == 0
    assert group("reset", "g", "--to", "earliest") == "g: 10 messages to do\n"
    assert group("delete", "g") == "g: deleted\n"


@pytest.mark.parametrize("command", ["list", "create", "reset", "delete"])
def test_help_shows_an_example(command: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["group", command, "--help"]) == 0
    assert f"Example: shardq group {command}" in capfd.readouterr().out


def test_a_group_is_paused_and_resumed(group: Group) -> None:
    group("create", "g")
    assert group("pause", "g") == "g: paused\n"
    assert "g (paused)" in group("list")
    assert json.loads(group("list", "--json"))["paused"] is True
    assert json.loads(group("pause", "g", "--json"))["paused"] is True
    assert group("resume", "g") == "g: resumed\n"
    assert "paused" not in group("list")
    assert "has no group 'h'" in group("pause", "h", status=1)
