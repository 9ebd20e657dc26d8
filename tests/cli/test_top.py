"""`shardq top` on a terminal: what it shows is what is there, keys work at once, and the terminal is left as it was."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest
from rich.console import Console

import shardq
from shardq.cli.app import run
from shardq.cli.top_view import draw
from shardq.ops.inspect import QueueView, ShardView
from shardq.ops.local_cluster import LocalCluster
from shardq.ops.top.board import Board
from shardq.ops.top.state import settle, start
from tests.cli.screen import Terminal, terminal
from tests.cli.support import commands

pytestmark = pytest.mark.server_kinds("valkey9")  # what it reads is held to every kind in ops/test_inspect.py

SHARDS = 40


@pytest.fixture(scope="module")
def cluster(server_binary: Path) -> Iterator[LocalCluster]:
    """Of its own: other tests' queues would fill the screen."""
    with LocalCluster(3, 0, None, server_binary) as made:
        yield made


@pytest.fixture(scope="module")
def queue(cluster: LocalCluster) -> str:
    """40 shards; the group `slow` has all 400 messages to do, and `done` has none."""
    name = "top-screen"

    async def fill() -> None:
        async with shardq.connect(cluster.url) as client:
            queue = await client.queue(name, shards=SHARDS)
            await queue.open_group("slow")
            async with queue.producer() as producer:
                await producer.send_many((f"k{number}", number) for number in range(400))
            await queue.open_group("done", "latest")

    anyio.run(fill)
    return name


@pytest.fixture
def live(cluster: LocalCluster, queue: str) -> Iterator[Terminal]:
    with terminal("top", queue, "--group", "slow", "--interval", "0.2", "--url", cluster.url) as running:
        yield running


def whole(text: str) -> bool:
    """Not half drawn: the last line is there, and it is the last."""
    return "q quit" in text.split("\n")[-1]


def line(text: str, pattern: str) -> str | None:
    found = re.search(pattern, text, re.MULTILINE)
    return found[0] if found else None


def test_shards_scroll_and_open_and_the_way_back_ends_with_the_terminal_as_it_was(live: Terminal, queue: str) -> None:
    shown = live.until(lambda text: "backlog 400" in text and whole(text), "the totals")
    assert f"shardq top   {queue} / slow" in shown
    assert re.search(r"^ SHARD▲ .* NODE +BACKLOG +PENDING +OLDEST +STORED/S +HANDLED/S +OWNER", shown, re.MULTILINE)
    assert len(re.findall(r"^ +\d+ .*127\.0\.0\.1", shown, re.MULTILINE)) == 24 - 6
    live.type(b"\x1b[F")
    live.until(lambda text: line(text, r"^ +39 .*127") is not None, "the last shard")
    assert line(live.text, r"^ +0 .*127") is None
    live.type(b"\r")
    shown = live.until(lambda text: "shard 39" in text, "one shard")
    assert "hashes f999999a-ffffffff" in shown
    assert re.search(r"^ done +0 .*^ slow +\d", shown, re.MULTILINE | re.DOTALL)
    live.type(b"\x1b")
    live.until(lambda text: "shard 39" not in text and line(text, r"^ +39 .*127") is not None, "the shards again")
    live.type(b"g")
    live.until(lambda text: f"{queue} / done" in text and "backlog 0" in text, "the other group")
    live.type(b"?")
    live.until(lambda text: "sort by the next column" in text, "help")
    live.type(b"?ss")
    live.until(lambda text: "NODE▲" in text, "another order")
    live.type(b"q")
    assert live.end() == 0
    assert live.is_as_it_was


def test_all_queues_and_another_size(cluster: LocalCluster, queue: str) -> None:
    with terminal("top", "--url", cluster.url, columns=60, lines=12) as live:
        live.until(lambda text: line(text, rf"^ {queue} +slow +400 ") is not None, "the queue's line")
        live.resize(160, 30)
        wide = "the columns that a narrow terminal goes without, and the keys in the last line"
        live.until(lambda text: "LEASES" in text and whole(text), wide)
        live.resize(20, 4)
        live.until(lambda text: text.startswith(" shardq") and "Enter" in text.split("\n")[-1], "next to nothing")


@pytest.mark.parametrize("how", ["Ctrl-C", "SIGTERM", "SIGHUP"])
def test_whatever_ends_it_the_terminal_is_as_it_was(live: Terminal, how: str) -> None:
    live.until(lambda text: "backlog 400" in text, "the totals")
    if how == "Ctrl-C":
        live.type(b"\x03")
    else:
        os.kill(live.process.pid, signal.Signals[how])
    assert live.end() == 0
    assert live.is_as_it_was
    assert b"Traceback" not in live.written


@asynccontextmanager
async def _worked(url: str, queue: str) -> AsyncIterator[None]:
    """Messages are sent and handled by one worker."""
    worker = shardq.Worker(queue, group="g", name="hand-1")

    @worker.handler
    async def handle(message: shardq.Message) -> None:
        return

    async with shardq.connect(url) as client:
        joined = await client.queue(queue, shards=3)
        async with joined.producer() as producer, anyio.create_task_group() as tasks:

            async def feed() -> None:
                while True:
                    await producer.send_many((f"k{number}", number) for number in range(20))
                    await anyio.sleep(0.05)

            tasks.start_soon(worker.run, client)
            tasks.start_soon(feed)
            yield
            tasks.cancel_scope.cancel()


def test_rates_and_workers_are_those_of_real_traffic(cluster: LocalCluster, queue_name: str) -> None:
    async def main() -> None:
        async with _worked(cluster.url, queue_name):
            await anyio.to_thread.run_sync(look)

    def look() -> None:
        with terminal("top", "--url", cluster.url, columns=200, lines=50) as live:
            busy = rf"^ {queue_name} +g +3 .*\d ━+.*\d ━+.* 1 +3$"
            live.until(lambda text: line(text, busy) is not None, "rates, their bars, one worker with three leases")
            names = [each.split()[0] for each in live.text.splitlines()[4:] if each.startswith(" ") and each.strip()]
            live.type(b"j" * names.index(queue_name) + b"w")
            live.until(lambda text: line(text, r"^ hand-1 +leader +3 ") is not None, "the worker")
            live.type(b"\r")
            live.until(lambda text: "worker hand-1" in text and line(text, r"^ +2 .*held") is not None, "its shards")
            live.type(b"q")
            assert live.end() == 0

    anyio.run(main)


def _chosen(live: Terminal) -> str:
    """The row that is shown in reverse, below the title."""
    for number, text in enumerate(live.screen.display):
        if number > 0 and live.screen.buffer[number][0].reverse:
            return str(text)
    return ""


def test_an_outage_is_a_red_line_with_the_last_values_and_ends_with_it(server_binary: Path, tmp_path: Path) -> None:
    with LocalCluster(3, 0, None, server_binary, settings={"cluster-node-timeout": "60000"}) as own:
        with commands(tmp_path) as start:
            assert start("queue", "create", "q", "--shards", "6", "--url", own.url).wait() == 0
        with terminal("top", "q", "--interval", "0.2", "--url", own.url) as live:
            live.until(lambda text: line(text, r"^ +5 .*127") is not None, "six shards")
            for process in own.processes:
                os.kill(process.pid, signal.SIGSTOP)
            try:
                shown = live.until(lambda text: "no answer for" in text or "can't be read" in text, "the outage")
                assert len(re.findall(r"^ +\d .*127", shown, re.MULTILINE)) == 6
                number = next(n for n, each in enumerate(live.screen.display) if "no answer" in each or "can't" in each)
                assert live.screen.buffer[number][0].fg == "red"
                live.type(b"j")
                live.until(lambda text: _chosen(live).split()[0] == "1", "a key that works all the same")
            finally:
                for process in own.processes:
                    os.kill(process.pid, signal.SIGCONT)
            live.until(lambda text: "no answer" not in text and "can't" not in text, "the end of the outage")
            live.type(b"q")
            assert live.end() == 0
            assert live.is_as_it_was


# -- no terminal ------------------------------------------------------------------------------------------------------


def test_a_pipe_gets_one_table(cluster: LocalCluster, queue: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["top", "--interval", "0.1", "--url", cluster.url]) == 0
    out = capfd.readouterr().out
    assert re.search(rf"^{queue} +slow +{SHARDS} +400 +0 +\S+ +0 +0 +0 +0 +0$", out, re.MULTILINE)
    assert out.count("QUEUE") == 1
    assert "\x1b" not in out


def test_json_is_an_object_for_every_look(cluster: LocalCluster, queue: str, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["top", queue, "--group", "slow", "--json", "--count", "3", "--interval", "0.1"]
    assert run([*arguments, "--url", cluster.url]) == 0
    looks = [json.loads(each) for each in capfd.readouterr().out.splitlines()]
    assert len(looks) == 3
    for look in looks:
        assert (look["queue"], look["group"], look["trouble"]) == (queue, "slow", None)
        assert sum(each["backlog"] for each in look["shards"]) == look["totals"]["backlog"] == 400
        assert [each["shard"] for each in look["shards"]] == list(range(SHARDS))
        assert all(each["stored_rate"] == 0 for each in look["shards"])
    assert [look["time"] for look in looks] == sorted({look["time"] for look in looks})


def test_json_goes_on_until_nobody_reads(cluster: LocalCluster) -> None:
    command = [sys.executable, "-m", "shardq", "top", "--json", "--interval", "0.1", "--url", cluster.url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert "queues" in json.loads(process.stdout.readline())
        assert "queues" in json.loads(process.stdout.readline())
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(30) == 0


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["never-declared"], 1, "queue 'never-declared' does not exist"),
        (["QUEUE", "--group", "never"], 1, "queue 'QUEUE' has no group 'never': `shardq group list QUEUE`"),
        (["--group", "g"], 2, "--group needs the"),
        (["--interval", "0"], 2, "Invalid value for '--interval'"),
    ],
    ids=["queue", "group", "no queue", "interval"],
)
def test_refusals(
    cluster: LocalCluster,
    queue: str,
    arguments: list[str],
    status: int,
    says: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert run(["top", *(each.replace("QUEUE", queue) for each in arguments), "--url", cluster.url]) == status
    error = capfd.readouterr().err
    assert error.startswith("error: ")
    assert says.replace("QUEUE", queue) in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("width", [60, 80, 160])
def test_a_hot_shard_is_marked_however_narrow_the_terminal_is(width: int) -> None:
    def view(second: int) -> QueueView:
        shards = {
            number: ShardView(number, 0, 1, 0, "n:1", "open", second * 1000, second * rate, 0, 0, 0, 0, {})
            for number, rate in enumerate((10, 900, 10))
        }
        return QueueView("q", shards, {})

    board = Board().updated({"q": view(1)}, {}, whole=True).updated({"q": view(2)}, {}, whole=True)
    console = Console(width=width, file=io.StringIO())
    with console.capture() as shown:
        console.print(draw(settle(start("q"), board, 10), board, width, 16))
    assert re.findall(r"^!? +(\d)", shown.get(), re.MULTILINE) == ["0", "1", "2"]
    assert re.findall(r"^! +(\d)", shown.get(), re.MULTILINE) == ["1"]
    assert (" hot" in shown.get()) is (width == 160)
