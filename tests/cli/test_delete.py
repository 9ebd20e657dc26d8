"""`shardq delete` and `shardq trim`: what goes and what stays, what they say of it, and what they refuse."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import anyio
import pytest

import shardq
from shardq.cli.app import run
from shardq.ops.local_cluster import LocalCluster, find_server

Shardq = Callable[..., str]


@pytest.fixture(scope="module")
def url(shared_clusters: Callable[[Path], LocalCluster]) -> str:
    """A shared cluster of the server that is found first, for what no server kind changes."""
    return shared_clusters(find_server(None)).url


@pytest.fixture
def shardq_(url: str, capfd: pytest.CaptureFixture[str]) -> Shardq:
    """`shardq ...`: what it prints; its error when it ends with status 1, 2 or 130."""

    def call(*arguments: str, status: int = 0) -> str:
        capfd.readouterr()
        assert run([*arguments, "--url", url]) == status
        printed = capfd.readouterr()
        return printed.err if status else printed.out

    return call


def objects(printed: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in printed.splitlines()]


async def _send(url: str, queue: str, values: list[Any], *, together: bool, **settings: Any) -> list[str]:
    async with shardq.connect(url) as client:
        joined = await client.queue(queue, shards=1, **settings)
        async with joined.producer() as producer:
            if together:
                await producer.send_many(("k", value) for value in values)
            else:
                for value in values:
                    await producer.send(value, key="k")
        return [record.id async for record in joined.history()]


def send(url: str, queue: str, *values: Any, together: bool = False, **settings: Any) -> list[str]:
    """Sends to a queue of one shard, in one batch or one by one; returns the ids of all that it holds."""

    async def main() -> list[str]:
        return await _send(url, queue, list(values), together=together, **settings)

    return anyio.run(main)


def work(url: str, queue: str, *, group: str = "g", attempts: int = 6) -> list[Any]:
    """Handles what there is for the group; with `attempts` 1 every message becomes a dead letter."""
    got: list[Any] = []
    worker = shardq.Worker(queue, group=group, retry=shardq.Retry(attempts=attempts))

    @worker.handler
    async def handle(message: shardq.Message) -> None:
        got.append(message.value)
        if attempts == 1:
            raise ValueError("no")

    async def main() -> None:
        async with shardq.connect(url) as client:
            joined = await client.queue(queue)
            await joined.open_group(group)
            with anyio.fail_after(30):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(worker.run, client)
                    while True:
                        if all(each.backlog == 0 for each in await joined.groups() if each.name == group):
                            break
                        await anyio.sleep(0.02)
                    worker.stop()

    anyio.run(main)
    return got


def values(shardq_: Shardq, queue: str) -> list[Any]:
    return [each["value"] for each in objects(shardq_("peek", queue, "--json", "-n", "1000"))]


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Has the next question answered with this."""
    return lambda text: monkeypatch.setattr("sys.stdin", io.StringIO(text))


# -- delete ------------------------------------------------------------------------------------------------------------


def test_a_message_that_every_group_has_finished_is_gone_at_once(shardq_: Shardq, url: str, queue_name: str) -> None:
    ids = send(url, queue_name, "a", "b", "c", together=True, retention="1d")
    work(url, queue_name)
    assert shardq_("delete", queue_name, ids[1], "--yes") == f"{ids[1]} is deleted\n"
    assert values(shardq_, queue_name) == ["a", "c"]
    assert objects(shardq_("delete", queue_name, ids[2], "--yes", "--json")) == [
        {"id": ids[2], "deleted": True, "bytes_gone": True}
    ]
    assert values(shardq_, queue_name) == ["a"]


def test_bytes_that_can_not_go_yet(shardq_: Shardq, url: str, queue_name: str) -> None:
    ids = send(url, queue_name, "a", "b", "c", together=True, retention="1d")
    shardq_("group", "create", queue_name, "g")
    assert shardq_("delete", queue_name, ids[1], "--yes") == (
        f"{ids[1]} is deleted; its bytes go when every group has finished its batch\n"
    )
    assert objects(shardq_("delete", queue_name, ids[1], "--yes", "--json")) == [
        {"id": ids[1], "deleted": True, "bytes_gone": False}
    ], "safe to repeat"
    assert work(url, queue_name) == ["a", "c"]
    assert shardq_("delete", queue_name, ids[1], "--yes") == f"{ids[1]} is deleted\n"
    assert values(shardq_, queue_name) == ["a", "c"]


def test_a_dead_letter_of_it_goes_too(shardq_: Shardq, url: str, queue_name: str) -> None:
    ids = send(url, queue_name, "a", "b", together=True)
    work(url, queue_name, attempts=1)
    dead = ["dead", "list", queue_name, "--group", "g", "--json"]
    assert [each["message_id"] for each in objects(shardq_(*dead))] == ids
    assert shardq_("delete", queue_name, ids[0], "--yes") == f"{ids[0]} is deleted\n"
    assert [each["message_id"] for each in objects(shardq_(*dead))] == ids[1:]
    error = shardq_("delete", queue_name, ids[0], "--yes", status=1)
    assert error.startswith(f"error: message {ids[0]} is not stored (any more)")


def test_a_message_that_is_not_due(shardq_: Shardq, url: str, queue_name: str) -> None:
    async def main() -> str:
        async with shardq.connect(url) as client:
            async with (await client.queue(queue_name, shards=1)).producer() as producer:
                return await producer.send("secret", delay=3600)

    name = anyio.run(main)
    assert re.fullmatch(r"0/d\d+/0", name)
    assert shardq_("delete", queue_name, name, "--yes") == f"{name} is deleted\n"
    assert "is not among the delayed messages (any more)" in shardq_("delete", queue_name, name, "--yes", status=1)


def test_it_asks_first(
    shardq_: Shardq,
    url: str,
    queue_name: str,
    answer: Callable[[str], None],
    capfd: pytest.CaptureFixture[str],
) -> None:
    ids = send(url, queue_name, "a", "b")
    for text in ("n\n", "\n", ""):
        answer(text)
        asked = shardq_("delete", queue_name, ids[0], status=130)
        assert asked.startswith(f"Delete message {ids[0]} of {queue_name} for good? [y/N]:")
    assert values(shardq_, queue_name) == ["a", "b"]
    answer("y\n")
    assert run(["delete", queue_name, ids[0], "--json", "--url", url]) == 0
    assert json.loads(capfd.readouterr().out)["deleted"] is True, "the question is not on stdout"
    assert values(shardq_, queue_name) == ["b"]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nonsense", "error: 'nonsense' is not a message id; it looks like 3/1795231414661-0/7"),
        ("", "error: '' is not a message id"),
        ("\udcff", r"error: '\udcff' is not a message id"),
        ("0/1-0", "error: '0/1-0' is not a message id"),
        ("0/1-0/0", "error: message 0/1-0/0 is not stored (any more): every group has finished it, or it never was"),
        ("7/1-0/0", "error: there is no shard 7: is 7/1-0/0 an id of another queue?"),
        ("0/d9/0", "error: 0/d9/0 is not among the delayed messages (any more)"),
        ("7/d9/0", "error: '7/d9/0' is not a message id"),
    ],
)
def test_refusals_of_delete_are_one_line(shardq_: Shardq, url: str, queue_name: str, name: str, says: str) -> None:
    send(url, queue_name, "a")
    error = shardq_("delete", queue_name, name, "--yes", status=1)
    assert error.startswith(says)
    assert error.count("\n") == 1
    assert values(shardq_, queue_name) == ["a"]


# -- trim --------------------------------------------------------------------------------------------------------------


def test_all_that_is_kept_of_finished_messages(shardq_: Shardq, url: str, queue_name: str) -> None:
    send(url, queue_name, *range(5), retention="1d")
    work(url, queue_name)
    assert shardq_("trim", queue_name, "--before", "earliest") == f"{queue_name}: 0 entries went\n"
    assert values(shardq_, queue_name) == list(range(5))
    assert shardq_("trim", queue_name, "--before", "latest") == f"{queue_name}: 5 entries went\n"
    assert values(shardq_, queue_name) == []
    assert objects(shardq_("trim", queue_name, "--before", "latest", "--json")) == [
        {"queue": queue_name, "entries_gone": 0}
    ]


def test_every_form_of_a_moment(shardq_: Shardq, url: str, queue_name: str) -> None:
    ids = send(url, queue_name, *range(6), retention="1d")
    work(url, queue_name)
    now = datetime.now(UTC)
    for before, gone in (
        ("2024-01-31T08:00Z", 0),
        ("1700000000.5", 0),
        (ids[0], 0),
        (ids[2], 2),
        ((now + timedelta(hours=1)).isoformat(), 4),
    ):
        assert objects(shardq_("trim", queue_name, "--before", before, "--json"))[0]["entries_gone"] == gone, before


def test_what_some_group_has_not_finished_stays(shardq_: Shardq, url: str, queue_name: str) -> None:
    send(url, queue_name, "a", "b", retention="1d")
    shardq_("group", "create", queue_name, "late")
    work(url, queue_name)
    send(url, queue_name, "c")
    assert shardq_("trim", queue_name, "--before", "latest") == f"{queue_name}: 0 entries went\n"
    assert work(url, queue_name, group="late") == ["a", "b", "c"]
    assert shardq_("trim", queue_name, "--before", "latest") == f"{queue_name}: 2 entries went\n"
    assert work(url, queue_name) == ["c"]


@pytest.mark.parametrize(
    ("before", "status", "says"),
    [
        ("yesterday", 2, "'yesterday' is none of: earliest, latest"),
        ("", 2, "'' is none of"),
        ("2024-01-31T08:00", 2, "says no time zone"),
        ("7/1-0/0", 1, "error: 7/1-0/0 names shard 7, which this queue does not have\n"),
        ("7/8", 1, "error: '7/8' is not a message id"),
        ("1795231414661", 1, "error: 1795231414661.0 is no time"),
    ],
)
def test_what_is_no_moment(shardq_: Shardq, url: str, queue_name: str, before: str, status: int, says: str) -> None:
    send(url, queue_name, "a", retention="1d")
    assert says in shardq_("trim", queue_name, "--before", before, status=status)
    assert values(shardq_, queue_name) == ["a"]


# -- both --------------------------------------------------------------------------------------------------------------


def test_a_queue_that_is_not_there(shardq_: Shardq) -> None:
    for arguments in (["delete", "none", "0/1-0/0", "--yes"], ["trim", "none", "--before", "latest"]):
        error = shardq_(*arguments, status=1)
        assert error.startswith("error: queue 'none' does not exist")
        assert error.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", [["delete", "q"], ["delete", "q", "0/1-0/0", "0/1-0/1"], ["trim", "q"], ["trim"]], ids=" ".join
)
def test_wrong_usage(shardq_: Shardq, arguments: list[str]) -> None:
    assert f"Usage: shardq {arguments[0]}" in shardq_(*arguments, status=2)


@pytest.mark.parametrize("command", ["delete", "trim"])
def test_help_shows_an_example(command: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run([command, "--help"]) == 0
    assert f"Example: shardq {command} orders" in capfd.readouterr().out
