"""The charts of README.md as SVG: bars for what is compared, lines for what grows. Draws nothing but saved figures.

Equal results give equal files (no date, no chance), so that they can be checked. On white, which both of GitHub's
themes show as it is.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from benchmarks.saved import Saved, SavedCurve, by_case, figure

LOG_OVER = 20  # beyond this ratio the shortest bar of a linear axis can't be seen
MOST_BESIDE_CURVES = 8  # of more sides than these the curves say it better than bars
INK, GREY = "#24292f", "#d0d7de"
# Told apart also by those who see no red or green (Okabe and Ito).
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#7f7f7f", "#000000")
DASHES: tuple[Literal["-", "--", ":", "-."], ...] = ("-", "--", ":", "-.")
STYLE: Any = {  # matplotlib types the names of all its settings one by one
    "svg.hashsalt": "shardq",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.use_mathtext": False,
}


@dataclass(frozen=True, slots=True)
class Chart:
    """One SVG file; `title` is also the text for those who can't see it."""

    case: str
    name: str
    title: str
    svg: str


def charts(results: Sequence[Saved]) -> Iterator[Chart]:
    """For each case: bars when there are sides to compare, then a chart for each title of its curves."""
    for case, of_case in by_case(results).items():
        if any(1 < len(result.sides) <= (MOST_BESIDE_CURVES if result.curves else 1000) for result in of_case):
            yield Chart(case, f"{case}.svg", spoken(of_case[0].title), bars(of_case))
        for title in dict.fromkeys(curve.title for result in of_case for curve in result.curves):
            drawn = {one.server: curve for one in of_case for curve in one.curves if curve.title == title}
            name = slug(title).removeprefix(f"{slug(case)}-")
            yield Chart(case, f"{case}-{name}.svg", spoken(title), lines(drawn))


def slug(title: str) -> str:
    """A file name."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def spoken(title: str) -> str:
    """Without Markdown's marks for code."""
    return title.replace("`", "")


def bars(results: Sequence[Saved]) -> str:
    """The median of every side on every server, a thin line from the lowest round to the highest."""
    names = list(dict.fromkeys(name for result in results for name in result.sides))
    rows = [(result, name) for result in results for name in names if name in result.sides]
    labels = [name if len(results) == 1 else f"{name}, {result.server}" for result, name in rows]
    middles = [median(result.sides[name]) for result, name in rows]
    with rc_context(STYLE):
        image, axes = canvas(1.1 + 0.27 * len(rows))
        places = [-(at + 0.6 * results.index(result)) for at, (result, _) in enumerate(rows)]
        axes.barh(places, middles, height=0.72, color=[colours(names)[name] for _, name in rows])
        for place, middle, (result, name) in zip(places, middles, rows, strict=True):
            ones = result.sides[name]
            axes.plot([min(ones), max(ones)], [place, place], color=INK, linewidth=0.8)
            at = (max(ones), place)
            axes.annotate(figure(middle), at, (4, 0), textcoords="offset points", va="center")
        axes.set_yticks(places, labels)
        axes.tick_params(axis="y", length=0)
        scale_bars(axes, middles, [one for result, name in rows for one in result.sides[name]])
        axes.set_title(spoken(results[0].title), loc="left", fontsize=10)
        axes.set_xlabel(f"{results[0].unit}, median; the thin line: lowest to highest round{said_log(axes)}")
        return written(image)


def colours(names: Sequence[str]) -> dict[str, str]:
    """One for each name, shardq's first."""
    ordered = sorted(names, key=lambda name: not name.startswith("shardq"))
    return {name: COLOURS[at % len(COLOURS)] for at, name in enumerate(ordered)}


def scale_bars(axes: Axes, middles: Sequence[float], rounds: Sequence[float]) -> None:
    """Room for every round, and for the figure behind it."""
    lowest, highest = min(rounds), max(rounds)
    if lowest > 0 and max(middles) / min(middles) > LOG_OVER:
        axes.set_xscale("log")
        axes.set_xlim(10 ** math.floor(math.log10(lowest) - 0.3), highest * 3)
    else:
        axes.set_xlim(0, highest * 1.18 or 1)
    plain(axes.xaxis, log=axes.get_xscale() == "log")


def said_log(axes: Axes) -> str:
    return " (logarithmic)" if axes.get_xscale() == "log" else ""


def lines(curves: Mapping[str, SavedCurve]) -> str:
    """The same curve on each server: a colour for each line's name, a dash for each server."""
    first = next(iter(curves.values()))
    names = list(dict.fromkeys(name for curve in curves.values() for name in curve.lines))
    with rc_context(STYLE):
        image, axes = canvas(3.4)
        for dash, (server, curve) in enumerate(curves.items()):
            for name, points in curve.lines.items():
                label = name if len(curves) == 1 else f"{name}, {server}"
                (drawn,) = axes.plot(*zip(*points, strict=True), label=label, marker="o", markersize=3, linewidth=1.3)
                drawn.set_color(colours(names)[name])
                drawn.set_linestyle(DASHES[dash % len(DASHES)])
        scale_lines(axes, first)
        axes.set_title(spoken(first.title), loc="left", fontsize=10)
        axes.set_xlabel(first.x)
        axes.set_ylabel(first.y)
        if len(axes.get_lines()) > 1:
            axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        return written(image)


def scale_lines(axes: Axes, curve: SavedCurve) -> None:
    """Logarithmic where the case says so and no point forbids it; else from zero."""
    xs = [x for points in curve.lines.values() for x, _ in points]
    ys = [y for points in curve.lines.values() for _, y in points]
    log_x, log_y = curve.log_x and min(xs) > 0, curve.log_y and min(ys) > 0
    if log_x:
        axes.set_xscale("log")
        if len(set(xs)) <= 8:  # few enough to name each one that was measured
            axes.xaxis.set_major_locator(NullLocator())
            axes.set_xticks(sorted(set(xs)))
    if log_y:
        axes.set_yscale("log")
    else:
        axes.set_ylim(min(0, *ys), max(*ys, 0) * 1.06 or 1)
    plain(axes.xaxis, log=log_x and len(set(xs)) > 8)
    plain(axes.yaxis, log=log_y)
    if log_x:
        axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(axis="y", color=GREY, linewidth=0.5)


def plain(axis: Any, log: bool) -> None:
    """Ticks in plain figures; thousands and millions as k and M."""
    if log:
        axis.set_major_locator(LogLocator(10, numticks=20))
        axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))


def short(value: float) -> str:
    for size, least, letter in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e3, 1e4, "k")):
        if abs(value) >= least:
            return f"{value / size:.4g}{letter}"
    return f"{value:,.4g}"


def canvas(height: float) -> tuple[Figure, Axes]:
    """`height` in inches."""
    image = Figure(figsize=(8, height), layout="constrained", facecolor="white")
    return image, image.subplots()


def written(image: Figure) -> str:
    out = io.StringIO()
    image.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return re.sub(r"[ \t]+$", "", out.getvalue(), flags=re.MULTILINE)


def same(one: str, other: str) -> bool:
    """Whether two charts show the same: numbers may differ in the last digits, as they do between processors, and with
    them the names that matplotlib makes of numbers."""
    ours, theirs = _pieces(one), _pieces(other)
    if len(ours) != len(theirs):
        return False
    return all(a == b or _close(a, b) for a, b in zip(ours, theirs, strict=True))


def _pieces(svg: str) -> list[str]:
    return re.split(r"(-?\d+\.\d+)", re.sub(r"\b[mpCh][0-9a-f]{10}\b", "", svg))


def _close(one: str, other: str) -> bool:
    numbers = all(re.fullmatch(r"-?\d+\.\d+", text) for text in (one, other))
    return numbers and abs(float(one) - float(other)) <= 0.001
