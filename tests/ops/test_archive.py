"""The archive: what is on disk is every message once and in order, wherever a process was killed, paused or refused."""

from __future__ import annotations

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

import shardq
from shardq.cli.app import run
from shardq.core.history import Record
from shardq.errors import ArchiveFailed, CorruptData, UsageError
from shardq.ops import archive_write
from shardq.ops.archive import Archive, read, read_lines
from shardq.ops.archive_files import MARKER, files_of, lines_of_shard, open_folder, pack_member
from shardq.ops.archive_write import ShardWriter
from shardq.ops.local_cluster import LocalCluster, find_server
from tests.cli.support import DEADLINE_S, Command, commands, until
from tests.runtime.harness import until as until_async

GROUP = "archive"
SHARDS = 4
TURN = 30_000  # messages: about a second's work for one process


def records(first: int, last: int, shard: int = 0) -> list[Record]:
    """Messages first..last of a shard, five to an entry."""
    return [
        Record(f"{shard}/{1000 + number // 5}-0/{number % 5}", shard, f"k{number}", number, None, 7, 1000 + number // 5)
        for number in range(first, last + 1)
    ]


def writer(folder: Path, fence: int, **limits: Any) -> ShardWriter:
    return ShardWriter(folder, fence, **({"rotate_bytes": None, "rotate_s": None} | limits))


def values(folder: Path) -> list[int]:
    return [json.loads(line)["value"] for line in lines_of_shard(folder)]


def raw_values(folder: Path) -> list[int]:
    """What gzip alone reads, file by file as their names sort."""
    found = []
    for each in sorted(folder.iterdir()):
        found += [json.loads(line)["value"] for line in gzip.decompress(each.read_bytes()).splitlines()]
    return found


# -- the files of one shard --------------------------------------------------------------------------------------------


def test_every_record_comes_back_as_it_was(tmp_path: Path) -> None:
    open_folder(tmp_path, "q", GROUP)
    sent = [
        Record("2/5-0/0", 2, None, b"\x00\xff", None, 1, 5),
        Record("2/5-0/1", 2, b"key", {"a": [1, b"x"], "$utf8": 3}, {"trace": b"\xff"}, 2, 5),
        Record("2/6-3/0", 2, "k", "text\nmore", {}, 3, 6),
    ]
    writer(tmp_path / "2", 9).write(sent)
    assert list(read(tmp_path)) == sent
    assert [file.name for file in (tmp_path / "2").iterdir()] == ["5-0.9.jsonl.gz"]
    assert list(read(tmp_path, shards=[7])) == []


@given(cut=st.integers(0, 400), again=st.integers(0, 30), rest=st.integers(0, 10))
def test_wherever_a_file_is_torn_nothing_is_lost_or_twice(
    tmp_path_factory: pytest.TempPathFactory, cut: int, again: int, rest: int
) -> None:
    """A process dies while it writes the last of three lists; its successor is given what was not committed."""
    folder = tmp_path_factory.mktemp("shard")
    first = writer(folder, 1)
    for low in (0, 10, 20):
        first.write(records(low, low + 9))
    (file,) = folder.iterdir()
    os.truncate(file, max(0, file.stat().st_size - cut))
    survived = values(folder)
    assert survived == list(range(len(survived)))
    committed = min(again, len(survived))
    second = writer(folder, 2)
    for low in range(committed, 30 + rest, 7):
        second.write(records(low, min(low + 6, 29 + rest)))
    assert values(folder) == list(range(30 + rest))
    assert raw_values(folder) == list(range(30 + rest))  # so that other programs may read it too


def test_zeros_at_the_end_are_what_a_power_failure_left(tmp_path: Path) -> None:
    writer(tmp_path, 1).write(records(0, 9))
    (file,) = tmp_path.iterdir()
    with file.open("ab") as appended:
        appended.write(bytes(100))
    assert values(tmp_path) == list(range(10))
    writer(tmp_path, 2).write(records(5, 14))
    assert raw_values(tmp_path) == list(range(15))


@pytest.mark.parametrize("at", [0, 3, 25, 60], ids=["magic", "flags", "body", "later"])
def test_damage_is_an_error_and_not_a_shorter_file(tmp_path: Path, at: int) -> None:
    first = writer(tmp_path, 1)
    first.write(records(0, 9))
    first.write(records(10, 19))
    (file,) = tmp_path.iterdir()
    data = bytearray(file.read_bytes())
    data[at] ^= 0x55
    file.write_bytes(data)
    with pytest.raises(CorruptData, match=r"is damaged at byte 0: put back"):
        values(tmp_path)


def test_a_stale_owner_adds_nothing_twice(tmp_path: Path) -> None:
    stale = writer(tmp_path, 1)
    stale.write(records(0, 9))
    owner = writer(tmp_path, 2)
    owner.write(records(10, 19))
    stale.write(records(10, 17))
    owner.write(records(20, 29))
    stale.write(records(18, 22))
    assert values(tmp_path) == list(range(30))
    late = writer(tmp_path, 3)
    late.write(records(15, 39))
    assert values(tmp_path) == list(range(40))
    assert len(files_of(tmp_path)) == 3


def test_a_file_that_is_being_written_to_is_not_cut(tmp_path: Path) -> None:
    """Its owner was paused in the middle of a member, with the lock held; when it goes on the member is whole."""
    writer(tmp_path, 1).write(records(0, 9))
    whole = (tmp_path / "1000-0.1.jsonl.gz").read_bytes()
    hold = (
        "import fcntl, os, sys, time; d = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND);"
        "fcntl.flock(d, fcntl.LOCK_EX); os.write(d, bytes.fromhex(sys.argv[2])); print(flush=True); time.sleep(60)"
    )
    torn = pack_member(b"not finished")[:30]
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path / "1000-0.1.jsonl.gz"), torn.hex()], stdout=subprocess.PIPE
    ) as paused:
        assert paused.stdout is not None
        paused.stdout.readline()
        writer(tmp_path, 2).write(records(5, 19))
        assert (tmp_path / "1000-0.1.jsonl.gz").read_bytes() == whole + torn
        assert values(tmp_path) == list(range(20))
        paused.kill()
    writer(tmp_path, 3)
    assert values(tmp_path) == list(range(20))


def test_ids_that_went_back_are_kept_and_read_in_order(tmp_path: Path) -> None:
    """After a failover that lost messages, to a master whose clock is behind."""
    first = writer(tmp_path, 1)
    first.write(records(100, 119))
    first.write([*records(50, 59), *records(120, 129)])
    first.write(records(60, 69))
    first.write(records(50, 69))
    assert values(tmp_path) == [*range(50, 70), *range(100, 130)]
    writer(tmp_path, 2).write([*records(55, 75), *records(125, 135)])
    assert values(tmp_path) == [*range(50, 76), *range(100, 136)]


def test_an_epoch_given_out_twice_makes_two_files(tmp_path: Path) -> None:
    one, other = writer(tmp_path, 1), writer(tmp_path, 1)
    one.write(records(0, 9))
    other.write(records(0, 9))
    other.write(records(10, 19))
    assert len(files_of(tmp_path)) == 1 + 1
    assert values(tmp_path) == list(range(20))


def test_files_are_followed_by_new_ones_at_their_size(tmp_path: Path) -> None:
    full = writer(tmp_path, 1, rotate_bytes=1024)
    for number in range(0, 1000, 10):
        full.write(records(number, number + 9))
    names = [file.path.name for file in files_of(tmp_path)]
    assert len(names) > 5
    assert all(file.path.stat().st_size >= 1024 for file in files_of(tmp_path)[:-1])
    first = json.loads(gzip.decompress((tmp_path / names[1]).read_bytes()).split(b"\n")[0])["id"]
    assert names[1].startswith(f"{first.split('/')[1]}.1.")
    assert values(tmp_path) == raw_values(tmp_path) == list(range(1000))


def test_files_are_followed_by_new_ones_at_their_age(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("shardq.ops.archive_write.time.monotonic", lambda: now)
    old = writer(tmp_path, 1, rotate_s=60)
    old.write(records(0, 9))
    now += 59
    old.write(records(10, 19))
    assert len(files_of(tmp_path)) == 1
    now += 1
    old.write(records(20, 29))
    assert [file.first[0] for file in files_of(tmp_path)] == [1000, 1004]


def test_a_full_disk_leaves_whole_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = writer(tmp_path, 1)
    first.write(records(0, 9))
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()

    class FullDisk:
        def __getattr__(self, name: str) -> Any:
            return getattr(os, name)

        def write(self, descriptor: int, data: memoryview) -> int:
            if len(data) < 50:
                raise OSError(28, "No space left on device")
            return os.write(descriptor, data[:40])

    with monkeypatch.context() as patch:
        patch.setattr(archive_write, "os", FullDisk())
        with pytest.raises(OSError, match="No space left"):
            first.write(records(10, 19))
    assert file.read_bytes() == whole
    first.write(records(10, 19))
    assert raw_values(tmp_path) == list(range(20))


# -- the folder --------------------------------------------------------------------------------------------------------


def test_a_folder_is_one_queues_archive(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    open_folder(folder, "q", GROUP)
    open_folder(folder, "q", GROUP)
    with pytest.raises(UsageError, match="is the archive of queue 'q' by group 'archive': name another folder"):
        open_folder(folder, "other", GROUP)
    with pytest.raises(UsageError, match="by group 'archive'"):
        open_folder(folder, "q", "other")
    (folder / MARKER).write_text('{"format": 2, "queue": "q", "group": "archive"}')
    with pytest.raises(UsageError, match="of format 2, this shardq reads 1"):
        read(folder)
    (folder / MARKER).write_text("nonsense")
    with pytest.raises(UsageError, match="is no archive"):
        read_lines(folder)
    with pytest.raises(UsageError, match="is no archive"):
        read(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="can't be written to"):
        open_folder(tmp_path / "file", "q", GROUP)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"queue": "no name"}, "queue name"),
        ({"group": "no name"}, "group name"),
        ({"rotate_bytes": 10}, "rotate_bytes is at least 1024"),
        ({"rotate_s": 0.1}, "rotate_s is at least 1"),
        ({"concurrency": 0}, "concurrency must be at least 1"),
    ],
    ids=str,
)
def test_mistakes(tmp_path: Path, arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Archive(arguments.pop("queue", "q"), tmp_path, **arguments)


# -- with a queue ------------------------------------------------------------------------------------------------------


@pytest.fixture
def any_cluster(shared_clusters: Callable[[Path], LocalCluster]) -> LocalCluster:
    """A shared cluster of the server that is found first, for what no server kind changes."""
    return shared_clusters(find_server(None))


@pytest.fixture
def start(tmp_path: Path, any_cluster: LocalCluster, queue_name: str) -> Iterator[Callable[[], Command]]:
    """Starts `shardq archive` for the test's queue, into the folder `archive`."""
    with commands(tmp_path) as start:
        url = ("--url", any_cluster.url, "--lease", "1", "--rotate", "20kB")
        yield lambda: start("archive", queue_name, "--to", str(tmp_path / "archive"), *url)


async def _send(url: str, queue: str, values: range) -> None:
    async with shardq.connect(url) as client:
        joined = await client.queue(queue, shards=SHARDS)
        async with joined.producer() as producer:
            await producer.send_many((f"k{value % 50}", value) for value in values)


def send(url: str, queue: str, values: range) -> None:
    anyio.run(_send, url, queue, values)


async def _counts(queue: shardq.Queue) -> tuple[int, int]:
    shards = (await queue.counters([GROUP])).values()
    groups = [(shard, shard.groups[GROUP]) for shard in shards if GROUP in shard.groups]
    left = sum(shard.appended - group.base - group.acked - group.dead for shard, group in groups)
    return (left if len(groups) == SHARDS else -1), sum(group.dead for _, group in groups)


def state(url: str, queue: str) -> tuple[int, int]:
    """Messages that the group has not finished (-1 while it does not exist), and its dead letters."""

    async def look() -> tuple[int, int]:
        async with shardq.connect(url) as client:
            return await _counts(await client.queue(queue))

    return anyio.run(look)


def left(url: str, queue: str) -> int:
    return state(url, queue)[0]


async def _is_archived(queue: shardq.Queue) -> bool:
    return (await _counts(queue))[0] == 0


async def _is_shared(queue: shardq.Queue) -> bool:
    """Whether two processes have an equal part of the shards."""
    shards = (await queue.counters([GROUP])).values()
    groups = [shard.groups[GROUP] for shard in shards if GROUP in shard.groups]
    owners = Counter(group.owner for group in groups if group.held)
    return len(owners) == 2 and set(owners.values()) == {SHARDS // 2}


def until_queue(holds: Callable[[shardq.Queue], Awaitable[bool]], url: str, name: str, what: str) -> None:
    """Polls on one connection: one for each look would take more of the machine than who is waited for."""

    async def poll() -> None:
        async with shardq.connect(url) as client:
            queue = await client.queue(name)
            await until_async(lambda: holds(queue), DEADLINE_S, what)

    anyio.run(poll)


def check(folder: Path, sent: int) -> None:
    """Every message once, in order per key and by rising ids per shard."""
    found = list(read(folder))
    assert Counter(record.value for record in found) == dict.fromkeys(range(sent), 1)
    for key in range(50):
        assert [record.value for record in found if record.key == f"k{key}"] == list(range(key, sent, 50))
    assert [record.shard for record in found] == sorted(record.shard for record in found)


def test_a_queue_is_archived_and_read(
    cluster: LocalCluster, queue_name: str, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    folder = tmp_path / "archive"
    send(cluster.url, queue_name, range(2000))
    archive = Archive(queue_name, folder, rotate_bytes=4096)

    async def main() -> None:
        async with shardq.connect(cluster.url) as client, anyio.create_task_group() as tasks:
            tasks.start_soon(archive.run, client)
            queue = await client.queue(queue_name)
            await until_async(lambda: _is_archived(queue), 30, "all is archived")
            archive.stop()

    anyio.run(main)
    check(folder, 2000)
    assert run(["archive", "cat", str(folder)]) == 0
    printed = capfdbinary.readouterr().out
    assert printed == b"".join(line + b"\n" for line in read_lines(folder))
    assert run(["archive", "cat", str(folder), "--shard", "1"]) == 0
    assert {json.loads(line)["id"][:2] for line in capfdbinary.readouterr().out.splitlines()} == {"1/"}


@pytest.mark.slow
def test_sigkill_at_any_moment(
    start: Callable[[], Command], any_cluster: LocalCluster, queue_name: str, tmp_path: Path
) -> None:
    url, folder, sent = any_cluster.url, tmp_path / "archive", 0
    chance = random.Random(os.urandom(8).hex())
    cut_short = 0
    for turn in range(3):
        send(url, queue_name, range(sent, sent + TURN))
        sent += TURN
        before = on_disk(folder)
        processes = [start() for _ in range(1 + turn % 2)]
        until(lambda before=before: on_disk(folder) > before, "it writes")  # type: ignore[misc]
        time.sleep(chance.uniform(0, 0.3))
        for process in processes:
            process.stop(signal.SIGKILL)
        cut_short += left(url, queue_name) > 0
        # What a few dead processes in a row have left is handled one by one, which takes too long here.
        last = start()
        until_queue(_is_archived, url, queue_name, "all is archived")
        last.stop(signal.SIGKILL)
    assert cut_short, "nobody was killed at work: TURN is too small for this machine"
    check(folder, sent)
    plain = Counter(value for _, shard in shard_folders(folder) for value in raw_values(shard))
    assert plain == dict.fromkeys(range(sent), 1)  # nobody was paused, so the files themselves hold each once
    assert state(url, queue_name) == (0, 0)


def on_disk(folder: Path) -> int:
    return sum(each.stat().st_size for each in folder.glob("*/*.gz")) if folder.exists() else 0


def shard_folders(folder: Path) -> list[tuple[int, Path]]:
    return [(int(each.name), each) for each in folder.iterdir() if each.is_dir()]


@pytest.mark.slow
def test_a_paused_owner_writes_nothing_twice(
    start: Callable[[], Command], any_cluster: LocalCluster, queue_name: str, tmp_path: Path
) -> None:
    url, folder, sent = any_cluster.url, tmp_path / "archive", 0
    chance = random.Random(os.urandom(8).hex())
    send(url, queue_name, range(0))
    processes = [start(), start()]
    paused_at_work = 0
    for turn in range(3):
        # Else the one that comes back would be given shards with what was fetched and not handled.
        until_queue(_is_shared, url, queue_name, "both have shards")
        before = on_disk(folder)
        send(url, queue_name, range(sent, sent + TURN))
        sent += TURN
        until(lambda before=before: on_disk(folder) > before, "they write")  # type: ignore[misc]
        time.sleep(chance.uniform(0, 0.2))
        processes[turn % 2].send(signal.SIGSTOP)
        paused_at_work += left(url, queue_name) > 0
        until_queue(_is_archived, url, queue_name, "the other one took its shards")
        processes[turn % 2].send(signal.SIGCONT)
    assert paused_at_work, "nobody was paused at work: TURN is too small for this machine"
    for process in processes:
        assert process.stop() == 0, process.stderr
    check(folder, sent)
    assert state(url, queue_name) == (0, 0)


def test_what_can_not_be_written_stops_it_and_loses_nothing(
    start: Callable[[], Command], any_cluster: LocalCluster, queue_name: str, tmp_path: Path
) -> None:
    url, folder = any_cluster.url, tmp_path / "archive"
    send(url, queue_name, range(500))
    folder.mkdir()
    (folder / "2").write_text("not a folder")
    process = start()
    assert process.wait() == 1
    assert f"error: the archive in {folder} stopped, nothing is lost by that" in process.stderr
    assert "Traceback" not in process.stderr
    behind, dead = state(url, queue_name)
    assert behind > 0
    assert dead == 0
    (folder / "2").unlink()
    process = start()
    until_queue(_is_archived, url, queue_name, "the rest is archived")
    assert process.stop() == 0
    check(folder, 500)
    assert state(url, queue_name) == (0, 0)


def test_a_message_that_no_line_can_hold_stops_it_too(
    any_cluster: LocalCluster, queue_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(record: Record) -> bytes:
        raise ValueError("no luck")

    monkeypatch.setattr("shardq.ops.archive_write.exact", fail)
    send(any_cluster.url, queue_name, range(100))

    async def main() -> None:
        async with shardq.connect(any_cluster.url) as client:
            with anyio.fail_after(30), pytest.raises(ArchiveFailed, match="no luck"):
                await Archive(queue_name, tmp_path / "archive", lease=1).run(client)

    anyio.run(main)
    assert state(any_cluster.url, queue_name) == (100, 0)


def test_what_can_never_run_ends_at_once(any_cluster: LocalCluster, tmp_path: Path) -> None:
    for arguments, says in (
        (["q", "--rotate", "1kB"], "error: rotate_bytes is at least 1024"),
        (["never-declared"], "error: queue 'never-declared' does not exist"),
    ):
        with commands(tmp_path) as start:
            process = start("archive", *arguments, "--to", "folder", "--url", any_cluster.url)
            assert process.wait() == 1
            assert process.stderr.startswith(says)
            assert process.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["q"], 2, "name the folder to write to"),
        (["q", "folder"], 2, "to read: shardq archive cat DIR"),
        (["cat", "folder", "--to", "other"], 2, "to write: shardq archive QUEUE --to DIR"),
        (["q", "--to", "folder", "--rotate", "often"], 2, "'often' is no size or age: write 64MB or 1h"),
        (["cat", "/nowhere"], 1, "error: /nowhere is no archive"),
    ],
    ids=str,
)
def test_command_lines_that_can_not_be(
    any_cluster: LocalCluster,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    arguments: list[str],
    status: int,
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SHARDQ_URL", any_cluster.url)
    assert run(["archive", *arguments]) == status
    assert says in capfd.readouterr().err
