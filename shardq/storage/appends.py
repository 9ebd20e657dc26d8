"""What producers call of the functions library: messages in, the ids that they were stored under out.

Decides nothing: what is in a batch is the runtime's, whether it is stored again is the function's. Replies are
untrusted: what does not have the shape that the .lua file's header states raises CorruptData.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from shardq.storage.commands import EMPTY, Confirm, Packed, pack_call
from shardq.storage.keys import ShardKeys
from shardq.storage.reply import shape


def pack_append(
    shard: ShardKeys, producer: str, sequence: int, count: int, batch: bytes | bytearray, confirm: Confirm | None
) -> Packed:
    keys, args = (shard.stream, shard.meta), (producer, sequence, count, "", shard.bell)
    # The batch is most of what is sent: it is copied once, into the place of an empty argument.
    before, after = pack_call("append", keys, args).rsplit(EMPTY, 1)
    data = b"".join((before, b"$%d\r\n" % len(batch), batch, b"\r\n", after))
    return Packed(data, False, confirm)


@dataclass(frozen=True, slots=True)
class Item:
    """One message of append_each: `when` is '', 'in:<ms>' or 'at:<Unix ms>'; `once` its dedupe id; `job` its job's
    id."""

    batch: bytes
    when: str = ""
    once: str = ""
    window_ms: int = 0
    job: str = ""
    job_ms: int = 0
    job_record: bytes = b""


def pack_append_each(
    shard: ShardKeys, producer: str, sequence: int, items: Sequence[Item], confirm: Confirm | None
) -> Packed:
    keys = (shard.stream, shard.meta, shard.delayed, shard.expiring, shard.timed)
    args: list[str | bytes | int] = [producer, sequence, shard.bell]
    for item in items:
        args += [item.when, item.once, item.window_ms, item.job, item.job_ms, item.job_record, item.batch]
    return Packed(pack_call("append_each", keys, args), False, confirm)


class Appended(NamedTuple):
    """`status` is OK, SEALED, FULL, MISSING or STALE; `entries` the entry id, or the id of each message, when OK;
    `overflow` what the queue says of FULL."""

    status: str
    entries: tuple[str, ...] = ()
    overflow: str = ""


def read_append(reply: Any, *, each: int = 0) -> Appended:
    """The reply of append, or of append_each for `each` messages."""
    with shape("append"):
        status = reply[0].decode()
        if status == "FULL":
            return Appended(status, overflow=reply[1].decode())
        if status != "OK":
            return Appended(status)
        entries = tuple(part.decode() for part in (reply[1:] if each else reply[1:2]))
        if len(entries) != (each or 1):
            raise ValueError
        return Appended(status, entries)
