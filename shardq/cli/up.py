"""`shardq up`: a local cluster in the foreground, for trying things out.

Prints one line on stdout, the URL, when the cluster serves; everything else goes to stderr. Never outlives its servers
in silence: when one dies, it stops the rest and says which.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import click

from shardq.cli.options import Command
from shardq.errors import StoreUnavailable, UsageError
from shardq.ops.local_cluster import LocalCluster, find_server, server_version
from shardq.ops.processes import STOP_SIGNALS
from shardq.storage.nodes import TlsFiles

_LOOK_EVERY_S = 0.2


def _file(name: str, text: str) -> Callable[[Command], Command]:
    kind = click.Path(exists=True, dir_okay=False, readable=True, path_type=Path)
    return click.option(name, metavar="FILE", type=kind, help=text)


def _password(variable: str | None) -> str | None:
    if variable is not None and not os.environ.get(variable):
        raise UsageError(f"the environment variable {variable} is not set: it should hold the password")
    return os.environ[variable] if variable is not None else None


def _tls(certificate: Path | None, key: Path | None, authority: Path | None) -> TlsFiles | None:
    if certificate is None and key is None and authority is None:
        return None
    if certificate is None or key is None or authority is None:
        raise click.UsageError("--tls-cert, --tls-key and --tls-ca go together: name all three files")
    return TlsFiles(authority, certificate, key)


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
@click.option("--password-env", metavar="VARIABLE", help="Ask for the password that stands in this variable.")
@_file("--tls-cert", "Speak TLS alone, with this certificate; with --tls-key and --tls-ca. Name 127.0.0.1 in it.")
@_file("--tls-key", "The certificate's key.")
@_file("--tls-ca", "Who signed the certificate.")
def up(
    masters: int,
    replicas: int,
    port: int,
    server_binary: str | None,
    data_dir: Path | None,
    password_env: str | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    tls_ca: Path | None,
) -> None:
    """Run a local Redis or Valkey cluster in the foreground.

    Prints the cluster's URL, without the password, when it is ready. Ctrl-C or SIGTERM stops it.
    """
    password, tls = _password(password_env), _tls(tls_cert, tls_key, tls_ca)
    for number in STOP_SIGNALS:
        signal.signal(number, _stop_once)
    try:
        server = find_server(server_binary)
        click.echo(f"{server_version(server)} ({server}), {masters * (1 + replicas)} nodes", err=True)
        with LocalCluster(masters, replicas, port, server, data_dir, password, tls=tls) as cluster:
            if password:
                click.echo(f"Clients put the password of ${password_env} into the URL: ...//:PASSWORD@...", err=True)
            click.echo(cluster.url_without_password)
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
