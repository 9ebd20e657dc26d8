"""`python -m benchmarks.report`: writes the tables of README.md, the charts, and what the project's README says of
speed from results/*.json; `--check` says whether they fit. It measures nothing and types no figure: what is not in a
result file is not in a table.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.charts import Chart, charts, same
from benchmarks.saved import BadResult, load
from benchmarks.summary import summary
from benchmarks.tables import document

HERE = Path(__file__).parent
FRONT = HERE.parent / "README.md"
BEGIN, END = "<!-- tables: written by report.py -->", "<!-- end of tables -->"
FRONT_BEGIN, FRONT_END = "<!-- figures: written by benchmarks/report.py -->", "<!-- end of figures -->"


def filled(text: str, between: str) -> str | None:
    """The README with its tables replaced; None when it has lost the lines they stand between."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{between}\n\n{END}{after}" if begin and end else None


def front_filled(text: str, between: str) -> str | None:
    """The same for the project's README, which has no lines to spare."""
    before, begin, rest = text.partition(FRONT_BEGIN)
    _, end, after = rest.partition(FRONT_END)
    return f"{before}{FRONT_BEGIN}\n{between}\n{FRONT_END}{after}" if begin and end else None


def differences(folder: Path, text: str, fresh: str, drawn: Sequence[Chart]) -> list[str]:
    """What does not fit the results, by name."""
    wrong = ["README.md"] if text != fresh else []
    there = {path.name for path in (folder / "charts").glob("*.svg")}
    wrong += [f"charts/{name}" for name in sorted(there - {chart.name for chart in drawn})]
    for chart in drawn:
        path = folder / "charts" / chart.name
        if not path.exists() or not same(path.read_text(encoding="utf-8"), chart.svg):
            wrong.append(f"charts/{chart.name}")
    return wrong


def write(folder: Path, fresh: str, drawn: Sequence[Chart]) -> None:
    (folder / "charts").mkdir(exist_ok=True)
    for old in (folder / "charts").glob("*.svg"):
        old.unlink()
    for chart in drawn:
        (folder / "charts" / chart.name).write_text(chart.svg, encoding="utf-8")
    (folder / "README.md").write_text(fresh, encoding="utf-8")


def report(folder: Path, check: bool, front: Path | None = None) -> int:
    """Exit status: 1 when `check` found a difference, 2 when the report could not be made. `front` is the project's
    README, or None to leave it."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    try:
        results = load(folder / "results")
    except BadResult as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    drawn = list(charts(results))
    fresh = filled(text, document(results, drawn))
    if fresh is None:
        print(f"error: README.md has lost its lines '{BEGIN}' and '{END}': put them back", file=sys.stderr)
        return 2
    said = front.read_text(encoding="utf-8") if front is not None else ""
    to_say = front_filled(said, summary(results)) if front is not None else ""
    if to_say is None:
        print(f"error: {front} has lost its lines '{FRONT_BEGIN}' and '{FRONT_END}': put them back", file=sys.stderr)
        return 2
    if not check:
        write(folder, fresh, drawn)
        if front is not None:
            front.write_text(to_say, encoding="utf-8")
        return 0
    wrong = differences(folder, text, fresh, drawn)
    wrong += [str(front)] if said != to_say else []
    if wrong:
        print(f"not what results/ says: {', '.join(wrong)}; run `python -m benchmarks.report`", file=sys.stderr)
    return int(bool(wrong))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, say what would change")
    return report(HERE, parser.parse_args(arguments).check, FRONT)


if __name__ == "__main__":
    raise SystemExit(main())
