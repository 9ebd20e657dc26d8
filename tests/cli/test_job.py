"""`shardq job`: what it shows of a job in every state and with every result, how it waits, and what it refuses."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest

import shardq
from shardq.cli.app import run
from shardq.ops.local_cluster import LocalCluster, find_server
from tests.cli.support import commands, until

MOMENT = datetime(2026, 11, 21, 3, 23, 34, tzinfo=UTC)
# What a handler returned, how it is shown to people (None: not at all), and what it is in JSON.
RESULTS: list[tuple[Any, str | None, Any]] = [
    (None, None, None),
    (False, "False", False),
    (-7, "-7", -7),
    (0.5, "0.5", 0.5),
    (float("nan"), "nan", "nan"),
    ("", "", ""),
    ("two\nlines \x1b[31m", r"two\nlines \x1b[31m", "two\nlines \x1b[31m"),
    (b"text", "text", "text"),
    (b"\x00\xff", "base64:AP8=", {"$base64": "AP8="}),
    ([1, b"\xff", None], "[1, {'$base64': '/w=='}, None]", [1, {"$base64": "/w=="}, None]),
    ({"image": "cat.png", "width": 200}, "{'image': 'cat.png', 'width': 200}", {"image": "cat.png", "width": 200}),
    (MOMENT, "2026-11-21 03:23:34+00:00", "2026-11-21 03:23:34+00:00"),
    (msgspec.msgpack.Ext(5, b"x"), "{'$msgpack': '1AV4'}", {"$msgpack": "1AV4"}),
]
SLOW = """
import os

import anyio

import shardq

worker = shardq.Worker({queue!r}, group="g")

@worker.handler
async def handle(message):
    while not os.path.exists("go"):
        await anyio.sleep(0.02)
"""
TIME = r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d\d\dZ"


@pytest.fixture(scope="module")
def url(shared_clusters: Callable[[Path], LocalCluster]) -> str:
    """A shared cluster of the server that is found first, for what no server kind changes."""
    return shared_clusters(find_server(None)).url


class Jobs:
    """A queue, and the ids of its jobs: one for each of RESULTS, and one dead, one retrying, one that is not due."""

    def __init__(self) -> None:
        self.queue = f"q-{uuid.uuid4().hex[:12]}"
        self.done: list[str] = []
        self.dead = self.retrying = self.queued = ""


async def _make(url: str, jobs: Jobs) -> None:
    worker = shardq.Worker(jobs.queue, group="g", retry=shardq.Retry(attempts=2, base=3600))

    @worker.handler
    async def handle(message: shardq.Message) -> Any:
        if message.value == "dies":
            raise shardq.Reject("no\x1b[31m")
        if message.value == "fails":
            raise LookupError("not\nyet")
        return RESULTS[message.value][0]

    async with shardq.connect(url) as client:
        queue = await client.queue(jobs.queue, shards=2)
        async with queue.producer() as producer:
            done = [await producer.submit(number) for number in range(len(RESULTS))]
            dead, retrying = await producer.submit("dies"), await producer.submit("fails")
            queued = await producer.submit("later", delay=3600)
        with anyio.fail_after(30):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(worker.run, client)
                for job in (*done, dead):
                    await job.ended()
                while True:
                    if (await retrying.state()).status == "retrying":
                        break
                    await anyio.sleep(0.02)
                worker.stop()
        jobs.done = [job.id for job in done]
        jobs.dead, jobs.retrying, jobs.queued = dead.id, retrying.id, queued.id


@pytest.fixture(scope="module")
def jobs(url: str) -> Jobs:
    made = Jobs()
    anyio.run(_make, url, made)
    return made


Job = Callable[..., str]


@pytest.fixture
def job(url: str, capfd: pytest.CaptureFixture[str]) -> Job:
    """`shardq job ...`: what it prints; its error when it ends with status 1 or 2."""

    def call(*arguments: str, status: int = 0) -> str:
        capfd.readouterr()
        assert run(["job", *arguments, "--url", url]) == status
        printed = capfd.readouterr()
        return printed.err if status else printed.out

    return call


def fields(printed: str) -> dict[str, str]:
    return dict(re.split(r": +|:$", line, maxsplit=1) for line in printed.splitlines())


# -- states ------------------------------------------------------------------------------------------------------------


def test_one_that_is_done(job: Job, jobs: Jobs) -> None:
    name = jobs.done[10]
    lines = job(name).splitlines()
    assert lines[:5] == [
        f"id:        {name}",
        "status:    done",
        f"queue:     {jobs.queue}",
        "group:     g",
        "attempts:  1",
    ]
    assert re.fullmatch(f"submitted: {TIME}", lines[5])
    assert re.fullmatch(f"updated:   {TIME}", lines[6])
    assert lines[7:] == ["result:    {'image': 'cat.png', 'width': 200}"]
    (found,) = map(json.loads, job(name, "--json").splitlines())
    times = found.pop("submitted_ms"), found.pop("updated_ms")
    assert 0 < times[0] <= times[1]
    assert found == {
        "id": name,
        "status": "done",
        "queue": jobs.queue,
        "group": "g",
        "attempts": 1,
        "result": {"image": "cat.png", "width": 200},
        "error": "",
    }


@pytest.mark.parametrize("at", range(len(RESULTS)), ids=lambda at: repr(RESULTS[at][0])[:30])
def test_results_of_every_type(job: Job, jobs: Jobs, at: int) -> None:
    _, text, value = RESULTS[at]
    assert fields(job(jobs.done[at])).get("result") == text
    assert json.loads(job(jobs.done[at], "--json"))["result"] == value


def test_one_that_is_dead(job: Job, jobs: Jobs) -> None:
    shown = fields(job(jobs.dead))
    assert (shown["status"], shown["attempts"]) == ("dead", "1")
    assert "no" in shown["error"]
    assert "\x1b" not in shown["error"]
    assert "result" not in shown
    assert json.loads(job(jobs.dead, "--json"))["result"] is None


def test_one_that_is_tried_again(job: Job, jobs: Jobs) -> None:
    shown = fields(job(jobs.retrying))
    assert (shown["status"], shown["attempts"], shown["error"]) == ("retrying", "1", r"LookupError('not\nyet')")


def test_one_that_nobody_has_handled(job: Job, jobs: Jobs) -> None:
    assert list(fields(job(jobs.queued))) == ["id", "status", "queue", "attempts", "submitted", "updated"]
    found = json.loads(job(jobs.queued, "--json"))
    assert (found["status"], found["group"], found["attempts"], found["error"]) == ("queued", "", 0, "")


def submit(url: str, queue: str) -> str:
    """Submits a job to a queue of one shard; returns its id."""

    async def main() -> str:
        async with shardq.connect(url) as client, (await client.queue(queue, shards=1)).producer() as producer:
            return (await producer.submit(7)).id

    return anyio.run(main)


# -- waiting -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wait", ["30", "2m", "0.5h"])
def test_what_has_ended_is_not_waited_for(job: Job, jobs: Jobs, wait: str) -> None:
    assert fields(job(jobs.done[0], "--wait", wait))["status"] == "done"
    assert fields(job(jobs.dead, "--wait", wait))["status"] == "dead"


@pytest.mark.parametrize("wait", ["0.2", "200ms"])
def test_what_does_not_end_in_time_is_one_line_and_status_1(job: Job, jobs: Jobs, wait: str) -> None:
    for name in (jobs.queued, jobs.retrying):
        error = job(name, "--wait", wait, status=1)
        assert error == f"error: job {name} did not end within 0.2 s: wait again, or look at its state\n"


def test_it_waits_for_the_end(job: Job, url: str, queue_name: str, tmp_path: Path) -> None:
    async def work() -> None:
        worker = shardq.Worker(queue_name, group="g")

        @worker.handler
        async def handle(message: shardq.Message) -> int:
            worker.stop()
            return int(message.value) * 2

        with anyio.fail_after(30):
            async with shardq.connect(url) as client:
                await worker.run(client)

    name = submit(url, queue_name)
    with commands(tmp_path) as start:
        waiting = start("job", name, "--wait", "60", "--json", "--url", url)
        assert fields(job(name))["status"] == "queued"
        anyio.run(work)
        assert waiting.wait() == 0, waiting.stderr
        found = json.loads(waiting.stdout)
        assert (found["status"], found["result"]) == ("done", 14)


def test_one_that_runs(job: Job, url: str, queue_name: str, tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW.format(queue=queue_name))
    name = submit(url, queue_name)
    with commands(tmp_path) as start:
        worker = start("work", "slow:worker", "--url", url)
        until(lambda: fields(job(name))["status"] == "running", "the handler")
        (tmp_path / "go").touch()
        assert fields(job(name, "--wait", "30"))["status"] == "done"
        assert worker.stop() == 0


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["soon", "-1", "nan", "inf", ""])
def test_what_is_no_length_of_time(job: Job, text: str) -> None:
    assert f"{text!r} is no length of time: write 90" in job("q/0/0123456789abcdef", f"--wait={text}", status=2)


@pytest.mark.parametrize("name", ["nonsense", "", "q/0", "q/0/xyz", "q/0/0123456789abcdef/0", "\udcff"], ids=repr)
def test_what_is_no_id(job: Job, name: str) -> None:
    error = job(name, status=1)
    assert error == f"error: {name!r} is not a job id; it looks like orders/3/9f86d081884c7d65 (queue/shard/random)\n"


@pytest.mark.parametrize("options", [[], ["--json"], ["--wait", "5"]], ids=str)
def test_what_is_not_there_is_one_line(job: Job, jobs: Jobs, options: list[str]) -> None:
    for name, says in (
        (f"{jobs.queue}/0/0123456789abcdef", "error: no job "),
        (f"{jobs.queue}/9/0123456789abcdef", "is not of queue"),
        ("none/0/0123456789abcdef", "error: queue 'none' does not exist"),
    ):
        error = job(name, *options, status=1)
        assert says in error
        assert error.count("\n") == 1


def test_help_shows_an_example(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["job", "--help"]) == 0
    assert "Example: shardq job orders/3/" in capfd.readouterr().out
