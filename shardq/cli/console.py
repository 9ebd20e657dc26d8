"""`shardq console`: serves one page to watch and operate queues, until it is told to stop. The page and its API are
ops/console's."""

from __future__ import annotations

import os

import click

from shardq.cli.options import log_level_option, url_option
from shardq.ops.console.server import TOKEN_VARIABLE, check_installed, is_loopback, make_policy, serve_console
from shardq.ops.processes import run_async, until_stopped
from shardq.ops.work import log_to_stderr
from shardq.runtime.client import connect


@click.command(epilog="Example: shardq console --port 9500 --write")
@click.option("--port", type=click.IntRange(0, 65535), default=9500, show_default=True, help="0 takes a free one.")
@click.option("--host", default="127.0.0.1", show_default=True, metavar="ADDRESS", help="Where to listen.")
@click.option("--write", is_flag=True, help="Allow replay and purge to whoever has the token.")
@click.option("--allow-host", "names", multiple=True, metavar="NAME", help="A host name to answer to; may be repeated.")
@url_option
@log_level_option
def console(port: int, host: str, write: bool, names: tuple[str, ...], url: str, log_level: str) -> None:
    """Serve a page to watch queues, and with --write to replay and purge dead letters.

    Prints the page's address when it listens. With --write the address has the token behind its #, which a browser
    keeps to itself; SHARDQ_CONSOLE_TOKEN gives one that stays the same, and is not printed.
    """
    check_installed()
    log_to_stderr(log_level)
    policy = make_policy(write=write, names=names)

    def tell(address: str) -> None:
        generated = policy.token is not None and not os.environ.get(TOKEN_VARIABLE)
        click.echo(f"{address}#token={policy.token}" if generated else address)
        if not is_loopback(host):
            click.echo(f"warning: whoever reaches {host} can read messages here; a proxy with a login helps", err=True)

    async def work() -> None:
        async with connect(url) as client:
            await serve_console(client, port, policy=policy, host=host, on_listening=tell)

    run_async(lambda: until_stopped(work, lambda: False))
