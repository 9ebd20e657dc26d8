"""`shardq produce`: lines of JSON from stdin into a queue. How they get there is the producer's; reading is ops'."""

from __future__ import annotations

import os
import stat
import sys
from contextlib import nullcontext

import click

from shardq.cli.complete import queue_names
from shardq.cli.options import json_option, url_option
from shardq.cli.output import print_json
from shardq.cli.progress import Report, progress
from shardq.ops.processes import run_async
from shardq.ops.produce import produce_lines
from shardq.runtime.client import connect


@click.command(epilog="Example: shardq produce orders --key user_id < orders.jsonl")
@click.argument("queue", shell_complete=queue_names)
@click.option("--key", "field", metavar="FIELD", help="The field that is the message's key; without it there is none.")
@url_option
@json_option
def produce(queue: str, field: str | None, url: str, as_json: bool) -> None:
    """Send every line of stdin, a JSON value each, to QUEUE.

    Lines are sent as they come, so that it may follow a log. When a line can't be sent, all before it are stored, and
    the error names the line: what follows from there can be sent later.
    """

    if sys.stdin is None:
        raise click.UsageError("stdin is closed: give it a file or a pipe, as in `< file.jsonl`")
    descriptor = sys.stdin.fileno()
    # A pipe, or a terminal, has no size; whoever types sees what they type, and no bar between.
    total = os.fstat(descriptor).st_size if stat.S_ISREG(os.fstat(descriptor).st_mode) else None

    async def main(report: Report) -> int:
        async with connect(url) as client:
            joined = await client.queue(queue)
            async with joined.producer() as producer:
                return await produce_lines(producer, descriptor, field, lambda count: report(count, total))

    with progress(f"sending to {queue}", size=True) if not sys.stdin.isatty() else nullcontext(_no_report) as report:
        count = run_async(lambda: main(report))
    if as_json:
        print_json([{"queue": queue, "sent": count}])
    else:
        click.echo(f"{count} messages stored")


def _no_report(done: float, total: float | None) -> None:
    return
