"""The demo's verdict and its view: what is counted, and that nothing wrong passes unseen."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from shardq.ops.demo.board import Board, WorkerLine
from shardq.ops.demo.flights import Flight
from shardq.ops.demo.journal import Handling
from shardq.ops.demo.report import CarrierTotal, Observed, Report, judge
from shardq.ops.demo.text import report_text, verdict
from shardq.ops.demo.view import draw
from shardq.ops.demo.worker import GROUP
from shardq.storage.counters import GroupCounters, ShardCounters

S = 1_000_000_000


def flight(row: int, tail: str | None = "N1", carrier: str = "UA", delay: int | None = 5) -> Flight:
    return Flight(row, "2013-01-01", 515, carrier, 1545, tail, "EWR", "IAH", delay, 11)


def handling(
    row: int,
    start_s: float,
    *,
    end_s: float | None = None,
    worker: str = "w1",
    tail: str | None = "N1",
    carrier: str = "UA",
    delay: int | None = 5,
    shard: int = 0,
) -> Handling:
    end_s = start_s if end_s is None else end_s
    return Handling(worker, row, tail, carrier, delay, round(start_s * S), round(end_s * S), 1, shard)


def observed(sent: int = 2, *, killed_s: float = 100.0, shards: tuple[int, ...] = ()) -> Observed:
    worker = "w1" if shards else None
    return Observed("Redis 7.0.15", 3, 12, sent, 0, ("w1",), worker, round(killed_s * S), frozenset(shards))


def report_of(flights: list[Flight], handlings: list[Handling], seen: Observed | None = None) -> Report:
    return judge(flights, handlings, seen or observed(len(flights)))


# -- the verdict ------------------------------------------------------------------------------------------------------


def test_everything_once_and_in_order_is_ok() -> None:
    flights = [flight(1), flight(2, carrier="B6", delay=-3), flight(3, None, delay=None)]
    handlings = [
        handling(3, 0.5, tail=None, delay=None),
        handling(1, 1),
        handling(2, 2, worker="w2", carrier="B6", delay=-3),
    ]
    report = report_of(flights, handlings)
    assert report.ok
    assert (report.sent, report.handled, report.lost, report.out_of_order, report.duplicates) == (3, 3, 0, 0, 0)
    assert report.carriers == {"B6": CarrierTotal(1, -3), "UA": CarrierTotal(2, 5)}
    assert report.workers == {"w1": 2, "w2": 1}
    assert (report.seconds, report.messages_per_second, report.takeover_seconds) == (2.0, 1.5, None)
    assert verdict(report).startswith("OK: ")


def test_a_row_nobody_handled_is_lost_and_missing_in_the_totals() -> None:
    report = report_of([flight(1), flight(2)], [handling(1, 1)])
    assert (report.ok, report.lost, report.handled, report.totals_match) == (False, 1, 1, False)
    assert verdict(report) == "FAILED: 1 flights lost, totals differ from the file's."


def test_nothing_handled_is_a_report_too() -> None:
    report = report_of([flight(1)], [])
    assert (report.ok, report.lost, report.seconds, report.messages_per_second) == (False, 1, 0.0, 0.0)
    assert report.workers == {"w1": 0}


def test_overtaking_within_a_tail_number_is_out_of_order() -> None:
    flights = [flight(1), flight(2), flight(3)]
    report = report_of(flights, [handling(2, 1), handling(3, 2, worker="w2"), handling(1, 3, worker="w2")])
    assert (report.ok, report.out_of_order, report.lost, report.totals_match) == (False, 2, 0, True)
    assert verdict(report) == "FAILED: 2 handled out of order."


def test_tail_numbers_may_overtake_each_other_and_rows_without_one_may_do_anything() -> None:
    flights = [flight(1), flight(2, "N2"), flight(3, None), flight(4, None)]
    handlings = [
        handling(4, 1, end_s=9, tail=None),
        handling(3, 2, end_s=9, tail=None),
        handling(2, 3, tail="N2"),
        handling(1, 4),
    ]
    assert report_of(flights, handlings).ok


def test_two_handlings_of_a_tail_number_at_a_time_are_out_of_order() -> None:
    overlapping = [handling(1, 1, end_s=3), handling(2, 2.5, end_s=4, worker="w2")]
    assert report_of([flight(1), flight(2)], overlapping).out_of_order == 1
    touching = [handling(1, 1, end_s=2.5), handling(2, 2.5, end_s=4, worker="w2")]
    assert report_of([flight(1), flight(2)], touching).ok


def test_an_overlapping_duplicate_is_out_of_order_too() -> None:
    report = report_of([flight(1)], [handling(1, 1, end_s=3), handling(1, 2, worker="w2")])
    assert (report.duplicates, report.out_of_order) == (1, 1)


def test_duplicates_change_neither_order_nor_totals() -> None:
    handlings = [handling(1, 1), handling(2, 2), handling(1, 11, worker="w2"), handling(2, 12, worker="w2")]
    report = report_of([flight(1), flight(2)], handlings, observed(killed_s=5, shards=(0,)))
    assert report.ok
    assert (report.handled, report.duplicates, report.duplicates_not_by_the_kill) == (2, 2, 0)


@pytest.mark.parametrize(("shard", "start_s"), [(1, 9), (0, 4)], ids=["another shard", "before the kill"])
def test_duplicates_that_the_kill_does_not_explain_are_told(shard: int, start_s: float) -> None:
    handlings = [handling(1, 1, shard=shard), handling(1, start_s, shard=shard, worker="w2")]
    report = report_of([flight(1)], handlings, observed(killed_s=5, shards=(0,)))
    assert report.duplicates_not_by_the_kill == 1
    assert "NOT explained" in report_text(report)


@pytest.mark.parametrize("wrong", [handling(1, 1, delay=6), handling(1, 1, delay=None), handling(1, 1, carrier="B6")])
def test_a_value_that_did_not_come_through_makes_the_totals_differ(wrong: Handling) -> None:
    report = report_of([flight(1)], [wrong])
    assert (report.ok, report.totals_match, report.lost) == (False, False, 0)


def test_a_row_that_was_never_sent_makes_the_totals_differ() -> None:
    assert not report_of([flight(1)], [handling(1, 1), handling(7, 2)]).totals_match


def test_takeover_runs_from_the_kill_to_the_first_message_of_its_shards_by_another() -> None:
    flights = [flight(row, f"N{row}") for row in range(1, 7)]
    handlings = [
        handling(1, 9, tail="N1", shard=1, worker="w2"),  # before the kill
        handling(2, 10.5, tail="N2", shard=1, worker="w1"),  # the killed one's last line
        handling(3, 11, tail="N3", shard=5, worker="w2"),  # a shard it did not own
        handling(4, 15.25, tail="N4", shard=2, worker="w2"),
        handling(5, 16, tail="N5", shard=2, worker="w3"),
        handling(6, 17.5, tail="N6", shard=1, worker="w3"),
    ]
    report = report_of(flights, handlings, observed(6, killed_s=10, shards=(1, 2, 3)))
    assert (report.takeover_seconds, report.takeover_seconds_last_shard, report.killed_shards) == (5.25, 7.5, 3)


def test_the_best_second_counts_first_handlings_from_the_first_send() -> None:
    starts = [0.1, 0.9, 1.0, 1.5, 1.999, 2.0]
    flights = [flight(row, f"N{row}") for row in range(1, 7)]
    handlings = [handling(row, start, tail=f"N{row}") for row, start in enumerate(starts, 1)]
    again = [handling(1, 2.1, tail="N1"), handling(2, 2.2, tail="N2")]
    assert report_of(flights, handlings + again).peak_messages_per_second == 3


@given(st.permutations(range(1, 8)), st.lists(st.sampled_from(["N1", "N2", None]), min_size=7, max_size=7))
def test_in_order_is_exactly_ascending_rows_for_each_tail_number(order: list[int], tails: list[str | None]) -> None:
    flights = [flight(row, tail) for row, tail in enumerate(tails, 1)]
    handlings = [handling(row, place, tail=tails[row - 1]) for place, row in enumerate(order)]
    ascending = all(
        rows == sorted(rows) for tail in ("N1", "N2") for rows in [[row for row in order if tails[row - 1] == tail]]
    )
    assert (report_of(flights, handlings).out_of_order == 0) == ascending


# -- the view ----------------------------------------------------------------------------------------------------------


def shard_counters(owner: str, appended: int, acked: int) -> ShardCounters:
    values: dict[str, int | str | bool] = dict.fromkeys(GroupCounters.__slots__, 0)
    values |= dict.fromkeys(("heir", "oldest_pending", "oldest_unread", "oldest_waiting"), "")
    values |= {"owner": owner, "epoch": 1, "held": bool(owner), "renewals": "1"}
    values |= {"acked": acked, "delivered": acked, "pending_entries": 3}
    group = GroupCounters(**values)  # type: ignore[arg-type]
    return ShardCounters(0, 1, "1-0", "open", appended, 100, 0, 0, (GROUP,), {GROUP: group})


def board() -> Board:
    board = Board("Redis 7.0.15", 400, began=10.0, metrics_url="http://127.0.0.1:9109/metrics")
    board.workers = {"w1": WorkerLine(4242, "killed"), "w2": WorkerLine(4243)}
    nodes = dict.fromkeys(range(12), "127.0.0.1:7000")
    for now, acked in ((20.0, 0), (20.5, 50)):
        counters = {shard: shard_counters("w1" if shard < 6 else "w2", 90, acked) for shard in range(12)}
        board.see_counters(now, counters, nodes)
    board.tell(21.0, "w1 is killed", grave=True)
    return board


def rendered(board: Board, width: int, height: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=False)
    with console.capture() as capture:
        console.print(draw(board, width, height))
    return capture.get().splitlines()


def test_the_view_shows_shards_workers_and_events() -> None:
    lines = rendered(board(), 100, 30)
    text = "\n".join(lines)
    assert len(lines) <= 29
    assert sum("w1 (dead)" in line and "100/s" in line and line.split()[-2:] == ["40", "3"] for line in lines) == 6
    assert "backlog    480" in text
    assert "11.0 s  w1 is killed" in text
    assert "4242  killed" in text
    assert "http://127.0.0.1:9109/metrics" in text


def test_the_view_fits_a_small_terminal() -> None:
    lines = rendered(board(), 80, 24)
    assert len(lines) <= 23
    assert all(len(line) <= 80 for line in lines)
    assert any("w1 is killed" in line for line in lines)


def test_the_board_tells_who_took_over() -> None:
    shown = board()
    shown.killed(observed(killed_s=20, shards=(1, 2)))
    shown.see_handlings(25.5, [handling(1, 19, shard=1, worker="w2"), handling(2, 25, shard=1, worker="w2")])
    assert [event.text for event in shown.events[1:]] == ["w2 took over shard 1 after 5.0 s"]
    shown.see_handlings(26.5, [handling(3, 26, shard=2, worker="w2"), handling(4, 26.1, shard=2, worker="w2")])
    assert shown.events[-1].text == "all 2 shards of w1 are served again after 6.0 s"
    assert len(shown.events) == 3
    assert shown.workers["w2"].handled == 4
