"""Every decoder of bytes that come from Redis or from a file, by name: what fuzzing runs. Starts no server.

A decoder either takes the bytes or raises what its target allows, a ShardqError always; anything else is a defect. A
function's reply is fuzzed as the msgpack of the reply (text stands for bytes), so that bytes become replies of any
shape. Where bytes are taken, the decoder goes on to what is done with them next: a value that is taken and can't be
shown, kept or written again would stop whoever handles it.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from shardq.core import intake, jobs, notices, records
from shardq.core.dead import kept_again, open_letter, parse_dead_id
from shardq.core.history import open_entry
from shardq.core.ids import MessageId, entry_key
from shardq.core.jsonlines import exact, read_exact, readable
from shardq.core.later import Later, parse_member
from shardq.core.message import Batch, Message, Ownership
from shardq.core.plan import Plan
from shardq.core.queue_settings import QueueSettings
from shardq.core.records import RecordBatch
from shardq.core.reshard import Reshard, merge, split, split_all
from shardq.core.routing import RoutingTable
from shardq.core.schedule import Schedule
from shardq.core.session import Session
from shardq.errors import CorruptData, InvalidValue, ShardqError, UsageError
from shardq.ops import produce
from shardq.ops.archive_files import pack_member
from shardq.runtime.failures import dead_record_of
from tests.fuzz.files import archive_lines, archive_owner
from tests.fuzz.replies import REPLIES, as_reply
from tests.fuzz.wire import WIRE_SEEDS, converse

Errors = tuple[type[ShardqError], ...]


@dataclass(frozen=True)
class Target:
    """`decode` takes bytes or raises one of `errors`. `seeds` are what fuzzing starts from; `packed` says that bytes
    may unpack to more, MAX_UNPACKED_BYTES at most."""

    decode: Callable[[bytes], object]
    seeds: Sequence[bytes]
    errors: Errors = (CorruptData,)
    packed: bool = False


def _owner() -> Ownership:
    class Owner(Ownership):
        def local_key(self, name: str) -> str:
            return name

        def now_ms(self) -> int:
            return 0

    return Owner("orders", "g", 3, 1, "n", 0)


# -- record batches ----------------------------------------------------------------------------------------------------


def _batches() -> list[bytes]:
    many = RecordBatch(1_795_231_414_661, [0, -5, 9], ["a", b"\xff", None], [b"x", "text", 7], [None, {"h": b"v"}, {}])
    values = [None, True, -1, 1 << 63, 1.5, "x", b"x", [1, [2, {"a": {}}]], {"k": 1, 2: b"", (1, "b"): None}]
    varied = RecordBatch(0, None, [None] * len(values), [records.pack_value(value) for value in values], None)
    long = RecordBatch(1, None, ["key"] * 40, [b"0123456789" * 3] * 40, None)
    odd = [float("nan"), float("inf"), msgspec.msgpack.Ext(5, b"abc")]
    odd_ones = RecordBatch(1, None, [None] * 3, [records.pack_value(value) for value in odd], None)
    whole = records.decode(records.encode(many))
    made = [records.encode(batch) for batch in (many, varied, odd_ones, long, records.without(whole, 1))]
    timestamp = bytes.fromhex("d7ff") + bytes(4) + bytes.fromhex("5f000000")
    return [
        *made,
        records.encode(long, "zlib"),
        records.encode(long, "zstd"),
        bytes((1, 0, 0, 1)) + b"\x95\x00\xc0\x91\xc0\x91" + timestamp + b"\xc0",
    ]


def _batch(data: bytes) -> None:
    records.count_of(data)
    batch = records.decode(data)
    assert records.count_of(data) == len(batch.keys)
    records.encode(batch, records.compression_of(data))


def _entry(data: bytes) -> None:
    """What looks at a queue: no entry keeps it from the others."""
    for record in open_entry(3, ("1-1", [b"at", b"0", b"batch", data])):
        line = exact(record)
        again = read_exact(line)
        assert exact(again) == line or record.error is not None
        json.dumps(readable(record))


def _foreign(data: bytes) -> None:
    fields = data.split(b"\n")
    for record in open_entry(3, ("1-1", fields)):
        read_exact(exact(record))
        json.dumps(readable(record))


def _session(data: bytes) -> None:
    _at_depth(10, lambda: _handle_all(data))


def _at_depth(frames: int, call: Callable[[], None]) -> None:
    if frames:
        _at_depth(frames - 1, call)
    else:
        call()


def _handle_all(data: bytes) -> None:
    """What an owner, who stands so deep at least, does with a batch: each message fails, is put off, comes again, and
    becomes a dead letter."""
    owner = _owner()
    try:
        batch = records.decode(data)
        entry = Batch(owner, "1-1", len(batch.keys), data)
        messages = intake.build_messages(batch, entry)
    except CorruptData:
        return
    for message in messages:
        _fails(owner, message)


def _fails(owner: Ownership, message: Message) -> None:
    dead = dead_record_of(message, "boom")
    open_letter(3, "1-1", [b"count", b"1", b"record", dead])
    raw = intake.keep(message, intake.pristine_value(message), 2, "boom")
    try:
        again, _ = intake.open_kept(owner, 1, raw)
    except CorruptData:
        return
    intake.restore_value(again)
    dead_record_of(again, "boom")


def _kept(data: bytes) -> None:
    owner = _owner()
    message, _ = intake.open_kept(owner, 1, data)
    _fails(owner, message)


def _receive(data: bytes) -> None:
    """A batch and the progress inside it, as a session takes them in."""
    later = Later(by_key=True, lane_busy=lambda _: False)
    session = Session(_owner(), 1, later, dead_record_of)
    cut = data[0] if data else 0
    pending, raw = data[1 : 1 + cut], data[1 + cut :]
    messages = session.arrivals.open_entry("1-1", [b"at", b"0", b"batch", raw], pending)
    for message in messages:
        session.hand.put_off(message, 1.0, "boom", 0.0)


# -- what is kept of messages ------------------------------------------------------------------------------------------


def _message(value: Any, **more: Any) -> Message:
    return Message("k", value, more.get("headers"), 5, 0, Batch(_owner(), "1-1", 1))


def _letter(data: bytes) -> None:
    letter = open_letter(3, "1-1", [b"count", b"1", b"record", data])
    str(letter.error)
    try:
        kept_again(letter)
    except CorruptData:
        return


def _letters() -> list[bytes]:
    return [
        dead_record_of(_message({"a": [1]}, headers={"h": b"x"}), "boom"),
        intake.dead_letter("1-1", None, _batches()[0], "broken"),
        intake.dead_letter("", 3, b"\xc1", ""),
    ]


def _job(data: bytes) -> None:
    state = jobs.decode_state(data)
    jobs.encode_state(state)


def _headers(data: bytes) -> None:
    text = data.decode(errors="replace")
    jobs.job_of({jobs.JOB_HEADER: "orders/3/9f86d081884c7d65", jobs.KEEP_HEADER: text})
    jobs.job_of({jobs.JOB_HEADER: text, jobs.KEEP_HEADER: data})


def _progress(data: bytes) -> None:
    count = data[0] if data else 0
    done = intake.unpack_progress(data[1:], count)
    assert len(done) == count
    if count:
        assert intake.unpack_progress(intake.pack_progress(done), count) == done


def _member(data: bytes) -> None:
    parse_member(data, 1_795_231_414_661, 0.0)


# -- what is kept of queues --------------------------------------------------------------------------------------------


def _settings(data: bytes) -> None:
    settings = QueueSettings.from_bytes(data)
    settings.shown()
    settings.for_range(7, 1 << 30)
    settings.to_bytes(data)


def _schedule(data: bytes) -> None:
    schedule = Schedule.from_bytes("nightly", data)
    schedule.shard_in(RoutingTable.equal(4))
    Schedule.from_bytes("nightly", schedule.to_bytes())


def _schedules() -> list[bytes]:
    return [
        Schedule(name="a", cron="0 3 * * *", key=b"\xff", value={"a": [1, None]}, headers={"b": b"x"}).to_bytes(),
        Schedule(name="a", cron="@daily", missed="all", since_ms=7, turn=1).to_bytes(),
    ]


def _table(data: bytes) -> None:
    table = RoutingTable.from_bytes(data)
    assert table.shard_for(0).low == 0
    assert RoutingTable.from_bytes(table.to_bytes()) == table
    assert table.next_id > max(table.by_id)
    for shard in table.by_id:
        assert table.relatives(shard)
        assert all(each.id < shard for each in table.ancestors(shard))
    assert sum(map(len, table.generations)) == len(table.by_id)


def _plans() -> list[Reshard]:
    one = split(RoutingTable.equal(3), 1)
    two = merge(one.table, [child.id for child in one.children])
    return [one, two, split_all(two.table.without(1))]


def _resharded() -> list[bytes]:
    return [plan.table.to_bytes() for plan in _plans()]


def _plan(data: bytes) -> None:
    plan = Reshard.from_bytes(data)
    for child in plan.children:
        assert plan.parents_of(child.id)
        assert plan.table.ancestors(child.id)
    assert Reshard.from_bytes(plan.to_bytes()) == plan
    plan.given_up().to_bytes()


def _text(parse: Callable[[str], object]) -> Callable[[bytes], object]:
    return lambda data: parse(data.decode(errors="replace"))


def _lines(data: bytes) -> None:
    for _ in produce._Lines("key").messages(data):
        pass


def _record_line(data: bytes) -> None:
    """A restored message is sent like any other."""
    record = read_exact(data)
    json.dumps(readable(record))
    try:
        records.pack_value(record.value)
    except InvalidValue:
        return


def _record_lines() -> list[bytes]:
    return [exact(record) for raw in _batches() for record in open_entry(3, ("1-1", [b"at", b"0", b"batch", raw]))]


def _archive() -> list[bytes]:
    one, two = (f'{{"id":"3/1-{n}/0","value":{{"a":[1]}}}}\n'.encode() for n in (1, 2))
    return [pack_member(one) + pack_member(two), pack_member(one) + b"\0" * 100, pack_member(two + two)[:-3]]


def _reply(read: Callable[[Any], object]) -> Callable[[bytes], object]:
    def decode(data: bytes) -> object:
        try:
            reply = as_reply(msgspec.msgpack.decode(data))
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, TypeError, ValueError):
            return None
        return read(reply)

    return decode


TARGETS: dict[str, Target] = {
    "batch": Target(_batch, _batches(), packed=True),
    "entry": Target(_entry, _batches(), (), packed=True),
    "foreign": Target(_foreign, [b"name\nvalue", b"\xff\n\xff\na\n", b"at\n0\nbatch"], ()),
    "session": Target(_session, _batches(), (), packed=True),
    "receive": Target(_receive, [bytes((3,)) + b"1:\x05" + raw for raw in _batches()], (), packed=True),
    "kept": Target(_kept, [intake.keep(_message(value), value, 2, "e") for value in (b"x", {"a": [1]}, None)]),
    "dead": Target(_letter, _letters(), ()),
    "job": Target(_job, [jobs.encode_state(jobs.JobState("orders/3/00000000", "done", result={"a": [1]}))]),
    "job headers": Target(_headers, [b"orders/3/9f86d081884c7d65", b"60000"], ()),
    "progress": Target(_progress, [b"\x09\xff\x01", b"\x10\x00\x80"], ()),
    "later": Target(_member, [b"12:1795231414661:0:kuser", b"1:2:3:"], ()),
    "routing": Target(_table, [RoutingTable.equal(count).to_bytes() for count in (1, 3, 64)] + _resharded()),
    "reshard": Target(_plan, [plan.to_bytes() for plan in _plans()]),
    "settings": Target(
        _settings,
        [
            QueueSettings(retention_s=60, max_backlog=5, overflow="drop-oldest").to_bytes(),
            QueueSettings(compression="zstd", jobs=True, retention_bytes=10).to_bytes(),
        ],
    ),
    "schedule": Target(_schedule, _schedules()),
    "plan": Target(Plan.from_bytes, [Plan({1: "w", 2: "v"}, {1: "v"}).to_bytes()]),
    "notice": Target(
        notices.decode, [notices.encode(bytes(16), records.pack_value(v)) for v in (b"x", {"a": 1}, "text")]
    ),
    "message id": Target(_text(MessageId.parse), [b"3/1795231414661-0/7"], (UsageError,)),
    "entry id": Target(_text(entry_key), [b"1795231414661-0"], (UsageError,)),
    "dead id": Target(_text(parse_dead_id), [b"3/1795231414661-0"], (UsageError,)),
    "archive line": Target(_record_line, _record_lines()),
    "archive file": Target(archive_lines, _archive(), packed=True),
    "archive marker": Target(archive_owner, [b'{"format": 1, "queue": "q", "group": "g"}'], (UsageError,)),
    "json lines": Target(_lines, [b'{"key":"a","v":1}\n\n{"key":7}'], (InvalidValue,)),
    "wire": Target(converse, WIRE_SEEDS, (ShardqError,)),
    **{
        f"reply {name}": Target(
            _reply(reply.read), [msgspec.msgpack.encode(seed) for seed in reply.seeds], reply.errors
        )
        for name, reply in REPLIES.items()
    },
}


def _bomb(flags: int, body: bytes, count: int = 1) -> bytes:
    packed = zlib.compress(body) if flags & 1 else body
    return bytes((1, flags, count >> 8, count & 0xFF)) + packed


def _array(count: int) -> bytes:
    return b"\xdd" + count.to_bytes(4, "big")


_MANY = 15 << 20

# Few bytes that would unpack to much: each is refused, or takes no more room than `test_memory` grants. Each is made
# where it is wanted: to pack them all takes seconds.
BOMBS: dict[str, Callable[[], bytes]] = {
    "bytes": lambda: _bomb(1, b"\0" * (1 << 28)),
    "maps in a value": lambda: _bomb(1, b"\x95\0\xc0\x91\xc0\x91" + _array(_MANY) + b"\x80" * _MANY + b"\xc0"),
    "lists in a value": lambda: _bomb(1, b"\x95\0\xc0\x91\xc0\x91" + _array(_MANY) + b"\x90" * _MANY + b"\xc0"),
    "floats in a value": lambda: _bomb(
        1, b"\x95\0\xc0\x91\xc0\x91" + _array(_MANY // 5) + b"\xca\x40\0\0\1" * (_MANY // 5) + b"\xc0"
    ),
    "maps in a key": lambda: _bomb(1, b"\x95\0\xc0\x91" + _array(_MANY) + b"\x80" * _MANY + b"\x91\xc0\xc0"),
    "maps in a header": lambda: _bomb(1, b"\x95\0\xc0\x91\xc0\x91\xc0\x91\x81\xa1h" + _array(_MANY) + b"\x80" * _MANY),
    "keys": lambda: _bomb(1, b"\x95\0\xc0" + _array(_MANY) + b"\xc0" * _MANY + b"\x90\xc0"),
    "times": lambda: _bomb(1, b"\x95\0" + _array(_MANY) + b"\x01" * _MANY + b"\x90\x90\xc0"),
    "a length": lambda: _bomb(0, b"\x95\0\xc0" + _array(0xFFFFFFFF)),
    "nested lengths": lambda: _bomb(0, b"\x95\0\xc0" + _array(0xFFFFFFFF) * 200),
}
