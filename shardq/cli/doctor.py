"""`shardq doctor`: what is wrong with a cluster and its queues, and what to do. Prints; the checks are ops/doctor/."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from textwrap import wrap

import click

from shardq.cli.options import json_option, url_option
from shardq.cli.output import print_json
from shardq.cli.progress import waiting
from shardq.core.findings import Finding, Level, is_fine
from shardq.ops.doctor.run import Wanted, examine
from shardq.ops.processes import run_async

_TITLES: dict[Level, str] = {
    "problem": "PROBLEMS",
    "warning": "WARNINGS",
    "unknown": "UNKNOWN",
    "advice": "ADVICE",
    "ok": "OK",
}
_NAMED = 4
_WIDTH = 120


@click.command(epilog="Example: shardq doctor --queue orders")
@click.option("--queue", metavar="QUEUE", help="Only this queue; the cluster all the same.")
@click.option(
    "--over",
    "over_s",
    type=click.FloatRange(0.5, 3600),
    default=3.0,
    show_default=True,
    metavar="SECONDS",
    help="Time between two looks, for rates and for leases that stand still.",
)
@click.option("--deep", is_flag=True, help="Look through the keys, too, for what deleted queues left.")
@url_option
@json_option
@click.pass_context
def doctor(context: click.Context, queue: str | None, over_s: float, deep: bool, url: str, as_json: bool) -> None:
    """Check the cluster and its queues, and say what to do. Changes nothing.

    Exit status 0: fine, or advice only; 1: warnings or problems, or no node answers. What this user may not ask is
    shown as unknown, with the right that is missing.
    """
    with waiting("looking"):
        findings = run_async(lambda: examine(url, Wanted(queue, over_s, deep)))
    if as_json:
        print_json(_object(finding) for finding in findings)
    else:
        _print(findings)
    context.exit(0 if is_fine(findings) else 1)


def _object(finding: Finding) -> dict[str, str]:
    return {name: getattr(finding, name) for name in Finding.__slots__}


def _print(findings: Sequence[Finding]) -> None:
    for level, of_level in groupby(findings, key=lambda finding: finding.level):
        click.secho(_TITLES[level], bold=True)
        for line in _fine(list(of_level)) if level == "ok" else _lines(of_level):
            click.echo(line)
        click.echo()
    counts = {level: sum(finding.level == level for finding in findings) for level in _TITLES}
    click.echo(", ".join(f"{count} {_counted(level, count)}" for level, count in counts.items()))


def _counted(level: Level, count: int) -> str:
    return f"{level}s" if level in ("problem", "warning") and count != 1 else level


def _lines(findings: Iterable[Finding]) -> Iterator[str]:
    """The same said of several subjects is said once."""
    for (name, what, do), same in groupby(findings, key=lambda each: (each.id, each.what, each.do)):
        subjects = [each.subject for each in same]
        shown = ", ".join(subjects[:_NAMED]) + (f" and {len(subjects) - _NAMED} more" if subjects[_NAMED:] else "")
        yield f"  {name}  {shown}"
        yield f"    {what}"
        if do:
            yield f"    -> {do}"


def _fine(findings: Sequence[Finding]) -> Iterator[str]:
    """What is as it should be, in a few lines: one for each number of nodes or queues it was asked of."""
    for subject in dict.fromkeys(finding.subject for finding in findings):
        said = "; ".join(finding.what for finding in findings if finding.subject == subject)
        yield from wrap(f"{subject}: {said}", _WIDTH, initial_indent="  ", subsequent_indent="    ")
