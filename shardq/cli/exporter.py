"""`shardq exporter`: serves the metrics over HTTP until it is told to stop. What it serves is ops/exporter.py's."""

from __future__ import annotations

import click

from shardq.cli.options import log_level_option, url_option
from shardq.ops.exporter import keep_serving_metrics
from shardq.ops.processes import end_when_told, run_async, until_stopped
from shardq.ops.work import log_to_stderr
from shardq.runtime.client import connect


@click.command(epilog="Example: shardq exporter --port 9400 --host 0.0.0.0")
@click.option("--port", type=click.IntRange(0, 65535), default=9400, show_default=True, help="0 takes a free one.")
@click.option("--host", default="127.0.0.1", show_default=True, metavar="ADDRESS", help="Where to listen.")
@url_option
@log_level_option
def exporter(port: int, host: str, url: str, log_level: str) -> None:
    """Serve the metrics of every queue for Prometheus.

    Prints the URL when it listens, and then waits for Redis if that is away: until then shardq_exporter_up is 0 and
    /readyz says why. It keeps no count of its own: run as many as you like, restart them at will.
    """
    end_when_told()
    log_to_stderr(log_level)

    async def work() -> None:
        await keep_serving_metrics(lambda: connect(url), port, host=host, on_listening=click.echo)

    run_async(lambda: until_stopped(work, lambda: False))
