"""`shardq coordinator`: a group's coordinator in a process of its own. What it does is runtime/standalone.py's."""

from __future__ import annotations

from typing import Literal

import anyio
import click

from shardq.cli.complete import group_names, queue_names
from shardq.cli.options import log_level_option, metrics_options, url_option
from shardq.core.autosplit import AutoSplit
from shardq.ops.processes import Listen, end_when_told, run_async, until_stopped
from shardq.ops.work import log_to_stderr, serving_client
from shardq.runtime.settings import WorkerSettings
from shardq.runtime.standalone import coordinate


@click.command(epilog="Example: shardq coordinator orders --group billing")
@click.argument("queue", shell_complete=queue_names)
@click.option(
    "--group", required=True, metavar="GROUP", shell_complete=group_names, help="The consumer group to coordinate."
)
@click.option(
    "--lease", type=float, default=5.0, show_default=True, metavar="SECONDS", help="The lease time of its workers."
)
@click.option(
    "--balance",
    type=click.Choice(["count", "load"]),
    default="count",
    show_default=True,
    help="What it makes even among the workers; the same as theirs.",
)
@click.option(
    "--autosplit",
    "max_shards",
    type=click.IntRange(2, 16384),
    metavar="MAX_SHARDS",
    help="Split hot shards by itself, up to so many.",
)
@click.option(
    "--autosplit-every",
    type=click.FloatRange(0),
    default=600.0,
    show_default=True,
    metavar="SECONDS",
    help="The least time between two such splits.",
)
@click.option(
    "--autosplit-after",
    type=click.FloatRange(0),
    default=300.0,
    show_default=True,
    metavar="SECONDS",
    help="How long a shard has been hot before it is split.",
)
@metrics_options
@url_option
@log_level_option
def coordinator(
    queue: str,
    group: str,
    lease: float,
    balance: Literal["count", "load"],
    max_shards: int | None,
    autosplit_every: float,
    autosplit_after: float,
    metrics_port: int | None,
    metrics_host: str,
    url: str,
    log_level: str,
) -> None:
    """Decide which worker of GROUP owns which shard of QUEUE.

    Workers do this among themselves; run one or two of these to keep it out of busy or short-lived workers. One leads,
    and sends the schedules of QUEUE too; the others stand by. SIGTERM or Ctrl-C hands the leadership over at once.
    """
    end_when_told()
    log_to_stderr(log_level)
    listen = Listen(metrics_host, metrics_port) if metrics_port is not None else None
    settings = WorkerSettings(lease_s=lease, leader_lease_s=min(3.0, 0.6 * lease), balance=balance)

    autosplit = AutoSplit(max_shards, autosplit_every, autosplit_after) if max_shards is not None else None

    async def work() -> None:
        async with serving_client(url, listen, lambda client: client.queue(queue)) as client:
            await coordinate(client, queue, group, settings, anyio.Event(), autosplit=autosplit)

    # Cancelled, it still resigns and signs off, and it has nothing else to finish.
    run_async(lambda: until_stopped(work, lambda: False))
