"""The tables of README.md, as lines of Markdown, from saved results. Types no figure and leaves none out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks.charts import Chart
from benchmarks.saved import Saved, SavedGoal, apart, base_of, by_case, figure


def document(results: Sequence[Saved], charts: Sequence[Chart]) -> str:
    """All that stands between the markers. `charts` are those that were drawn of the results."""
    if not results:
        return "Nothing has been measured yet: `make bench`."
    parts = ["## Goals", "", *goals(results), "", "## Figures", ""]
    for case, of_case in by_case(results).items():
        parts += section(of_case, [chart for chart in charts if chart.case == case])
    text = "\n".join([*parts, "## Measured with", "", *circumstances(results)])
    return re.sub(r"\n{3,}", "\n\n", text)


# -- goals ---------------------------------------------------------------------------------------------------


def goals(results: Sequence[Saved]) -> list[str]:
    """One row for each goal and server; how many were missed stands above them."""
    rows = [(result, goal) for result in results for goal in result.goals]
    missed = sum(not goal.reached for _, goal in rows)
    verdict = "all reached" if not missed else f"{len(rows) - missed} reached, **{missed} missed**"
    head = ["| what | goal | measured | against | | server |", "| --- | ---: | ---: | --- | --- | --- |"]
    return [f"{len(rows)} goals: {verdict}.", "", *head, *(goal_row(*row) for row in rows)]


def goal_row(result: Saved, goal: SavedGoal) -> str:
    wanted = f"{'at least' if goal.sense == '>=' else 'at most'} {figure(goal.bound)}"
    verdict = "reached" if goal.reached else "**missed**"
    return row([goal.what, wanted, apart(goal.value, goal.bound), goal.against, verdict, result.server])


# -- one case ------------------------------------------------------------------------------------------------


def section(results: Sequence[Saved], charts: Sequence[Chart]) -> list[str]:
    """One case on every server that it was measured on."""
    lines = [f"### {results[0].title}", "", f"`python -m benchmarks {results[0].case}`. {sizes(results)}", ""]
    if any(result.sides for result in results):
        lines += [*medians(results), ""]
    for result in results:
        lines += figures(result, named=len(results) > 1)
    notes = list(dict.fromkeys(note for result in results for note in result.notes))
    lines += [*(f"- {note}" for note in notes), ""] if notes else []
    for chart in charts:
        lines += [f"![{chart.title}](charts/{chart.name})", ""]
    return lines


def sizes(results: Sequence[Saved]) -> str:
    """What was measured with which sizes, once for each set of them."""
    texts = dict.fromkeys(
        ", ".join(f"{label(name)} {cell(size)}" for name, size in one.sizes.items()) for one in results
    )
    rounds = sorted({result.rounds for result in results})
    counted = f"{' or '.join(map(str, rounds))} rounds" if rounds != [1] else "One round"
    return "; ".join([counted, *(text for text in texts if text)]) + "."


def medians(results: Sequence[Saved]) -> list[str]:
    """Rows are sides on a server. The ratio is shardq's median divided by that side's, on the same server."""
    compared = any(base_of(name, result.sides) for result in results for name in result.sides)
    head = [
        "",
        f"median, {results[0].unit}",
        "lowest to highest round",
        *(["shardq / this"] if compared else []),
        "server",
    ]
    lines = [row(head), row(["---", "---:", "---:", *(["---:"] if compared else []), "---"])]
    for result in results:
        lines += [row(cells) for cells in median_cells(result, compared)]
    return lines


def median_cells(result: Saved, compared: bool) -> list[list[str]]:
    rows = []
    for name, ones in result.sides.items():
        middle, base = median(ones), base_of(name, result.sides)
        ratio = f"{apart(median(result.sides[base]) / middle, 1)}x" if base and middle else ""
        spread = f"{figure(min(ones))} - {figure(max(ones))}" if len(ones) > 1 else ""
        rows.append([name, f"**{figure(middle)}**", spread, *([ratio] if compared else []), result.server])
    return rows


# -- what else was measured ----------------------------------------------------------------------------------


def figures(result: Saved, named: bool) -> list[str]:
    """A table for a mapping of mappings, and for mappings with the same names; a line for anything else. `named`: say
    which server it was."""
    server = f", {result.server}" if named else ""
    tables: dict[tuple[str, ...], dict[str, Mapping[str, Any]]] = {}
    plain: list[str] = []
    lines: list[str] = []
    for name, value in result.figures.items():
        if is_table(value):
            columns = tuple(dict.fromkeys(column for inner in value.values() for column in inner))
            lines += table(f"{label(name)}{server}", columns, value)
        elif isinstance(value, Mapping):
            tables.setdefault(tuple(value), {})[name] = value
        else:
            plain.append(f"- {label(name)}{server}: {cell(value)}")
    for columns, rows in tables.items():
        if len(rows) == 1:
            plain += [f"- {label(name)}{server}: {cell(value)}" for name, value in rows.items()]
            continue
        lines += table(server.removeprefix(", "), columns, rows)
    return [*plain, *lines, ""] if plain or lines else []


def is_table(value: object) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(one, Mapping) for one in value.values())


def table(corner: str, columns: Sequence[str], rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    head = [row([corner, *columns]), row(["---", *["---:"] * len(columns)])]
    return ["", *head, *(row([name, *(cell(ones.get(one)) for one in columns)]) for name, ones in rows.items())]


def cell(value: Any) -> str:
    """A saved value as text: numbers as everywhere, lists and mappings on one line, nothing for None."""
    if value is None:
        return "-"
    if isinstance(value, (bool, str)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return figure(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {cell(one)}" for name, one in value.items())
    return ", ".join(map(cell, value))


def label(name: str) -> str:
    return name.replace("_", " ")


def row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(text.replace("|", "\\|").replace("\n", " ") for text in cells) + " |"


# -- where and with what -------------------------------------------------------------------------------------


def circumstances(results: Sequence[Saved]) -> list[str]:
    """Every machine with what was measured on it, every set of versions, and what exactly each side ran."""
    lines = []
    for text, ones in grouped(results, machine):
        loads = [float(one.machine["load"]) for one in ones if "load" in one.machine]
        before = f"; load average before the cases {min(loads):g} to {max(loads):g}" if loads else ""
        lines.append(f"- {text}{before}{which(ones, results)}")
    lines += [f"- {text}{which(ones, results)}" for text, ones in grouped(results, versions)]
    times = [one.seconds for one in results if one.seconds is not None]
    if len(times) == len(results):
        lines.append(f"- all that stands above took {figure(sum(times) / 60)} minutes to measure")
    lines += ["", "What each side ran:", ""]
    commands = dict.fromkeys((one.case, name, text) for one in results for name, text in one.commands.items())
    return [*lines, *(f"- {case}, {name}: `{text}`" for case, name, text in commands)]


def machine(result: Saved) -> str:
    known = result.machine
    return f"{known.get('cpus', '?')} CPUs ({known.get('cpu') or 'unknown'}), {known.get('system', 'unknown')}"


def versions(result: Saved) -> str:
    return ", ".join(f"{name} {text}" for name, text in result.versions.items() if name != "server")


def grouped(results: Sequence[Saved], key: Any) -> list[tuple[str, list[Saved]]]:
    groups: dict[str, list[Saved]] = {}
    for result in results:
        groups.setdefault(key(result), []).append(result)
    return list(groups.items())


def which(ones: Sequence[Saved], results: Sequence[Saved]) -> str:
    """What was measured so, unless all was."""
    if len(ones) == len(results):
        return ""
    return ": " + ", ".join(f"{one.case} on {one.server}" for one in ones)
