"""`shardq bench`: how fast shardq sends and handles here, beside redis-benchmark and redis-py.

Starts a cluster of its own unless it is given one. Prints the result on stdout, its progress on stderr.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from typing import Any, TypeVar

import click

from shardq.cli.options import json_option
from shardq.ops import bench as rounds
from shardq.ops.bench import Say, Sizes
from shardq.ops.local_cluster import LocalCluster, find_server

MASTERS = 3
# A rewrite of the append-only file would slow down whichever side it falls to.
SERVER_SETTINGS = {"auto-aof-rewrite-percentage": "0"}

Command = TypeVar("Command", bound=Callable[..., Any])
Measure = Callable[[str, Sizes, Say], dict[str, Any]]


@click.group(epilog="Example: shardq bench produce --json")
def bench() -> None:
    """Measure sending and handling.

    Sides take turns on one cluster, with 100-byte values and 10,000 keys; a rate is the median of the rounds.
    """


def _options(command: Command) -> Command:
    for option in (
        json_option,
        # No SHARDQ_URL here: nobody should load a cluster in use because of a variable set for something else.
        click.option("--url", metavar="URL", help="Measure on this cluster instead of one started for it."),
        click.option("--server-binary", metavar="PATH", help="The server to start; otherwise as `shardq up` finds it."),
        click.option("--shards", type=click.IntRange(1, 16384), default=12, show_default=True, help="Shards, streams."),
        click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Rounds that count."),
        click.option(
            "--messages", type=click.IntRange(1), default=500_000, show_default=True, help="Messages in a round."
        ),
    ):
        command = option(command)
    return command


@bench.command(epilog="Example: shardq bench produce --json --messages 200000")
@_options
def produce(**options: Any) -> None:
    """Sending: shardq's producer, redis-py's cluster pipelines, redis-benchmark where it is installed."""
    _measure(rounds.produce, **options)


@bench.command(epilog="Example: shardq bench consume --json --messages 200000")
@_options
def consume(**options: Any) -> None:
    """Handling: shardq's batch_handler and handler, redis-py's XREADGROUP and XACK."""
    _measure(rounds.consume, **options)


def _measure(
    measure: Measure,
    messages: int,
    rounds: int,
    shards: int,
    server_binary: str | None,
    url: str | None,
    as_json: bool,
) -> None:
    if url is not None and server_binary is not None:
        raise click.UsageError("--url names a cluster that runs already: leave out --server-binary.")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C: keys deleted, servers stopped
    sizes = Sizes(messages, rounds, shards)
    if url is not None:
        result = measure(url, sizes, _say)
    else:
        server = find_server(server_binary)
        with LocalCluster(MASTERS, port=None, server=server, settings=SERVER_SETTINGS) as cluster:
            result = measure(cluster.url, sizes, _say)
    click.echo(json.dumps(result, indent=2) if as_json else _table(result))


def _say(line: str) -> None:
    click.echo(line, err=True)


def _table(result: dict[str, Any]) -> str:
    lines = [f"{'':<18}{'messages/s':>14}{'shardq is':>12}"]
    for name, rate in result["rates"].items():
        ratio = result["ratios"].get(name)
        times = f"{ratio:.2f} times" if ratio is not None else ""
        lines.append(f"{name:<18}{f'{rate:,}' if rate is not None else 'not here':>14}{times:>12}")
    machine, versions = result["machine"], result["versions"]
    lines.append(f"{versions['server']}, {machine['cpus']} CPUs, Python {versions['python']}")
    return "\n".join(lines)
