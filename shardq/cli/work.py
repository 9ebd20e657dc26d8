"""`shardq work`: runs a worker, in this process or in several. Finding, running and watching are ops/work.py's."""

from __future__ import annotations

import click

from shardq.cli.options import log_level_option, metrics_options, url_option
from shardq.errors import UsageError
from shardq.ops.processes import Listen, end_when_told, run_async
from shardq.ops.work import USAGE, load_worker, log_to_stderr, run_worker, supervise


@click.command(epilog="Example: shardq work billing:worker --processes 4")
@click.argument("target", metavar="MODULE:WORKER")
@click.option("--processes", type=click.IntRange(1, 1000), default=1, show_default=True, help="How many processes.")
@click.option("--name", metavar="NAME", help="This worker's name in its group, NAME-1, NAME-2, ... with --processes.")
@click.option("--number", type=int, hidden=True)  # the place of a process that another `shardq work` watches over
@metrics_options
@url_option
@log_level_option
@click.pass_context
def work(
    context: click.Context,
    target: str,
    processes: int,
    name: str | None,
    number: int | None,
    metrics_port: int | None,
    metrics_host: str,
    url: str,
    log_level: str,
) -> None:
    """Run the shardq.Worker called WORKER in MODULE, or the shardq.Workers of that name: several queues in one process,
    its handler slots shared by weight.

    The module is imported with the current directory first. SIGTERM or Ctrl-C finishes what is being handled, hands
    the shards over and ends with status 0; a second one cancels what is still being handled (status 130). With
    --processes a process that dies is started again.
    """
    end_when_told()
    log_to_stderr(log_level)
    try:
        worker = load_worker(target)
        if processes > 1:
            given = {"--name": name, "--metrics-port": metrics_port, "--metrics-host": metrics_host}
            options = [text for option, value in given.items() if value is not None for text in (option, str(value))]
            options += ["--log-level", log_level]
            context.exit(run_async(lambda: supervise(target, processes, url, options)))
        own_name = name or worker.name
        if number is not None and own_name is not None:
            own_name = f"{own_name}-{number}"
        listen = Listen(metrics_host, metrics_port).for_process(number or 1) if metrics_port is not None else None
        context.exit(run_async(lambda: run_worker(worker, url, own_name, listen)))
    except UsageError as error:
        if number is None:
            raise
        click.echo(f"error: {error}", err=True)
        context.exit(USAGE)
