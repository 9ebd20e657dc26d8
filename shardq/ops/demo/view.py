"""The live view of the demo on a terminal. Imported only there; draws a Board, changes nothing on it."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from shardq.ops.demo.board import Board, WorkerLine

_EVENTS, _CARRIERS = 5, 4
_WIDTH, _FULL_HEIGHT = 100, 28
_STATE_STYLES = {"runs": "green", "killed": "bold red", "ended": "bold red"}


class LiveView:
    """A context: the view is there inside it, and gone after it."""

    def __init__(self, console: Console | None = None) -> None:
        # Refreshed by `show` alone: a thread of rich's own would draw a board that is being changed.
        self._console = console or Console()
        self._live = Live(console=self._console, auto_refresh=False, transient=True)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def show(self, board: Board) -> None:
        """Draws the board as it is now."""
        width, height = self._console.size
        self._live.update(draw(board, min(width, _WIDTH), height), refresh=True)


def draw(board: Board, width: int, height: int) -> RenderableType:
    """The whole view: 28 lines; a lower terminal goes without the workers and carriers."""
    parts: list[RenderableType] = [_title(board), _progress(board, width), _shards(board, width)]
    if height > _FULL_HEIGHT:
        lower = Table.grid(padding=(0, 4))
        lower.add_row(_workers(board), _carriers(board))
        parts += [lower, Text()]
    return Group(*parts, _events(board))


def _title(board: Board) -> Text:
    title = Text(no_wrap=True, overflow="ellipsis")
    title.append("shardq demo", style="bold cyan")
    title.append(f"   {board.server}   {board.total:,} flights", style="bold")
    if board.metrics_url:
        title.append(f"   {board.metrics_url}", style="dim")
    return title


def _progress(board: Board, width: int) -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    grid.add_row(
        Text(f"sent {board.sent:>7,}"),
        Text(f"handled {board.handled:>7,}", style="bold"),
        Text(f"{board.rate:>7,.0f}/s"),
        Text(f"backlog {board.backlog:>6,}", style="yellow" if board.backlog > board.rate else ""),
        ProgressBar(total=board.total, completed=board.handled, width=max(width - 64, 8)),
    )
    return grid


def _shards(board: Board, width: int) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), width=width, pad_edge=False)
    for name in ("SHARD", "NODE", "OWNER"):
        table.add_column(name, ratio=2 if name != "SHARD" else 1)
    for name in ("RATE", "BACKLOG", "PEL"):
        table.add_column(name, justify="right", ratio=1)
    for line in board.lines:
        table.add_row(
            str(line.shard),
            Text(line.node, style="dim"),
            _owner(board, line.owner),
            f"{line.rate:,.0f}/s",
            Text(f"{line.backlog:,}", style="bold yellow" if line.backlog > max(line.rate, 10) else ""),
            f"{line.pel:,}",
        )
    return table


def _owner(board: Board, owner: str) -> Text:
    if not owner:
        return Text("nobody", style="dim")
    if board.workers.get(owner, WorkerLine(0)).state != "runs":
        return Text(f"{owner} (dead)", style="bold red")
    return Text(owner, style="green")


def _workers(board: Board) -> Table:
    table = Table(box=None, padding=(0, 1), pad_edge=False)
    for name in ("WORKER", "PID", "STATE"):
        table.add_column(name)
    for name in ("SHARDS", "HANDLED"):
        table.add_column(name, justify="right")
    for name, worker in board.workers.items():
        state = Text(worker.state, style=_STATE_STYLES.get(worker.state, ""))
        table.add_row(name, str(worker.pid), state, str(board.owned_by(name)), f"{worker.handled:,}")
    return table


def _carriers(board: Board) -> Table:
    table = Table(box=None, padding=(0, 1), pad_edge=False)
    table.add_column("CARRIER")
    table.add_column("FLIGHTS", justify="right")
    table.add_column("MINUTES LATE", justify="right")
    for carrier, flights in board.flights_by_carrier.most_common(_CARRIERS):
        table.add_row(carrier, f"{flights:,}", f"{board.minutes_by_carrier[carrier]:,}")
    return table


def _events(board: Board) -> Text:
    text = Text(no_wrap=True, overflow="ellipsis")
    for event in board.events[-_EVENTS:]:
        text.append(f"{event.seconds:5.1f} s  ", style="dim")
        text.append(f"{event.text}\n", style="bold red" if event.grave else "")
    text.rstrip()
    return text
