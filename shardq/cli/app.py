"""The command group: which commands there are, and what an error looks like to a person or a script.

A command's module is imported only when that command is used; `shardq --help` imports none of them.
Exit statuses: 0 done, 1 it could not be done, 2 wrong usage, 130 interrupted. An error is one line on stderr.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

import click

from shardq.errors import ShardqError

_INTERRUPTED = 130  # 128 + SIGINT, as shells have it
_HELP = getattr(click.exceptions, "NoArgsIsHelpError", ())  # click 8.1 has none: a group alone prints its help there


class CommandEntry(NamedTuple):
    """Where a command lives ("module:object") and the line the group's help shows for it."""

    target: str
    help: str


COMMANDS: dict[str, CommandEntry] = {
    "demo": CommandEntry("shardq.cli.demo:demo", "Show shardq at work on a cluster of its own, and check the outcome."),
    "up": CommandEntry("shardq.cli.up:up", "Run a local Redis or Valkey cluster in the foreground."),
    "install": CommandEntry("shardq.cli.install:install", "Load shardq's functions on every master."),
    "acl": CommandEntry("shardq.cli.acl:acl", "Print the rights that a Redis user needs, by role."),
    "queue": CommandEntry("shardq.cli.queue:queue", "Create, change, scale, list, show and delete queues."),
    "split": CommandEntry("shardq.cli.reshard:split", "Split shards of a queue that is in use."),
    "merge": CommandEntry("shardq.cli.reshard:merge", "Merge shards of a queue that is in use."),
    "group": CommandEntry("shardq.cli.group:group", "List, create, reset and delete consumer groups."),
    "status": CommandEntry("shardq.cli.status:status", "Show backlog, age, rate and owner of every shard."),
    "top": CommandEntry("shardq.cli.top:top", "Show the queues live, with keys to sort and to look closer."),
    "doctor": CommandEntry("shardq.cli.doctor:doctor", "Check the cluster and its queues, and say what to do."),
    "produce": CommandEntry("shardq.cli.produce:produce", "Send lines of JSON to a queue."),
    "peek": CommandEntry("shardq.cli.peek:peek", "Show messages without consuming them."),
    "tail": CommandEntry("shardq.cli.tail:tail", "Follow a queue without consuming it."),
    "work": CommandEntry("shardq.cli.work:work", "Run a worker, in one process or several."),
    "dead": CommandEntry("shardq.cli.dead:dead", "List, show, replay and purge dead letters."),
    "delete": CommandEntry("shardq.cli.delete:delete", "Delete one message for good, by its id."),
    "trim": CommandEntry("shardq.cli.delete:trim", "Give up what is kept of finished messages."),
    "job": CommandEntry("shardq.cli.job:job", "Show what became of a tracked job."),
    "schedule": CommandEntry("shardq.cli.schedule:schedule", "Set, list and remove what a queue sends by the clock."),
    "archive": CommandEntry("shardq.cli.archive:archive", "Write a queue to compressed files, or read them."),
    "coordinator": CommandEntry("shardq.cli.coordinator:coordinator", "Coordinate a group's workers from outside."),
    "exporter": CommandEntry("shardq.cli.exporter:exporter", "Serve the metrics for Prometheus."),
    "console": CommandEntry("shardq.cli.console:console", "Serve a page to watch and operate queues."),
    "bench": CommandEntry("shardq.cli.bench:bench", "Measure sending and handling, beside redis-py."),
    "completion": CommandEntry(
        "shardq.cli.completion:completion", "Print the completion script for bash, zsh or fish."
    ),
}


class LazyGroup(click.Group):
    """A group whose commands come from COMMANDS and are imported one at a time."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        entry = COMMANDS.get(cmd_name)
        if entry is None:
            return None
        module_name, _, object_name = entry.target.partition(":")
        command = getattr(import_module(module_name), object_name)
        assert isinstance(command, click.Command), f"{entry.target} is no click command"
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.help) for name, entry in COMMANDS.items()])


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start here: `shardq up` in one terminal; the other commands find that cluster by themselves.",
)
@click.version_option(package_name="shardq", message="shardq %(version)s")
def cli() -> None:
    """A sharded, cluster-aware stream queue on Redis Cluster."""


def _said(error: click.ClickException) -> str:
    """With the usage, where that is what is wrong."""
    said = error.format_message()
    if isinstance(error, click.UsageError) and error.ctx is not None:
        usage = error.ctx.get_usage()
        return f"{said.rstrip('.')}. {usage} (--help tells more)"
    return said


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (this process's own by default) and return its exit status; never raises a ShardqError.

    Commands return None; one that ends with another status than 0 without an error calls `context.exit(status)`.
    """
    try:
        status = cli.main(args=arguments, prog_name="shardq", standalone_mode=False)
    except ShardqError as error:
        click.echo(f"error: {' '.join(str(error).split())}", err=True)
        return 1
    except click.ClickException as error:
        if isinstance(error, _HELP):
            error.show(sys.stderr)
            return click.UsageError.exit_code
        click.echo(f"error: {' '.join(_said(error).split())}", err=True)
        return error.exit_code
    except click.Abort as error:
        if error.__cause__ is None:  # no Ctrl-C: a question that was answered with no, or not at all
            click.echo("error: nothing was done, the answer was not yes: --yes does not ask", err=True)
        return _INTERRUPTED
    except KeyboardInterrupt:
        return _INTERRUPTED
    return status if isinstance(status, int) else 0
