"""`shardq peek`: messages that a queue holds, without consuming them. Reading is runtime/history.py's."""

from __future__ import annotations

import click

from shardq.cli.complete import queue_names
from shardq.cli.options import json_option, url_option
from shardq.cli.output import quiet_when_unread
from shardq.cli.records import Printer, choice_options, parse_when
from shardq.core.history import Record
from shardq.ops.processes import run_async
from shardq.runtime.client import connect
from shardq.runtime.history import When

BLOCK_RECORDS = 500


@click.command(epilog="Example: shardq peek orders --key user:42 --since 10m --reverse -n 5")
@click.argument("queue", shell_complete=queue_names)
@choice_options
@click.option("--since", callback=parse_when, metavar="WHEN", help="Stored at this moment or later.")
@click.option("--until", callback=parse_when, metavar="WHEN", help="Stored at this moment or earlier.")
@click.option("--reverse", is_flag=True, help="The newest first.")
@click.option("-n", "limit", type=click.IntRange(1), default=10, show_default=True, help="So many at most.")
@url_option
@json_option
def peek(
    queue: str,
    shards: tuple[int, ...],
    key: str | None,
    since: When,
    until: When,
    reverse: bool,
    limit: int,
    url: str,
    as_json: bool,
) -> None:
    """Show messages of QUEUE, the oldest first, without consuming them.

    WHEN is how long ago (10m, 2h, 1.5d), an ISO date or time (without an offset: this machine's), Unix time in seconds,
    or a message id. Bytes that are not UTF-8 are shown as base64:..., in JSON as {"$base64": "..."}; an entry that
    can't be read is shown with the reason.
    """
    printer = Printer(as_json=as_json)

    async def main() -> None:
        async with connect(url) as client:
            joined = await client.queue(queue)
            block: list[Record] = []
            async for record in joined.history(
                since, until, reverse=reverse, shards=shards or None, key=key, limit=limit
            ):
                block.append(record)
                if len(block) == BLOCK_RECORDS:
                    printer.print(block)
                    block = []
            printer.print(block)

    with quiet_when_unread():
        run_async(main)
