"""`shardq install`: loads the functions library, for operators whose applications may not. Does nothing else."""

from __future__ import annotations

import click

from shardq.cli.options import json_option, url_option
from shardq.cli.output import print_json
from shardq.ops.install import install as install_functions
from shardq.ops.processes import run_async
from shardq.runtime.client import connect


@click.command(epilog="Example: shardq install --url redis://admin:secret@redis-1:7000")
@url_option
@json_option
def install(url: str, as_json: bool) -> None:
    """Load shardq's functions on every master of the cluster.

    Connecting does it too, where the user may; run this as one who may, before the others and at every upgrade.
    """

    async def main() -> dict[str, int]:
        async with connect(url) as client:
            return await install_functions(client)

    builds = run_async(main)
    if as_json:
        print_json({"node": node, "build": build} for node, build in builds.items())
        return
    for node, build in builds.items():
        click.echo(f"{node}  build {build}")
