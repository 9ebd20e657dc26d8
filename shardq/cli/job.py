"""`shardq job`: what became of one tracked job. Changes nothing."""

from __future__ import annotations

from typing import Any

import click
import msgspec

from shardq.cli.dead import _iso, _plain
from shardq.cli.options import json_option, url_option
from shardq.cli.output import print_json
from shardq.core.jobs import JobState, job_place
from shardq.ops.processes import run_async
from shardq.runtime.client import connect


@click.command(epilog="Example: shardq job orders/3/9f86d081884c7d65")
@click.argument("job_id", metavar="ID")
@click.option("--wait", type=click.FloatRange(min=0), metavar="SECONDS", help="Wait so long for its end.")
@url_option
@json_option
def job(job_id: str, wait: float | None, url: str, as_json: bool) -> None:
    """Show the state of a job that `producer.submit` returned."""
    queue, _ = job_place(job_id)

    async def main() -> JobState:
        async with connect(url) as client:
            tracked = (await client.queue(queue)).job(job_id)
            return await tracked.ended(wait) if wait is not None else await tracked.state()

    state = run_async(main)
    shown: dict[str, Any] = {name: _plain(value) for name, value in msgspec.structs.asdict(state).items()}
    for name in ("submitted", "updated"):
        shown[name] = _iso(shown.pop(f"{name}_ms"))
    if as_json:
        print_json([shown])
        return
    for name, value in shown.items():
        click.echo(f"{name + ':':<11}{value}")
