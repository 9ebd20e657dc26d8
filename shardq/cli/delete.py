"""`shardq delete` and `shardq trim`: take messages out of a queue for good. The only commands, with purge, that do."""

from __future__ import annotations

import click

from shardq.cli.complete import queue_names
from shardq.cli.group import PositionType
from shardq.cli.options import json_option, url_option
from shardq.cli.output import print_json
from shardq.cli.progress import waiting
from shardq.ops.processes import run_async
from shardq.runtime.client import connect
from shardq.runtime.groups import Position


@click.command(epilog="Example: shardq delete orders 3/1795231414661-0/7 --yes")
@click.argument("queue", shell_complete=queue_names)
@click.argument("message_id", metavar="ID")
@click.option("--yes", is_flag=True, help="Don't ask.")
@url_option
@json_option
def delete(queue: str, message_id: str, yes: bool, url: str, as_json: bool) -> None:
    """Delete one message for good, by its id: nobody handles it any more, and its bytes leave Redis.

    Where some group has not finished the other messages of its batch, the bytes go as soon as all have. Files that
    Redis wrote before (AOF, RDB, backups) hold them until they are written anew.
    """
    if not yes:
        click.confirm(f"Delete message {message_id} of {queue} for good?", abort=True, err=True)

    async def main() -> bool:
        async with connect(url) as client:
            return await (await client.queue(queue)).delete_message(message_id)

    with waiting("waiting for the workers to confirm"):
        gone = run_async(main)
    if as_json:
        print_json([{"id": message_id, "deleted": True, "bytes_gone": gone}])
    else:
        click.echo(f"{message_id} is deleted{'' if gone else '; its bytes go when every group has finished its batch'}")


@click.command(epilog="Example: shardq trim orders --before 2026-01-31T00:00+00:00")
@click.argument("queue", shell_complete=queue_names)
@click.option(
    "--before", type=PositionType(), required=True, metavar="WHEN", help="What was stored before it goes; latest: all."
)
@url_option
@json_option
def trim(queue: str, before: Position, url: str, as_json: bool) -> None:
    """Give up what is kept of messages that every group has finished. What some group has not finished stays.

    WHEN is latest, an ISO time with its zone, Unix seconds, or a message id. Messages go by the entry, in which up to
    1000 were stored together.
    """

    async def main() -> int:
        async with connect(url) as client:
            return await (await client.queue(queue)).trim(before)

    with waiting(f"trimming {queue}"):
        gone = run_async(main)
    if as_json:
        print_json([{"queue": queue, "entries_gone": gone}])
    else:
        click.echo(f"{queue}: {gone} entries went")
