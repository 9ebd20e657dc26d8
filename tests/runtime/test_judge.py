"""The judge itself: it must see each kind of planted fault, and nothing where there is none."""

from __future__ import annotations

from tests.runtime.judge import Fact, Verdict, judge

SENT = {"a": ["a1", "a2", "a3"], "b": ["b1"]}


def facts(*rows: tuple[str, str, str, int, int]) -> list[Fact]:
    """(process, id, key, start, end) with the fence 1; an end of 0 means that the handler never ended."""
    found = []
    for process, id_, key, start, end in rows:
        found.append(Fact(process, "start", id_, key, None, start, 1))
        if end:
            found.append(Fact(process, "end", id_, key, None, end, 1))
    return sorted(found, key=lambda fact: fact.at_ns)


GOOD = (("p", "a1", "a", 1, 2), ("p", "b1", "b", 1, 9), ("p", "a2", "a", 3, 4), ("p", "a3", "a", 5, 6))


def test_a_clean_run_has_no_faults() -> None:
    assert judge(SENT, facts(*GOOD)) == Verdict(set(), set(), [], [], [], 4)


def test_planted_faults_are_seen() -> None:
    assert judge(SENT, facts(*GOOD[:-1])).lost == {"a3"}
    assert judge(SENT, facts(*GOOD[:-1], ("p", "a3", "a", 5, 0))).lost == {"a3"}
    assert judge(SENT, facts(*GOOD, ("q", "a3", "a", 7, 8))).repeated == {"a3"}
    swapped = (GOOD[0], GOOD[1], ("p", "a3", "a", 3, 4), ("p", "a2", "a", 5, 6))
    assert judge(SENT, facts(*swapped)).disorder == [("a2", "a3")]
    assert judge(SENT, facts(*GOOD[:-1], ("q", "a3", "a", 3, 6))).overlaps == [("a2", "a3")]


def test_a_start_under_an_older_lease_is_stale() -> None:
    later = Fact("q", "start", "a1", "a", None, 1, 2)
    older = Fact("p", "start", "a2", "a", None, 2, 1)
    assert judge(SENT, [later, older]).stale == ["a2"]


def test_a_handler_that_slept_through_a_pause_is_no_overlap() -> None:
    crossing = facts(("p", "a1", "a", 1, 100), ("q", "a1", "a", 20, 30))
    assert judge(SENT, crossing).overlaps == [("a1", "a1")]
    assert judge(SENT, crossing, {"p": (10, 90)}).overlaps == []
