"""`shardq split`, `shardq merge` and `shardq queue scale`: another number of shards, while the queue is in use."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import anyio
import click

from shardq.cli.complete import queue_names
from shardq.cli.options import json_option, over_option, url_option
from shardq.cli.output import print_json
from shardq.cli.progress import waiting
from shardq.errors import UsageError
from shardq.ops.inspect import read_queue
from shardq.ops.processes import run_async
from shardq.ops.rates import Look, hottest
from shardq.runtime.client import connect
from shardq.runtime.queue import Queue


@click.command(epilog="Example: shardq split orders 3   or: shardq split orders --hottest --over 10")
@click.argument("queue", shell_complete=queue_names)
@click.argument("shard", type=click.IntRange(0), required=False)
@click.option("--hottest", "by_rate", is_flag=True, help="The shard that stores most messages a second.")
@click.option("--all", "every", is_flag=True, help="Every shard.")
@click.option("--into", type=click.IntRange(2, 16384), default=2, show_default=True, help="Into so many equal ranges.")
@over_option("the rates that --hottest goes by")
@url_option
@json_option
def split(
    queue: str, shard: int | None, by_rate: bool, every: bool, into: int, over_s: float, url: str, as_json: bool
) -> None:
    """Split SHARD of QUEUE while it is in use. New shards lie where the old one does: more workers can share the work.

    Groups finish the old shard first, so messages of a key stay in order. `shardq queue show` tells how far they are.
    """
    if (shard is not None) + by_rate + every != 1:
        raise click.UsageError("name one shard, or give --hottest or --all")
    if by_rate and over_s == 0:
        raise click.UsageError("--hottest goes by rates, so --over can't be 0")

    async def do(joined: Queue) -> list[int]:
        if every:
            return await joined.split_all(into)
        return await joined.split(shard if shard is not None else await _hottest(joined, over_s), into)

    _carry_out(queue, url, do, as_json=as_json)


@click.command(epilog="Example: shardq merge orders 64 65")
@click.argument("queue", shell_complete=queue_names)
@click.argument("shards", metavar="SHARD SHARD...", type=click.IntRange(0), nargs=-1, required=True)
@url_option
@json_option
def merge(queue: str, shards: Sequence[int], url: str, as_json: bool) -> None:
    """Make one shard of several of QUEUE while it is in use: of some that a split made of one, side by side."""
    _carry_out(queue, url, lambda joined: joined.merge(shards), as_json=as_json)


@click.command(epilog="Example: shardq queue scale orders --shards 256")
@click.argument("name", shell_complete=queue_names)
@click.option("--shards", type=click.IntRange(1, 16384), required=True, help="How many it shall have.")
@url_option
@json_option
def scale(name: str, shards: int, url: str, as_json: bool) -> None:
    """Bring the queue NAME to so many shards while it is in use, by splits and merges. Safe to repeat.

    None fewer than it was declared with. New shards lie where those lie that they come of.
    """
    _carry_out(name, url, lambda joined: joined.scale(shards), as_json=as_json)


async def _hottest(joined: Queue, over_s: float) -> int:
    before = await read_queue(joined.client, joined.name, [])
    await anyio.sleep(over_s)
    look = Look(before, await read_queue(joined.client, joined.name, []))
    found = hottest(look, [shard.id for shard in joined.table.shards])
    if found is None:
        raise UsageError(
            f"no shard of {joined.name} stored a message within {over_s:g} s: measure longer (--over), or name one"
        )
    return found


def _carry_out(name: str, url: str, do: Callable[[Queue], Awaitable[list[int]]], *, as_json: bool) -> None:
    async def main() -> tuple[list[int], list[int], int]:
        async with connect(url) as client:
            joined = await client.queue(name)
            opened = await do(joined)
            new = set(opened)
            sealed = [each.shard.id for each in joined.table.retired if new.intersection(each.children)]
            return sealed, opened, len(joined.table.shards)

    with waiting(f"resharding {name}"):
        sealed, opened, count = run_async(main)
    if as_json:
        _print_object(name, sealed, opened, count)
    elif opened:
        click.echo(f"{name}: {_named(sealed)} became {_named(opened)}; it has {count} shards now")
    else:
        click.echo(f"{name}: it has {count} shards already")


def _print_object(name: str, sealed: list[int], opened: list[int], count: int) -> None:
    found: dict[str, Any] = {"queue": name, "sealed": sealed, "opened": opened, "shards": count}
    print_json([found])


def _named(shards: Sequence[int]) -> str:
    """`shard 3`, `shards 3 to 9` or `shards 1, 4, 5`."""
    if len(shards) == 1:
        return f"shard {shards[0]}"
    ordered = sorted(shards)
    if len(ordered) > 2 and ordered == list(range(ordered[0], ordered[-1] + 1)):
        return f"shards {ordered[0]} to {ordered[-1]}"
    return f"shards {', '.join(map(str, ordered))}"
