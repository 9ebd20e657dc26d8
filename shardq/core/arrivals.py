"""What a step fetched becomes messages in hand: entries of the stream and items that were put off, one at a time.
Decides nothing about how much is fetched or when (core/session.py). Pure.

Invariants:
- A message that can't be decoded is a dead letter with its bytes, never an endless loop; one that was delivered
  SUSPECT_DELIVERIES times without an outcome is put among those that are handled alone (core/later.py).
- A message that is deleted is not handed out: it is finished here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from shardq.core import records
from shardq.core.in_hand import InHand
from shardq.core.intake import build_messages, dead_letter, is_batch, open_kept, unpack_progress
from shardq.core.later import FATAL_GETS, SUSPECT_GETS
from shardq.core.message import Batch, Message
from shardq.errors import CorruptData

SUSPECT_DELIVERIES = 3


class Arrivals:
    """`describe(message, error)` makes a dead letter of a message; `marks` are the messages that are deleted."""

    def __init__(self, hand: InHand, describe: Callable[[Message, str], bytes]) -> None:
        self.describe = describe
        self.marks: frozenset[tuple[str, int]] = frozenset()
        self._hand, self._owner = hand, hand.owner
        self._trusting = False

    # -- entries ---------------------------------------------------------------------------------------------

    def open_entry(self, entry: str, fields: Sequence[bytes], pending: bytes) -> list[Message]:
        """The messages to handle of an entry; `pending` is '<times delivered>:<progress>' where it was pending."""
        times, _, progress = pending.partition(b":")
        if not is_batch(fields):
            return self._suspect(times, self._open_foreign(entry, fields))
        raw = fields[3]
        try:
            unpacked = records.unpack(raw) if raw[1:2] > b"\0" and raw[1] & records.PACKED else None
            decoded = records.decode(raw, unpacked)
            batch = Batch(self._owner, entry, len(decoded.keys), raw)
            if unpacked is not None:
                batch.size = len(unpacked)
            batch.headed = decoded.headers is not None
            messages = build_messages(decoded, batch)
        except CorruptData as error:
            return self._set_aside(entry, records.count_of(raw), raw, str(error))
        self._hand.entries[entry] = batch
        self._hand.held_bytes += batch.size
        if progress:
            messages = self._resume(batch, messages, progress)
        if decoded.holes or self.marks:
            messages = self._without_deleted(messages, frozenset(decoded.holes or ()))
        self._hand.outstanding += len(messages)
        return self._suspect(times, messages)

    def _suspect(self, times: bytes, messages: list[Message]) -> list[Message]:
        """Messages that were delivered again and again without an outcome go where each is handled alone. Only those
        before all others that are in hand: one behind them would be put before an earlier one of its key. Such a one
        was delivered more often only for an answer that was lost, or an owner that went in good order."""
        if self._trusting:
            return messages
        if messages and (not times.isdigit() or int(times[:9]) < SUSPECT_DELIVERIES):
            self._trusting = True
            return messages
        for message in messages:
            self._hand.park(message, SUSPECT_GETS)
        return []

    def _resume(self, batch: Batch, messages: list[Message], progress: bytes) -> list[Message]:
        done = unpack_progress(progress, batch.count)
        batch.done[:] = done
        rest = [message for message in messages if not done[message.index]]
        batch.remaining = len(rest)
        if not rest:
            self._hand.whole(batch)
        return rest

    def _without_deleted(self, messages: list[Message], holes: frozenset[int]) -> list[Message]:
        """Deleted messages are finished unhandled."""
        rest: list[Message] = []
        for message in messages:
            if message.index in holes or (message.batch.entry, message.index) in self.marks:
                self._hand.acked += 1
                self._hand.leave(message)
            else:
                rest.append(message)
        return rest

    def _open_foreign(self, entry: str, fields: Sequence[bytes]) -> list[Message]:
        if len(fields) % 2 or not fields:
            return self._set_aside(entry, 1, b"", "the entry was deleted while it was pending")
        batch = Batch(self._owner, entry, 1)
        batch.size = sum(map(len, fields))
        self._hand.entries[entry] = batch
        self._hand.held_bytes += batch.size
        value = records.foreign_value(fields)
        batch.pristine = records.RecordBatch(0, None, [None], [dict(value)], None)
        messages = [Message(None, value, None, 0, 0, batch)]
        if self.marks:
            messages = self._without_deleted(messages, frozenset())
        self._hand.outstanding += len(messages)
        return messages

    def _set_aside(self, entry: str, count: int, raw: bytes, error: str) -> list[Message]:
        batch = Batch(self._owner, entry, count)
        batch.remaining = 0
        self._hand.entries[entry] = batch
        self._hand.whole(batch)
        self._hand.give_up(count, dead_letter(entry, None, raw, error))
        return []

    # -- items -----------------------------------------------------------------------------------------------

    def open_item(self, item: int, raw: bytes, now_s: float) -> Message | None:
        """The message of an item that was asked for; None when it is not to be handled."""
        hand, later = self._hand, self._hand.later
        later.got(item)
        if not raw:  # it was deleted meanwhile
            hand.acked += 1
            hand.drop(item, now_s)
            return None
        gets = later.items[item].gets
        try:
            message, error = open_kept(self._owner, item, raw)
        except CorruptData as broken:
            self._give_up(item, dead_letter("", None, raw, str(broken)), now_s)
            return None
        if gets > FATAL_GETS:
            error = f"its worker process died {gets - 1} times while handling it" + (
                f"; before: {error}" if error else ""
            )
            self._give_up(item, self.describe(message, error), now_s)
            return None
        hand.outstanding += 1
        hand.held_bytes += message.batch.size
        return message

    def _give_up(self, item: int, record: bytes, now_s: float) -> None:
        self._hand.give_up(1, record)
        self._hand.drop(item, now_s)
