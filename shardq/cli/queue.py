"""`shardq queue`: create, change, list, show and delete queues (scale is cli/reshard.py's)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import anyio
import click

from shardq.cli.complete import group_names, queue_names
from shardq.cli.options import json_option, over_option, url_option
from shardq.cli.output import age, print_json, print_table, tell_unreadable
from shardq.cli.progress import waiting
from shardq.cli.reshard import scale
from shardq.core.queue_settings import QueueSettings
from shardq.errors import UnknownQueue
from shardq.ops.inspect import GroupView, QueueView, ShardView, read_queue, read_queues
from shardq.ops.processes import run_async
from shardq.ops.rates import Look, lease_word
from shardq.ops.waits import in_words
from shardq.runtime.client import connect
from shardq.runtime.reshard_state import ReshardState

Command = TypeVar("Command", bound=Callable[..., Any])


def _count_or_none(_context: click.Context, _parameter: click.Parameter, value: str | None) -> int | str | None:
    if value is None or value == "none":
        return value
    if not (value.isascii() and value.isdecimal()):
        raise click.BadParameter(f"{value!r} is neither a number nor none")
    return int(value)


def _settings_options(command: Command) -> Command:
    """The queue's settings, None where they are not named; `_named` makes of them what a queue takes."""
    for option in (
        click.option(
            "--jobs/--no-jobs", default=None, help="Whether every message of send and submit is a tracked job."
        ),
        click.option("--compression", type=click.Choice(["none", "zlib", "zstd"]), help="How producers compress."),
        click.option(
            "--overflow",
            type=click.Choice(["block", "reject", "drop-oldest"]),
            help="What a send does when the queue is full: wait, fail, or drop the oldest messages.",
        ),
        click.option(
            "--max-backlog",
            callback=_count_or_none,
            metavar="N|none",
            help="The queue is full when its slowest group has N messages to do.",
        ),
        click.option(
            "--retention",
            metavar="AMOUNT",
            help="How long finished messages stay: done (not at all), a time as 7d, 12h, 30m, 45s, or while the queue "
            "is smaller than a size as 10GB, 512MB.",
        ),
    ):
        command = option(command)
    return command


def _named(options: dict[str, Any]) -> dict[str, Any]:
    may_be_none = ("max_backlog", "compression")
    named = {name: value for name, value in options.items() if value is not None}
    return {name: None if value == "none" and name in may_be_none else value for name, value in named.items()}


def _in_words(settings: QueueSettings) -> str:
    words = {True: "yes", False: "no", None: "none"}
    shown = settings.shown().items()
    return ", ".join(f"{name.replace('_', '-')} {words.get(value, value)}" for name, value in shown)


@click.group(epilog="Example: shardq queue create orders --shards 64")
def queue() -> None:
    """Create, change, scale, list, show and delete queues."""


queue.add_command(scale)


@queue.command(epilog="Example: shardq queue create orders --shards 64 --retention 7d --compression zstd")
@click.argument("name")
@click.option("--shards", type=click.IntRange(1, 16384), required=True, help="How many: the most workers side by side.")
@_settings_options
@url_option
@json_option
def create(name: str, shards: int, url: str, as_json: bool, **options: Any) -> None:
    """Declare the queue NAME. Safe to repeat with the same shards and settings."""

    async def main() -> tuple[bool, QueueSettings]:
        async with connect(url) as client:
            try:
                await client.queue(name)
                existed = True
            except UnknownQueue:
                existed = False
            # Also when it existed: a creation that was cut short is completed.
            declared = await client.queue(name, shards=shards, **_named(options))
            return not existed, declared.settings

    created, settings = run_async(main)
    if as_json:
        print_json([{"queue": name, "shards": shards, "created": created, "settings": settings.shown()}])
    else:
        click.echo(f"{name}: {shards} shards{'' if created else ', it existed already'}")


@queue.command(epilog="Example: shardq queue change orders --max-backlog 1000000 --overflow reject")
@click.argument("name", shell_complete=queue_names)
@_settings_options
@url_option
@json_option
def change(name: str, url: str, as_json: bool, **options: Any) -> None:
    """Change settings of the queue NAME: those that are named. Safe to repeat."""
    named = _named(options)
    if not named:
        raise click.UsageError("name at least one setting to change, as --retention 7d")

    async def main() -> QueueSettings:
        async with connect(url) as client:
            return await (await client.queue(name)).change(**named)

    settings = run_async(main)
    if as_json:
        print_json([{"queue": name, "settings": settings.shown()}])
    else:
        click.echo(f"{name}: {_in_words(settings)}")


@queue.command("list", epilog="Example: shardq queue list --json")
@url_option
@json_option
@click.pass_context
def list_queues(context: click.Context, url: str, as_json: bool) -> None:
    """List every queue with its shards, messages and groups; exit status 1 when one can't be read."""

    async def main() -> tuple[dict[str, QueueView], dict[str, str]]:
        async with connect(url) as client:
            return await read_queues(client, await client.queue_names())

    found, unreadable = run_async(main)
    _print_list(found.values(), as_json)
    tell_unreadable(context, unreadable)


def _print_list(views: Iterable[QueueView], as_json: bool) -> None:
    if as_json:
        print_json(_summary(view) for view in views)
        return
    rows = [[view.queue, str(_count(view)), str(view.appended), " ".join(_groups(view)) or "-"] for view in views]
    print_table(["QUEUE", "SHARDS", "APPENDED", "GROUPS"], rows, left=["QUEUE", "GROUPS"])


def _groups(view: QueueView) -> list[str]:
    return sorted({group for shard in view.shards.values() for group in shard.groups})


def _count(view: QueueView) -> int:
    """Without those that a reshard sealed."""
    return sum(shard.state == "open" for shard in view.shards.values()) + len(view.unreadable)


def _summary(view: QueueView) -> dict[str, Any]:
    known = {"queue": view.queue, "shards": _count(view), "appended": view.appended, "groups": _groups(view)}
    return {**known, "unreadable": sorted(view.unreadable)}


@queue.command(epilog="Example: shardq queue show orders --group billing")
@click.argument("name", shell_complete=queue_names)
@click.option("--group", metavar="GROUP", shell_complete=group_names, help="Only this consumer group.")
@over_option("the rates")
@url_option
@json_option
@click.pass_context
def show(context: click.Context, name: str, group: str | None, over_s: float, url: str, as_json: bool) -> None:
    """Show the settings of the queue NAME and its map: each shard, the hashes of its keys, where it lies, what it holds
    and, for each group, who owns it and what is left to do."""

    async def main() -> tuple[Look, QueueSettings, ReshardState | None]:
        groups = [group] if group is not None else None
        async with connect(url) as client:
            joined = await client.queue(name)
            before = await read_queue(client, name, groups) if over_s > 0 else None
            await anyio.sleep(over_s)
            return Look(before, await read_queue(client, name, groups)), joined.settings, await joined.reshard()

    look, settings, reshard = run_async(main)
    view = look.view
    if as_json:
        waits_for = reshard.stay if reshard is not None else {}
        print_json(
            _shard_object(look, shard) | {"waits_for": waits_for.get(number), "settings": settings.shown()}
            for number, shard in view.shards.items()
        )
    else:
        click.echo(f"{name}: {_in_words(settings)}")
        if unusual := _unusual(view):
            click.echo(f"{name}: {unusual}")
        rows = [row for shard in view.shards.values() for row in _map_rows(look, shard)]
        print_table(_MAP, rows, left=["HASHES", "NODE", "STATE", "GROUP", "OWNER"])
        if reshard is not None:
            _tell_reshard(view, reshard)
    for number, why in view.unreadable.items():
        click.echo(f"shard {number} can't be read: {why}", err=True)
    if view.unreadable:
        context.exit(1)


def _tell_reshard(view: QueueView, reshard: ReshardState) -> None:
    name = view.queue
    if reshard.phase in ("opening", "sealing"):
        parents = ", ".join(map(str, reshard.parents))
        click.echo(f"{name}: a reshard of shards {parents} is under way ({reshard.phase}); repeating it completes it")
    for group in _groups(view):
        if words := in_words(view, group):
            click.echo(f"{name}: {words}")
    for number, why in reshard.stay.items():
        click.echo(f"{name}: shard {number} is retired and waits for {why}")


_MAP = ["SHARD", "HASHES", "SLOT", "NODE", "STATE", "APPENDED", "BYTES", "STORED/S"]
_MAP += ["GROUP", "OWNER", "EPOCH", "BACKLOG", "PENDING", "OLDEST", "HANDLED/S"]


def _map_rows(look: Look, shard: ShardView) -> list[list[str]]:
    """A row for each group, the first of them with the shard itself."""
    where = [str(shard.shard), f"{shard.low:08x}-{shard.high - 1:08x}", str(shard.slot), shard.node or "-", shard.state]
    own = [*where, str(shard.appended), str(shard.bytes), _rate(look.stored(shard))]
    rows = [
        [
            group,
            f"{view.owner} (moving)" if view.moving else view.owner or "-",
            str(view.epoch),
            str(view.backlog),
            str(view.pel_messages),
            age(view.oldest_age_s),
            _rate(look.handled(shard, group)),
        ]
        for group, view in shard.groups.items()
    ] or [["-"] * 7]
    return [
        [*(own if first else [""] * len(own)), *row]
        for first, row in zip([True, *[False] * (len(rows) - 1)], rows, strict=True)
    ]


def _rate(rate: float | None) -> str:
    return "-" if rate is None else f"{rate:.0f}"


def _shard_object(look: Look, shard: ShardView) -> dict[str, Any]:
    return {
        "shard": shard.shard,
        "low": shard.low,
        "high": shard.high,
        "slot": shard.slot,
        "node": shard.node,
        "state": shard.state,
        "appended": shard.appended,
        "bytes": shard.bytes,
        "entries": shard.entries,
        "delayed": shard.delayed,
        "dropped": shard.dropped,
        "stored_rate": look.stored(shard),
        "groups": [_group_object(look, shard, group, view) for group, view in shard.groups.items()],
    }


def _group_object(look: Look, shard: ShardView, group: str, view: GroupView) -> dict[str, Any]:
    return {
        "group": group,
        "owner": view.owner,
        "epoch": view.epoch,
        "lease": lease_word(view),
        "backlog": view.backlog,
        "pending": view.pel_messages,
        "oldest_s": view.oldest_age_s,
        "handled_rate": look.handled(shard, group),
    }


def _unusual(view: QueueView) -> str:
    counts = {"messages delayed": view.delayed, "messages dropped because it was full": view.dropped}
    return ", ".join(f"{count} {what}" for what, count in counts.items() if count)


@queue.command(epilog="Example: shardq queue delete orders --yes")
@click.argument("name", shell_complete=queue_names)
@click.option("--yes", is_flag=True, help="Don't ask.")
@click.option("--force", is_flag=True, help="Also while workers hold its shards: needed after workers were killed.")
@url_option
@json_option
def delete(name: str, yes: bool, force: bool, url: str, as_json: bool) -> None:
    """Delete the queue NAME with its messages, groups, dead letters and schedules. Stop its workers first.

    Keys that handlers made with message.local_key stay.
    """
    if not yes:
        click.confirm(f"Delete queue {name} with all its messages?", abort=True, err=True)

    async def main() -> None:
        async with connect(url) as client:
            await (await client.queue(name)).delete(force=force)

    with waiting(f"deleting {name}"):
        run_async(main)
    if as_json:
        print_json([{"queue": name, "deleted": True}])
    else:
        click.echo(f"{name}: deleted")
