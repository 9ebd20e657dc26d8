"""`shardq dead`: a group's dead letters. Deletes only what `purge` was told to."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any, TypeVar

import click

from shardq.cli.options import json_option, url_option
from shardq.cli.output import age, print_json, print_table
from shardq.core.dead import DeadLetter
from shardq.ops.processes import run_async
from shardq.runtime.client import connect
from shardq.runtime.dead import DeadLetters

Command = TypeVar("Command", bound=Callable[..., Any])
T = TypeVar("T")

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


class Age(click.ParamType):  # type: ignore[type-arg]  # not generic before click 8.2
    """Seconds, or a number with s, m, h or d behind it."""

    name = "age"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        text = str(value)
        number, unit = (text[:-1], _UNITS[text[-1]]) if text[-1:] in _UNITS else (text, 1)
        try:
            return float(number) * unit
        except ValueError:
            self.fail(f"{text!r} is no age: write 90, 90s, 15m, 2h or 7d", param, ctx)


def _group_option(command: Command) -> Command:
    return click.option("--group", required=True, help="Whose dead letters.")(command)


def _filters(command: Command) -> Command:
    for option in (
        click.option("--newer-than", type=Age(), help="Failed less long ago, like 15m or 2h."),
        click.option("--older-than", type=Age(), help="Failed longer ago, like 15m or 2h."),
        click.option("--error", default="", help="With this text in its error."),
        click.option("--key", help="Of this key."),
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
@click.argument("queue")
@_group_option
@_filters
@click.option("-n", "limit", type=click.IntRange(1), default=100, show_default=True, help="Show at most so many.")
@url_option
@json_option
def list_letters(queue: str, group: str, limit: int, url: str, as_json: bool, **filters: Any) -> None:
    """List dead letters, oldest first in each shard."""

    async def read(letters: DeadLetters) -> list[DeadLetter]:
        found = []
        async for letter in letters.find(**filters):
            found.append(letter)
            if len(found) == limit:
                break
        return found

    found = _with(url, queue, group, read)
    if as_json:
        print_json(map(_as_json, found))
        return
    now_ms = time.time_ns() // 1_000_000
    rows = [
        [
            letter.id,
            age(max(0, now_ms - letter.failed_at_ms) / 1000),
            str(letter.attempts),
            _short(letter.key, 24),
            _short(letter.error, 60),
        ]
        for letter in found
    ]
    print_table(["ID", "FAILED", "TRIES", "KEY", "ERROR"], rows, left=["ID", "KEY", "ERROR"])


@dead.command(epilog="Example: shardq dead show orders 3/1795231414661-0 --group billing")
@click.argument("queue")
@click.argument("dead_id", metavar="ID")
@_group_option
@url_option
@json_option
def show(queue: str, dead_id: str, group: str, url: str, as_json: bool) -> None:
    """Show one dead letter whole, traceback included."""
    letter = _with(url, queue, group, lambda letters: letters.get(dead_id))
    if as_json:
        print_json([_as_json(letter)])
        return
    shown = _as_json(letter)
    trace = shown.pop("traceback")
    for name, value in shown.items():
        click.echo(f"{name + ':':<15}{value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}")
    if trace:
        click.echo(f"\n{trace}".rstrip())


@dead.command(epilog="Example: shardq dead replay orders --group billing --error Timeout")
@click.argument("queue")
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
    _say(
        _with(url, queue, group, lambda letters: letters.replay(*_chosen(ids, everything, filters), **filters)), as_json
    )


@dead.command(epilog="Example: shardq dead purge orders --group billing --older-than 7d --yes")
@click.argument("queue")
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
        click.confirm(f"Forget these dead letters of {queue}/{group} for good?", abort=True, err=True)
    _say(_with(url, queue, group, lambda letters: letters.purge(*chosen, **filters)), as_json, "purged")


def _chosen(ids: tuple[str, ...], everything: bool, filters: dict[str, Any]) -> tuple[tuple[str, ...] | None]:
    """Nothing is replayed or purged because a filter was forgotten."""
    filtered = any(value not in (None, "") for value in filters.values())
    if sum((bool(ids), filtered, everything)) != 1:
        raise click.UsageError("say which: IDs, or filters (--key, --error, --older-than, --newer-than), or --all")
    return (ids or None,)


def _say(count: int, as_json: bool, done: str = "replayed") -> None:
    if as_json:
        print_json([{done: count}])
    else:
        click.echo(f"{count} dead letters {done}")


def _as_json(letter: DeadLetter) -> dict[str, Any]:
    return {
        "id": letter.id,
        "message": letter.message_id,
        "key": _plain(letter.key),
        "value": _plain(letter.value),
        "headers": _plain(letter.headers),
        "messages": letter.messages,
        "attempts": letter.attempts,
        "sent_at": _iso(letter.sent_at_ms),
        "failed_at": _iso(letter.failed_at_ms),
        "error": letter.error,
        "raw": base64.b64encode(letter.raw).decode(),
        "traceback": letter.traceback,
    }


def _iso(unix_ms: int) -> str:
    try:
        return datetime.fromtimestamp(unix_ms / 1000, UTC).isoformat(timespec="milliseconds")
    except (ValueError, OverflowError, OSError):
        return str(unix_ms)


def _plain(value: Any) -> Any:
    """What JSON can carry: bytes as text where they are UTF-8, else as base64 behind "base64:"."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return "base64:" + base64.b64encode(value).decode()
    if isinstance(value, dict):
        return {str(_plain(name)): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else repr(value)


def _short(value: Any, most: int) -> str:
    text = "-" if value is None else " ".join(str(_plain(value)).split())
    return text if len(text) <= most else text[: most - 1] + "…"
