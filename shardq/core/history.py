"""What a queue holds, read without consuming it: stream entries opened into records, shards merged into one order.

Opening never raises: an entry that can't be read is a record with an `error`, so that looking at a queue shows what is
wrong with it. Pure: where pages come from, and when, is runtime/history.py's.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat
from typing import Any

import msgspec

from shardq.core import records
from shardq.core.ids import MessageId, entry_key
from shardq.core.records import Headers, Key
from shardq.errors import CorruptData

Entry = tuple[str, Sequence[bytes]]
"""A stream entry: its id, its flat list of fields and values."""

Position = MessageId | int | None
"""A place in every shard: a message, or Unix time in ms, or None for the very beginning or end."""


class Record(msgspec.Struct, frozen=True):
    """One message as it is stored.

    id            `<shard>/<entry id>/<index>`
    key           str, bytes or None, as it was sent
    value         bytes, str, or what msgpack carried; a dict of fields when another client wrote the entry
    headers       mapping from str to str or bytes, or None
    sent_at_ms    Unix time in ms by the producer's clock (0 for another client's entry)
    stored_at_ms  Unix time in ms by the server's clock: the first part of the entry id
    error         None, or why the entry can't be read; `value` is then its bytes
    """

    id: str
    shard: int
    key: Key
    value: Any
    headers: Headers | None
    sent_at_ms: int
    stored_at_ms: int
    error: str | None = None


def open_entry(shard: int, entry: Entry) -> list[Record]:
    """The records of one entry, in order, without deleted ones; one with an `error` when it can't be read."""
    entry_id, fields = entry
    stored = entry_key(entry_id)[0]
    base = f"{shard}/{entry_id}/"
    if not fields or len(fields) % 2:
        return [Record(f"{base}0", shard, None, b"", None, 0, stored, "the entry's fields do not come in pairs")]
    if len(fields) < 4 or fields[0] != b"at" or fields[2] != b"batch":
        return [Record(f"{base}0", shard, None, records.foreign_value(fields), None, 0, stored)]
    try:
        batch = records.decode(fields[3])
    except CorruptData as error:
        return [Record(f"{base}0", shard, None, fields[3], None, 0, stored, str(error))]
    return _records(shard, base, stored, batch)


def _records(shard: int, base: str, stored: int, batch: records.RecordBatch) -> list[Record]:
    offsets = batch.offsets_ms if batch.offsets_ms is not None else repeat(0)
    headers = batch.headers if batch.headers is not None else repeat(None)
    columns = enumerate(zip(batch.keys, batch.values, headers, offsets, strict=False))
    holes = frozenset(batch.holes or ())
    return [
        Record(f"{base}{index}", shard, key, value, own, batch.base_ms + offset, stored)
        for index, (key, value, own, offset) in columns
        if index not in holes
    ]


# -- a part of the history ---------------------------------------------------------------------------------------------


def bounds(shard: int, start: Position, end: Position) -> tuple[str, str]:
    """First and last entry id of a shard, for XRANGE, both inclusive: a message id is exact on its own shard, on the
    others its entry's ms is meant."""
    return _bound(shard, start, "-"), _bound(shard, end, "+")


def _bound(shard: int, position: Position, open_end: str) -> str:
    if position is None:
        return open_end
    if isinstance(position, int):
        return str(position)  # without its second part an id means all of that ms
    return position.entry if position.shard == shard else position.entry.partition("-")[0]


def is_empty(lower: str, upper: str) -> bool:
    """Whether no entry can lie between two bounds."""
    return lower != "-" and upper != "+" and _key(lower, 0) > _key(upper, (1 << 64) - 1)


def _key(bound: str, seq: int) -> tuple[int, int]:
    return entry_key(bound) if "-" in bound else (int(bound), seq)


def within(found: list[Record], start: Position, end: Position) -> list[Record]:
    """The records of one entry without those before `start` or behind `end` in the same entry."""
    first, last = _index_in(found, start), _index_in(found, end)
    if first is None and last is None:
        return found
    low, high = first or 0, len(found) if last is None else last
    return [record for record in found if low <= int(record.id.rpartition("/")[2]) <= high]


def _index_in(found: list[Record], position: Position) -> int | None:
    if not found or not isinstance(position, MessageId):
        return None
    same = found[0].id.rpartition("/")[0] == f"{position.shard}/{position.entry}"
    return position.index if same else None


def has_key(record: Record, key: bytes) -> bool:
    """Whether the record's key is this one; a str and its UTF-8 bytes are one key."""
    own = record.key
    return own == key if type(own) is not str else own.encode() == key


# -- several shards in one order ---------------------------------------------------------------------------------------


class Merge:
    """Entries of several shards by (ms, seq, shard), or in the exact reverse of that order.

    `ready` yields entries until a shard that is not at its end has none left: it is in `hungry` then, to be fed its
    next page. Within a shard pages come in the direction of the merge.
    """

    def __init__(self, shards: Iterable[int], *, reverse: bool = False) -> None:
        self.hungry = set(shards)
        self._sign = -1 if reverse else 1
        self._pages: dict[int, Iterator[Entry]] = {}
        self._ended: set[int] = set()
        self._heap: list[tuple[int, int, int, Entry]] = []

    def feed(self, shard: int, page: Sequence[Entry], *, last: bool) -> None:
        """The shard's next entries, at least one unless they are the last."""
        self.hungry.discard(shard)
        self._pages[shard] = iter(page)
        if last:
            self._ended.add(shard)
        self._advance(shard)

    def ready(self) -> Iterator[tuple[int, Entry]]:
        """(shard, entry), as long as it is known which comes next."""
        while self._heap and not self.hungry:
            _, _, signed, entry = heapq.heappop(self._heap)
            shard = signed * self._sign
            self._advance(shard)
            yield shard, entry

    def _advance(self, shard: int) -> None:
        entry = next(self._pages[shard], None)
        if entry is not None:
            ms, seq = entry_key(entry[0])
            heapq.heappush(self._heap, (ms * self._sign, seq * self._sign, shard * self._sign, entry))
        elif shard not in self._ended:
            self.hungry.add(shard)
