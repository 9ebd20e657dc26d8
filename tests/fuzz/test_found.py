"""What fuzzing found, each as the bytes that did it."""

from __future__ import annotations

import gzip
from pathlib import Path

import anyio
import msgspec
import pytest
from redis.asyncio.cluster import ClusterNode

from shardq.core import records
from shardq.core.servers import version_of
from shardq.errors import CorruptData, StoreError, StoreRefused, StoreTimeout, StoreUnavailable, UsageError
from shardq.ops import archive_files
from shardq.ops.archive_files import owner_of, pack_member, unpack_member
from shardq.storage.cluster import Cluster
from shardq.storage.commands import Packed, confirm_fsync, confirm_replicas, pack_command
from shardq.storage.control import Member
from shardq.storage.nodes import node_command, node_slot_map
from shardq.storage.reply import entries_of, text, texts
from shardq.storage.trouble import NO_REPLY, Trouble, classify
from tests.fuzz.replies import REPLIES
from tests.fuzz.targets import TARGETS
from tests.fuzz.wire import converse

HOST = "127.0.0.1"
ANSWERS = [
    b"-MOVED\r\n",
    b"-MOVED 5 host\r\n",
    b"-MOVED x a:b\r\n",
    b"-ASK 5 a:70p1\r\n",
    b"?\r\n",
]


@pytest.mark.parametrize("answer", ANSWERS)
def test_an_answer_that_is_none_is_a_trouble(answer: bytes) -> None:
    """It ended the sender of the node, and with it the whole client."""
    converse(answer)
    converse(b"+OK\r\n" + answer)


@pytest.mark.parametrize("error", NO_REPLY)
def test_what_no_server_says_has_an_unknown_outcome(error: type[Exception]) -> None:
    trouble = classify(error("x"), "a:1")
    assert trouble.action == "refresh"
    assert isinstance(trouble.error, StoreTimeout)


def test_a_programming_error_is_none_of_the_servers() -> None:
    with pytest.raises(ZeroDivisionError):
        classify(ZeroDivisionError(), "a:1")


@pytest.mark.parametrize("reply", [b"1", None, [], [1], [b"1", 1], [None, None], {}])
def test_an_answer_to_wait_that_is_no_number_confirms_nothing(reply: object) -> None:
    assert confirm_fsync(1).shortfall(reply) == 0
    if not isinstance(reply, int):
        assert confirm_replicas(1).shortfall(reply) == 0
    assert confirm_replicas(1).shortfall(1) is None


@pytest.mark.anyio
@pytest.mark.parametrize(("host", "port"), [(HOST, 99_999_999), ("a\0b", 7000), ("x" * 300, 7000), ("", 0)])
async def test_a_redirect_may_name_any_address(host: str, port: int) -> None:
    cluster = Cluster("redis://127.0.0.1:1")
    node: ClusterNode = cluster.node_at((host, port))
    with anyio.fail_after(20):
        (reply,) = await cluster.exchange(node, [Packed(pack_command("PING"))])
    assert isinstance(reply, Trouble)
    assert isinstance(reply.error, StoreError)
    await cluster.aclose()


@pytest.mark.anyio
@pytest.mark.parametrize("answer", [b"-MOVED\r\n", b"?\r\n", b"*1\r\n*1\r\n:5\r\n", b"*1\r\n:5\r\n"])
async def test_a_node_that_lists_no_slots(answer: bytes) -> None:
    async def serve(stream: anyio.abc.SocketStream) -> None:
        async with stream:
            try:
                while await stream.receive():
                    await stream.send(answer * 3)
            except (anyio.EndOfStream, anyio.BrokenResourceError):
                return

    listener = await anyio.create_tcp_listener(local_host=HOST)
    port = listener.extra(anyio.abc.SocketAttribute.local_port)
    async with listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, serve)
        cluster = Cluster(f"redis://{HOST}:{port}")
        with pytest.raises(StoreUnavailable, match="no cluster node"):
            await cluster.connect()
        await cluster.refresh()
        await cluster.aclose()
        for ask in (lambda: node_slot_map(HOST, port), lambda: node_command(HOST, port, "PING")):
            try:
                await anyio.to_thread.run_sync(ask)
            except (StoreError, CorruptData):
                continue
        tasks.cancel_scope.cancel()


def test_a_reply_of_numbers_is_no_string() -> None:
    """bytes() of a number makes so many zeros: of a large one it takes all memory."""
    with pytest.raises(TypeError):
        text(1 << 40)
    with pytest.raises(TypeError):
        texts([b"x", 5])
    with pytest.raises(CorruptData):
        REPLIES["stored queue"].read([1 << 40, None, None])
    with pytest.raises(CorruptData):
        REPLIES["declare"].read([b"OK", b"1", 1 << 40, b"", b"1"])


@pytest.mark.parametrize("reply", [5, [5], [[b"1-1"]], [[b"1", []]], [[b"\xff", []]], [[b"1-1", [5]]], [[5, []]], [[]]])
def test_entries_have_ids_and_fields(reply: object) -> None:
    with pytest.raises((TypeError, ValueError)):
        entries_of(reply)


def test_an_entry_without_fields_is_a_deleted_one() -> None:
    assert entries_of([[b"1-1", None], [b"1-2", []], [b"1-3", [b"a", b"b"]]]) == [
        ("1-1", []),
        ("1-2", []),
        ("1-3", [b"a", b"b"]),
    ]
    step = list(REPLIES["step"].seeds[0])
    step[2] = [[b"1-1", None]]
    REPLIES["step"].read(step)


@pytest.mark.parametrize("part", [2, 3, 6, 8, 9])
def test_a_step_brings_what_its_header_says(part: int) -> None:
    for broken in (5, [5], [[b"x", b"y", b"z"]], [[b"x", 5]]):
        step = list(REPLIES["step"].seeds[0])
        step[part] = broken
        with pytest.raises(CorruptData):
            REPLIES["step"].read(step)


@pytest.mark.parametrize("beats", ["9" * 5000, "x", "", "-1", "1.5"])
def test_a_member_whose_beats_are_no_number_is_none(beats: str) -> None:
    """It kept its group from electing a leader."""
    assert Member.parse(f"n:{beats}:active".encode()) is None


def test_a_version_is_read_from_digits_only() -> None:
    assert version_of({"redis_version": "7.²." + "9" * 5000}).numbers == (7,)


def test_an_archive_file_unpacks_to_no_more_than_one_message_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive_files, "MAX_MEMBER_BYTES", 1000)
    assert unpack_member(pack_member(b"x" * 1000)) == b"x" * 1000
    assert unpack_member(pack_member(b"x" * 1001)) is None
    assert unpack_member(gzip.compress(b"x" * 100_000)) is None


@pytest.mark.parametrize("nested", [b"[" * 100_000, b'{"a":' * 100_000])
def test_nested_json_in_an_archive_is_damage(tmp_path: Path, nested: bytes) -> None:
    (tmp_path / archive_files.MARKER).write_bytes(nested)
    with pytest.raises(UsageError, match="is no archive"):
        owner_of(tmp_path)
    with pytest.raises(CorruptData):
        TARGETS["archive file"].decode(pack_member(b'{"id":"3/1-1/0","v":' + nested) * 2)


def test_a_batch_has_no_longer_lists_than_it_may_have_messages() -> None:
    """Refused by their length, before room is made for them."""
    for fields in ([0, None, [None] * 65536, [None], None], [0, [0] * 65536, [None], [None], None]):
        with pytest.raises(CorruptData, match="length <= 65535"):
            records.decode(bytes((1, 0, 0, 1)) + msgspec.msgpack.encode(fields))


def test_a_corrupt_key_is_said_to_be_corrupt() -> None:
    error = classify(_response("SHARDQ_CORRUPT a:meta is a list, not a hash"), "a:1").error
    assert isinstance(error, CorruptData)
    assert "a:meta is a list" in str(error)
    assert isinstance(classify(_response("WRONGTYPE x"), "a:1").error, StoreRefused)


def _response(said: str) -> Exception:
    from redis.exceptions import ResponseError

    return ResponseError(said)
