"""`shardq dead`: a group's dead letters. Deletes only what `purge` was told to."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import click
import msgspec

from shardq.cli.complete import group_names, queue_names
from shardq.cli.options import json_option, url_option
from shardq.cli.output import age, cut, print_fields, print_json, print_table, quiet_when_unread
from shardq.cli.progress import progress
from shardq.cli.records import Age, escaped, key_text, parse_key, time_text, value_text
from shardq.core.dead import DeadLetter
from shardq.core.jsonlines import readable_value
from shardq.ops.processes import run_async
from shardq.runtime.client import connect
from shardq.runtime.dead import DeadLetters

Command = TypeVar("Command", bound=Callable[..., Any])
T = TypeVar("T")

KEY_ROOM = 24


def _group_option(command: Command) -> Command:
    return click.option(
        "--group", required=True, metavar="GROUP", shell_complete=group_names, help="Whose dead letters."
    )(command)


def _filters(command: Command) -> Command:
    for option in (
        click.option("--newer-than", type=Age(), metavar="AGE", help="Failed less long ago, like 15m or 2h."),
        click.option("--older-than", type=Age(), metavar="AGE", help="Failed longer ago, like 15m or 7d."),
        click.option("--error", default="", metavar="TEXT", help="With this text in its error, in capitals or not."),
        click.option("--key", callback=parse_key, metavar="KEY", help="Of this key."),
    ):
        command = option(command)
    return command


def _with(url: str, queue: str, group: str, do: Callable[[DeadLetters], Awaitable[T]]) -> T:
    async def main() -> T:
        async with connect(url) as client:
            return await do((await client.queue(queue)).dead_letters(group))

    return run_async(main)


@click.group(epilog="Example: shardq dead list orders --group billing")
def dead() -> None:
    """List, show, replay and purge dead letters."""


@dead.command("list", epilog="Example: shardq dead list orders --group billing --error Timeout --newer-than 1h")
@click.argument("queue", shell_complete=queue_names)
@_group_option
@_filters
@click.option("-n", "limit", type=click.IntRange(1), default=100, show_default=True, help="Show at most so many.")
@url_option
@json_option
def list_letters(queue: str, group: str, limit: int, url: str, as_json: bool, **filters: Any) -> None:
    """List dead letters, oldest first in each shard. FAILED is how long ago."""

    async def read(letters: DeadLetters) -> list[DeadLetter]:
        found = []
        async for letter in letters.find(**filters):
            found.append(letter)
            if len(found) > limit:  # one more than is shown tells whether there are more
                break
        return found

    found = _with(url, queue, group, read)
    with quiet_when_unread():
        if as_json:
            print_json(map(_as_json, found[:limit]))
            return
        headers = ["ID", "FAILED", "TRIES", "KEY", "ERROR"]
        print_table(headers, list(map(_row, found[:limit])), left=["ID", "KEY", "ERROR"], shorten="ERROR")
    if len(found) > limit:
        click.echo(f"There are more than these {limit}: filters choose among them, -n shows more.", err=True)


def _row(letter: DeadLetter) -> list[str]:
    error = escaped(" ".join(letter.error.split()))
    return [letter.id, _ago(letter.failed_at_ms), str(letter.attempts), cut(key_text(letter.key), KEY_ROOM), error]


def _ago(unix_ms: int) -> str:
    return age(max(0, time.time_ns() // 1_000_000 - unix_ms) / 1000)


@dead.command(epilog="Example: shardq dead show orders 3/1795231414661-0 --group billing")
@click.argument("queue", shell_complete=queue_names)
@click.argument("dead_id", metavar="ID")
@_group_option
@url_option
@json_option
def show(queue: str, dead_id: str, group: str, url: str, as_json: bool) -> None:
    """Show one dead letter whole, traceback included."""
    letter = _with(url, queue, group, lambda letters: letters.get(dead_id))
    with quiet_when_unread():
        if as_json:
            print_json([_as_json(letter)])
            return
        print_fields(_fields(letter))
        if letter.traceback:
            click.echo("\n" + "\n".join(map(escaped, letter.traceback.rstrip().split("\n"))))


def _fields(letter: DeadLetter) -> dict[str, str | None]:
    failed = f"{time_text(letter.failed_at_ms)} ({_ago(letter.failed_at_ms)} ago)"
    known: dict[str, str | None] = {"id": letter.id}
    if letter.message_id:
        known |= {
            "message": letter.message_id,
            "key": key_text(letter.key),
            "value": value_text(letter.value),
            "headers": value_text(letter.headers) if letter.headers else None,
            "attempts": str(letter.attempts),
            "sent": time_text(letter.sent_at_ms) if letter.sent_at_ms else None,  # 0: another client's
        }
    else:
        known |= {"messages": str(letter.messages), "bytes": value_text(letter.raw) if letter.raw else None}
    return {**known, "failed": failed, "error": escaped(letter.error)}


@dead.command(epilog="Example: shardq dead replay orders --group billing --error Timeout")
@click.argument("queue", shell_complete=queue_names)
@click.argument("ids", nargs=-1, metavar="[ID]...")
@_group_option
@_filters
@click.option("--all", "everything", is_flag=True, help="All of them.")
@url_option
@json_option
def replay(
    queue: str, ids: tuple[str, ...], group: str, everything: bool, url: str, as_json: bool, **filters: Any
) -> None:
    """Hand dead letters back to their group: those of the IDs, or all that fit the filters. Safe to repeat."""
    chosen = _chosen(ids, everything, filters)
    with progress("replaying") as report:

        async def hand_back(letters: DeadLetters) -> int:
            letters.on_progress = report
            return await letters.replay(chosen, **filters)

        count = _with(url, queue, group, hand_back)
    _say(count, chosen, as_json, "replayed")


@dead.command(epilog="Example: shardq dead purge orders --group billing --older-than 7d --yes")
@click.argument("queue", shell_complete=queue_names)
@click.argument("ids", nargs=-1, metavar="[ID]...")
@_group_option
@_filters
@click.option("--all", "everything", is_flag=True, help="All of them.")
@click.option("--yes", is_flag=True, help="Don't ask.")
@url_option
@json_option
def purge(
    queue: str,
    ids: tuple[str, ...],
    group: str,
    everything: bool,
    yes: bool,
    url: str,
    as_json: bool,
    **filters: Any,
) -> None:
    """Forget dead letters for good: those of the IDs, or all that fit the filters."""
    chosen = _chosen(ids, everything, filters)
    if not yes:
        _confirm(url, queue, group, chosen, filters)
    with progress("purging") as report:

        async def forget(letters: DeadLetters) -> int:
            letters.on_progress = report
            return await letters.purge(chosen, **filters)

        count = _with(url, queue, group, forget)
    _say(count, chosen, as_json, "purged")


def _chosen(ids: tuple[str, ...], everything: bool, filters: dict[str, Any]) -> list[str] | None:
    """The IDs, None where filters or --all choose. Nothing is replayed or purged because a filter was forgotten."""
    filtered = any(value is not None for name, value in filters.items() if name != "error") or filters["error"] != ""
    if sum((bool(ids), filtered, everything)) != 1:
        raise click.UsageError("say which: IDs, or filters (--key, --error, --older-than, --newer-than), or --all")
    return list(dict.fromkeys(ids)) or None


def _confirm(url: str, queue: str, group: str, chosen: list[str] | None, filters: dict[str, Any]) -> None:
    async def count(letters: DeadLetters) -> int:
        fitting = 0
        async for _ in letters.find(**filters):
            fitting += 1
        return fitting

    there = len(chosen) if chosen is not None else _with(url, queue, group, count)
    if there > 0:
        click.confirm(f"Forget {there} dead letters of {queue}/{group} for good?", abort=True, err=True)


def _say(count: int, chosen: list[str] | None, as_json: bool, done: str) -> None:
    if as_json:
        print_json([{done: count}])
        return
    click.echo(f"{count} dead letters {done}")
    if chosen is not None and count < len(chosen):
        missing = len(chosen) - count
        click.echo(f"{missing} of the IDs are not there: replayed or purged before, or never there.", err=True)


def _as_json(letter: DeadLetter) -> dict[str, Any]:
    """Every field under its name; `raw` is null where the entry could be read."""
    shown = {name: readable_value(value) for name, value in msgspec.structs.asdict(letter).items()}
    return {**shown, "raw": shown["raw"] or None}
