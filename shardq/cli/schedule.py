"""`shardq schedule`: set, list and remove what a queue sends by the clock. Workers and coordinators send it."""

from __future__ import annotations

import base64
import time
from collections.abc import Sequence
from typing import Any

import click
import msgspec

from shardq.cli.complete import queue_names
from shardq.cli.options import json_option, url_option
from shardq.cli.output import print_json, print_table
from shardq.core.schedule import MISSED, Missed, Schedule
from shardq.errors import UsageError
from shardq.ops.processes import run_async
from shardq.runtime.client import connect
from shardq.runtime.cron import Cron


@click.group(epilog="Example: shardq schedule set orders nightly '0 3 * * *' --timezone Europe/Berlin")
def schedule() -> None:
    """Set, list and remove what a queue sends by the clock."""


@schedule.command("list", epilog="Example: shardq schedule list orders --json")
@click.argument("queue", shell_complete=queue_names)
@url_option
@json_option
def list_schedules(queue: str, url: str, as_json: bool) -> None:
    """List the schedules of QUEUE, with the time each sends next."""

    async def main() -> list[Schedule]:
        async with connect(url) as client:
            return await client.schedules(queue)

    found = run_async(main)
    if as_json:
        print_json(_fields(each) for each in found)
        return
    rows = [
        [each.name, each.cron, each.timezone, _text(each.key), each.missed, _next(each) or "never"] for each in found
    ]
    headers = ["NAME", "CRON", "TIMEZONE", "KEY", "MISSED", "NEXT"]
    print_table(headers, rows, left=headers)


@schedule.command(
    "set", epilog="Example: shardq schedule set orders nightly '0 3 * * *' --key total --value '{\"n\": 1}'"
)
@click.argument("queue", shell_complete=queue_names)
@click.argument("name")
@click.argument("cron")
@click.option("--key", metavar="KEY", help="The messages' key; without it there is none.")
@click.option("--value", default="null", metavar="JSON", show_default=True, help="The messages' value.")
@click.option("--header", "headers", multiple=True, metavar="NAME=TEXT", help="A header; may be given several times.")
@click.option("--timezone", default="UTC", show_default=True, metavar="ZONE", help="Whose clocks CRON means.")
@click.option(
    "--missed",
    type=click.Choice(MISSED),
    default="last",
    show_default=True,
    help="What to send of the times at which nobody could: only the last, all, or none over a minute late.",
)
@url_option
@json_option
def set_schedule(
    queue: str,
    name: str,
    cron: str,
    key: str | None,
    value: str,
    headers: Sequence[str],
    timezone: str,
    missed: Missed,
    url: str,
    as_json: bool,
) -> None:
    """Have QUEUE get a message at every time that CRON names, once. Safe to repeat; another CRON replaces the first.

    Workers of the queue send it, or `shardq coordinator`; with none of them up nothing is sent.
    """
    content, named = _value(value), _headers(headers)

    async def main() -> Schedule:
        async with connect(url) as client:
            return await client.schedule(
                queue, name, cron, key=key, value=content, headers=named, timezone=timezone, missed=missed
            )

    done = run_async(main)
    if as_json:
        print_json([_fields(done)])
    else:
        click.echo(f"{queue}: schedule {name} sends next at {_next(done)}")


@schedule.command(epilog="Example: shardq schedule remove orders nightly")
@click.argument("queue", shell_complete=queue_names)
@click.argument("name")
@url_option
@json_option
def remove(queue: str, name: str, url: str, as_json: bool) -> None:
    """Remove the schedule NAME of QUEUE. Messages that it sent stay."""

    async def main() -> bool:
        async with connect(url) as client:
            return await client.unschedule(queue, name)

    if not run_async(main):
        raise UsageError(f"queue {queue!r} has no schedule {name!r}: `shardq schedule list {queue}` shows those it has")
    if as_json:
        print_json([{"queue": queue, "name": name, "removed": True}])
    else:
        click.echo(f"{queue}: schedule {name} is removed")


def _value(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise UsageError(f"--value is not JSON ({error}): a string is written with quotes, as in '\"text\"'") from error


def _headers(pairs: Sequence[str]) -> dict[str, str] | None:
    for pair in pairs:
        if "=" not in pair:
            raise UsageError(f"--header {pair!r} is not NAME=TEXT")
    return dict(pair.split("=", 1) for pair in pairs) or None


def _next(each: Schedule) -> str | None:
    cron = Cron(each.cron, each.timezone)
    tick = cron.after(int(time.time()))
    return cron.iso(tick) if tick is not None else None


def _text(key: str | bytes | None) -> str:
    return key.decode(errors="backslashreplace") if isinstance(key, bytes) else key or "-"


def _fields(each: Schedule) -> dict[str, Any]:
    """What JSON can't carry (bytes in a value) is shown in base64."""
    fields = {name: getattr(each, name) for name in ("name", "cron", "timezone", "missed", "since_ms")}
    carried = {"key": _text(each.key) if each.key is not None else None, "value": each.value, "headers": each.headers}
    return {**fields, **msgspec.to_builtins(carried, enc_hook=_base64, str_keys=True), "next": _next(each)}


def _base64(item: object) -> str:
    return base64.b64encode(bytes(item)).decode() if isinstance(item, memoryview) else repr(item)
