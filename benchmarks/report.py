"""Writes the tables of README.md from results/*.json: `python benchmarks/report.py`; `--check` says whether they fit.

It measures nothing and types no figure: what is not in a result file is not in a table.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
BEGIN, END = "<!-- tables: written by report.py -->", "<!-- end of tables -->"

Result = dict[str, Any]


def load(folder: Path) -> list[Result]:
    """Every saved result, in the order of the tables."""
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    return sorted(results, key=lambda one: (one["bench"] != "produce", one["sizes"]["shards"], server_of(one)))


def server_of(result: Result) -> str:
    return str(result["versions"]["server"])


def tables(results: list[Result]) -> str:
    """One table for sending and one for handling, for each number of shards measured."""
    parts: list[str] = []
    for kind, title in (("produce", "Sending"), ("consume", "Handling")):
        of_kind = [one for one in results if one["bench"] == kind]
        for shards in sorted({one["sizes"]["shards"] for one in of_kind}):
            chosen = [one for one in of_kind if one["sizes"]["shards"] == shards]
            parts += [f"### {title}, {shards:,} shards", "", *rates_table(chosen), ""]
    return "\n".join([*parts, *circumstances(results)])


def rates_table(results: list[Result]) -> list[str]:
    """Rows are sides, columns are servers; `n x` is how many times shardq's rate is that side's."""
    names = [name for name in results[0]["rates"] if any(one["rates"].get(name) is not None for one in results)]
    lines = ["| messages/s | " + " | ".join(server_of(one) for one in results) + " |"]
    lines.append("| --- |" + " ---: |" * len(results))
    rates = [[name, *(cell(one, name) for one in results)] for name in names]
    cpus = [[f"CPU us a message, {name}", *(cpu_cell(one, name) for one in results)] for name in names]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rates + cpus)]


def cell(result: Result, name: str) -> str:
    rate, ratio = result["rates"].get(name), result["ratios"].get(name)
    if rate is None:
        return "-"
    low, high = min(result["rounds"][name]), max(result["rounds"][name])
    times = f" ({ratio:.2f}x)" if ratio is not None else ""
    return f"**{rate:,}**{times}, {low / 1000:,.0f}k-{high / 1000:,.0f}k"


def cpu_cell(result: Result, name: str) -> str:
    cpu = result["cpu_us_per_message"].get(name)
    return f"{cpu['client']:.2f} + {cpu['servers']:.2f}" if cpu else "-"


def circumstances(results: list[Result]) -> list[str]:
    """Where and with what this was measured, and what exactly each side ran."""
    machines = sorted({f"{one['machine']['cpus']} CPUs, {one['machine']['system']}" for one in results})
    loads = [one["machine"]["load"] for one in results]
    parts = ("python", "redis-py", "hiredis", "redis-benchmark")
    used = sorted({", ".join(f"{part} {one['versions'].get(part, '-')}" for part in parts) for one in results})
    commands = {f"{name}: {text}" for one in results for name, text in one["commands"].items()}
    return [
        "### Measured with",
        "",
        *(f"- {machine}; load average before the runs {min(loads):.1f} to {max(loads):.1f}" for machine in machines),
        *(f"- {text}" for text in used),
        *(f"- `{text}`" for text in sorted(commands)),
        "",
    ]


def main(arguments: list[str]) -> int:
    readme = HERE / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        print(f"{readme.name} has lost its lines '{BEGIN}' and '{END}'", file=sys.stderr)
        return 2
    fresh = f"{before}{BEGIN}\n\n{tables(load(HERE / 'results'))}\n{END}{after}"
    if "--check" in arguments:
        if fresh != text:
            print("the tables are not those of results/: run `python benchmarks/report.py`", file=sys.stderr)
        return int(fresh != text)
    readme.write_text(fresh, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
