"""Checks of one queue, by what was read of it twice. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from shardq.core.findings import Finding, Level
from shardq.core.hot import hot_shards
from shardq.ops.doctor.check import Check
from shardq.ops.doctor.facts import MIB, HotShard, Limits, QueueFacts
from shardq.ops.doctor.reshards import group_of as _group
from shardq.ops.doctor.reshards import reshards
from shardq.ops.doctor.servers import denied_right
from shardq.ops.inspect import GroupView, QueueView, ShardView
from shardq.ops.waits import named as _count
from shardq.ops.waits import waits_for

_SHOWN = 8


def denied(queue: QueueFacts, _limits: Limits) -> Iterator[Finding]:
    for right in sorted(queue.denied):
        yield denied_right(queue.name, right, queue.user)


def shards(queue: QueueFacts, _limits: Limits) -> Iterator[Finding]:
    for shard, keys in queue.missing.items():
        what = f"keys are gone: {', '.join(keys)}"
        do = f"a master lost its data: restore it, or start the shard empty with `shardq queue create {queue.name} "
        do += f"--shards {queue.shards}`"
        yield Finding("problem", "shard.missing", _shard(queue, shard), what, do)
    for shard, why in queue.after.unreadable.items():
        if shard not in queue.missing and "NOPERM" not in why:
            do = "see what is said of its master; `shardq install` where functions are missing"
            yield Finding("problem", "shard.unreadable", _shard(queue, shard), f"can't be read: {why}", do)


def groups_everywhere(queue: QueueFacts, _limits: Limits) -> Iterator[Finding]:
    there = {group for shard in queue.after.shards.values() for group in shard.groups}
    for group in sorted(there):
        lacking = [number for number, shard in queue.after.shards.items() if group not in shard.groups]
        if lacking:
            what = f"is not registered on {_count(lacking)}: what is stored there is not kept for it"
            do = f"shardq group create {queue.name} {group}"
            yield Finding("problem", "group.incomplete", _group(queue, group), what, do)


def unowned(queue: QueueFacts, _limits: Limits) -> Iterator[Finding]:
    """Backlog without workers; shards without an owner although there are workers; pending entries without an owner."""
    for group, views in _by_group(queue.after).items():
        waiting = waits_for(queue.after, group)  # nobody may own these yet
        free = [n for n, view in views.items() if not view.held and n not in waiting and _same(queue, n, group)]
        pending = [number for number in free if views[number].pel_entries]
        backlog = sum(view.backlog for view in views.values())
        if group in queue.paused_groups():
            do = f"shardq group resume {queue.name} {group}, once it may go on"
            yield Finding(
                "advice", "group.paused", _group(queue, group), f"is paused; unfinished messages: {backlog}", do
            )
        elif group in queue.members and not queue.workers(group) and backlog:
            what = f"unfinished messages: {backlog}, and no worker is there"
            yield Finding(
                "warning", "group.no_workers", _group(queue, group), what, "start one: shardq work MODULE:WORKER"
            )
        elif group in queue.members and queue.workers(group) and free:
            what = f"{_count(free)} had no owner for {queue.over_s:.0f} s although workers are there"
            do = "look again in a few seconds; then the leader's log, and whether workers reach that master"
            yield Finding("warning", "shard.no_owner", _group(queue, group), what, do)
        if pending:
            what = f"messages were delivered and nobody owns {_count(pending)} any more"
            do = "start a worker: it handles them first; nothing is lost"
            yield Finding("warning", "group.pending_unowned", _group(queue, group), what, do)


def _same(queue: QueueFacts, shard: int, group: str) -> bool:
    """Whether the lease was free in the first look too."""
    earlier = queue.before.shards.get(shard)
    return earlier is not None and group in earlier.groups and not earlier.groups[group].held


def still(queue: QueueFacts, _limits: Limits) -> Iterator[Finding]:
    """Leases that nobody renewed, of workers that do not beat either. (A long lease is renewed rarely, but beats come
    once a second.)"""
    for group, views in _by_group(queue.after).items():
        alive = queue.alive(group)
        stuck = [
            number
            for number, view in views.items()
            if group in queue.members and view.held and view.owner not in alive and _unmoved(queue, number, group, view)
        ]
        if stuck:
            owners = sorted({views[number].owner for number in stuck})
            gone = ", ".join(owners[:_SHOWN])
            what = f"{_count(stuck)}: its owner ({gone}) gave no sign of life for {queue.over_s:.0f} s"
            do = "other workers take them when the lease has run out; without one: start one, or wake this one up"
            yield Finding("warning", "lease.still", _group(queue, group), what, do)


def _unmoved(queue: QueueFacts, shard: int, group: str, now: GroupView) -> bool:
    earlier = queue.before.shards.get(shard)
    then = earlier.groups.get(group) if earlier is not None else None
    return then is not None and (then.epoch, then.renewals) == (now.epoch, now.renewals)


def consumers(queue: QueueFacts, _limits: Limits) -> Iterator[Finding]:
    for stray in queue.strays:
        level: Level = "problem" if stray.pending else "warning"
        what = f"another client reads in this group as {stray.consumer!r} on shard {stray.shard}"
        stream = queue.after.queue
        if stray.pending:
            what += f" and holds {stray.pending} entries, which no worker gets"
            do = f"stop it; then `XAUTOCLAIM STREAM {stray.group} owner 0 0` there, and restart the worker of the shard"
        else:
            do = f"stop it; then `XGROUP DELCONSUMER STREAM {stray.group} {stray.consumer}` there"
        yield Finding(level, "group.stray_consumer", f"{stream} / {stray.group}", what, do)
    for group, numbers in _grouped(queue.foreign_groups).items():
        what = f"Redis group {group!r} on {_count(numbers)} is not shardq's: entries go without waiting for it"
        yield Finding(
            "advice", "stream.foreign_group", queue.name, what, "make it a group of the queue, or XGROUP DESTROY it"
        )


def _grouped(pairs: Iterable[tuple[int, str]]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for shard, group in pairs:
        found.setdefault(group, []).append(shard)
    return found


def old_pending(queue: QueueFacts, limits: Limits) -> Iterator[Finding]:
    for group, views in _by_group(queue.after).items():
        old = {n: age for n, view in views.items() if (age := view.oldest_pending_age_s or 0) > limits.old_pending_s}
        if old:
            what = f"an entry on {_count(sorted(old))} is unfinished since it was stored {max(old.values()):.0f} s ago"
            do = f"see the worker's log: a handler hangs (give it a timeout), or retries: shardq status {queue.name}"
            yield Finding("warning", "group.pending_old", _group(queue, group), what, do)


def dead_letters(queue: QueueFacts, _limits: Limits) -> Iterator[Finding]:
    for group, views in _by_group(queue.after).items():
        letters = sum(view.dead_letters for view in views.values())
        if letters:
            do = f"shardq dead list {queue.name} --group {group}; then replay or purge them"
            yield Finding("warning", "group.dead_letters", _group(queue, group), f"dead letters kept: {letters}", do)


def uneven(queue: QueueFacts, _limits: Limits) -> Iterator[Finding]:
    # Shards that splits made of one lie in one slot, wherever that is.
    homes = {shard.slot: shard.node for shard in queue.after.shards.values() if shard.node}
    share = len(homes) / queue.masters if queue.masters else 0
    heavy = {node: count for node, count in Counter(homes.values()).items() if count > share + 1}
    if heavy and not queue.after.unreadable:
        most = ", ".join(f"{count} on {node}" for node, count in sorted(heavy.items()))
        what = f"its shards are uneven over {queue.masters} masters: {most} of {len(homes)}"
        if len(homes) < len(queue.after.shards):
            what += " (those of one slot, which splits made of one shard, count as one)"
        yield Finding("advice", "queues.uneven", queue.name, what, "redis-cli --cluster rebalance HOST:PORT")


def hot(queue: QueueFacts, _limits: Limits) -> Iterator[Finding]:
    """A hot key is told apart from a hot shard: only the latter is helped by a split."""
    for shard in queue.hot:
        level: Level = "warning" if shard.falls_behind else "advice"
        what = shard.text
        if shard.falls_behind:
            what += f"; {', '.join(shard.falls_behind)} can't keep up with it"
        keys = shard.keys
        if keys is not None and keys.one_key:
            what += f"; one key, {repr(keys.key)[:80]}, has {keys.share:.0%} of its newest {keys.messages} messages"
            do = "no split helps: spread that key over several where its order allows, or make its handler faster"
            yield Finding(level, "shard.hot_key", _shard(queue, shard.shard), what, do)
        else:
            do = f"shardq split {queue.name} {shard.shard}"
            if keys is not None:
                lower, upper = keys.halves
                do += f": of its newest {keys.messages} messages {lower:.0%} and {upper:.0%} would go to the halves"
            yield Finding(level, "shard.hot", _shard(queue, shard.shard), what, do)


def full(queue: QueueFacts, limits: Limits) -> Iterator[Finding]:
    share = queue.settings.share_of_backlog(queue.shards)
    if not share:
        return
    full_now, nearly = [], []
    for number, shard in queue.after.shards.items():
        used = _waiting(shard) if shard.state == "open" else 0
        if used >= share:
            full_now.append(number)
        elif used >= limits.memory * share:
            nearly.append(number)
    do = f"start more workers, or shardq queue change {queue.name} --max-backlog N"
    if full_now:
        says = {"block": "sends wait", "reject": "sends are refused", "drop-oldest": "the oldest messages are dropped"}
        what = f"{_count(full_now)} full (max-backlog {queue.settings.max_backlog}): {says[queue.settings.overflow]}"
        level: Level = "warning" if queue.settings.overflow == "drop-oldest" else "problem"
        yield Finding(level, "queues.full", queue.name, what, do)
    if nearly:
        what = f"{_count(nearly)} nearly full (max-backlog {queue.settings.max_backlog})"
        yield Finding("warning", "queues.nearly_full", queue.name, what, do)


def _waiting(shard: ShardView) -> int:
    """What counts against max_backlog; without a group everything stored."""
    return max((view.backlog for view in shard.groups.values()), default=shard.appended) + shard.delayed


def hot_between(before: QueueView, after: QueueView, limits: Limits) -> list[HotShard]:
    """Shards that got far more than the median shard between two looks; their keys are not known here."""
    found: dict[int, str] = {}
    wanted: tuple[tuple[float, Callable[[ShardView], int], Callable[[float], str]], ...] = (
        (limits.hot_per_s, lambda shard: shard.appended, lambda rate: f"{rate:.0f} messages/s"),
        (limits.hot_bytes_per_s, lambda shard: shard.bytes, lambda rate: f"{rate / MIB:.1f} MiB/s"),
    )  # fmt: skip
    for least, count, words in wanted:
        for number, rate in hot_shards(_rates(before, after, count), factor=limits.hot_factor, least=least).items():
            found.setdefault(number, f"gets {words(rate.rate)}, the median shard {words(rate.median)}")
    return [
        HotShard(number, text, falls_behind=_behind(before.shards[number], after.shards[number]))
        for number, text in sorted(found.items())
    ]


def _behind(before: ShardView, after: ShardView) -> list[str]:
    """Groups whose backlog grew by over a tenth of what was stored in between."""
    stored = after.appended - before.appended
    return [
        name
        for name, view in sorted(after.groups.items())
        if name in before.groups and view.backlog - before.groups[name].backlog > stored / 10
    ]


def _rates(before: QueueView, after: QueueView, count: Callable[[ShardView], int]) -> dict[int, float]:
    takes = {number: shard for number, shard in after.shards.items() if shard.state == "open"}
    pairs = [(before.shards[number], shard) for number, shard in takes.items() if number in before.shards]
    return {
        now.shard: (count(now) - count(then)) * 1000 / (now.time_ms - then.time_ms)
        for then, now in pairs
        if now.time_ms > then.time_ms
    }


def _by_group(view: QueueView) -> dict[str, dict[int, GroupView]]:
    found: dict[str, dict[int, GroupView]] = {}
    for number, shard in view.shards.items():
        for group, counts in shard.groups.items():
            found.setdefault(group, {})[number] = counts
    return dict(sorted(found.items()))


def _shard(queue: QueueFacts, shard: int) -> str:
    return f"{queue.name} shard {shard}"


def _always(_queue: QueueFacts) -> bool:
    return True


def _readable(queue: QueueFacts) -> bool:
    return bool(queue.after.shards)


def _has_groups(queue: QueueFacts) -> bool:
    return any(shard.groups for shard in queue.after.shards.values())


CHECKS: tuple[Check[QueueFacts], ...] = (
    Check("queue_access", "this user may read all of it", denied, _always),
    Check("shards", "every shard can be read and is whole", shards, lambda queue: not queue.denied),
    Check("groups", "every group is registered on every shard", groups_everywhere, _has_groups),
    Check("owners", "nothing waits for a worker that is not there", unowned, _has_groups),
    Check("reshards", "no change of shards is unfinished", reshards, _readable),
    Check("leases", "every lease that is held is alive", still, _has_groups),
    Check(
        "consumers", "nobody else reads in the groups", consumers, lambda queue: _has_groups(queue) and not queue.denied
    ),
    Check("pending", "nothing is in hand for long", old_pending, _has_groups),
    Check("dead", "no dead letters", dead_letters, _has_groups),
    Check("spread", "shards are even over the masters", uneven, _readable),
    Check("load", "no shard is far busier than the others", hot, _readable),
    Check("room", "below max-backlog", full, lambda queue: _readable(queue) and queue.settings.max_backlog is not None),
)
