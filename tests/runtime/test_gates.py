"""How long a worker waits between looks at a shut gate, and what it says meanwhile."""

from __future__ import annotations

import logging

import pytest

from shardq.runtime import gates
from shardq.runtime.gates import Gates, pause_s


@pytest.mark.parametrize(
    ("waited_s", "hears", "expected_s"),
    [(0, True, 0.1), (0.1, False, 0.1), (1, True, 0.25), (5, True, 0.5), (60, False, 0.5), (31, True, 2.0)],
)
def test_looks_come_less_often(waited_s: float, hears: bool, expected_s: float) -> None:
    assert pause_s(waited_s, hears=hears) == expected_s


def test_a_short_wait_is_not_worth_a_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "shardq")
    waiting = Gates("q/g")
    waiting.waits(4, 0, 10)
    waiting.waits(5, None, 0)
    waiting.passed(4)
    waiting.passed(5)
    assert caplog.text == ""


def test_a_long_wait_is_said_once_in_a_while_and_its_end(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "shardq")
    clock = [0.0]
    monkeypatch.setattr(gates, "monotonic", lambda: clock[0])
    waiting = Gates("q/g")
    for clock[0] in (100.0, 104.0, 106.0, 150.0, 167.0):
        for shard in range(10, 20):
            waiting.waits(shard, shard % 2, 7)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2, "at 106 and 167 s"
    assert said[0] == (
        "q/g: shards 10, 11, 12, 13, 14, 15, 16, 17, ... wait until the group has finished "
        "7 messages on shard 0, 7 messages on shard 1: see `shardq queue show`"
    )
    for shard in range(10, 20):
        assert len(caplog.records) == 2
        waiting.passed(shard)
    assert caplog.records[2].getMessage() == "q/g: no shard waits for an older one any more"
