"""`shardq queue`: create, list and show queues. Never deletes one."""

from __future__ import annotations

from typing import Any

import click

from shardq.cli.options import json_option, url_option
from shardq.cli.output import print_json, print_table
from shardq.errors import UnknownQueue
from shardq.ops.inspect import QueueView, read_queue
from shardq.ops.processes import run_async
from shardq.runtime.client import connect


@click.group(epilog="Example: shardq queue create orders --shards 64")
def queue() -> None:
    """Create, list and show queues."""


@queue.command(epilog="Example: shardq queue create orders --shards 64")
@click.argument("name")
@click.option("--shards", type=click.IntRange(1, 16384), required=True, help="How many: the most workers side by side.")
@url_option
@json_option
def create(name: str, shards: int, url: str, as_json: bool) -> None:
    """Declare the queue NAME. Safe to repeat with the same number of shards."""

    async def main() -> bool:
        async with connect(url) as client:
            try:
                await client.queue(name)
                existed = True
            except UnknownQueue:
                existed = False
            # Also when it existed: a creation that was cut short is completed.
            await client.queue(name, shards=shards)
            return not existed

    created = run_async(main)
    if as_json:
        print_json([{"queue": name, "shards": shards, "created": created}])
    else:
        click.echo(f"{name}: {shards} shards{'' if created else ', it existed already'}")


@queue.command("list", epilog="Example: shardq queue list --json")
@url_option
@json_option
def list_queues(url: str, as_json: bool) -> None:
    """List every queue with its shards, messages and groups."""

    async def main() -> list[QueueView]:
        async with connect(url) as client:
            return [await read_queue(client, name) for name in await client.queue_names()]

    views = run_async(main)
    if as_json:
        print_json(_summary(view) for view in views)
        return
    rows = [
        [view.queue, str(len(view.shards) + len(view.unreadable)), str(view.appended), " ".join(_groups(view)) or "-"]
        for view in views
    ]
    print_table(["QUEUE", "SHARDS", "APPENDED", "GROUPS"], rows, left=["QUEUE", "GROUPS"])


def _groups(view: QueueView) -> list[str]:
    return sorted({group for shard in view.shards.values() for group in shard.groups})


def _summary(view: QueueView) -> dict[str, Any]:
    shards = len(view.shards) + len(view.unreadable)
    known = {"queue": view.queue, "shards": shards, "appended": view.appended, "groups": _groups(view)}
    return {**known, "unreadable": sorted(view.unreadable)}


@queue.command(epilog="Example: shardq queue show orders")
@click.argument("name")
@url_option
@json_option
def show(name: str, url: str, as_json: bool) -> None:
    """Show where each shard of the queue NAME lies and what it holds."""

    async def main() -> tuple[QueueView, dict[int, tuple[int, int]]]:
        async with connect(url) as client:
            table = (await client.queue(name)).table
            return await read_queue(client, name), {shard.id: (shard.low, shard.high) for shard in table.shards}

    view, bounds = run_async(main)
    if as_json:
        print_json(
            {
                "shard": shard.shard,
                "low": bounds[shard.shard][0],
                "high": bounds[shard.shard][1],
                "slot": shard.slot,
                "node": shard.node,
                "state": shard.state,
                "appended": shard.appended,
                "bytes": shard.bytes,
                "entries": shard.entries,
                "groups": sorted(shard.groups),
            }
            for shard in view.shards.values()
        )
        return
    rows = [
        [
            str(shard.shard),
            f"{bounds[shard.shard][0]:08x}-{bounds[shard.shard][1] - 1:08x}",
            str(shard.slot),
            shard.node,
            shard.state,
            str(shard.appended),
            str(shard.bytes),
            str(shard.entries),
        ]
        for shard in view.shards.values()
    ]
    headers = ["SHARD", "HASHES", "SLOT", "NODE", "STATE", "APPENDED", "BYTES", "ENTRIES"]
    print_table(headers, rows, left=["HASHES", "NODE", "STATE"])
    for number, why in view.unreadable.items():
        click.echo(f"shard {number} can't be read: {why}", err=True)
