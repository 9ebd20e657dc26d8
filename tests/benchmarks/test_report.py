"""The report, from made-up results in a folder of its own: right tables, misses shown as misses, no figure invented.
And that the README's tables and charts are those of the results that are saved here."""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from msgspec import structs

from benchmarks import harness, report
from benchmarks.charts import bars, charts, same
from benchmarks.harness import Curve, Goal, Options, Result
from benchmarks.report import differences
from benchmarks.saved import apart, base_of, figure, load
from benchmarks.tables import document

MACHINE = {"cpus": 2, "cpu": "Made Up", "system": "Linux x86_64", "load": 0.25}
FRAME = f"# How fast\n\nBefore.\n\n{report.BEGIN}\n\nold\n\n{report.END}\n\nAfter.\n"

SENDING = Result(
    title="Sending",
    unit="messages/s",
    samples={"shardq": [1500.0, 1200.0, 1700.0], "redis-py": [60.0, 50.0, 70.0]},
    commands={"shardq": "send_many(pairs)", "redis-py": "pipeline() of XADD | 500"},
    goals=[
        Goal("times redis-py's rate", 25.0, ">=", 20.0, "redis-py"),
        Goal("CPU us a message", 0.60004, "<=", 0.6),
    ],
    curves=[Curve("Rate by shards", "shards", "messages/s", {"shardq": [(1, 900.0), (12, 1500.0), (1024, 800.0)]})],
    sizes={"messages": 1_000_000, "shards": 12},
    notes=["redis-py hashes no key."],
    figures={"CPU_us_a_message": {"shardq": {"client": 0.59, "servers": 0.5}, "redis-py": {"client": 15.27}}},
)

FLAT = replace(SENDING, curves=[])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands for benchmarks/."""
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(harness, "server_version", str)
    (tmp_path / "results").mkdir()
    (tmp_path / "README.md").write_text(FRAME)
    return tmp_path


def save(result: Result = SENDING, case: str = "produce", server: str = "Redis 7.0.15", scale: float = 1.0) -> Path:
    return harness.save(case, result, Options(server, rounds=3, scale=scale), MACHINE)


def written(folder: Path) -> str:
    assert report.report(folder, check=False) == 0
    return (folder / "README.md").read_text()


def tables(folder: Path) -> str:
    """Without drawing anything."""
    return document(load(folder / "results"), [])


def cells(text: str, start: str) -> list[str]:
    """Those of the row that starts so."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {start}")]
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_goals_say_what_was_missed_and_by_how_little(folder: Path) -> None:
    save()
    text = tables(folder)
    assert "2 goals: 1 reached, **1 missed**." in text
    assert cells(text, "times redis-py's rate")[1:] == ["at least 20", "25", "redis-py", "reached", "Redis 7.0.15"]
    (missed,) = [line for line in text.splitlines() if "at most 0.6" in line]
    assert missed == "| CPU us a message | at most 0.6 | 0.60004 |  | **missed** | Redis 7.0.15 |"


def test_a_goal_that_was_reached_stays_so_and_all_are_counted(folder: Path) -> None:
    save(replace(SENDING, goals=SENDING.goals[:1]))
    assert "1 goals: all reached." in tables(folder)


def test_medians_spreads_and_ratios(folder: Path) -> None:
    save()
    text = tables(folder)
    assert cells(text, "shardq | **") == ["shardq", "**1,500**", "1,200 - 1,700", "", "Redis 7.0.15"]
    assert cells(text, "redis-py | **") == ["redis-py", "**60**", "50 - 70", "25x", "Redis 7.0.15"]
    assert "3 rounds; messages 1,000,000, shards 12." in text
    assert "- redis-py hashes no key." in text
    assert "- produce, redis-py: `pipeline() of XADD | 500`" in text
    assert "2 CPUs (Made Up), Linux x86_64; load average before the cases 0.25 to 0.25" in text


def test_a_figure_that_was_not_measured_is_a_dash(folder: Path) -> None:
    save(replace(SENDING, samples={"shardq": [7.0], "redis-benchmark": []}))
    text = tables(folder)
    assert "| CPU us a message | client | servers |" in text
    assert "| redis-py | 15.3 | - |" in text
    assert not [line for line in text.splitlines() if line.startswith("| redis-benchmark")]
    assert "shardq / this" not in text


def test_every_figure_in_the_tables_comes_from_a_file(folder: Path) -> None:
    """Other samples, other tables: nothing in them is typed."""
    save()
    first = tables(folder)
    save(replace(SENDING, samples={name: [2 * one for one in ones] for name, ones in SENDING.samples.items()}))
    second = tables(folder)
    assert "**3,000**" in second
    assert "**1,500**" not in second
    assert first.replace("1,500", "").count("**") == second.replace("3,000", "").count("**")


def test_a_try_out_says_that_it_is_one(folder: Path) -> None:
    save(scale=0.02)
    text = tables(folder)
    assert cells(text, "times redis-py's rate")[-1] == "Redis 7.0.15 (a try-out at 0.02 of the size)"
    assert cells(text, "shardq | **")[-1] == "Redis 7.0.15 (a try-out at 0.02 of the size)"


def test_several_servers_stand_in_one_section(folder: Path) -> None:
    save()
    save(server="Valkey 9.1.2")
    text = written(folder)
    assert text.count("### Sending") == 1
    assert [line for line in text.splitlines() if line.startswith("| redis-py | **60**")] == [
        "| redis-py | **60** | 50 - 70 | 25x | Redis 7.0.15 |",
        "| redis-py | **60** | 50 - 70 | 25x | Valkey 9.1.2 |",
    ]
    assert sorted(path.name for path in (folder / "charts").iterdir()) == ["produce-rate-by-shards.svg", "produce.svg"]


def test_what_stands_around_the_tables_stays(folder: Path) -> None:
    save(FLAT)
    text = written(folder)
    assert text.startswith(f"# How fast\n\nBefore.\n\n{report.BEGIN}")
    assert text.endswith(f"{report.END}\n\nAfter.\n")
    assert written(folder) == text


def test_without_results_there_are_no_tables(folder: Path) -> None:
    assert "Nothing has been measured yet" in written(folder)
    assert report.report(folder, check=True) == 0


def test_how_long_it_took_is_said_when_it_was_measured(folder: Path) -> None:
    save()
    assert "minutes to measure" not in tables(folder)
    harness.save("produce", SENDING, Options("Redis 7.0.15", rounds=3), MACHINE, 90.0)
    assert "- all that stands above took 1.5 minutes to measure" in tables(folder)


def test_many_sides_with_curves_have_no_bars(folder: Path) -> None:
    save(replace(SENDING, samples={f"{number} tasks": [1.0] for number in range(9)}))
    written(folder)
    assert [path.name for path in (folder / "charts").iterdir()] == ["produce-rate-by-shards.svg"]


def test_charts_are_the_same_each_time_and_show_what_was_measured(folder: Path) -> None:
    save()
    results = load(folder / "results")
    drawn = list(charts(results))
    assert [(chart.name, chart.title) for chart in drawn] == [
        ("produce.svg", "Sending"),
        ("produce-rate-by-shards.svg", "Rate by shards"),
    ]
    assert drawn == list(charts(results))
    texts = [" ".join(ElementTree.fromstring(chart.svg).itertext()) for chart in drawn]
    assert all(word in texts[0] for word in ("shardq", "redis-py", "1,500", "60", "messages/s", "(logarithmic)"))
    assert all(word in texts[1] for word in ("shards", "messages/s", "1,024"))
    assert "(logarithmic)" not in bars([structs.replace(results[0], samples={"a": [2.0], "b": [3.0]})])


def test_check_notices_a_changed_figure(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(FLAT)
    text = written(folder)
    assert report.report(folder, check=True) == 0
    (folder / "README.md").write_text(text.replace("**1,500**", "**1,501**"))
    assert report.report(folder, check=True) == 1
    assert "README.md; run `python -m benchmarks.report`" in capsys.readouterr().err
    assert "**1,501**" in (folder / "README.md").read_text()


def test_check_notices_a_chart_that_is_not_of_the_results(folder: Path) -> None:
    save()
    text = written(folder)
    drawn = list(charts(load(folder / "results")))
    chart = folder / "charts" / "produce.svg"
    svg = chart.read_text()
    moved = re.sub(r"(?<=L )\d+", lambda found: str(int(found[0]) + 1), svg)
    for wrong in (svg.replace("1,500", "1,600"), moved, ""):
        assert wrong != svg
        chart.write_text(wrong)
        assert differences(folder, text, text, drawn) == ["charts/produce.svg"]
    chart.unlink()
    assert differences(folder, text, text, drawn) == ["charts/produce.svg"]
    chart.write_text(svg)
    assert differences(folder, text, text, drawn) == []


def test_a_chart_of_results_that_are_gone_goes_too(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = folder / "charts" / "old.svg"
    old.parent.mkdir()
    old.write_text("<svg/>")
    assert report.report(folder, check=True) == 1
    assert "charts/old.svg" in capsys.readouterr().err
    written(folder)
    assert not old.exists()


def test_a_changed_result_is_noticed(folder: Path) -> None:
    path = save(FLAT)
    written(folder)
    path.write_text(path.read_text().replace("1500.0", "1600.0"))
    assert report.report(folder, check=True) == 1


def test_the_last_digits_of_a_place_do_not_matter() -> None:
    assert same('<path id="m0123456789" d="M 1.250000 7.5"/>', '<path id="mabcdef0123" d="M 1.250400 7.5"/>')
    assert not same('<path d="M 1.25 7.5"/>', '<path d="M 1.35 7.5"/>')
    assert not same("<text>1,500</text>", "<text>1,501</text>")


@pytest.mark.parametrize("text", ["{", '{"bench": "produce", "rates": {}}', "[]"])
def test_a_file_that_is_no_result_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    (folder / "results" / "produce-x.json").write_text(text)
    assert report.report(folder, check=False) == 2
    assert re.fullmatch(r"error: produce-x\.json is no result .*: measure its case again\n", capsys.readouterr().err)
    assert (folder / "README.md").read_text() == FRAME


def test_a_readme_without_its_lines_is_left_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save()
    (folder / "README.md").write_text("# How fast\n")
    assert report.report(folder, check=False) == 2
    assert "has lost its lines" in capsys.readouterr().err
    assert (folder / "README.md").read_text() == "# How fast\n"


FRONT = f"# The project\n\n{report.FRONT_BEGIN}\nold\n{report.FRONT_END}\n\nAfter.\n"
SIDES = {"shardq": [900.0, 1000.0, 1100.0], "redis-benchmark": [500.0], "redis-py": [50.0]}
OF_SENDING = replace(FLAT, samples=SIDES, sizes={"shards": 12, "value_bytes": 100, "keys": 10_000})


def test_what_the_project_says_of_speed_is_what_was_measured(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    front = tmp_path / "FRONT.md"
    front.write_text(FRONT)
    save(OF_SENDING)
    assert report.report(folder, check=False, front=front) == 0
    text = " ".join(front.read_text().split())
    for said in ("on 2 cores", "Redis 7.0.15, 12 shards, 100-byte values, 10,000 keys", "sends 1,000 messages a second",
                 "2 times redis-benchmark", "20 times redis-py"):  # fmt: skip
        assert said in text, text
    assert text.startswith("# The project")
    assert text.endswith("After.")
    assert all(len(line) <= 120 for line in front.read_text().splitlines())
    assert report.report(folder, check=True, front=front) == 0
    front.write_text(front.read_text().replace("1,000 messages", "1,001 messages"))
    assert report.report(folder, check=True, front=front) == 1
    assert "FRONT.md; run `python -m benchmarks.report`" in capsys.readouterr().err
    front.write_text("no lines")
    assert report.report(folder, check=False, front=front) == 2
    assert front.read_text() == "no lines"


def test_a_try_out_or_a_missing_side_is_no_figure_of_the_project(folder: Path, tmp_path: Path) -> None:
    front = tmp_path / "FRONT.md"
    front.write_text(FRONT)
    save(OF_SENDING, scale=0.2)
    save(FLAT, server="Redis 8.2.3")
    assert report.report(folder, check=False, front=front) == 0
    assert "Nothing has been measured yet." in front.read_text()


def test_rounding_never_turns_a_miss_into_a_hit() -> None:
    assert apart(2.4996, 2.5) == "2.4996"
    assert apart(2.5, 2.5) == "2.5"
    assert apart(99.9996, 100) == "99.9996"
    assert apart(3.0, 2.5) == "3"
    assert [figure(value) for value in (0, 0.000123, 0.5678, 12.345, 123.4, 1234567.8)] == [
        "0",
        "1.23e-04",
        "0.568",
        "12.3",
        "123",
        "1,234,568",
    ]


def test_what_a_side_is_compared_with() -> None:
    sides = {"shardq": 1, "shardq-handler": 1, "redis-py": 1, "shardq, p99": 1, "redis-py, p99": 1, "peer, p50": 1}
    assert {name: base_of(name, sides) for name in sides} == {
        "shardq": None,
        "shardq-handler": "shardq",
        "redis-py": "shardq",
        "shardq, p99": None,
        "redis-py, p99": "shardq, p99",
        "peer, p50": None,
    }


def test_make_bench_measures_and_reports() -> None:
    command = ["make", "--no-print-directory", "-n", "bench", "ARGS=produce"]
    shown = subprocess.run(command, cwd=report.HERE.parent, capture_output=True, text=True, timeout=60, check=True)
    measures, reports = shown.stdout.splitlines()[-2:]
    assert measures.endswith("python -m benchmarks produce")
    assert reports.endswith("python -m benchmarks.report")


def test_the_readme_here_is_of_the_results_here() -> None:
    """`python -m benchmarks.report` was run after the last measurement; see there what differs."""
    assert report.report(report.HERE, check=True, front=report.FRONT) == 0
    results = load(report.HERE / "results")
    assert document(results, list(charts(results))) in (report.HERE / "README.md").read_text(encoding="utf-8")
