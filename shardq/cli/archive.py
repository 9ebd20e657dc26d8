"""`shardq archive`: writes a queue to files, or shows what such files hold. The work is ops/archive.py's."""

from __future__ import annotations

import re
import sys
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import click

from shardq.cli.complete import group_names, queue_names
from shardq.cli.options import log_level_option, url_option
from shardq.cli.output import quiet_when_unread
from shardq.cli.progress import waiting
from shardq.ops.archive import ROTATE_BYTES, Archive, read_lines
from shardq.ops.processes import end_when_told, run_async, until_stopped
from shardq.ops.work import INTERRUPTED, log_to_stderr
from shardq.runtime.client import connect

_LIMIT = re.compile(r"(\d+)(kB|KB|MB|GB|s|m|h|d)")
_BYTES = {"kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
BLOCK_LINES = 1000


@click.command(
    epilog="Example: shardq archive orders --to /srv/orders --rotate 64MB --rotate 1h, "
    "then: shardq archive cat /srv/orders | jq .value"
)
@click.argument("queue", metavar="QUEUE", shell_complete=queue_names)
@click.argument("folder", required=False, metavar="[DIR]", type=click.Path(path_type=Path))
@click.option("--to", metavar="DIR", type=click.Path(path_type=Path), help="Where the files are; made if need be.")
@click.option(
    "--group",
    default="archive",
    show_default=True,
    metavar="GROUP",
    shell_complete=group_names,
    help="The archive's consumer group.",
)
@click.option(
    "--rotate",
    multiple=True,
    metavar="LIMIT",
    help="Begin a new file at this size (kB, MB, GB) or age (s, m, h, d); one of each may be given.  [default: 64MB]",
)
@click.option(
    "--lease", type=float, default=5.0, show_default=True, metavar="SECONDS", help="Shards of a crash rest this long."
)
@click.option("--name", metavar="NAME", help="This process's name in the group.")
@click.option("--shard", "shards", type=int, multiple=True, metavar="ID", help="With cat: only this shard.")
@url_option
@log_level_option
@click.pass_context
def archive(
    context: click.Context,
    queue: str,
    folder: Path | None,
    to: Path | None,
    group: str,
    rotate: tuple[str, ...],
    lease: float,
    name: str | None,
    shards: tuple[int, ...],
    url: str,
    log_level: str,
) -> None:
    """Write every message of QUEUE to the folder given by --to, until SIGTERM or Ctrl-C; or, as
    `shardq archive cat DIR`, print what a folder holds: JSON lines, shard by shard, in order, each message once.

    Files are gzip of JSON lines, in a folder for each shard. Messages count as finished for GROUP when they are on
    disk. Start it as often as you like, here or elsewhere, with the same folder: processes share the shards. When it
    can't write, it stops with status 1 and the messages stay in the queue.
    """
    if folder is not None:
        if queue != "cat" or to is not None:
            raise click.UsageError("to write: shardq archive QUEUE --to DIR; to read: shardq archive cat DIR")
        _cat(folder, shards)
        return
    if to is None:
        raise click.UsageError("name the folder to write to: shardq archive QUEUE --to DIR")
    rotate_bytes, rotate_s = _limits(rotate)
    end_when_told()
    worker = Archive(queue, to, group=group, rotate_bytes=rotate_bytes, rotate_s=rotate_s, lease=lease, name=name)
    log_to_stderr(log_level)
    context.exit(run_async(lambda: _run(worker, url)))


async def _run(worker: Archive, url: str) -> int:
    running = False

    async def work() -> None:
        nonlocal running
        async with connect(url) as client:
            running = True
            await worker.run(client)

    def stop() -> bool:
        worker.stop()
        return running

    return INTERRUPTED if await until_stopped(work, stop) else 0


def _limits(texts: tuple[str, ...]) -> tuple[int | None, float | None]:
    if not texts:
        return ROTATE_BYTES, None
    rotate_bytes, rotate_s = None, None
    for text in texts:
        match = _LIMIT.fullmatch(text)
        if match is None:
            raise click.BadParameter(f"{text!r} is no size or age: write 64MB or 1h", param_hint="--rotate")
        number, unit = int(match[1]), match[2]
        if unit in _BYTES:
            rotate_bytes = number * _BYTES[unit]
        else:
            rotate_s = float(number * _SECONDS[unit])
    return rotate_bytes, rotate_s


def _cat(folder: Path, shards: tuple[int, ...]) -> None:
    lines = read_lines(folder, shards or None)
    # On a terminal the lines themselves show that it goes on.
    with quiet_when_unread(), nullcontext() if sys.stdout.isatty() else waiting(f"reading {folder}"):
        while block := list(islice(lines, BLOCK_LINES)):
            sys.stdout.buffer.write(b"\n".join(block) + b"\n")
        sys.stdout.flush()
