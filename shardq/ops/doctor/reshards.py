"""Checks of what changes of the number of shards leave behind, by what was read of a queue twice. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from shardq.core.findings import Finding
from shardq.ops.doctor.facts import Limits, QueueFacts
from shardq.ops.inspect import GroupView, ShardView
from shardq.ops.waits import named, waiting_shards


def reshards(queue: QueueFacts, limits: Limits) -> Iterator[Finding]:
    """A reshard that nobody carries on; groups that wait for long at retired shards, or keep them."""
    if queue.reshard:
        stuck = queue.reshard == "sealing"
        what = f"a reshard made no progress for {queue.over_s:.0f} s"
        what += ": sends to the shards that it seals wait" if stuck else ", and holds nothing up so far"
        do = f"`shardq queue show {queue.name}` names its shards; repeat the command that began it, or run a worker or "
        do += f"coordinator that may complete it (shardq acl worker --queue {queue.name} --reshards)"
        yield Finding("problem" if stuck else "warning", "reshard.unfinished", queue.name, what, do)
    for group in sorted({name for shard in _retired(queue).values() for name in shard.groups}):
        yield from _kept_by(queue, group, limits)


def _kept_by(queue: QueueFacts, group: str, limits: Limits) -> Iterator[Finding]:
    views = {number: shard.groups[group] for number, shard in _retired(queue).items() if group in shard.groups}
    late = {number: view for number, view in views.items() if _is_late(view, limits)}
    waiting = waiting_shards(queue.after, group)
    if late and waiting:
        backlog, retries = sum(view.backlog for view in late.values()), sum(view.waiting for view in late.values())
        what = f"has {backlog} messages to finish on retired {named(sorted(late))}, of which {retries} wait for a "
        what += f"retry, and begins on {named(waiting)} only then"
        do = f"shardq status {queue.name} --group {group}: a retry waits there, a handler hangs, or no worker runs; a "
        do += f"group that is not needed: shardq group delete {queue.name} {group}"
        yield Finding("warning", "reshard.waits", group_of(queue, group), what, do)
    letters = {number: view.dead_letters for number, view in views.items() if view.dead_letters}
    if letters:
        what = f"retired {named(sorted(letters))} can't be removed: dead letters kept there: {sum(letters.values())}"
        do = f"shardq dead list {queue.name} --group {group}; then replay or purge them"
        yield Finding("advice", "reshard.kept", group_of(queue, group), what, do)


def _is_late(view: GroupView, limits: Limits) -> bool:
    """Messages that are in hand, or wait to be, since long ago; or nothing but retries, whose times are not known."""
    return view.backlog > 0 and ((view.oldest_age_s or 0) > limits.old_pending_s or view.waiting >= view.backlog)


def _retired(queue: QueueFacts) -> dict[int, ShardView]:
    return {number: shard for number, shard in queue.after.shards.items() if shard.state != "open"}


def group_of(queue: QueueFacts, group: str) -> str:
    return f"{queue.name} / {group}"
