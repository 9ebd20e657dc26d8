"""Schedules: what a queue sends by the clock, and which of its ticks are to be sent now. Reads no clock and knows no
calendar: runtime/cron.py turns a cron expression into ticks.

A tick is a moment in whole Unix seconds. It is appended to the shard of the schedule's key by the producer
`cron/<name>` with the tick itself as the sequence, so append's own idempotence sends it once, however many leaders try;
and that producer's last sequence is the last tick sent: no second record could disagree with it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice, takewhile
from typing import Annotated, Any, Literal, Self, get_args

import msgspec

from shardq.core.hashing import key_hash
from shardq.core.routing import RoutingTable, Shard
from shardq.errors import CorruptData

Missed = Literal["last", "all", "skip"]
MISSED: tuple[Missed, ...] = get_args(Missed)

GRACE_S = 60
"""A tick at most this late is not missed for `missed="skip"`."""

MOST_MISSED = 1000
"""So many ticks are looked back at, at most."""


class _Definition(msgspec.Struct, frozen=True, kw_only=True):
    """What is stored, as a msgpack map of these names, in the field of the schedule's name. msgspec decodes no union of
    str and bytes, so those are checked by `from_bytes`."""

    cron: str
    timezone: str = "UTC"
    key: Any = None
    value: Any = None
    headers: dict[str, Any] | None = None
    missed: Missed = "last"
    since_ms: Annotated[int, msgspec.Meta(ge=0, lt=1 << 53)] = 0
    turn: int = 0


class Schedule(_Definition, frozen=True, kw_only=True):
    """One schedule of a queue.

    name      unique in the queue
    cron      the cron expression, read in `timezone`
    key       str, bytes or None, of each message
    value     of each message; what msgpack carried comes back as what msgpack makes of it
    headers   mapping from str to str or bytes, of each message, or None
    missed    what becomes of ticks at which nobody could send: "last", "all" or "skip"
    since_ms  Unix time in ms; ticks up to here are not this schedule's business
    turn      rises with every change, so that no definition stands twice
    """

    name: str

    def to_bytes(self) -> bytes:
        """Equal schedules of one name give equal bytes."""
        fields = {name: getattr(self, name) for name in _Definition.__struct_fields__}
        if self.headers is not None:
            fields["headers"] = dict(sorted(self.headers.items()))
        return msgspec.msgpack.encode(fields)

    @classmethod
    def from_bytes(cls, name: str, data: bytes) -> Self:
        """Raises CorruptData."""
        try:
            stored = msgspec.msgpack.decode(data, type=_Definition)
            texts = ["" if stored.key is None else stored.key, *(stored.headers or {}).values()]
            if not all(isinstance(text, str | bytes) for text in texts):
                raise ValueError("a key or header is neither str nor bytes")
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, OverflowError, ValueError) as error:
            msg = f"schedule {name!r} does not decode ({error}): set it again"
            raise CorruptData(msg) from error
        return cls(name=name, **msgspec.structs.asdict(stored))

    def over(self, before: Schedule | None, now_ms: int) -> Self:
        """As it is to be stored in the place of `before`: new times count from now, the same ones go on. One that
        changes nothing comes out as `before`."""
        if before is None:
            return msgspec.structs.replace(self, since_ms=now_ms)
        goes_on = (before.cron, before.timezone) == (self.cron, self.timezone)
        same_turn = msgspec.structs.replace(self, since_ms=before.since_ms if goes_on else now_ms, turn=before.turn)
        return same_turn if same_turn.to_bytes() == before.to_bytes() else same_turn.next_turn()

    def next_turn(self) -> Self:
        """The same: whoever would replace the one he saw has to look again."""
        return msgspec.structs.replace(self, turn=self.turn + 1)

    def shard_in(self, table: RoutingTable) -> Shard:
        """Where its messages go and its last tick is known: without a key, by its name."""
        return table.shard_for(key_hash(self.name if self.key is None else self.key))


def tick_producer(name: str) -> str:
    """The producer that all ticks of a schedule are appended by."""
    return f"cron/{name}"


@dataclass(frozen=True, slots=True)
class Due:
    """`ticks` are to be sent, in this order; `left_out` are not, and `late` of all these were missed.

    Numbers are counted no further back than MOST_MISSED ticks.
    """

    ticks: tuple[int, ...]
    left_out: int
    late: int


def due_ticks(newest_first: Iterable[int], after_s: int, now_s: int, missed: Missed) -> Due:
    """What is due of ticks that come newest first: those in (after_s, now_s], less what `missed` leaves out.

    `after_s` is the last tick sent, or the moment the schedule began. Takes at most one tick more than it looks at, so
    that the ticks may be an endless iterator.
    """
    past = (tick for tick in newest_first if tick <= now_s)
    found = list(islice(takewhile(lambda tick: tick > after_s, past), MOST_MISSED + 1))
    punctual = [tick for tick in found if tick >= now_s - GRACE_S]
    if missed == "skip":
        sent = punctual
    else:
        sent = found[: 1 if missed == "last" else MOST_MISSED]
    return Due(tuple(reversed(sent)), len(found) - len(sent), len(found) - len(punctual))
