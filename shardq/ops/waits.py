"""Which shards a group may not begin on after a reshard, and what it has to finish first: by what was read, in words.
Pure."""

from __future__ import annotations

from collections.abc import Sequence

from shardq.ops.inspect import QueueView, ShardView

_SHOWN = 8


def waits_for(view: QueueView, group: str) -> dict[int, list[int]]:
    """The shards that the group may not begin on: of each the retired ones, which held its keys, that it has not
    finished. Those that can't be read now are left out."""
    unfinished: dict[int, list[ShardView]] = {}
    for shard in view.shards.values():
        if shard.state != "open" and group in shard.groups and shard.groups[group].backlog + shard.delayed > 0:
            unfinished.setdefault(shard.slot, []).append(shard)
    if not unfinished:
        return {}
    found = {number: _before(shard, unfinished.get(shard.slot, ())) for number, shard in view.shards.items()}
    return {number: before for number, before in found.items() if before}


def _before(shard: ShardView, unfinished: Sequence[ShardView]) -> list[int]:
    """Those of one home whose hashes the shard took over, at once or over others between them."""
    return [
        old.shard for old in unfinished if old.shard < shard.shard and old.low < shard.high and shard.low < old.high
    ]


def waiting_shards(view: QueueView, group: str) -> list[int]:
    """Those of them that the group has or will have something to do on: not retired ones that it has finished, too."""
    return sorted(number for number in waits_for(view, group) if _matters(view.shards[number], group))


def _matters(shard: ShardView, group: str) -> bool:
    return shard.state == "open" or (group in shard.groups and shard.groups[group].backlog > 0)


def in_words(view: QueueView, group: str) -> str:
    """`group bikes has 75 messages to finish on retired shard 0, and begins on shards 2, 3 only then`; '' where it need
    not wait."""
    waiting = waits_for(view, group)
    if not waiting:
        return ""
    before = sorted({old for each in waiting.values() for old in each})
    views = [view.shards[number].groups[group] for number in before]
    retries = sum(each.waiting for each in views)
    of_them = f", {retries} of which wait for a retry," if retries else ","
    left = f"{sum(each.backlog for each in views)} messages to finish on retired {named(before)}"
    return f"group {group} has {left}{of_them} and begins on {named(waiting_shards(view, group))} only then"


def named(numbers: Sequence[int]) -> str:
    """`shard 3` or `shards 3, 4`, the first few of many."""
    shown = ", ".join(map(str, numbers[:_SHOWN])) + (", ..." if len(numbers) > _SHOWN else "")
    return f"shard{'s' * (len(numbers) != 1)} {shown}"
