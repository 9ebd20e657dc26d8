"""The commands that do one thing and end: what they print, for people and for programs, and what they refuse."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import anyio
import pytest

import shardq
from shardq.cli.app import run
from shardq.cli.output import age
from shardq.ops.local_cluster import LocalCluster, find_server
from shardq.storage.functions import BUILD
from shardq.storage.nodes import free_ports
from tests.cli.support import until


@pytest.fixture
def any_cluster(shared_clusters: object) -> LocalCluster:
    """A shared cluster of the server that is found first, for what no server kind changes."""
    assert callable(shared_clusters)
    cluster = shared_clusters(find_server(None))
    assert isinstance(cluster, LocalCluster)
    return cluster


def objects(printed: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in printed.splitlines()]


def produce(url: str, *arguments: str, lines: str | bytes) -> subprocess.CompletedProcess[str]:
    data = lines.encode() if isinstance(lines, str) else lines
    command = [sys.executable, "-m", "shardq", "produce", *arguments, "--url", url]
    done = subprocess.run(command, input=data, capture_output=True, timeout=60, check=False)
    return subprocess.CompletedProcess(command, done.returncode, done.stdout.decode(), done.stderr.decode())


async def _drain(url: str, queue: str, count: int) -> list[tuple[Any, Any]]:
    worker = shardq.Worker(queue, group="g", lease=1)
    got: list[tuple[Any, Any]] = []

    @worker.handler
    async def take(message: shardq.Message) -> None:
        got.append((message.key, message.value))
        if len(got) == count:
            worker.stop()

    with anyio.fail_after(30):
        async with shardq.connect(url) as client:
            await worker.run(client)
    return got


def drain(url: str, queue: str, count: int) -> list[tuple[Any, Any]]:
    """Handles this many messages in group g; returns (key, value) of each."""
    return anyio.run(_drain, url, queue, count)


# -- the whole way, on every server kind ------------------------------------------------------------------------------


def test_from_install_to_status(cluster: LocalCluster, queue_name: str, capfd: pytest.CaptureFixture[str]) -> None:
    url = ["--url", cluster.url]
    assert run(["install", *url]) == 0
    nodes = sorted(f"127.0.0.1:{port}" for port in cluster.ports)
    assert capfd.readouterr().out == "".join(f"{node}  build {BUILD}\n" for node in nodes)
    assert run(["install", "--json", *url]) == 0
    assert objects(capfd.readouterr().out) == [{"node": node, "build": BUILD} for node in nodes]

    assert run(["queue", "create", queue_name, "--shards", "3", *url]) == 0
    assert run(["queue", "create", queue_name, "--shards", "3", *url]) == 0
    assert capfd.readouterr().out == f"{queue_name}: 3 shards\n{queue_name}: 3 shards, it existed already\n"

    lines = "".join(json.dumps({"user": f"u{number % 7}", "n": number}) + "\n" for number in range(50))
    done = produce(cluster.url, queue_name, "--key", "user", lines=lines)
    assert (done.returncode, done.stdout) == (0, "50 messages stored\n"), done.stderr
    assert run(["status", queue_name, "--json", "--over", "0", *url]) == 0
    shards = objects(capfd.readouterr().out)
    assert sum(shard["appended"] for shard in shards) == 50
    assert [shard["shard"] for shard in shards] == [0, 1, 2]

    got = drain(cluster.url, queue_name, 50)
    assert sorted(value["n"] for _, value in got) == list(range(50))
    assert all(key == value["user"] for key, value in got)
    produce(cluster.url, queue_name, "--key", "user", lines=lines)
    assert run(["status", queue_name, "--group", "g", "--json", "--over", "0.1", *url]) == 0
    shards = objects(capfd.readouterr().out)
    assert (sum(shard["backlog"] for shard in shards), sum(shard["acked"] for shard in shards)) == (50, 50)
    assert [(shard["lease"], shard["rate"], shard["pending"]) for shard in shards] == [("free", 0.0, 0)] * 3

    assert run(["status", "--json", "--over", "0", *url]) == 0
    (line,) = (line for line in objects(capfd.readouterr().out) if line["queue"] == queue_name)
    assert (line["group"], line["appended"], line["backlog"], line["acked"]) == ("g", 100, 50, 50)


# -- tables -----------------------------------------------------------------------------------------------------------


def test_tables_for_people(any_cluster: LocalCluster, queue_name: str, capfd: pytest.CaptureFixture[str]) -> None:
    url = ["--url", any_cluster.url]
    assert run(["queue", "create", queue_name, "--shards", "2", *url]) == 0
    produce(any_cluster.url, queue_name, lines="1\n2\n3\n")
    drain(any_cluster.url, queue_name, 3)
    capfd.readouterr()
    assert run(["status", queue_name, *url]) == 0
    title, headers, *rows = capfd.readouterr().out.splitlines()
    assert title == f"{queue_name} / g: 0 messages to do, 0 dead"
    assert headers.split() == ["SHARD", "SLOT", "NODE", "BACKLOG", "PENDING", "OLDEST", "RATE", "OWNER", "LEASE"]
    assert [re.split(r"\s+", row.strip()) for row in rows] == [
        ["0", "4096", f"127.0.0.1:{any_cluster.ports[0]}", "0", "0", "-", "0", "-", "free"],
        ["1", "12288", f"127.0.0.1:{any_cluster.ports[2]}", "0", "0", "-", "0", "-", "free"],
    ]
    assert run(["queue", "list", *url]) == 0
    assert re.search(rf"^{queue_name} +2 +3 +g$", capfd.readouterr().out, re.MULTILINE)
    assert run(["queue", "show", queue_name, *url]) == 0
    shown = capfd.readouterr().out
    assert re.search(r"^ +0  00000000-7fffffff +4096 +127\.0\.0\.1:\d+ +open ", shown, re.MULTILINE)
    assert run(["status", "--over", "0", *url]) == 0
    assert re.search(rf"^{queue_name} +g +2 +3 +0 +0 +- +- +0 +0/2$", capfd.readouterr().out, re.MULTILINE)


def test_json_of_queue_list_and_show(
    any_cluster: LocalCluster, queue_name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    url = ["--json", "--url", any_cluster.url]
    assert run(["queue", "create", queue_name, "--shards", "2", *url]) == 0
    (created,) = objects(capfd.readouterr().out)
    settings = created.pop("settings")
    assert created == {"queue": queue_name, "shards": 2, "created": True}
    assert run(["queue", "list", *url]) == 0
    (listed,) = (each for each in objects(capfd.readouterr().out) if each["queue"] == queue_name)
    assert listed == {"queue": queue_name, "shards": 2, "appended": 0, "groups": [], "unreadable": []}
    assert run(["queue", "show", queue_name, *url]) == 0
    shown = objects(capfd.readouterr().out)
    assert [(each["low"], each["high"], each["slot"]) for each in shown] == [(0, 2**31, 4096), (2**31, 2**32, 12288)]
    assert [each["settings"] for each in shown] == [settings] * 2


async def _leave_some_of_each(url: str, queue: str) -> None:
    """One message waiting for its retry and one held back by it, two dead letters, three not due."""
    worker = shardq.Worker(queue, group="g", retry=shardq.Retry(base=3600, max_delay=3600))

    @worker.handler
    async def handle(message: shardq.Message) -> None:
        raise shardq.Reject("no") if message.key == "dead" else LookupError("not yet")

    async with shardq.connect(url) as client:
        joined = await client.queue(queue, shards=2)
        async with joined.producer() as producer:
            for key in ("dead", "dead", "held", "held"):
                await producer.send(1, key=key)
            for _ in range(3):
                await producer.send(1, delay=3600)
        with anyio.fail_after(30):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(worker.run, client)
                while True:
                    if [(each.dead, each.waiting) for each in await joined.groups()] == [(2, 2)]:
                        break
                    await anyio.sleep(0.02)
                worker.stop()


def test_what_waits_is_dead_or_is_not_due(
    any_cluster: LocalCluster, queue_name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    url = ["--url", any_cluster.url]
    anyio.run(_leave_some_of_each, any_cluster.url, queue_name)
    capfd.readouterr()
    assert run(["status", queue_name, "--over", "0", *url]) == 0
    title, headers = capfd.readouterr().out.splitlines()[:2]
    assert title == (f"{queue_name} / g: 2 messages to do (2 of them waiting), 2 dead (2 dead letters kept), 3 delayed")
    assert headers.split() == ["SHARD", "SLOT", "NODE", "BACKLOG", "PENDING", "OLDEST", "RATE", "OWNER", "LEASE"]
    assert run(["status", queue_name, "--json", "--over", "0", *url]) == 0
    shards = objects(capfd.readouterr().out)
    assert all(shard["pending"] == 0 for shard in shards)
    counts = {"backlog": 2, "waiting": 2, "dead": 2, "dead_letters": 2, "delayed": 3}
    assert [shard["oldest_s"] is not None for shard in shards] == [shard["waiting"] == 2 for shard in shards]
    assert {name: sum(shard[name] for shard in shards) for name in counts} == counts
    assert run(["status", "--json", "--over", "0", *url]) == 0
    (line,) = (line for line in objects(capfd.readouterr().out) if line["queue"] == queue_name)
    assert {name: line[name] for name in counts} == counts
    assert run(["queue", "show", queue_name, *url]) == 0
    assert capfd.readouterr().out.splitlines()[1] == f"{queue_name}: 3 messages delayed"
    assert run(["queue", "show", queue_name, "--json", *url]) == 0
    shards = objects(capfd.readouterr().out)
    assert [sum(shard[name] for shard in shards) for name in ("delayed", "dropped")] == [3, 0]


def test_what_a_full_queue_dropped_and_delayed_ones_without_a_group(
    any_cluster: LocalCluster, queue_name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    async def send() -> None:
        async with shardq.connect(any_cluster.url) as client:
            queue = await client.queue(queue_name, shards=1, max_backlog=5, overflow="drop-oldest")
            async with queue.producer() as producer:
                for _ in range(8):
                    await producer.send(1)
                await producer.send(1, delay=3600)

    anyio.run(send)
    url = ["--url", any_cluster.url]
    assert run(["queue", "show", queue_name, *url]) == 0
    shown = capfd.readouterr().out.splitlines()[1]
    assert re.fullmatch(rf"{queue_name}: 1 messages delayed, [1-9]\d* messages dropped because it was full", shown)
    assert run(["status", queue_name, "--over", "0", *url]) == 0
    assert capfd.readouterr().out.startswith(f"{queue_name}, no group yet: 8 messages, 1 delayed\n")


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(None, "-"), (0.04, "0.0s"), (9.9, "9.9s"), (59, "59s"), (245.9, "4m05s"), (11520, "3h12m"), (187200, "2d04h")],
)
def test_ages(seconds: float | None, shown: str) -> None:
    assert age(seconds) == shown


# -- produce ----------------------------------------------------------------------------------------------------------


def test_produce_without_key_blank_lines_and_no_last_line_break(any_cluster: LocalCluster, queue_name: str) -> None:
    run(["queue", "create", queue_name, "--shards", "2", "--url", any_cluster.url])
    done = produce(any_cluster.url, queue_name, "--json", lines='1\n\n  \n"two"\r\n[3, null]')
    assert (done.returncode, json.loads(done.stdout)) == (0, {"queue": queue_name, "sent": 3}), done.stderr
    got = drain(any_cluster.url, queue_name, 3)
    assert sorted(map(repr, got)) == sorted(map(repr, [(None, 1), (None, "two"), (None, [3, None])]))
    assert produce(any_cluster.url, queue_name, lines="").stdout == "0 messages stored\n"


def test_produce_follows_a_pipe_line_by_line(
    any_cluster: LocalCluster, queue_name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    run(["queue", "create", queue_name, "--shards", "1", "--url", any_cluster.url])
    command = [sys.executable, "-m", "shardq", "produce", queue_name, "--url", any_cluster.url]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.write(b'"first"\n"half of')
        process.stdin.flush()

        def stored() -> int:
            capfd.readouterr()
            run(["status", queue_name, "--json", "--over", "0", "--url", any_cluster.url])
            return int(objects(capfd.readouterr().out)[0]["appended"])

        until(lambda: stored() == 1, "the first line is stored while the pipe is open")
        out, _ = process.communicate(b' the second"\n', timeout=30)
    assert (process.returncode, out) == (0, b"2 messages stored\n")


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (b'{"id": 1}\n{"id": 2}\nnonsense\n', r"line 3: it is not JSON .*; the 2 messages before it are stored"),
        (b'{"id": 1}\n\n{"other": 2}\n', "line 3: it has no field 'id' to be the key; the 1 messages before"),
        (b'{"id": 1}\n[1]\n', "line 2: it has no field 'id' to be the key; the 1 messages before"),
        (b'{"id": {"a": 1}}\n', "line 1: its field 'id' is no string or number .*; the 0 messages before"),
        (b'{"id": true}\n', "line 1: its field 'id' is no string or number"),
        (b'{"id": null}\n', "line 1: its field 'id' is no string or number"),
        (b'{"id": "\xff"}\n', "line 1: it is not JSON"),
        (b'{"id": 1}\n{"id": 2, "n": 123456789012345678901234567890}\n', "line 2: .*; the 1 messages before"),
        (b'{"id": 1}\n{"id": 2, "x": "' + b"x" * 1_100_000 + b'"}\n', r"line 2: .*max_message_bytes.*; the 1 messages"),
    ],
    ids=["no json", "no field", "no object", "object", "true", "null", "no utf-8", "huge number", "too large"],
)
def test_a_line_that_cannot_be_sent_is_named(
    any_cluster: LocalCluster, queue_name: str, lines: bytes, says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    run(["queue", "create", queue_name, "--shards", "2", "--url", any_cluster.url])
    done = produce(any_cluster.url, queue_name, "--key", "id", lines=lines)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(rf"error: {says}.*\n", done.stderr), done.stderr[:500]
    capfd.readouterr()
    run(["status", queue_name, "--json", "--over", "0", "--url", any_cluster.url])
    stored = sum(shard["appended"] for shard in objects(capfd.readouterr().out))
    match = re.search(r"the (\d+) messages before", done.stderr)
    assert match is not None
    assert stored == int(match[1])


def test_a_bad_line_far_into_a_large_file_leaves_all_before_it_stored(
    any_cluster: LocalCluster, queue_name: str, tmp_path: Path
) -> None:
    run(["queue", "create", queue_name, "--shards", "4", "--url", any_cluster.url])
    source = tmp_path / "large.jsonl"
    source.write_text("".join(f'{{"id": {number}, "pad": "{"x" * 60}"}}\n' for number in range(40_000)) + "oops\n1\n")
    command = [sys.executable, "-m", "shardq", "produce", queue_name, "--key", "id", "--url", any_cluster.url]
    with source.open() as lines:
        done = subprocess.run(command, stdin=lines, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: line 40001: it is not JSON")
    assert "; the 40000 messages before it are stored" in done.stderr
    status = [*command[:3], "status", queue_name, "--json", "--over", "0", "--url", any_cluster.url]
    shards = objects(subprocess.run(status, capture_output=True, text=True, timeout=60, check=True).stdout)
    assert sum(shard["appended"] for shard in shards) == 40_000


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["queue", "show", "never-declared"], "queue 'never-declared' does not exist"),
        (["status", "never-declared"], "queue 'never-declared' does not exist"),
        (["coordinator", "never-declared", "--group", "g"], "queue 'never-declared' does not exist"),
        (["queue", "create", "not a name", "--shards", "2"], "queue name 'not a name' is not valid"),
        (["coordinator", "orders", "--group", "not a name"], "group name 'not a name' is not valid"),
        (["coordinator", "orders", "--group", "g", "--lease", "0.01"], "lease must be at least"),
        (["exporter", "--port", "0", "--host", "256.1.1.1"], "can't listen on 256.1.1.1:0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_does_not_exist_is_one_line_and_status_1(
    any_cluster: LocalCluster, arguments: list[str], says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = [*arguments, "--url", any_cluster.url]
    if arguments[0] in ("coordinator", "exporter"):  # they take signals over, so they get a process of their own
        command = [sys.executable, "-m", "shardq", *arguments]
        status = subprocess.run(command, timeout=60, check=False).returncode
    else:
        status = run(arguments)
    captured = capfd.readouterr()
    assert (status, captured.out) == (1, "")
    assert re.fullmatch(rf"error: {re.escape(says)}.*\n", captured.err)


def test_other_shards_and_other_groups_are_refused(
    any_cluster: LocalCluster, queue_name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    url = ["--url", any_cluster.url]
    run(["queue", "create", queue_name, "--shards", "2", *url])
    capfd.readouterr()
    assert run(["queue", "create", queue_name, "--shards", "3", *url]) == 1
    assert f"error: queue '{queue_name}' has 2 shards, not 3" in capfd.readouterr().err
    assert run(["status", queue_name, "--group", "g", *url]) == 1
    assert f"error: queue '{queue_name}' has no group 'g': it has none yet" in capfd.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [["install"], ["queue", "list"], ["status"], ["queue", "create", "q", "--shards", "1"]],
    ids=" ".join,
)
def test_no_cluster_is_one_line_and_status_1(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    port = free_ports("127.0.0.1", 1)[0]
    assert run([*arguments, "--url", f"redis://127.0.0.1:{port}"]) == 1
    captured = capfd.readouterr()
    assert captured.out == ""
    assert re.fullmatch(rf"error: no cluster node answers at 127\.0\.0\.1:{port}: .*\n", captured.err)


@pytest.mark.parametrize(
    "arguments",
    [
        ["status", "--group", "g"],
        ["queue", "create", "q"],
        ["queue", "create", "q", "--shards", "0"],
        ["queue", "create", "q", "--shards", "1", "--overflow", "drop"],
        ["queue", "create", "q", "--shards", "1", "--max-backlog", "many"],
        ["queue", "change", "q"],
        ["produce"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_status_2(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 2
    assert "Usage: shardq" in capfd.readouterr().err


@pytest.mark.parametrize("command", ["create", "change", "list", "show"])
def test_help_of_queue_commands_shows_an_example(command: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["queue", command, "--help"]) == 0
    assert f"Example: shardq queue {command}" in capfd.readouterr().out
