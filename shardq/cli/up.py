"""`shardq up`: a local cluster in the foreground, for trying things out.

Prints one line on stdout, the URL, when the cluster serves; everything else goes to stderr. Never outlives its servers
in silence: when one dies, it stops the rest and says which.
"""

from __future__ import annotations

import signal
import time
from pathlib import Path
from types import FrameType

import click

from shardq.errors import StoreUnavailable
from shardq.ops.local_cluster import LocalCluster, find_server, server_version
from shardq.ops.processes import STOP_SIGNALS

_LOOK_EVERY_S = 0.2


@click.command(epilog="Example: shardq up --masters 3 --replicas 1 --data ./data")
@click.option("--masters", type=click.IntRange(1, 100), default=3, show_default=True, help="How many masters.")
@click.option("--replicas", type=click.IntRange(0, 10), default=0, show_default=True, help="Replicas of each master.")
@click.option("--port", type=click.IntRange(1, 65535), default=7000, show_default=True, help="The first node's port.")
@click.option(
    "--server-binary",
    metavar="PATH",
    help="The server to run; otherwise $SHARDQ_SERVER, then PATH, then the bundled one.",
)
@click.option(
    "--data",
    "data_dir",
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
    help="Keep the data here and continue from it; otherwise it is gone at the end.",
)
def up(masters: int, replicas: int, port: int, server_binary: str | None, data_dir: Path | None) -> None:
    """Run a local Redis or Valkey cluster in the foreground.

    Prints the cluster's URL when it is ready. Ctrl-C or SIGTERM stops it.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, _stop_once)
    try:
        server = find_server(server_binary)
        click.echo(f"{server_version(server)} ({server}), {masters * (1 + replicas)} nodes", err=True)
        with LocalCluster(masters, replicas, port, server, data_dir) as cluster:
            click.echo(cluster.url)
            _watch(cluster)
    except KeyboardInterrupt:
        click.echo("The cluster is stopped.", err=True)


def _stop_once(number: int, frame: FrameType | None) -> None:
    # An impatient second Ctrl-C must not cut the stopping short and leave servers or data behind.
    for each in STOP_SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt


def _watch(cluster: LocalCluster) -> None:
    while True:
        for process in cluster.processes:
            if not process.alive:
                raise StoreUnavailable(
                    f"The server on port {process.port} (pid {process.pid}) died while running, so the cluster was "
                    f"stopped: run `shardq up` again. Its log ends: {process.log_tail}"
                )
        time.sleep(_LOOK_EVERY_S)
