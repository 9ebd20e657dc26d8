"""`shardq status`: what is in the queues, how old it is, how fast it goes, who has it. Reads twice, for the rate."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anyio
import click

from shardq.cli.complete import group_names, queue_names
from shardq.cli.options import json_option, over_option, url_option
from shardq.cli.output import age, print_json, print_table, tell_unreadable
from shardq.ops.inspect import GroupView, QueueView, ShardView, read_queue, read_queues
from shardq.ops.processes import run_async
from shardq.ops.rates import Look, lease_word, shown_groups
from shardq.ops.waits import named, waits_for
from shardq.runtime.client import Client, connect


@click.command(epilog="Example: shardq status orders --group billing")
@click.argument("queue", required=False, shell_complete=queue_names)
@click.option("--group", metavar="GROUP", shell_complete=group_names, help="Only this consumer group.")
@over_option("RATE")
@url_option
@json_option
@click.pass_context
def status(
    context: click.Context, queue: str | None, group: str | None, over_s: float, url: str, as_json: bool
) -> None:
    """Show every shard of QUEUE for each of its groups, or, without QUEUE, a line for each queue and group.

    BACKLOG counts messages stored and not finished, PENDING those of them that a worker has; OLDEST is the age of the
    oldest of them (of those that wait for a retry, the one that was put off first counts); RATE is messages finished in
    a second (stored in a second, where there is no group).
    """
    if group is not None and queue is None:
        raise click.UsageError("--group needs the QUEUE it belongs to")
    looks, bad = run_async(lambda: _look_twice(url, queue, group, over_s))
    if queue is None:
        _print_summary(looks, as_json)
    else:
        _print_shards(looks[0], as_json)
    for look in looks:
        for number, why in look.view.unreadable.items():
            click.echo(f"shard {number} of {look.view.queue} can't be read: {why}", err=True)
    tell_unreadable(context, bad)


async def _look_twice(
    url: str, queue: str | None, group: str | None, over_s: float
) -> tuple[list[Look], dict[str, str]]:
    """Every queue, or the one that is named; and why of those that can't be read, which the named one raises."""
    groups = [group] if group is not None else None

    async def read(client: Client) -> tuple[dict[str, QueueView], dict[str, str]]:
        if queue is not None:
            return {queue: await read_queue(client, queue, groups)}, {}
        return await read_queues(client, await client.queue_names())

    async with connect(url) as client:
        before: dict[str, QueueView] = {}
        if over_s > 0:
            before, _ = await read(client)
            if before:
                await anyio.sleep(over_s)
        views, bad = await read(client)
        return [Look(before.get(name), view) for name, view in views.items()], bad


# -- one queue: its shards --------------------------------------------------------------------------------------------


def _print_shards(look: Look, as_json: bool) -> None:
    if as_json:
        for group in shown_groups(look.view):
            waits = waits_for(look.view, group)
            print_json(_shard_object(look, shard, group, waits.get(shard.shard, [])) for shard in _shards(look))
        return
    headers = ["SHARD", "SLOT", "NODE", "BACKLOG", "PENDING", "OLDEST", "RATE", "OWNER", "LEASE"]
    for group in shown_groups(look.view):
        said, waits = _in_words(look.view, group), waits_for(look.view, group)
        click.echo(f"{look.view.queue} / {group}: {said}" if group else f"{look.view.queue}, no group yet: {said}")
        rows = [_shard_row(look, shard, group, waits.get(shard.shard)) for shard in _shards(look)]
        print_table(headers, rows, left=["NODE", "OWNER", "LEASE"])


def _in_words(view: QueueView, group: str) -> str:
    """What is unusual is named only where there is some."""
    total = view.total(group)
    delayed = f", {view.delayed} delayed" if view.delayed else ""
    if total is None:
        return f"{view.appended} messages{delayed}"
    waiting = f" ({total.waiting} of them waiting)" if total.waiting else ""
    letters = f" ({total.dead_letters} dead letters kept)" if total.dead_letters else ""
    return f"{total.backlog} messages to do{waiting}, {total.dead} dead{letters}{delayed}"


def _shards(look: Look) -> Iterator[ShardView]:
    yield from look.view.shards.values()


def _shard_row(look: Look, shard: ShardView, group: str, before: list[int] | None) -> list[str]:
    view = shard.groups.get(group)
    where = [str(shard.shard), str(shard.slot), shard.node or "-"]
    rate = _number(_shard_rate(look, shard, group))
    if view is None:
        return [*where, str(shard.appended), "-", "-", rate, "-", "-"]
    counts = [str(view.backlog), str(view.pel_messages), age(view.oldest_age_s)]
    lease = lease_word(view) + ("" if shard.state == "open" else ", retired")
    lease += f", waits for {named(before)}" if before else ""
    return [*where, *counts, rate, view.owner or "-", lease]


def _shard_rate(look: Look, shard: ShardView, group: str) -> float | None:
    return look.handled(shard, group) if group else look.stored(shard)


def _number(rate: float | None) -> str:
    return "-" if rate is None else f"{rate:.0f}"


def _shard_object(look: Look, shard: ShardView, group: str, before: list[int]) -> dict[str, Any]:
    view = shard.groups.get(group)
    where = {"queue": look.view.queue, "shard": shard.shard, "slot": shard.slot, "node": shard.node}
    held = {"state": shard.state, "appended": shard.appended, "delayed": shard.delayed}
    base = {**where, **held, "rate": _shard_rate(look, shard, group)}
    return (
        base
        if view is None
        else {**base, "group": group, **_group_object(view), "owner": view.owner, "waits_for": before}
    )


def _group_object(view: GroupView) -> dict[str, Any]:
    return {
        "backlog": view.backlog,
        "pending": view.pel_messages,
        "pending_entries": view.pel_entries,
        "delivered": view.delivered,
        "acked": view.acked,
        "retried": view.retried,
        "waiting": view.waiting,
        "dead": view.dead,
        "dead_letters": view.dead_letters,
        "oldest_s": view.oldest_age_s,
        "lease": lease_word(view),
        "epoch": view.epoch,
    }


# -- every queue: a line for each group -------------------------------------------------------------------------------


def _print_summary(looks: list[Look], as_json: bool) -> None:
    lines = [(look, group) for look in looks for group in shown_groups(look.view)]
    if as_json:
        print_json(_summary_object(look, group) for look, group in lines)
        return
    headers = ["QUEUE", "GROUP", "SHARDS", "APPENDED", "BACKLOG", "PENDING", "OLDEST", "RATE", "DEAD", "LEASES"]
    print_table(headers, [_summary_row(look, group) for look, group in lines], left=["QUEUE", "GROUP"])


def _total_rate(look: Look, group: str) -> float | None:
    return look.handled_total(group) if group else look.stored_total()


def _held(look: Look, group: str) -> int:
    return sum(shard.groups[group].held for shard in _shards(look) if group in shard.groups)


def _summary_row(look: Look, group: str) -> list[str]:
    view, total = look.view, look.view.total(group)
    shards = len(view.shards) + len(view.unreadable)
    where = [view.queue, group or "-", str(shards), str(view.appended)]
    rate = _number(_total_rate(look, group))
    if total is None:
        return [*where, str(view.appended), "-", "-", rate, "-", "-"]
    counts = [str(total.backlog), str(total.pel_messages), age(total.oldest_age_s), rate, str(total.dead)]
    return [*where, *counts, f"{_held(look, group)}/{shards}"]


def _summary_object(look: Look, group: str) -> dict[str, Any]:
    view, total = look.view, look.view.total(group)
    shards = len(view.shards) + len(view.unreadable)
    held = {"queue": view.queue, "shards": shards, "appended": view.appended, "delayed": view.delayed}
    base = {**held, "rate": _total_rate(look, group)}
    if total is None:
        return base
    state = view.groups.get(group)
    extra = {"leases": _held(look, group), "members": list(state.members) if state is not None else None}
    counts = {name: value for name, value in _group_object(total).items() if name not in ("lease", "epoch")}
    return {**base, "group": group, **counts, **extra}
