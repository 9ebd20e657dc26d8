"""`shardq group`: the consumer groups of a queue: list, create, reset, pause, resume, delete. Reads no message."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import asdict
from datetime import datetime
from typing import Any, TypeVar

import click

from shardq.cli.complete import group_names, queue_names
from shardq.cli.options import json_option, url_option
from shardq.cli.output import print_json, print_table
from shardq.ops.processes import run_async
from shardq.runtime.client import connect
from shardq.runtime.groups import Position
from shardq.runtime.queue import Queue

Command = TypeVar("Command", bound=Callable[..., Any])
T = TypeVar("T")


class PositionType(click.ParamType):  # type: ignore[type-arg]  # not generic before click 8.2
    """A position in a queue, as text."""

    name = "earliest|latest|TIME|ID"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Position:
        text = str(value)
        if text in ("earliest", "latest") or "/" in text:
            return text
        try:
            return float(text)
        except ValueError:
            pass
        try:
            moment = datetime.fromisoformat(text)
        except ValueError:
            self.fail(
                f"{text!r} is none of: earliest, latest, 2026-01-31T08:00Z, Unix seconds, a message id", param, ctx
            )
        if moment.tzinfo is None:
            self.fail(f"{text!r} says no time zone: write {text}Z or {text}+02:00", param, ctx)
        return moment


def _force_option(command: Command) -> Command:
    text = "Also while workers hold its shards: their leases are taken away. Needed after workers were killed."
    return click.option("--force", is_flag=True, help=text)(command)


def _with(url: str, queue: str, do: Callable[[Queue], Awaitable[T]]) -> T:
    async def main() -> T:
        async with connect(url) as client:
            return await do(await client.queue(queue))

    return run_async(main)


@click.group(epilog="Example: shardq group reset orders billing --to 2026-01-31T08:00Z")
def group() -> None:
    """List, create, reset, pause, resume and delete consumer groups."""


@group.command("list", epilog="Example: shardq group list orders")
@click.argument("queue", shell_complete=queue_names)
@url_option
@json_option
def list_groups(queue: str, url: str, as_json: bool) -> None:
    """List the groups of QUEUE: messages to do, those of them that wait for a retry, dead letters, leases held."""
    groups = _with(url, queue, lambda joined: joined.groups())
    if as_json:
        print_json({"queue": queue, **asdict(each)} for each in groups)
        return
    rows = [
        [
            f"{each.name} (paused)" if each.paused else each.name,
            str(each.backlog),
            str(each.waiting),
            str(each.dead),
            f"{each.owned}/{each.shards}",
            " ".join(each.workers) or "-",
        ]
        for each in groups
    ]
    print_table(["GROUP", "BACKLOG", "WAITING", "DEAD", "LEASES", "WORKERS"], rows, left=["GROUP", "WORKERS"])


@group.command(epilog="Example: shardq group create orders audit --start latest")
@click.argument("queue", shell_complete=queue_names)
@click.argument("name", metavar="GROUP")
@click.option("--start", type=PositionType(), default="earliest", show_default=True, help="Where it begins.")
@url_option
@json_option
def create(queue: str, name: str, start: Position, url: str, as_json: bool) -> None:
    """Open the group GROUP of QUEUE. One that exists stays where it is.

    TIME is Unix seconds or an ISO time with its zone: the first message stored at or after it. ID is a message's id:
    that message on its shard, on the others what was stored from its millisecond on.
    """
    created = _with(url, queue, lambda joined: joined.open_group(name, start))
    if as_json:
        print_json([{"queue": queue, "group": name, "created": created}])
    else:
        click.echo(f"{name}: {'created' if created else 'it existed already'}")


@group.command(epilog="Example: shardq group reset orders billing --to earliest")
@click.argument("queue", shell_complete=queue_names)
@click.argument("name", metavar="GROUP", shell_complete=group_names)
@click.option("--to", "to", type=PositionType(), required=True, help="Where it goes on, as in `shardq group create`.")
@_force_option
@url_option
@json_option
def reset(queue: str, name: str, to: Position, force: bool, url: str, as_json: bool) -> None:
    """Put the group GROUP of QUEUE at another position, back or forth. Stop its workers first.

    Messages in hand and those that wait for a retry are given up in favour of the new position; dead letters stay. It
    goes back as far as messages are stored: without retention finished messages are gone.
    """
    backlog = _with(url, queue, lambda joined: joined.reset_group(name, to, force=force))
    if as_json:
        print_json([{"queue": queue, "group": name, "backlog": backlog}])
    else:
        click.echo(f"{name}: {backlog} messages to do")


@group.command(epilog="Example: shardq group delete orders audit")
@click.argument("queue", shell_complete=queue_names)
@click.argument("name", metavar="GROUP", shell_complete=group_names)
@_force_option
@url_option
@json_option
def delete(queue: str, name: str, force: bool, url: str, as_json: bool) -> None:
    """Delete the group GROUP of QUEUE with its position, retries and dead letters. Stop its workers first."""
    _with(url, queue, lambda joined: joined.delete_group(name, force=force))
    if as_json:
        print_json([{"queue": queue, "group": name, "deleted": True}])
    else:
        click.echo(f"{name}: deleted")


@group.command(epilog="Example: shardq group pause orders billing")
@click.argument("queue", shell_complete=queue_names)
@click.argument("name", metavar="GROUP", shell_complete=group_names)
@url_option
@json_option
def pause(queue: str, name: str, url: str, as_json: bool) -> None:
    """Pause the group GROUP of QUEUE: its workers finish what they are at, and take no more until it is resumed."""
    _with(url, queue, lambda joined: joined.pause_group(name))
    _tell_paused(queue, name, as_json, paused=True)


@group.command(epilog="Example: shardq group resume orders billing")
@click.argument("queue", shell_complete=queue_names)
@click.argument("name", metavar="GROUP", shell_complete=group_names)
@url_option
@json_option
def resume(queue: str, name: str, url: str, as_json: bool) -> None:
    """Let the group GROUP of QUEUE go on after a pause."""
    _with(url, queue, lambda joined: joined.resume_group(name))
    _tell_paused(queue, name, as_json, paused=False)


def _tell_paused(queue: str, name: str, as_json: bool, *, paused: bool) -> None:
    if as_json:
        print_json([{"queue": queue, "group": name, "paused": paused}])
    else:
        click.echo(f"{name}: {'paused' if paused else 'resumed'}")
