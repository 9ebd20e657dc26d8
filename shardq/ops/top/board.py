"""What `shardq top` knows, and the rows and facts it makes of that for each view. Pure: reads and draws nothing.

A look that brings only some of the queues or shards leaves the last values of the others in place, as stale rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from shardq.ops.inspect import GroupView, QueueView, ShardView
from shardq.ops.rates import Look, lease_word, shown_groups
from shardq.ops.waits import waits_for

Level = Literal["queues", "shards", "workers", "shard", "worker"]
Kind = Literal["text", "number", "count", "bytes", "rate", "age"]
Value = str | int | float | None


@dataclass(frozen=True, slots=True)
class Column:
    """`field` is its name in JSON; the higher `drop`, the sooner a narrow terminal goes without it (0: never)."""

    name: str
    field: str
    kind: Kind
    drop: int = 0


@dataclass(frozen=True, slots=True)
class Place:
    """Where in the cluster a view looks; the fields that its level has no use for are empty."""

    level: Level
    queue: str = ""
    group: str = ""
    shard: int = -1
    worker: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """One line: a value for each column of its level. `opens` is what it stands for, unique in its table; a `marked`
    one is to be seen also where there is no room for the column that says why."""

    opens: Place
    values: tuple[Value, ...]
    stale: bool = False
    marked: bool = False


@dataclass(frozen=True, slots=True)
class Fact:
    """One figure of the lines above the table."""

    name: str
    value: Value
    kind: Kind


@dataclass(frozen=True, slots=True)
class Board:
    """The last look at each queue; `unreadable` says why of queues, `trouble` why of the whole cluster."""

    looks: Mapping[str, Look] = field(default_factory=dict)
    unreadable: Mapping[str, str] = field(default_factory=dict)
    trouble: str = ""

    def updated(self, views: Mapping[str, QueueView], unreadable: Mapping[str, str], *, whole: bool) -> Board:
        """With what was read now. `whole`: all queues were asked for, so that what did not come is gone."""
        known = {name: look for name, look in self.looks.items() if not whole or name in unreadable}
        fresh = {name: self._look(name, view) for name, view in views.items()}
        bad = {} if whole else {name: why for name, why in self.unreadable.items() if name not in views}
        return Board(dict(sorted((known | fresh).items())), bad | dict(unreadable))

    def failed(self, why: str) -> Board:
        """With nothing new, and the reason."""
        return replace(self, trouble=why)

    def _look(self, name: str, view: QueueView) -> Look:
        if name not in self.looks:
            return Look(None, view)
        last = self.looks[name].view
        if not view.unreadable:
            return Look(last, view)
        stale = {number: last.shards[number] for number in view.unreadable if number in last.shards}
        shards = dict(sorted((stale | dict(view.shards)).items()))
        return Look(last, replace(view, shards=shards, groups=dict(last.groups) | dict(view.groups)))


_WORK = (
    Column("BACKLOG", "backlog", "count"),
    Column("PENDING", "pending", "count", 2),
    Column("OLDEST", "oldest_s", "age"),
    Column("STORED/S", "stored_rate", "rate"),
    Column("HANDLED/S", "handled_rate", "rate"),
)
_OWNER = Column("OWNER", "owner", "text")
_LEASE = (Column("LEASE", "lease", "text", 4), Column("EPOCH", "epoch", "number", 6))
_HOT = Column("HOT", "hot", "text", 9)
_SHARD = (
    Column("SHARD", "shard", "number"),
    Column("SLOT", "slot", "number", 7),
    Column("NODE", "node", "text", 3),
    *_WORK,
)

COLUMNS: dict[Level, tuple[Column, ...]] = {
    "queues": (
        Column("QUEUE", "queue", "text"),
        Column("GROUP", "group", "text"),
        Column("SHARDS", "shards", "count", 6),
        *_WORK,
        Column("DEAD", "dead", "count", 3),
        Column("WORKERS", "workers", "count", 4),
        Column("LEASES", "leases", "count", 5),
    ),
    "shards": (*_SHARD, _OWNER, *_LEASE, _HOT),
    "workers": (
        Column("WORKER", "worker", "text"),
        Column("ROLE", "role", "text"),
        Column("SHARDS", "shards", "count"),
        *_WORK,
    ),
    "shard": (
        Column("GROUP", "group", "text"),
        *(column for column in _WORK if column.field != "stored_rate"),
        Column("WAITING", "waiting", "count", 3),
        Column("DEAD", "dead", "count", 3),
        _OWNER,
        *_LEASE,
    ),
    "worker": (*_SHARD, *_LEASE, _HOT),
}


def rows(board: Board, place: Place) -> list[Row]:
    """The table's rows in their natural order."""
    if place.level == "queues":
        return [_queue_row(look, group) for look in board.looks.values() for group in shown_groups(look.view)]
    look = board.looks.get(place.queue)
    if look is None:
        return []
    match place.level:
        case "shards":
            notes = _notes(look, place.group)
            return [_shard_row(look, shard, place.group, "shards", notes) for shard in look.view.shards.values()]
        case "worker":
            notes = _notes(look, place.group)
            return [_shard_row(look, shard, place.group, "worker", notes) for shard in _owned(look.view, place)]
        case "workers":
            return [_worker_row(look, place, worker) for worker in _workers(look.view, place.group)]
        case "shard":
            return [_group_row(look, place, group) for group in _groups_of(look.view, place.shard)]


def facts(board: Board, place: Place) -> list[Fact]:
    """What is said above the table."""
    look = board.looks.get(place.queue)
    if place.level == "queues":
        return [Fact("queues", len(board.looks), "count"), *_sums(board.looks.values())]
    if look is None:
        return []
    if place.level == "shard":
        return _shard_facts(look, place.shard)
    shards = list(_owned(look.view, place)) if place.level == "worker" else list(look.view.shards.values())
    part = replace(look, view=replace(look.view, shards={shard.shard: shard for shard in shards}))
    held = sum(shard.groups[place.group].held for shard in shards if place.group in shard.groups)
    return [Fact("shards", len(shards), "count"), Fact("held", held, "count"), *_sums([part], place.group)]


def trouble(board: Board, place: Place) -> str:
    """Why the view is not what is true now, on one line; '' when it is."""
    if board.trouble:
        return board.trouble
    named = [place.queue] if place.queue else [*board.looks, *board.unreadable]
    for name in named:
        if name in board.unreadable:
            return f"queue {name}: {board.unreadable[name]}"
        missing = board.looks[name].view.unreadable if name in board.looks else {}
        if missing:
            number, why = next(iter(missing.items()))
            return f"{len(missing)} shards of {name} can't be read; shard {number}: {why}"
    return ""


def queue_groups(board: Board, queue: str) -> list[str]:
    """The queue's groups, `['']` where it has none or is not known."""
    return shown_groups(board.looks[queue].view) if queue in board.looks else [""]


# -- rows -------------------------------------------------------------------------------------------------------------


def _queue_row(look: Look, group: str) -> Row:
    view = look.view
    shards = len(view.shards.keys() | view.unreadable.keys())
    stored, handled = look.stored_total(), look.handled_total(group) if group else None
    total = view.total(group)
    opens = Place("shards", view.queue, group)
    if total is None:
        values: tuple[Value, ...] = (view.appended, None, None, stored, handled, None, None, None)
    else:
        state = view.groups.get(group)
        held = sum(shard.groups[group].held for shard in view.shards.values() if group in shard.groups)
        members = len(state.members) if state is not None else None
        values = (*_left(total), stored, handled, total.dead, members, held)
    return Row(opens, (view.queue, group or "-", shards, *values), bool(view.unreadable))


def _left(view: GroupView) -> tuple[Value, ...]:
    return view.backlog, view.pel_messages, view.oldest_age_s


def _notes(look: Look, group: str) -> dict[int, str]:
    """What is to be said of a shard beside its figures."""
    retired = {number: "retired" for number, shard in look.view.shards.items() if shard.state != "open"}
    return (
        retired
        | {number: "waits" for number in waits_for(look.view, group) if number not in retired}
        | dict.fromkeys(look.hot(), "hot")
    )


def _shard_row(look: Look, shard: ShardView, group: str, level: Level, notes: dict[int, str]) -> Row:
    view = shard.groups.get(group)
    stored, handled = look.stored(shard), look.handled(shard, group) if view is not None else None
    left = _left(view) if view is not None else (shard.appended, None, None)
    lease: tuple[Value, ...] = ("-", None) if view is None else (lease_word(view), view.epoch)
    owner: tuple[Value, ...] = () if level == "worker" else ((view.owner or "-") if view is not None else "-",)
    values = (shard.shard, shard.slot, shard.node or "-", *left, stored, handled, *owner, *lease)
    note = notes.get(shard.shard, "")
    values = (*values, note)
    opens = Place("shard", look.view.queue, group, shard.shard)
    return Row(opens, values, shard.shard in look.view.unreadable, note == "hot")


def _group_row(look: Look, place: Place, group: str) -> Row:
    shard = look.view.shards[place.shard]
    view = shard.groups[group]
    counts = (*_left(view), look.handled(shard, group), view.waiting, view.dead)
    values = (group, *counts, view.owner or "-", lease_word(view), view.epoch)
    return Row(replace(place, group=group), values, place.shard in look.view.unreadable)


def _worker_row(look: Look, place: Place, worker: str) -> Row:
    opens = Place("worker", place.queue, place.group, worker=worker)
    shards = list(_owned(look.view, opens))
    parts = [shard.groups[place.group] for shard in shards]
    oldest = max((part.oldest_age_s for part in parts if part.oldest_age_s is not None), default=None)
    left = (sum(part.backlog for part in parts), sum(part.pel_messages for part in parts), oldest)
    stored = _known(map(look.stored, shards))
    handled = _known(look.handled(shard, place.group) for shard in shards)
    stale = any(shard.shard in look.view.unreadable for shard in shards)
    values = (worker or "-", _role(look.view, place.group, worker), len(shards), *left, stored, handled)
    return Row(opens, values, stale)


def _role(view: QueueView, group: str, worker: str) -> str:
    """`away` holds leases and has signed off, or was forgotten; `nobody` stands for the shards without an owner."""
    if not worker:
        return "nobody"
    state = view.groups.get(group)
    if state is None:
        return "-"
    if worker == state.leader:
        return "leader"
    return "member" if worker in state.members else "away"


def _workers(view: QueueView, group: str) -> list[str]:
    state = view.groups.get(group)
    owners = {shard.groups[group].owner for shard in view.shards.values() if group in shard.groups}
    return sorted(owners | set(state.members if state is not None else ()))


def _owned(view: QueueView, place: Place) -> Iterator[ShardView]:
    for shard in view.shards.values():
        if place.group in shard.groups and shard.groups[place.group].owner == place.worker:
            yield shard


def _groups_of(view: QueueView, shard: int) -> list[str]:
    return sorted(view.shards[shard].groups) if shard in view.shards else []


# -- facts ------------------------------------------------------------------------------------------------------------


def _sums(looks: Iterable[Look], group: str | None = None) -> list[Fact]:
    """Over all groups where none is named; what is stored counts once, however many groups there are."""
    looks = list(looks)
    pairs = [(look, name) for look in looks for name in ([group] if group is not None else shown_groups(look.view))]
    totals = [total for look, name in pairs if name and (total := look.view.total(name)) is not None]
    oldest = max((total.oldest_age_s for total in totals if total.oldest_age_s is not None), default=None)
    return [
        Fact("backlog", sum(total.backlog for total in totals), "count"),
        Fact("pending", sum(total.pel_messages for total in totals), "count"),
        Fact("oldest", oldest, "age"),
        Fact("stored", _known(look.stored_total() for look in looks), "rate"),
        Fact("handled", _known(look.handled_total(name) for look, name in pairs if name), "rate"),
        Fact("delayed", sum(look.view.delayed for look in looks), "count"),
        Fact("dead", sum(total.dead for total in totals), "count"),
    ]


def _shard_facts(look: Look, number: int) -> list[Fact]:
    shard = look.view.shards.get(number)
    if shard is None:
        return []
    return [
        Fact("hashes", f"{shard.low:08x}-{shard.high - 1:08x}", "text"),
        Fact("slot", shard.slot, "number"),
        Fact("node", shard.node or "-", "text"),
        Fact("state", shard.state, "text"),
        Fact("stored", look.stored(shard), "rate"),
        Fact("messages", shard.appended, "count"),
        Fact("size", shard.bytes, "bytes"),
        Fact("entries", shard.entries, "count"),
        Fact("delayed", shard.delayed, "count"),
        Fact("dropped", shard.dropped, "count"),
    ]


def _known(rates: Iterable[float | None]) -> float | None:
    known = [rate for rate in rates if rate is not None]
    return sum(known) if known else None
