"""`shardq tail`: follows a queue without consuming it until Ctrl-C. Reading is runtime/tail.py's."""

from __future__ import annotations

import click

from shardq.cli.complete import queue_names
from shardq.cli.options import json_option, url_option
from shardq.cli.output import quiet_when_unread
from shardq.cli.records import Printer, choice_options
from shardq.ops.processes import run_async, until_stopped
from shardq.ops.work import log_to_stderr
from shardq.runtime.client import connect


@click.command(epilog="Example: shardq tail orders --key user:42 -n 0 --json")
@click.argument("queue", shell_complete=queue_names)
@choice_options
@click.option(
    "-n", "from_end", type=click.IntRange(0), default=10, show_default=True, help="So many that are stored already."
)
@url_option
@json_option
def tail(queue: str, shards: tuple[int, ...], key: str | None, from_end: int, url: str, as_json: bool) -> None:
    """Show the last messages of QUEUE, then every new one as it is stored, without consuming any.

    Ctrl-C or SIGTERM ends it with status 0. Messages are shown as by `shardq peek`.
    """
    log_to_stderr("warning")
    printer = Printer(as_json=as_json)

    async def work() -> None:
        async with connect(url) as client:
            joined = await client.queue(queue)
            async for record in joined.tail(from_end=from_end, shards=shards or None, key=key):
                printer.print([record])

    with quiet_when_unread():
        run_async(lambda: until_stopped(work, lambda: False))
