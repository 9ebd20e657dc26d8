"""Histories: what is written is read, also when the writer was killed in the middle of a line."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from tests.faults.history import Event, Handle, Journal, Lease, Process, Send, Strike, latest, parse, read_history
from tests.faults.lab import until

ONE_OF_EACH: list[Event] = [
    Send("invoke", 1, "producer-1", "key-1", 7, True),
    Send("ok", 2, "producer-1", "key-1", 7, True, "3/1-0/0"),
    Handle("start", 3, "worker-1", 3, 55, "3/1-0/0", "key-1", "producer-1", 7, 1),
    Handle("end", 4, "worker-1", 3, 55, "3/1-0/0", "key-1", "producer-1", 7, 1, "ok"),
    Lease("taken", 5, "worker-1", 3, 55),
    Process("killed", 6, "worker-1", "why"),
    Strike("strike", 7, 0, "worker-killed"),
]


def test_what_is_written_is_read_in_order_of_time(tmp_path: Path) -> None:
    journals = [Journal(tmp_path / f"p{index}.jsonl") for index in range(2)]
    for index, event in enumerate(ONE_OF_EACH):
        journals[index % 2].write(event)
    for journal in journals:
        journal.close()
    assert read_history(tmp_path) == ONE_OF_EACH


def test_a_torn_last_line_is_left_out_and_any_other_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    journal = Journal(path)
    for event in ONE_OF_EACH:
        journal.write(event)
    journal.close()
    whole = path.read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    for left in range(1, len(last)):
        assert parse(whole[:-left]) == ONE_OF_EACH[:-1]
    assert parse(b"") == []
    with pytest.raises(msgspec.DecodeError):
        parse(whole[: len(last) // 2] + b"\n" + whole)


def test_a_writer_that_is_killed_leaves_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    program = (
        "import sys; from pathlib import Path; from tests.faults.history import *\n"
        "journal = Journal(Path(sys.argv[1]))\n"
        "number = 0\n"
        "while True: number += 1; journal.write(Send('invoke', number, 'p', 'k' * 500, number))\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", program, str(path)], cwd=Path(__file__).parents[2])
    until(lambda: path.exists() and path.stat().st_size > 200_000, "lines")
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    events = parse(path.read_bytes())
    assert [event.at_ns for event in events] == list(range(1, len(events) + 1))
    assert latest(path, 5000) == events[-len(latest(path, 5000)) :]
    assert 5 < len(latest(path, 5000)) < 20
