"""How `shardq top` looks: lines of a screen from a state and a board. Draws only; decides nothing and reads nothing.

Colours are the terminal's own sixteen, and only those that can be read on a dark and on a light ground.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from shardq.cli.output import age, cut, padded, text_width
from shardq.ops.top.board import Board, Column, Fact, Kind, Row, Value, facts, trouble
from shardq.ops.top.state import State, View, body_rows, ordered

_GAP = 2
_TEXT_LEAST = 12
_LEAST: dict[Kind, int] = {"text": 4, "number": 4, "count": 7, "bytes": 8, "rate": 6, "age": 6}
_BAR_LEAST, _BAR_MOST = 5, 24
_BAR_STYLES = {"stored_rate": "blue", "handled_rate": "green"}

KEYS = (
    ("↑↓", ""),
    ("Enter", "open"),
    ("Esc", "back"),
    ("s", "sort"),
    ("r", "reverse"),
    ("g", "group"),
    ("w", "workers"),
    ("?", "help"),
    ("q", "quit"),
)

HELP = """\
  up, down, j, k        move; Page Up, Page Down, Home, End
  Enter, right          open: a queue's shards, a shard's groups, a worker's shards
  Esc, Backspace, left  go back
  s                     sort by the next column
  r                     reverse the order
  g                     the next group of the queue
  w                     the workers of the group, or its shards again
  q, Ctrl-C             quit

  BACKLOG    messages stored and not finished
  PENDING    of these, a worker has them
  OLDEST     age of the oldest of them
  STORED/S   messages stored in a second
  HANDLED/S  messages finished in a second
  LEASE      held, moving to another worker, or free
  HOT, !     gets over five times what the median shard gets: `shardq doctor` says what helps"""


def draw(state: State, board: Board, width: int, height: int, silence: str = "") -> RenderableType:
    """The whole screen; `state` is settled for this height."""
    lines = [_title(state, width), *_facts(facts(board, state.view.place), width)]
    if state.help:
        lines += [Text(cut(line, width)) for line in HELP.splitlines()][: height - len(lines) - 1]
    else:
        lines += _table(state.view, board, width, body_rows(height))
    blanks = height - len(lines) - 2
    lines += [Text()] * max(0, blanks)
    said = silence or trouble(board, state.view.place)
    lines += [Text(cut(" ".join(said.split()), width), style="bold red")] if blanks >= 0 else []
    return Group(*lines[: height - 1], _keys(width))


def _title(state: State, width: int) -> Text:
    view = state.view
    order = f"by {view.columns[view.sort].name} {'down' if view.descending else 'up'} "
    title = cut(f" shardq top   {state.title}", max(12, width - len(order) - 1))
    return Text(padded(title, width - len(order)) + order if width > 40 else padded(title, width), style="bold reverse")


def _facts(found: Sequence[Fact], width: int) -> list[Text]:
    """Two lines; what fits them."""
    lines, used = [Text(" ")], 1
    for fact in found:
        shown = shown_value(fact.value, fact.kind) + ("/s" if fact.kind == "rate" else "")
        size = len(fact.name) + 1 + text_width(shown) + 3
        if used + size > width + 3:
            if len(lines) == 2:
                break
            lines, used = [*lines, Text(" ")], 1
        style = "bold red" if fact.name == "dead" and fact.value else "bold"
        lines[-1].append(f"{fact.name} ", style="dim").append(shown, style=style).append("   ")
        used += size
    return [*lines, *[Text()] * (2 - len(lines))]


def _keys(width: int) -> Text:
    text = Text(" ", no_wrap=True, overflow="crop")
    for key, what in KEYS:
        text.append(key, style="bold").append(f" {what}  " if what else "  ", style="dim")
    text.truncate(width)
    return text


# -- the table --------------------------------------------------------------------------------------------------------


def _table(view: View, board: Board, width: int, height: int) -> list[Text]:
    found = ordered(view, board)
    shown = found[view.first : view.first + height]
    cells = [[shown_value(value, column.kind) for value, column in _pairs(row, view)] for row in shown]
    headers = [_header(view, number) for number in range(len(view.columns))]
    widths = [
        max(_LEAST[column.kind], *(text_width(texts[at]) for texts in (headers, *cells)))
        for at, column in enumerate(view.columns)
    ]
    widths, bar = fit(view.columns, widths, width - 2)
    most = {at: max((_float(row.values[at]) for row in found), default=0) for at in range(len(widths))}
    lines = [_line(view, headers, widths, bar, None, most)]
    for number, (row, texts) in enumerate(zip(shown, cells, strict=True)):
        line = _line(view, texts, widths, bar, row, most)
        if view.first + number == view.at:
            line = Text(line.plain.ljust(width), style="bold reverse", no_wrap=True, overflow="crop")
        lines.append(line)
    return lines if found else [*lines, Text("  nothing here yet", style="dim")]


def _pairs(row: Row, view: View) -> Iterator[tuple[Value, Column]]:
    return zip(row.values, view.columns, strict=True)


def _header(view: View, number: int) -> str:
    name = view.columns[number].name
    return f"{name}{'▼' if view.descending else '▲'}" if number == view.sort else name


def fit(columns: Sequence[Column], widths: Sequence[int], room: int) -> tuple[list[int], int]:
    """The columns' widths in so much room, 0 for those left out, and the width of a rate's bar, 0 for none.

    First texts are cut down to what is still a name, then columns go by their `drop`; what is left becomes bars.
    """
    fitted = list(widths)
    while _used(fitted) > room:
        texts = [at for at, column in enumerate(columns) if column.kind == "text" and fitted[at] > _TEXT_LEAST]
        dropped = [at for at, column in enumerate(columns) if column.drop and fitted[at]]
        if texts and _used(fitted) - sum(fitted[at] - _TEXT_LEAST for at in texts) <= room:
            widest = max(texts, key=lambda at: fitted[at])
            fitted[widest] -= 1
        elif dropped:
            fitted[max(dropped, key=lambda at: columns[at].drop)] = 0
        else:
            break  # a terminal this narrow cuts the lines
    rates = sum(column.kind == "rate" for column in columns)
    bar = (room - _used(fitted)) // rates - 1 if rates else 0
    return fitted, min(bar, _BAR_MOST) if bar >= _BAR_LEAST else 0


def _used(widths: Sequence[int]) -> int:
    there = [width for width in widths if width]
    return sum(there) + _GAP * (len(there) - 1)


def _line(
    view: View, texts: Sequence[str], widths: Sequence[int], bar: int, row: Row | None, most: dict[int, float]
) -> Text:
    marked = row is not None and row.marked
    line = Text("!" if marked else " ", style="bold red" if marked else "", no_wrap=True, overflow="crop")
    for at, (column, text, width) in enumerate(zip(view.columns, texts, widths, strict=True)):
        if not width:
            continue
        style = _head_style(view, at) if row is None else _style(column, row, at)
        line.append(padded(cut(text, width), width, left=column.kind == "text"), style=style)
        if bar and column.kind == "rate":
            share = _float(row.values[at]) / most[at] if row is not None and most[at] else 0
            line.append(" " + _bar(share, bar), style=_BAR_STYLES[column.field])
        line.append(" " * _GAP)
    return line


def _bar(share: float, width: int) -> str:
    full, half = divmod(round(share * width * 2), 2)
    return ("━" * full + "╸" * half)[:width].ljust(width)


def _head_style(view: View, at: int) -> str:
    return "bold underline" if at == view.sort else "bold"


def _style(column: Column, row: Row, at: int) -> str:
    value = row.values[at]
    if row.stale:
        return "red"
    match column.field:
        case "hot" if value == "hot":
            return "bold red"
        case "lease" if value == "free":
            return "red"
        case "lease" if value == "moving":
            return "magenta"
        case "role" if value in ("away", "nobody"):
            return "red"
        case "dead" if value:
            return "red"
        case "owner" | "worker":
            return "green"
        case "slot" | "node" | "epoch":
            return "dim"
    return ""


def _float(value: Value) -> float:
    return value if isinstance(value, int | float) else 0


def shown_value(value: Value, kind: Kind) -> str:
    """A value as a person reads it."""
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    match kind:
        case "age":
            return age(value)
        case "rate":
            return f"{value:,.1f}" if 0 < value < 10 else f"{value:,.0f}"
        case "bytes":
            return _bytes(value)
        case "count":
            return f"{value:,}"
    return str(value)


def _bytes(value: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"
