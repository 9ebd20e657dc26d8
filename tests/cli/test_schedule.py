"""`shardq schedule`: what it prints for people and for programs, and what it refuses."""

from __future__ import annotations

import json
import re
from datetime import datetime
from pathlib import Path
from typing import Any

import anyio
import pytest

import shardq
from shardq.cli.app import run
from shardq.ops.local_cluster import LocalCluster, find_server
from tests.cli.support import Start, commands, until


@pytest.fixture
def url(shared_clusters: object, queue_name: str) -> str:
    """A shared cluster of the server that is found first, with the test's queue on it."""
    assert callable(shared_clusters)
    cluster = shared_clusters(find_server(None))
    assert isinstance(cluster, LocalCluster)
    assert run(["queue", "create", queue_name, "--shards", "3", "--json", "--url", cluster.url]) == 0
    return cluster.url


@pytest.fixture
def printed(capfd: pytest.CaptureFixture[str], url: str) -> pytest.CaptureFixture[str]:
    """What is printed after the queue was made."""
    capfd.readouterr()
    return capfd


def objects(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_set_list_and_remove(url: str, queue_name: str, printed: pytest.CaptureFixture[str]) -> None:
    def shardq_schedule(*arguments: str) -> str:
        assert run(["schedule", *arguments, "--url", url]) == 0
        return printed.readouterr().out

    name_of = ["set", queue_name, "nightly", "0 3 * * *", "--timezone", "Europe/Berlin", "--key", "total"]
    text = shardq_schedule(*name_of, "--value", '{"n": 1}', "--header", "trace=a=b", "--missed", "skip")
    assert re.fullmatch(rf"{queue_name}: schedule nightly sends next at \d{{4}}-\d\d-\d\dT03:00:00\+0[12]:00\n", text)
    (told,) = objects(shardq_schedule("set", queue_name, "each", "* * * * *", "--json"))
    assert datetime.fromisoformat(told["next"]).second == 0

    lines = shardq_schedule("list", queue_name).splitlines()
    assert lines[0].split() == ["NAME", "CRON", "TIMEZONE", "KEY", "MISSED", "NEXT"]
    assert [line.split()[0] for line in lines[1:]] == ["each", "nightly"]
    each, nightly = objects(shardq_schedule("list", queue_name, "--json"))
    assert each == told
    del nightly["since_ms"]
    assert nightly.pop("next").endswith(("+01:00", "+02:00"))
    assert nightly == {
        "name": "nightly",
        "cron": "0 3 * * *",
        "timezone": "Europe/Berlin",
        "missed": "skip",
        "key": "total",
        "value": {"n": 1},
        "headers": {"trace": "a=b"},
    }

    assert shardq_schedule("remove", queue_name, "each") == f"{queue_name}: schedule each is removed\n"
    assert objects(shardq_schedule("remove", queue_name, "nightly", "--json"))[0]["removed"]
    assert len(shardq_schedule("list", queue_name).splitlines()) == 1
    assert shardq_schedule("list", queue_name, "--json") == ""


def test_whatever_a_program_set_can_be_listed(url: str, queue_name: str, printed: pytest.CaptureFixture[str]) -> None:
    async def set_some() -> None:
        async with shardq.connect(url) as client:
            await client.schedule(queue_name, "a", "* * * * *", key=b"\xff", value={1: b"\xff", "t": (1.5, None)})
            await client.schedule(queue_name, "b", "* * * * *", value=b"raw", headers={"h": b"\0"})
            await client.schedule(queue_name, "c", "* * * * *", value=datetime(2026, 1, 1).astimezone())

    anyio.run(set_some)
    assert run(["schedule", "list", queue_name, "--json", "--url", url]) == 0
    first, second, _ = objects(printed.readouterr().out)
    assert (first["key"], first["value"]) == ("\\xff", {"1": "/w==", "t": [1.5, None]})
    assert (second["value"], second["headers"]) == ("cmF3", {"h": "AA=="})
    assert run(["schedule", "list", queue_name, "--url", url]) == 0
    assert "\\xff" in printed.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (["set", "QUEUE", "s", "61 * * * *"], 1, "is not a cron expression"),
        (["set", "QUEUE", "s", "* * * * *", "--timezone", "Mars/Base"], 1, "time zone 'Mars/Base' is not known"),
        (["set", "QUEUE", "a b", "* * * * *"], 1, "schedule name"),
        (["set", "QUEUE", "s", "* * * * *", "--value", "text"], 1, "is not JSON"),
        (["set", "QUEUE", "s", "* * * * *", "--header", "text"], 1, "is not NAME=TEXT"),
        (["set", "QUEUE", "s", "* * * * *", "--header", "shardq-tick=1"], 1, "shardq's own"),
        (["set", "QUEUE", "s", "* * * * *", "--missed", "some"], 2, "'some' is not one of"),
        (["set", "no-such-queue", "s", "* * * * *"], 1, "does not exist"),
        (["remove", "QUEUE", "s"], 1, "has no schedule 's'"),
        (["remove", "no-such-queue", "s"], 1, "does not exist"),
        (["list", "no-such-queue"], 1, "does not exist"),
        (["list"], 2, "Missing argument 'QUEUE'"),
    ],
)
def test_what_is_refused(
    url: str, queue_name: str, printed: pytest.CaptureFixture[str], arguments: list[str], status: int, text: str
) -> None:
    command = [queue_name if word == "QUEUE" else word for word in arguments]
    assert run(["schedule", *command, "--url", url]) == status
    out, err = printed.readouterr()
    assert text in err
    assert out == ""


def test_help_shows_examples(capfd: pytest.CaptureFixture[str]) -> None:
    for command in ([], ["set"], ["list"], ["remove"]):
        assert run(["schedule", *command, "--help"]) == 0
        assert "Example: shardq schedule" in capfd.readouterr().out


def test_a_coordinator_sends_it(url: str, queue_name: str, tmp_path: Path, printed: pytest.CaptureFixture[str]) -> None:
    def appended() -> int:
        assert run(["queue", "list", "--json", "--url", url]) == 0
        return sum(each["appended"] for each in objects(printed.readouterr().out) if each["queue"] == queue_name)

    assert run(["schedule", "set", queue_name, "s", "* * * * * *", "--url", url]) == 0
    printed.readouterr()
    with commands(tmp_path) as start_any:
        start: Start = start_any
        start("coordinator", queue_name, "--group", "g", "--url", url)
        until(lambda: appended() >= 2, "two messages of the schedule")
