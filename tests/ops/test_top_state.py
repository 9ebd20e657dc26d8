"""What keys make of the views of `shardq top`, over any data that comes and goes: no cluster, no terminal."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardq.ops.inspect import GroupState, GroupView, QueueView, ShardView
from shardq.ops.rates import Look
from shardq.ops.top.board import COLUMNS, Board, Place, facts, rows, trouble
from shardq.ops.top.keys import parse
from shardq.ops.top.state import State, View, ordered, press, settle, start

KEYS = ["up", "down", "j", "k", "home", "end", "pageup", "pagedown", "enter", "esc", "backspace", "s", "r", "g", "w"]
KEYS += ["?", "x", "left", "right"]
BLANK = GroupView(**dict.fromkeys(GroupView.__slots__, 0) | dict.fromkeys(("owner", "renewals"), ""))  # type: ignore[arg-type]  # ages and flags too


def group(backlog: int = 0, acked: int = 0, owner: str = "", oldest: float | None = None) -> GroupView:
    return replace(
        BLANK, backlog=backlog, acked=acked, owner=owner, held=bool(owner), oldest_pending_age_s=oldest,
        oldest_unread_age_s=None, moving=False,
    )  # fmt: skip


def shard(number: int, groups: dict[str, GroupView], *, appended: int = 0, time_ms: int = 0) -> ShardView:
    return ShardView(number, 0, 1 << 32, number * 7, "n:1", "open", time_ms, appended, 0, 0, 0, 0, groups)


def queue(name: str, *shards: ShardView, **groups: GroupState) -> QueueView:
    return QueueView(name, {each.shard: each for each in shards}, groups)


@st.composite
def views(draw: st.DrawFn) -> dict[str, QueueView]:
    found = {}
    for name in draw(st.sets(st.sampled_from(["a", "b-2", "b-10"]))):
        names = draw(st.sets(st.sampled_from(["g", "h", "i"])))
        owners = st.sampled_from(["", "w-1", "w-2", "w-10"])
        ages = st.none() | st.floats(0, 9)
        groups = st.fixed_dictionaries(
            {each: st.builds(group, st.integers(0, 9), st.just(0), owners, ages) for each in names}
        )
        shards = [shard(number, draw(groups)) for number in sorted(draw(st.sets(st.integers(0, 30), max_size=12)))]
        found[name] = queue(name, *shards, **{each: GroupState("w-1", ("w-1", "w-3"), 0) for each in names})
    return found


def check(state: State, board: Board, height: int) -> None:
    view, found = state.view, ordered(state.view, board)
    assert sorted(map(repr, found)) == sorted(map(repr, rows(board, view.place)))
    assert len({row.opens for row in found}) == len(found)
    assert all(len(row.values) == len(COLUMNS[view.place.level]) for row in found)
    if found:
        assert 0 <= view.first <= view.at < min(view.first + height, len(found))
        assert view.first <= max(0, len(found) - height)
        assert view.selected in (None, found[view.at].opens)
    else:
        assert (view.at, view.first) == (0, 0)
    known = [row.values[view.sort] for row in found if row.values[view.sort] is not None]
    numbers = [value for value in known if isinstance(value, int | float)]
    assert numbers == sorted(numbers, reverse=view.descending)
    assert [row.values[view.sort] for row in found[len(known) :]] == [None] * (len(found) - len(known))
    facts(board, view.place)
    trouble(board, view.place)


@given(st.lists(st.tuples(st.sampled_from(KEYS) | st.none(), views(), st.integers(1, 8)), max_size=25), st.booleans())
def test_every_state_that_keys_and_data_lead_to_is_sound(
    steps: list[tuple[str | None, dict[str, QueueView], int]], one: bool
) -> None:
    state, board = start("a" if one else None), Board()
    for key, found, height in steps:
        if key is None:
            board = board.updated(found, {}, whole=True)
            state = settle(state, board, height)
        else:
            state = press(settle(state, board, height), key, board, height)
        if not state.help:
            check(state, board, height)
        assert state.views[0].place.level == ("queues" if not one else state.views[0].place.level)
        assert not state.done


BOARD = Board().updated(
    {
        "jobs": queue("jobs", *(shard(n, {"g": group(n % 3), "h": group(owner=f"w-{n % 3}")}) for n in range(40))),
        "mail": queue("mail", shard(0, {})),
    },
    {},
    whole=True,
)


def pressed(*keys: str, state: State | None = None, height: int = 10) -> State:
    state = state or settle(start(None), BOARD, height)
    for key in keys:
        state = press(state, key, BOARD, height)
    return state


@pytest.mark.parametrize(
    ("keys", "place"),
    [
        ([], Place("queues")),
        (["enter"], Place("shards", "jobs", "g")),
        (["down", "enter"], Place("shards", "jobs", "h")),
        (["end", "enter"], Place("shards", "mail", "")),
        (["enter", "g"], Place("shards", "jobs", "h")),
        (["enter", "g", "g"], Place("shards", "jobs", "g")),
        (["enter", "end", "enter"], Place("shard", "jobs", "g", 39)),
        (["enter", "end", "enter", "enter"], Place("shard", "jobs", "g", 39)),
        (["enter", "end", "enter", "esc"], Place("shards", "jobs", "g")),
        (["enter", "end", "enter", "backspace", "esc"], Place("queues")),
        (["esc", "esc"], Place("queues")),
        (["down", "w"], Place("workers", "jobs", "h")),
        (["down", "w", "w"], Place("shards", "jobs", "h")),
        (["down", "w", "down", "enter"], Place("worker", "jobs", "h", worker="w-1")),
        (["down", "w", "down", "enter", "down", "enter"], Place("shard", "jobs", "h", 4)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_where_keys_lead(keys: list[str], place: Place) -> None:
    assert pressed(*keys).view.place == place


def test_going_back_leads_to_the_same_row() -> None:
    there = pressed("enter", "down", "down", "down")
    assert pressed("enter", "esc", state=there).view == there.view


def test_a_chosen_row_stays_chosen_in_another_order_and_the_first_one_is_not_chosen() -> None:
    by_backlog = pressed("enter", "down", "s", "s", "s")
    assert by_backlog.view.columns[by_backlog.view.sort].name == "BACKLOG"
    assert ordered(by_backlog.view, BOARD)[by_backlog.view.at].values[0] == 1
    untouched = pressed("enter", "s", "s", "s")
    assert (untouched.view.at, ordered(untouched.view, BOARD)[0].values[3]) == (0, 2)
    assert ordered(pressed("enter", "s", "s", "s", "r").view, BOARD)[0].values[3] == 0


def test_a_row_that_is_gone_leaves_the_choice_in_its_place() -> None:
    state = pressed("enter", "end")
    shards = {n: each for n, each in BOARD.looks["jobs"].view.shards.items() if n < 5}
    fewer = Board({"jobs": Look(None, replace(BOARD.looks["jobs"].view, shards=shards))})
    assert settle(state, fewer, 10).view.at == 4
    assert settle(state, Board(), 10).view.at == 0


def test_numbers_in_names_count_as_numbers() -> None:
    board = Board({"q": Look(None, queue("q", *(shard(n, {"g": group(owner=f"w-{n}")}) for n in (10, 9, 100))))})
    view = View(Place("workers", "q", "g"))
    assert [row.values[0] for row in ordered(view, board)] == ["w-9", "w-10", "w-100"]


def test_help_is_left_by_any_key_and_q_ends() -> None:
    assert pressed("?").help
    assert pressed("?", "q") == pressed()
    assert pressed("q").done


def test_rates_are_of_the_nodes_own_clock_and_never_negative() -> None:
    first = queue("q", shard(0, {"g": group(acked=5)}, appended=10, time_ms=1000))
    later = queue("q", shard(0, {"g": group(acked=7)}, appended=40, time_ms=3000))
    look = Board().updated({"q": first}, {}, whole=True).updated({"q": later}, {}, whole=True).looks["q"]
    assert (look.stored_total(), look.handled_total("g")) == (15.0, 1.0)
    assert Look(later, replace(first, shards={0: replace(first.shards[0], time_ms=5000)})).stored_total() == 0
    assert Look(later, later).stored_total() is None
    assert Look(None, later).stored_total() is None


def test_a_hot_shard_has_a_mark_in_every_table_of_shards() -> None:
    def at(second: int, rates: tuple[int, ...]) -> QueueView:
        return queue("q", *(
            shard(n, {"g": group(owner="w")}, appended=rate * second, time_ms=1000 * second)
            for n, rate in enumerate(rates)
        ))  # fmt: skip

    board = Board()
    for second in (1, 3):
        board = board.updated({"q": at(second, (20, 600, 20, 20))}, {}, whole=True)
    for place in (Place("shards", "q", "g"), Place("worker", "q", "g", worker="w")):
        column = [each.field for each in COLUMNS[place.level]].index("hot")
        assert [row.values[column] for row in rows(board, place)] == ["", "hot", "", ""]
        assert [row.marked for row in rows(board, place)] == [False, True, False, False]
    assert board.looks["q"].hot() == {1}
    assert Look(None, at(1, (20, 600, 20, 20))).hot() == frozenset()


def test_what_can_not_be_read_keeps_its_last_values_and_is_named() -> None:
    whole = queue("q", shard(0, {"g": group(3)}), shard(1, {"g": group(4)}))
    part = replace(queue("q", shard(0, {"g": group(1)})), unreadable={1: "n:1 is away"})
    board = Board().updated({"q": whole}, {}, whole=True).updated({"q": part}, {}, whole=True)
    place = Place("shards", "q", "g")
    assert [(row.values[3], row.stale) for row in rows(board, place)] == [(1, False), (4, True)]
    assert trouble(board, place) == "1 shards of q can't be read; shard 1: n:1 is away"
    gone = board.updated({}, {"q": "no routing table"}, whole=True)
    assert (len(rows(gone, place)), trouble(gone, Place("queues"))) == (2, "queue q: no routing table")
    assert trouble(board.failed("no node answers"), place) == "no node answers"
    assert trouble(gone.updated({"q": whole}, {}, whole=False), place) == ""
    assert gone.updated({}, {}, whole=True).looks == {}


# -- keys -------------------------------------------------------------------------------------------------------------

TYPED = {"\x1b[A": "up", "\x1bOB": "down", "\x1b[5~": "pageup", "\x1b[1;5A": "", "\r": "enter", "\x7f": "backspace"}
TYPED |= {"s": "s", "é": "é", "\x01": "", "\x1b[H": "home", "q": "q"}


@given(st.lists(st.sampled_from(sorted(TYPED))), st.data())
def test_bytes_mean_the_same_keys_however_they_are_cut(typed: list[str], data: st.DataObject) -> None:
    text = "".join(typed)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)))))
    keys, rest = [], ""
    for start_at, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        found, rest = parse(rest + text[start_at:end], more=True)
        keys += found
    assert (keys, rest) == ([TYPED[each] for each in typed if TYPED[each]], "")


@given(st.text(alphabet="\x1b[OAB;~1q\x00"))
def test_whatever_comes_is_read_to_its_end(text: str) -> None:
    assert parse(text, more=False)[1] == ""


def test_an_escape_that_nothing_follows_is_a_key() -> None:
    assert parse("\x1b", more=True) == ([], "\x1b")
    assert parse("\x1b", more=False) == (["esc"], "")
    assert parse("\x1b\x1b[B", more=True) == (["esc", "down"], "")
