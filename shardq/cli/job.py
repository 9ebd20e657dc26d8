"""`shardq job`: what became of one tracked job. Changes nothing."""

from __future__ import annotations

from typing import Any

import click
import msgspec

from shardq.cli.options import json_option, url_option
from shardq.cli.output import print_fields, print_json
from shardq.cli.records import Age, escaped, time_text, value_text
from shardq.core.jobs import JobState, job_place
from shardq.core.jsonlines import readable_value
from shardq.ops.processes import run_async
from shardq.runtime.client import connect


@click.command(epilog="Example: shardq job orders/3/9f86d081884c7d65")
@click.argument("job_id", metavar="ID")
@click.option("--wait", type=Age(), metavar="SECONDS", help="Wait so long for its end; like 90, 15m or 2h.")
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
    if as_json:
        print_json([{name: readable_value(value) for name, value in msgspec.structs.asdict(state).items()}])
    else:
        print_fields(_fields(state))


def _fields(state: JobState) -> dict[str, str | None]:
    return {
        "id": state.id,
        "status": state.status,
        "queue": state.queue or None,
        "group": state.group or None,
        "attempts": str(state.attempts),
        "submitted": time_text(state.submitted_ms),
        "updated": time_text(state.updated_ms),
        "result": None if state.result is None else _result(state.result),
        "error": escaped(state.error) or None,
    }


def _result(value: Any) -> str:
    return value_text(value) if isinstance(value, (str, bytes)) else escaped(str(readable_value(value)))
