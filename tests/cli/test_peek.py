"""`shardq peek` and `shardq tail`: what they print for people and for programs, and how they end."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import anyio
import click
import pytest

import shardq
from shardq.cli.app import run
from shardq.cli.records import Printer, parse_when
from shardq.core.history import Record
from shardq.ops.local_cluster import LocalCluster, find_server
from shardq.runtime.history import When
from tests.cli.support import Start, commands, until


@pytest.fixture
def url(shared_clusters: Callable[[Path], LocalCluster]) -> str:
    """A shared cluster of the server that is found first, for what no server kind changes."""
    return shared_clusters(find_server(None)).url


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with commands(tmp_path) as start:
        yield start


async def _send(url: str, queue: str, messages: list[tuple[Any, Any]], shards: int) -> list[str]:
    async with shardq.connect(url) as client:
        joined = await client.queue(queue, shards=shards)
        async with joined.producer() as producer:
            return [await producer.send(value, key=key) for key, value in messages]


def send(url: str, queue: str, *messages: tuple[Any, Any], shards: int = 1) -> list[str]:
    """Sends (key, value) one after the other; returns their ids."""
    return anyio.run(_send, url, queue, list(messages), shards)


def objects(printed: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in printed.splitlines()]


# -- peek --------------------------------------------------------------------------------------------------------------


def test_a_line_for_each_message(url: str, queue_name: str, capfd: pytest.CaptureFixture[str]) -> None:
    ids = send(url, queue_name, ("user:1", {"n": 1}), (b"\xff", b"\xfe"), (None, "two\nlines"), ("user:1", "x" * 500))
    assert run(["peek", queue_name, "--url", url]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ids
    assert len({line.index(line.split()[1]) for line in lines}) == 1  # columns
    assert lines[0].split()[2:] == ["user:1", '{"n":', "1}"]
    assert lines[1].split()[2:] == ["base64:/w==", "base64:/g=="]
    assert lines[2].split()[2:] == ["-", "two\\nlines"]
    assert lines[3].endswith("xxx...")
    assert len(lines[3]) == 160
    stored = datetime.fromisoformat(lines[0].split()[1])
    assert stored == datetime.fromtimestamp(int(ids[0].split("/")[1].split("-")[0]) / 1000, UTC)


def test_json_lines(url: str, queue_name: str, capfd: pytest.CaptureFixture[str]) -> None:
    ids = send(url, queue_name, ("k", {"n": [1, None]}), (b"\xff", b"\x00\xff"), (b"text", "two\nlines"))
    assert run(["peek", queue_name, "--json", "--url", url]) == 0
    found = objects(capfd.readouterr().out)
    assert [each["id"] for each in found] == ids
    assert [each["key"] for each in found] == ["k", {"$base64": "/w=="}, "text"]
    assert [each["value"] for each in found] == [{"n": [1, None]}, {"$base64": "AP8="}, "two\nlines"]
    assert set(found[0]) == {"id", "shard", "stored_at_ms", "sent_at_ms", "key", "headers", "value"}


def test_which_messages(url: str, queue_name: str, capfd: pytest.CaptureFixture[str]) -> None:
    ids = send(url, queue_name, *((f"k{number % 5}", number) for number in range(30)), shards=2)

    def values(*arguments: str) -> list[int]:
        assert run(["peek", queue_name, "--json", "--url", url, *arguments]) == 0
        return [each["value"] for each in objects(capfd.readouterr().out)]

    everything = values("-n", "100")
    assert sorted(everything) == list(range(30))
    assert values() == everything[:10]
    assert values("--reverse", "-n", "3") == everything[:-4:-1]
    assert values("--key", "k2") == list(range(2, 30, 5))
    assert values("--since", "10m", "--key", "k2", "-n", "1") == [2]
    assert values("--until", "10m") == []
    assert values("--since", ids[27], "--key", "k2") == [27]
    shards = [int(each.split("/")[0]) for each in ids]
    assert sorted(values("--shard", "1", "-n", "100")) == [value for value in range(30) if shards[value] == 1]
    assert sorted(values("--shard", "0", "--shard", "1", "-n", "100")) == list(range(30))


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["--since", "yesterday"], 2, "'yesterday' is no moment: write 10m"),
        (["--since", "99999999999999999w"], 2, "is no moment"),
        (["--since", "1795231414661"], 1, "error: start=1795231414661.0 is no Unix time in seconds"),
        (["--since", "0s", "--until", "1h"], 1, "error: `start` lies behind `end`"),
        (["--shard", "9"], 1, "has no shard 9: its shards are 0 to 0"),
        (["--shard", "0", "--key", "k"], 1, "error: a key lies on one shard"),
        (["-n", "0"], 2, "0 is not in the range"),
    ],
    ids=str,
)
def test_mistakes(
    url: str, queue_name: str, capfd: pytest.CaptureFixture[str], arguments: list[str], status: int, says: str
) -> None:
    send(url, queue_name, ("k", 1))
    assert run(["peek", queue_name, "--url", url, *arguments]) == status
    assert says in capfd.readouterr().err


def test_no_such_queue(url: str, queue_name: str, capfd: pytest.CaptureFixture[str]) -> None:
    for command in ("peek", "tail"):
        assert run([command, queue_name, "--url", url]) == 1
        assert f"error: queue {queue_name!r} does not exist" in capfd.readouterr().err


def test_a_reader_that_goes_away_is_no_error(url: str, queue_name: str) -> None:
    send(url, queue_name, *((None, "x" * 2000) for _ in range(200)))
    command = [sys.executable, "-m", "shardq", "peek", queue_name, "-n", "200", "--json", "--url", url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(30) == 0


# -- moments and lines -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "when"),
    [
        (None, None),
        ("10m", timedelta(minutes=10)),
        ("1.5h", timedelta(hours=1.5)),
        ("250ms", timedelta(milliseconds=250)),
        ("1795231414.5", 1795231414.5),
        ("2026-07-27T10:00:00Z", datetime(2026, 7, 27, 10, tzinfo=UTC)),
        ("2026-07-27", datetime(2026, 7, 27).astimezone()),
        ("3/1795231414661-0/7", "3/1795231414661-0/7"),
    ],
    ids=str,
)
def test_moments(text: str | None, when: When) -> None:
    context = click.Context(click.Command("peek"))
    assert parse_when(context, click.Option(["--since"]), text) == when


def test_nothing_printed_upsets_a_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    records = [
        Record("0/1-0/0", 0, "a\x1b[31m", "\x07\x9b\u202e\u2028end", None, 0, 1795231414661),
        Record("0/1-0/1", 0, None, b"", None, 0, 10**18, "it does not\ndecode"),
    ]
    Printer(as_json=False).print(records)
    assert capfd.readouterr().out.splitlines() == [
        "0/1-0/0  2026-11-21T03:23:34.661Z  a\\x1b[31m  \\x07\\x9b\\u202e\\u2028end",
        "0/1-0/1  1000000000000000000 ms    -          ! it does not\\ndecode",
    ]


# -- tail --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_it_follows_until_it_is_told_to_stop(start: Start, url: str, queue_name: str, number: signal.Signals) -> None:
    send(url, queue_name, *(("k", value) for value in range(20)))
    follower = start("tail", queue_name, "-n", "2", "--json", "--url", url)
    until(lambda: len(follower.stdout.splitlines()) == 2, "the last two")
    send(url, queue_name, *(("k", value) for value in range(20, 50)))
    until(lambda: len(follower.stdout.splitlines()) == 32, "what came since")
    assert follower.stop(number) == 0, follower.stderr
    assert [each["value"] for each in objects(follower.stdout)] == list(range(18, 50))
    assert follower.stderr == ""


def test_it_ends_when_nobody_reads_it(url: str, queue_name: str) -> None:
    send(url, queue_name, ("k", "first"))
    command = [sys.executable, "-m", "shardq", "tail", queue_name, "--url", url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert b"first" in process.stdout.readline()
        process.stdout.close()
        send(url, queue_name, ("k", "second"))
        assert process.stderr.read() == b""
        assert process.wait(30) == 0
