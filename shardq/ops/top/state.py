"""What `shardq top` shows and what each key makes of it: views on a stack, sorting, selection, scrolling. Pure.

Invariants of every settled state, whatever the keys and whatever became of the data (a property test holds them):
- there is a view; the selected row is a row of its table, or the first one where none was chosen
- the selected row is on the screen, and the screen is filled while there are rows to fill it
A chosen row stays chosen when the order changes; when it is gone, the one in its place is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from shardq.ops.top.board import COLUMNS, Board, Column, Place, Row, Value, queue_groups, rows

OTHER_LINES = 6
"""Lines of the screen that are no rows: the title, two of facts, the headers, trouble, the keys."""

_NUMBERS = re.compile("([0-9]+)")


@dataclass(frozen=True, slots=True)
class View:
    """One table. `selected` None: nobody chose a row yet, the first is shown as chosen. `first` is the top row."""

    place: Place
    sort: int = 0
    descending: bool = False
    selected: Place | None = None
    at: int = 0
    first: int = 0

    @property
    def columns(self) -> tuple[Column, ...]:
        return COLUMNS[self.place.level]


@dataclass(frozen=True, slots=True)
class State:
    """The views that were drilled through, the one that is shown last."""

    views: tuple[View, ...]
    help: bool = False
    done: bool = False

    @property
    def view(self) -> View:
        return self.views[-1]

    def showing(self, view: View) -> State:
        """With another view in the place of the one that is shown."""
        return replace(self, views=(*self.views[:-1], view))

    @property
    def title(self) -> str:
        """The way here, in words."""
        place = self.view.place
        parts = [place.queue, place.group] if place.queue else ["all queues"]
        parts += [f"shard {place.shard}"] if place.level == "shard" else []
        parts += [f"worker {place.worker or '-'}"] if place.level == "worker" else []
        parts += ["workers"] if place.level == "workers" else []
        return " / ".join(part for part in parts if part)


def start(queue: str | None, group: str | None = None) -> State:
    """All queues, or the shards of one."""
    return State((View(Place("queues") if queue is None else Place("shards", queue, group or "")),))


def body_rows(lines: int) -> int:
    """The rows that fit a terminal of so many lines."""
    return max(1, lines - OTHER_LINES)


def ordered(view: View, board: Board) -> list[Row]:
    """The rows as they are sorted; what is not known comes last either way."""
    found = rows(board, view.place)
    known = [row for row in found if row.values[view.sort] is not None]
    unknown = [row for row in found if row.values[view.sort] is None]
    return [*sorted(known, key=lambda row: _sort_key(row.values[view.sort]), reverse=view.descending), *unknown]


def _sort_key(value: Value) -> tuple[float, list[tuple[int, str]]]:
    """Numbers by size; texts with the numbers in them by size: w-2 before w-10."""
    if isinstance(value, str):
        parts = _NUMBERS.split(value)
        return 0, [(int(part), "") if number % 2 else (-1, part) for number, part in enumerate(parts)]
    return float(value or 0), []


def settle(state: State, board: Board, height: int) -> State:
    """After anything changed: every view's group is one that the queue has, and the shown view's selection is right."""
    views = tuple(_with_group(view, board) for view in state.views)
    return replace(state, views=(*views[:-1], _settled(views[-1], ordered(views[-1], board), height)))


def _with_group(view: View, board: Board) -> View:
    place = view.place
    if place.level not in ("shards", "workers") or place.queue not in board.looks:
        return view
    names = queue_groups(board, place.queue)
    return view if place.group in names else _regrouped(view, names[0])


def _regrouped(view: View, group: str) -> View:
    selected = replace(view.selected, group=group) if view.selected is not None else None
    return replace(view, place=replace(view.place, group=group), selected=selected)


def _settled(view: View, found: list[Row], height: int) -> View:
    if not found:
        return replace(view, at=0, first=0)
    at, selected = 0, view.selected
    if selected is not None:
        places = [row.opens for row in found]
        at = places.index(selected) if selected in places else min(view.at, len(found) - 1)
        selected = places[at]
    return replace(view, selected=selected, at=at, first=_scrolled(view.first, at, len(found), height))


def _scrolled(first: int, at: int, count: int, height: int) -> int:
    first = min(max(first, at - height + 1), at)
    return max(0, min(first, count - height))


# -- keys -------------------------------------------------------------------------------------------------------------


def press(state: State, key: str, board: Board, height: int) -> State:
    """The state after a key (as keys.py names them); keys that mean nothing here change nothing."""
    if state.help:
        return replace(state, help=False)
    return settle(_pressed(state, key, board, height), board, height)


def _pressed(state: State, key: str, board: Board, height: int) -> State:
    match key:
        case "q":
            return replace(state, done=True)
        case "?" | "h":
            return replace(state, help=True)
        case "s":
            return state.showing(_sorted_by_next(state.view))
        case "r":
            return state.showing(replace(state.view, descending=not state.view.descending))
        case "enter" | "right" | "l":
            return _opened(state, board)
        case "esc" | "backspace" | "left":
            return replace(state, views=state.views[:-1]) if len(state.views) > 1 else state
        case "g":
            return _next_group(state, board)
        case "w":
            return _workers(state, board)
    return state.showing(_moved(state.view, key, board, height))


def _sorted_by_next(view: View) -> View:
    sort = (view.sort + 1) % len(view.columns)
    return replace(view, sort=sort, descending=view.columns[sort].kind not in ("text", "number"))


def _moved(view: View, key: str, board: Board, height: int) -> View:
    if key == "home":
        return replace(view, selected=None)
    found = ordered(view, board)
    steps = {"up": -1, "k": -1, "down": 1, "j": 1, "pageup": -height, "pagedown": height, "end": len(found)}
    if key not in steps or not found:
        return view
    at = max(0, min(view.at + steps[key], len(found) - 1))
    return replace(view, selected=found[at].opens, at=at)


def _chosen(state: State, board: Board) -> Place | None:
    found = ordered(state.view, board)
    return found[state.view.at].opens if state.view.at < len(found) else None


def _opened(state: State, board: Board) -> State:
    chosen = _chosen(state, board)
    if chosen is None or state.view.place.level == "shard":  # there is nothing below a shard
        return state
    view = replace(state.view, selected=chosen)  # so that going back leads to the same row
    return replace(state, views=(*state.showing(view).views, View(chosen)))


def _next_group(state: State, board: Board) -> State:
    place = state.view.place
    if place.level not in ("shards", "workers"):
        return state
    names = queue_groups(board, place.queue)
    after = names.index(place.group) + 1 if place.group in names else 0
    return state.showing(_regrouped(state.view, names[after % len(names)]))


def _workers(state: State, board: Board) -> State:
    """The workers of the group that is shown or chosen; from workers back to shards."""
    place = state.view.place
    if place.level == "queues":
        opened = _opened(state, board)
        return opened if opened is state else _workers(opened, board)
    if place.level in ("shards", "workers"):
        level = "workers" if place.level == "shards" else "shards"
        return state.showing(View(Place(level, place.queue, place.group)))  # type: ignore[arg-type]  # one of the two
    return state
