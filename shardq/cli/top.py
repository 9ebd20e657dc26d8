"""`shardq top`: the queues as they are, live on a terminal, as tables or JSON lines elsewhere.

What is shown is decided by ops/top/, drawn by top_view.py. Whatever ends it, the terminal is left as it was found.
"""

from __future__ import annotations

import io
import logging
import signal
import sys
import time
from typing import Any

import anyio
import click

from shardq.cli.complete import group_names, queue_names
from shardq.cli.options import json_option, url_option
from shardq.cli.output import print_json, print_table, quiet_when_unread
from shardq.errors import StoreUnavailable, UsageError
from shardq.ops.processes import run_async, until_stopped
from shardq.ops.top.board import COLUMNS, Board, facts, trouble
from shardq.ops.top.read import Watcher
from shardq.ops.top.state import State, body_rows, ordered, press, settle, start
from shardq.runtime.client import connect

_EVERY_ROW = 1 << 30
_REDRAW_S = 1.0  # what is said of a look that takes too long counts seconds


@click.command(epilog="Example: shardq top orders --group billing")
@click.argument("queue", required=False, shell_complete=queue_names)
@click.option("--group", metavar="GROUP", shell_complete=group_names, help="Begin with this consumer group.")
@click.option(
    "--interval",
    "interval_s",
    type=click.FloatRange(0.1, 3600),
    default=1.0,
    show_default=True,
    metavar="SECONDS",
    help="Time between two looks; rates are measured over it.",
)
@click.option("--count", type=click.IntRange(1), metavar="N", help="Not live: print so many times, then end.")
@url_option
@json_option
def top(queue: str | None, group: str | None, interval_s: float, count: int | None, url: str, as_json: bool) -> None:
    """Show all queues, or the shards of QUEUE, as they change; keys sort, open a queue, a shard or a worker: ? tells.

    Where the output is no terminal, it prints one table and ends. With --json it prints an object for every look
    until it is stopped. An outage is shown, and ends nothing; q, Ctrl-C and SIGTERM do, with status 0.
    """
    if group is not None and queue is None:
        raise click.UsageError("--group needs the QUEUE it belongs to")
    state = start(queue, group)
    live = _is_terminal() and not as_json and count is None
    looks = count if as_json else count or 1

    async def work() -> None:
        async with connect(url) as client:
            watcher = Watcher(client, queue, interval_s)
            await watcher.look()
            _refuse_unknown(watcher.board, queue, group)
            if live:
                await _Live(watcher, state).run()
            else:
                await _print(watcher, state, looks, as_json)

    with quiet_when_unread():
        run_async(lambda: until_stopped(work, lambda: False))


def _is_terminal() -> bool:
    from rich.console import Console

    return sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty() and not Console().is_dumb_terminal


def _refuse_unknown(board: Board, queue: str | None, group: str | None) -> None:
    """A first look that shows nothing is an error; later ones keep what there was."""
    if why := board.trouble or (board.unreadable.get(queue) if queue is not None else None):
        raise StoreUnavailable(why)
    if queue is not None and group is not None:
        there = board.looks[queue].view.total(group)
        if there is None:
            raise UsageError(f"queue {queue!r} has no group {group!r}: `shardq group list {queue}` names those it has")


# -- no terminal ------------------------------------------------------------------------------------------------------


async def _print(watcher: Watcher, state: State, looks: int | None, as_json: bool) -> None:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(watcher.run)
        printed = 0
        while printed != looks:
            await watcher.changed()  # the first look was before: with this one there are rates
            settled = settle(state, watcher.board, _EVERY_ROW)
            if as_json:
                print_json([_object(settled, watcher.board)])
                sys.stdout.flush()
            else:
                _print_table(settled, watcher.board)
            printed += 1
        tasks.cancel_scope.cancel()


def _print_table(state: State, board: Board) -> None:
    from shardq.cli.top_view import shown_value

    columns = state.view.columns
    cells = [
        [shown_value(value, column.kind) for value, column in zip(row.values, columns, strict=True)]
        for row in ordered(state.view, board)
    ]
    print_table(
        [column.name for column in columns], cells, left=[column.name for column in columns if column.kind == "text"]
    )
    if said := trouble(board, state.view.place):
        click.echo(" ".join(said.split()), err=True)


def _object(state: State, board: Board) -> dict[str, Any]:
    place = state.view.place
    fields = [column.field for column in COLUMNS[place.level]]
    lines = [dict(zip(fields, row.values, strict=True)) | {"stale": row.stale} for row in ordered(state.view, board)]
    where = {"queue": place.queue, "group": place.group or None} if place.queue else {}
    totals = {fact.name: fact.value for fact in facts(board, place)}
    said = trouble(board, place) or None
    return {"time": round(time.time(), 3), **where, "totals": totals, place.level: lines, "trouble": said}


# -- a terminal -------------------------------------------------------------------------------------------------------


class _Live:
    """Keys, looks and changes of the terminal's size, each of which draws the screen anew."""

    def __init__(self, watcher: Watcher, state: State) -> None:
        from rich.console import Console

        self._watcher, self._state, self._console = watcher, state, Console()

    async def run(self) -> None:
        """Until the key q, or cancelled."""
        from rich.live import Live

        from shardq.cli.terminal import keys_one_by_one

        # A line of the log would stand in the middle of the table, which says itself what is wrong.
        logging.getLogger().addHandler(logging.NullHandler())
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # a locale without bars and arrows gets question marks
        # Drawn by `_draw` alone: a thread of rich's own would draw a board that is being changed.
        self._live = Live(
            console=self._console, screen=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False
        )
        with keys_one_by_one(sys.stdin.fileno()), self._live:
            async with anyio.create_task_group() as tasks:
                self._draw()
                for each in (self._watcher.run, self._on_looks, self._on_sizes):
                    tasks.start_soon(each)
                await self._on_keys()
                tasks.cancel_scope.cancel()

    async def _on_keys(self) -> None:
        from shardq.cli.terminal import keys

        async for key in keys(sys.stdin.fileno()):
            self._state = press(self._state, key, self._watcher.board, body_rows(self._console.height))
            if self._state.done:
                return
            self._watcher.watch(self._state.view.place.queue or None)
            self._draw()

    async def _on_looks(self) -> None:
        while True:
            with anyio.move_on_after(_REDRAW_S):
                await self._watcher.changed()
            self._draw()

    async def _on_sizes(self) -> None:
        with anyio.open_signal_receiver(signal.SIGWINCH) as signals:
            async for _ in signals:
                self._draw()

    def _draw(self) -> None:
        from shardq.cli.top_view import draw

        width, height = self._console.size
        board = self._watcher.board
        self._state = settle(self._state, board, body_rows(height))
        self._live.update(draw(self._state, board, width, height, self._watcher.silence), refresh=True)
