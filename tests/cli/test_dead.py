"""`shardq dead`: what it shows, for people and for programs, which dead letters it takes, and what it refuses."""

from __future__ import annotations

import io
import json
import math
import re
import time
import uuid
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest

import shardq
from shardq.cli.app import run
from shardq.core.intake import dead_letter
from shardq.ops.local_cluster import LocalCluster, find_server
from shardq.storage.commands import pack_command
from tests.cli.support import commands, until

NOW_MS = time.time_ns() // 1_000_000
HOUR_MS = 3_600_000
BOLD = re.compile(r"\x1b\[\d*m")
HUGE = "E" * 1500 + " the end"

WORKER = """
import os

import shardq

worker = shardq.Worker({queue!r}, group="g", name="w1", retry=shardq.Retry(attempts=1))

@worker.handler
async def handle(message):
    if os.path.exists("broken"):
        raise ValueError("broken")
    with open("handled", "a") as journal:
        journal.write(f"{{message.value}}\\n")
"""

Dead = Callable[..., str]


@pytest.fixture(scope="module")
def url(shared_clusters: Callable[[Path], LocalCluster]) -> str:
    """A shared cluster of the server that is found first, for what no server kind changes."""
    return shared_clusters(find_server(None)).url


@pytest.fixture
def dead(url: str, capfd: pytest.CaptureFixture[str]) -> Dead:
    """`shardq dead COMMAND QUEUE ... --group g`: what it prints; its error when it ends with status 1, 2 or 130."""

    def call(command: str, queue: str, *arguments: str, status: int = 0, group: str = "g") -> str:
        capfd.readouterr()
        assert run(["dead", command, queue, *arguments, "--group", group, "--url", url]) == status
        printed = capfd.readouterr()
        return printed.err if status else printed.out

    return call


def objects(printed: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in printed.splitlines()]


def columns(line: str) -> list[str]:
    return re.split(r"\s{2,}", line.strip())


# -- dead letters as they are stored, for what only reads --------------------------------------------------------------


async def _store(url: str, queue: str, records: Sequence[tuple[int, bytes]]) -> list[str]:
    async with shardq.connect(url) as client:
        joined = await client.queue(queue, shards=1)
        await joined.open_group("g")
        keys = joined.shards[0]
        packed = [pack_command("XADD", keys.dead("g"), "*", "count", count, "record", raw) for count, raw in records]
        return [f"0/{(await client.pipes.command(keys.slot, each)).decode()}" for each in packed]


def store(url: str, queue: str, *records: dict[str, Any] | tuple[int, bytes]) -> list[str]:
    """Dead letters with these fields, or of so many messages with these bytes; returns their ids."""
    given = {"id": "0/1-0/0", "key": None, "value": None, "attempts": 3, "sent_at_ms": NOW_MS, "error": "no"}
    made = [
        each
        if isinstance(each, tuple)
        else (1, msgspec.msgpack.encode(given | {"failed_at_ms": NOW_MS, "traceback": ""} | each))
        for each in records
    ]
    return anyio.run(_store, url, queue, made)


@pytest.fixture(scope="module")
def stored(url: str) -> tuple[str, list[str]]:
    """A queue, and the ids of its five dead letters: one day, two hours, one hour, half an hour old, and new."""
    queue = f"q-{uuid.uuid4().hex[:12]}"
    ids = store(
        url,
        queue,
        {"key": "user:1", "error": "LookupError('no such bank')", "failed_at_ms": NOW_MS - 24 * HOUR_MS},
        {"key": b"\xff\xfe", "error": "TimeoutError()", "failed_at_ms": NOW_MS - 2 * HOUR_MS, "attempts": 12},
        {"key": "user:1", "error": "TimeoutError()", "failed_at_ms": NOW_MS - HOUR_MS - 60_000},
        {"key": "", "error": HUGE, "failed_at_ms": NOW_MS - HOUR_MS // 2},
        (7, dead_letter("1-2", None, b"\x00\xff", "a record batch of version 0")),
    )
    return queue, ids


def test_a_line_for_each(dead: Dead, stored: tuple[str, list[str]]) -> None:
    queue, ids = stored
    header, *lines = dead("list", queue).splitlines()
    assert header.split() == ["ID", "FAILED", "TRIES", "KEY", "ERROR"]
    assert all(len(line) <= 160 for line in lines)
    found = [columns(line) for line in lines]
    assert [each[0] for each in found] == ids
    assert re.fullmatch(r"1d00h 2h\d\dm 1h\d\dm [34]\dm\d\ds", " ".join(each[1] for each in found[:4]))
    assert [each[2] for each in found] == ["3", "12", "3", "3", "0"]
    assert [each[3] for each in found[:3]] == ["user:1", "base64://4=", "user:1"]
    assert [line[header.index("ERROR") :] for line in lines[:3]] == [
        "LookupError('no such bank')",
        "TimeoutError()",
        "TimeoutError()",
    ]
    assert re.fullmatch(r"E+\.\.\.", lines[3][header.index("ERROR") :]), "shortened"
    assert columns(lines[4])[3:] == ["-", "a record batch of version 0"]


def test_a_json_object_for_each(dead: Dead, stored: tuple[str, list[str]]) -> None:
    queue, ids = stored
    found = objects(dead("list", queue, "--json"))
    assert [each["id"] for each in found] == ids
    assert [each["key"] for each in found] == ["user:1", {"$base64": "//4="}, "user:1", "", None]
    assert [each["error"] for each in found[3:]] == [HUGE, "a record batch of version 0"]
    assert [each["messages"] for each in found] == [1, 1, 1, 1, 7]
    assert [each["raw"] for each in found] == [None, None, None, None, {"$base64": "AP8="}]
    assert found[1]["failed_at_ms"] == NOW_MS - 2 * HOUR_MS
    assert (found[0]["message_id"], found[4]["message_id"]) == ("0/1-0/0", "")
    names = {"shard", "value", "headers", "attempts", "sent_at_ms", "traceback"}
    assert all(names <= set(each) for each in found)


@pytest.mark.parametrize(
    ("filters", "places"),
    [
        ([], [0, 1, 2, 3, 4]),
        (["--key", "user:1"], [0, 2]),
        (["--key", "\udcff\udcfe"], [1]),  # as Python gives an argument that is not UTF-8
        (["--key", ""], [3]),
        (["--key", "nobody"], []),
        (["--error", "TIMEOUT"], [1, 2]),
        (["--error", "record batch"], [4]),
        (["--older-than", "90m"], [0, 1]),
        (["--older-than", "3600"], [0, 1, 2]),
        (["--older-than", "1.5h"], [0, 1]),
        (["--older-than", "1d"], [0]),
        (["--older-than", "2w"], []),
        (["--newer-than", "3h"], [1, 2, 3, 4]),
        (["--newer-than", "0"], []),
        (["--older-than", "45m", "--newer-than", "3h"], [1, 2]),
        (["--key", "user:1", "--error", "timeout", "--newer-than", "1d"], [2]),
        (["-n", "2"], [0, 1]),
        (["-n", "1", "--error", "timeout"], [1]),
        (["-n", "5"], [0, 1, 2, 3, 4]),
    ],
    ids=str,
)
def test_filters(dead: Dead, stored: tuple[str, list[str]], filters: list[str], places: list[int]) -> None:
    queue, ids = stored
    assert [each["id"] for each in objects(dead("list", queue, "--json", *filters))] == [ids[at] for at in places]


def test_a_list_that_was_cut_off_says_so(
    url: str, stored: tuple[str, list[str]], capfd: pytest.CaptureFixture[str]
) -> None:
    for limit, said in (("4", "There are more than these 4: filters choose among them, -n shows more.\n"), ("5", "")):
        assert run(["dead", "list", stored[0], "--group", "g", "-n", limit, "--url", url]) == 0
        assert capfd.readouterr().err == said
        assert run(["dead", "list", stored[0], "--group", "g", "-n", limit, "--json", "--url", url]) == 0
        assert capfd.readouterr().err == ""


def test_on_a_terminal_the_error_takes_what_room_there_is(
    dead: Dead, stored: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    for width in (80, 200):
        monkeypatch.setenv("COLUMNS", str(width))
        lines = BOLD.sub("", dead("list", stored[0])).splitlines()
        assert len(lines) == 6
        assert all(len(line) <= width for line in lines)
        assert len(lines[4].rstrip()) > width - 4
    monkeypatch.setenv("COLUMNS", "20")
    lines = BOLD.sub("", dead("list", stored[0])).splitlines()
    assert [columns(line)[0] for line in lines[1:]] == stored[1], "too narrow: lines wrap, ids stay whole"


def test_wide_characters_keep_the_columns(dead: Dead, url: str, queue_name: str) -> None:
    store(url, queue_name, {"key": "客户", "error": "注文" * 200}, {"key": "abcd", "error": "x"})
    first, second = dead("list", queue_name).splitlines()[1:]
    assert first[: first.index("注")].endswith("  客户  ")
    assert second.endswith("  abcd  x")
    assert first.endswith(("注文...", "注..."))
    assert len(first) < 110


def test_no_dead_letters(dead: Dead, url: str, queue_name: str) -> None:
    store(url, queue_name)
    assert dead("list", queue_name).split() == ["ID", "FAILED", "TRIES", "KEY", "ERROR"]
    assert dead("list", queue_name, "--json") == ""
    assert dead("replay", queue_name, "--all") == "0 dead letters replayed\n"
    assert dead("purge", queue_name, "--all") == "0 dead letters purged\n", "nothing to ask about"


# -- show --------------------------------------------------------------------------------------------------------------

DEEP: Any = "bottom"
for _ in range(400):
    DEEP = [DEEP]
MOMENT = datetime(2026, 11, 21, 3, 23, 34, tzinfo=UTC)
VALUES: list[tuple[Any, str, Any]] = [
    (None, "null", None),
    (True, "true", True),
    (-7, "-7", -7),
    (2**64 - 1, str(2**64 - 1), 2**64 - 1),
    (0.5, "0.5", 0.5),
    (math.nan, "nan", "nan"),
    (-math.inf, "-inf", "-inf"),
    ("", "", ""),
    ("two\nlines \x1b[31m\u202e", r"two\nlines \x1b[31m\u202e", "two\nlines \x1b[31m\u202e"),
    (b"text", "text", "text"),
    (b"\x00\xff", "base64:AP8=", {"$base64": "AP8="}),
    ([1, [b"\xff"], None], '[1, [{"$base64": "/w=="}], null]', [1, [{"$base64": "/w=="}], None]),
    ({"n": {"b": b"x"}}, '{"n": {"b": "x"}}', {"n": {"b": "x"}}),
    ({7: 1, b"\xff": 2}, r'{"7": 1, "{\"$base64\":\"/w==\"}": 2}', {"7": 1, '{"$base64":"/w=="}': 2}),
    (MOMENT, "2026-11-21 03:23:34+00:00", "2026-11-21 03:23:34+00:00"),
    (msgspec.msgpack.Ext(5, b"x"), '{"$msgpack": "1AV4"}', {"$msgpack": "1AV4"}),
]


@pytest.fixture(scope="module")
def of_values(url: str) -> tuple[str, list[str]]:
    """A queue, and the ids of a dead letter for each of VALUES and one for DEEP."""
    queue = f"q-{uuid.uuid4().hex[:12]}"
    return queue, store(url, queue, *({"value": value} for value, _, _ in VALUES), {"value": DEEP})


@pytest.mark.parametrize("at", range(len(VALUES)), ids=lambda at: repr(VALUES[at][0])[:30])
def test_values_of_every_type(dead: Dead, of_values: tuple[str, list[str]], at: int) -> None:
    queue, ids = of_values
    _, text, value = VALUES[at]
    assert f"\nvalue:    {text}".rstrip() + "\n" in dead("show", queue, ids[at])
    (shown,) = objects(dead("show", queue, ids[at], "--json"))
    assert shown["value"] == value


def test_a_value_too_deep_for_json_is_shown_all_the_same(dead: Dead, of_values: tuple[str, list[str]]) -> None:
    queue, ids = of_values
    assert "bottom" in dead("show", queue, ids[-1]) or "$msgpack" in dead("show", queue, ids[-1])
    assert objects(dead("show", queue, ids[-1], "--json"))[0]["id"] == ids[-1]
    assert len(objects(dead("list", queue, "--json"))) == len(ids)


def test_one_whole(dead: Dead, url: str, queue_name: str) -> None:
    trace = 'Traceback (most recent call last):\n  File "a.py", line 1\nValueError: \x1b[31m\r\n'
    fields = {
        "id": "0/1795231414661-0/7",
        "key": "user:1",
        "value": {"n": 1},
        "headers": {"trace": "x", "b": b"\xff"},
        "sent_at_ms": 1795231414661,
        "failed_at_ms": 1795231415000,
        "attempts": 3,
        "error": f"ValueError('{HUGE}\n')",
        "traceback": trace,
    }
    (name,) = store(url, queue_name, fields)
    failed_ago = r"2026-11-21T03:23:35\.000Z \(\S+ ago\)"
    shown, _, printed_trace = dead("show", queue_name, name).partition("\n\n")
    lines = shown.splitlines()
    assert lines[:6] == [
        f"id:       {name}",
        "message:  0/1795231414661-0/7",
        "key:      user:1",
        'value:    {"n": 1}',
        'headers:  {"trace": "x", "b": {"$base64": "/w=="}}',
        "attempts: 3",
    ]
    assert lines[6] == "sent:     2026-11-21T03:23:34.661Z"
    assert re.fullmatch(rf"failed:   {failed_ago}", lines[7])
    assert lines[8:] == [f"error:    ValueError('{HUGE}\\n')"], "whole, on one line"
    assert printed_trace.splitlines() == [*trace.splitlines()[:2], r"ValueError: \x1b[31m"]
    (found,) = objects(dead("show", queue_name, name, "--json"))
    expected = fields | {"message_id": fields.pop("id"), "headers": {"trace": "x", "b": {"$base64": "/w=="}}}
    expected.pop("id", None)
    assert {field: found[field] for field in expected} == expected


def test_one_that_could_not_be_read(dead: Dead, stored: tuple[str, list[str]]) -> None:
    queue, ids = stored
    lines = dead("show", queue, ids[4]).splitlines()
    assert lines[:3] == [f"id:       {ids[4]}", "messages: 7", "bytes:    base64:AP8="]
    assert [line.split(":")[0] for line in lines[3:]] == ["failed", "error"]
    assert lines[4] == "error:    a record batch of version 0"


def test_bytes_that_are_no_dead_letter_are_shown(dead: Dead, url: str, queue_name: str) -> None:
    ids = store(url, queue_name, (2, b"\xc1\xff"), (1, b""), (1, msgspec.msgpack.encode({"failed_at_ms": 2**63})))
    assert "bytes:    base64:wf8=\n" in dead("show", queue_name, ids[0])
    assert "error:    the dead letter itself does not decode" in dead("show", queue_name, ids[1])
    assert f"failed:   {2**63} ms (0.0s ago)\n" in dead("show", queue_name, ids[2])
    assert len(dead("list", queue_name).splitlines()) == 4
    error = dead("replay", queue_name, "--all", status=1)
    assert error.startswith("error: 3 dead letters stay, they can't be handled; 0 were replayed. First: ")
    assert error.count("\n") == 1
    assert len(objects(dead("list", queue_name, "--json"))) == 3
    assert dead("purge", queue_name, "--all", "--yes") == "3 dead letters purged\n"


# -- dead letters that a worker made, for what moves them --------------------------------------------------------------


async def _bury(url: str, queue: str, messages: Sequence[tuple[Any, Any]], shards: int) -> None:
    worker = shardq.Worker(queue, group="g", retry=shardq.Retry(attempts=1))

    @worker.handler
    async def handle(message: shardq.Message) -> None:
        raise LookupError(f"no {message.value}")

    async with shardq.connect(url) as client:
        joined = await client.queue(queue, shards=shards)
        async with joined.producer() as producer:
            for key, value in messages:
                await producer.send(value, key=key)
        with anyio.fail_after(30):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(worker.run, client)
                while True:
                    if sum(each.dead for each in await joined.groups()) >= len(messages):
                        break
                    await anyio.sleep(0.02)
                worker.stop()


def bury(url: str, queue: str, *messages: tuple[Any, Any], shards: int = 2) -> None:
    """Sends (key, value) one after the other and has group g give them up."""
    anyio.run(_bury, url, queue, messages, shards)


async def _drain(url: str, queue: str, count: int) -> list[tuple[Any, Any]]:
    got: list[tuple[Any, Any]] = []
    worker = shardq.Worker(queue, group="g")

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


def values(dead: Dead, queue: str) -> list[Any]:
    return sorted(each["value"] for each in objects(dead("list", queue, "--json")))


def test_replay_of_ids_of_filters_and_of_all(dead: Dead, url: str, queue_name: str) -> None:
    bury(url, queue_name, *((b"\xff" if number % 2 else "even", number) for number in range(12)))
    found = {each["value"]: each["id"] for each in objects(dead("list", queue_name, "--json"))}
    assert sorted(found) == list(range(12))
    assert dead("replay", queue_name, found[3], found[0], found[3]) == "2 dead letters replayed\n"
    assert dead("replay", queue_name, "--key", "\udcff", "--json") == '{"replayed": 5}\n'
    assert dead("replay", queue_name, "--error", "lookuperror('no 4')") == "1 dead letters replayed\n"
    assert dead("replay", queue_name, "--older-than", "1h") == "0 dead letters replayed\n"
    assert values(dead, queue_name) == [2, 6, 8, 10]
    assert dead("replay", queue_name, "--newer-than", "1h", "--key", "even", "--error", "no 1") == (
        "1 dead letters replayed\n"
    )
    assert dead("replay", queue_name, "--all") == "3 dead letters replayed\n"
    got = drain(url, queue_name, 12)
    assert sorted(value for _, value in got) == list(range(12))
    assert all(key == (b"\xff" if value % 2 else "even") for key, value in got)
    assert [value for key, value in got if key == b"\xff"] == [3, 1, 5, 7, 9, 11], "in the order of the replays"


def test_a_second_replay_finds_nothing_and_says_so(
    dead: Dead, url: str, queue_name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    bury(url, queue_name, ("k", 1), ("k", 2))
    ids = [each["id"] for each in objects(dead("list", queue_name, "--json"))]
    replay = ["dead", "replay", queue_name, *ids, "0/1-1", "--group", "g", "--url", url]
    for count, missing in ((2, 1), (0, 3)):
        assert run(replay) == 0
        printed = capfd.readouterr()
        assert printed.out == f"{count} dead letters replayed\n"
        assert printed.err.startswith(f"{missing} of the IDs are not there: replayed or purged before")
    assert run([*replay, "--json"]) == 0
    assert capfd.readouterr().out == '{"replayed": 0}\n'
    assert dead("replay", queue_name, "--all") == "0 dead letters replayed\n"
    assert drain(url, queue_name, 2) == [("k", 1), ("k", 2)]


def test_what_fails_again_is_a_dead_letter_again(dead: Dead, url: str, queue_name: str) -> None:
    bury(url, queue_name, ("k", 1))
    (before,) = objects(dead("list", queue_name, "--json"))
    assert dead("replay", queue_name, "--all") == "1 dead letters replayed\n"
    bury(url, queue_name, ("k", 2))
    again, other = objects(dead("list", queue_name, "--json"))
    assert (again["message_id"], again["value"], again["attempts"]) == (before["message_id"], 1, 1)
    assert (again["id"] != before["id"], other["value"]) == (True, 2)
    assert f"no dead letter {before['id']}" in dead("show", queue_name, before["id"], status=1)


def test_an_entry_that_can_not_be_read_stays_the_others_go(dead: Dead, url: str, queue_name: str) -> None:
    bury(url, queue_name, ("k", 1), ("k", 2), shards=1)
    store(url, queue_name, (3, dead_letter("1-2", None, b"\xff\x00\x00\x03", "a record batch of version 255")))
    error = dead("replay", queue_name, "--all", "--json", status=1)
    assert error.startswith("error: 1 dead letters stay, they can't be handled; 2 were replayed. First: a record batch")
    assert error.count("\n") == 1
    (left,) = objects(dead("list", queue_name, "--json"))
    assert (left["messages"], left["raw"]) == (3, {"$base64": "/wAAAw=="})
    assert "1 dead letters stay" in dead("replay", queue_name, left["id"], status=1)


def test_replay_while_a_worker_runs(dead: Dead, url: str, queue_name: str, tmp_path: Path) -> None:
    (tmp_path / "billing.py").write_text(WORKER.format(queue=queue_name))
    (tmp_path / "broken").touch()
    assert run(["queue", "create", queue_name, "--shards", "2", "--url", url]) == 0

    def produce(numbers: range) -> None:
        async def send() -> None:
            async with shardq.connect(url) as client, (await client.queue(queue_name)).producer() as producer:
                for number in numbers:
                    await producer.send(number, key=f"k{number % 3}")

        anyio.run(send)

    def handled() -> list[int]:
        journal = tmp_path / "handled"
        return [int(line) for line in journal.read_text().split()] if journal.exists() else []

    produce(range(30))
    with commands(tmp_path) as start:
        worker = start("work", "billing:worker", "--url", url)
        until(
            lambda: (
                run(["group", "create", queue_name, "g", "--url", url]) == 0
                and len(objects(dead("list", queue_name, "--json"))) == 30
            ),
            "thirty dead letters",
        )
        (tmp_path / "broken").unlink()
        assert dead("replay", queue_name, "--all") == "30 dead letters replayed\n"
        produce(range(30, 60))
        until(lambda: len(handled()) == 60, "all to be handled")
        assert worker.stop() == 0
    for key in range(3):
        assert [number for number in handled() if number % 3 == key] == list(range(key, 60, 3)), (
            "in the order of the key"
        )
    assert dead("list", queue_name, "--json") == ""


def test_purge_of_ids_of_filters_and_of_all(dead: Dead, url: str, queue_name: str) -> None:
    bury(url, queue_name, *(("even" if number % 2 == 0 else "odd", number) for number in range(10)))
    found = {each["value"]: each["id"] for each in objects(dead("list", queue_name, "--json"))}
    assert dead("purge", queue_name, found[0], found[1], "--yes") == "2 dead letters purged\n"
    assert dead("purge", queue_name, found[0], "--yes") == "0 dead letters purged\n"
    assert dead("purge", queue_name, "--key", "even", "--error", "no 4", "--yes", "--json") == '{"purged": 1}\n'
    assert dead("purge", queue_name, "--older-than", "7d", "--yes") == "0 dead letters purged\n"
    assert values(dead, queue_name) == [2, 3, 5, 6, 7, 8, 9]
    assert dead("purge", queue_name, "--all", "--yes") == "7 dead letters purged\n"
    assert dead("replay", queue_name, *found.values()) == "0 dead letters replayed\n"


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Has the next question answered with this."""
    return lambda text: monkeypatch.setattr("sys.stdin", io.StringIO(text))


def test_purge_asks_first(
    dead: Dead, url: str, queue_name: str, answer: Callable[[str], None], capfd: pytest.CaptureFixture[str]
) -> None:
    ids = store(url, queue_name, {"key": "a", "value": 1}, {"key": "a", "value": 2}, {"key": "b", "value": 3})
    for text in ("n\n", "\n", ""):
        answer(text)
        asked = dead("purge", queue_name, "--all", status=130)
        assert asked.startswith(f"Forget 3 dead letters of {queue_name}/g for good? [y/N]:")
    answer("n\n")
    assert "Forget 2 dead letters" in dead("purge", queue_name, "--key", "a", status=130)
    answer("n\n")
    assert "Forget 1 dead letters" in dead("purge", queue_name, ids[0], ids[0], status=130)
    assert values(dead, queue_name) == [1, 2, 3]
    answer("y\n")
    assert run(["dead", "purge", queue_name, "--key", "a", "--group", "g", "--json", "--url", url]) == 0
    assert capfd.readouterr().out == '{"purged": 2}\n', "the question is not on stdout"
    assert values(dead, queue_name) == [3]


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["replay", "purge"])
@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--error", ""],
        ["0/1-0", "--all"],
        ["0/1-0", "--key", "k"],
        ["0/1-0", "--key", ""],
        ["--all", "--error", "x"],
        ["--all", "--older-than", "0"],
        ["0/1-0", "--newer-than", "1h", "--all"],
    ],
    ids=str,
)
def test_nothing_moves_without_a_choice(
    dead: Dead, stored: tuple[str, list[str]], command: str, arguments: list[str]
) -> None:
    yes = ["--yes"] if command == "purge" else []
    error = dead(command, stored[0], *arguments, *yes, status=2)
    says = "error: say which: IDs, or filters (--key, --error, --older-than, --newer-than), or --all. Usage: "
    assert error.startswith(says)
    assert len(objects(dead("list", stored[0], "--json"))) == 5


@pytest.mark.parametrize("text", ["soon", "", "-1", "-5m", "nan", "inf", "1y", "1h30m", "h", "9" * 400, "1e3"])
def test_what_is_no_length_of_time(dead: Dead, text: str) -> None:
    for option in ("--older-than", "--newer-than"):
        error = dead("list", "q", f"{option}={text}", status=2)
        assert f"{text!r} is no length of time: write 90, 90s, 15m, 2h or 7d" in error


@pytest.mark.parametrize("arguments", [["-n", "0"], ["-n", "many"], ["--shard", "1"]], ids=str)
def test_other_wrong_usage(dead: Dead, arguments: list[str]) -> None:
    assert "Usage: shardq dead list" in dead("list", "q", *arguments, status=2)


def test_a_group_must_be_named(capfd: pytest.CaptureFixture[str]) -> None:
    for command in (["list", "q"], ["show", "q", "0/1-0"], ["replay", "q", "--all"], ["purge", "q", "--all"]):
        assert run(["dead", *command]) == 2
        assert "Missing option '--group'" in capfd.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        ["list"],
        ["show", "0/1-0"],
        ["replay", "--all"],
        ["replay", "0/1-0"],
        ["purge", "--all"],
        ["purge", "0/1-0", "--yes"],
    ],
    ids=" ".join,
)
def test_what_is_not_there_is_one_line(dead: Dead, stored: tuple[str, list[str]], command: list[str]) -> None:
    name, *arguments = command
    unknown = [
        (dead(name, "none", *arguments, status=1), "error: queue 'none' does not exist"),
        (dead(name, stored[0], *arguments, status=1, group="nobody"), "group 'nobody'"),
        (dead(name, stored[0], *arguments, status=1, group="no name"), "error: group name 'no name' is not valid"),
    ]
    for error, says in unknown:
        assert says in error
        assert error.count("\n") == 1


@pytest.mark.parametrize("name", ["nonsense", "0/1-0/0", "0", "", "\udcff"], ids=repr)
def test_what_is_no_id(dead: Dead, stored: tuple[str, list[str]], name: str) -> None:
    for command in (["show", stored[0]], ["replay", stored[0]], ["purge", stored[0], "--yes"]):
        error = dead(*command, name, status=1)
        assert (
            error
            == f"error: {name!r} is not the id of a dead letter; it looks like 3/1795231414661-0 (shard/entry id)\n"
        )
    assert len(objects(dead("list", stored[0], "--json"))) == 5


@pytest.mark.parametrize("name", ["0/1-1", "7/1-1"])
def test_an_id_that_is_not_there(dead: Dead, stored: tuple[str, list[str]], name: str) -> None:
    error = dead("show", stored[0], name, status=1)
    assert error == f"error: group 'g' has no dead letter {name}: it was replayed or purged, or never there\n"


@pytest.mark.parametrize("command", ["list", "show", "replay", "purge"])
def test_help_shows_an_example(command: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["dead", command, "--help"]) == 0
    assert f"Example: shardq dead {command}" in capfd.readouterr().out
