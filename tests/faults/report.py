"""A run's report as text that a person understands: what struck, what flowed, the verdict, the evidence, how to repeat
it. Computes nothing.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator, Sequence

from shardq.ops.local_cluster import server_version
from tests.faults.driver import Report, Settings, ran_for_s
from tests.faults.faults import FAULTS
from tests.faults.schedule import Planned


def schedule_lines(schedule: Sequence[Planned]) -> Iterator[str]:
    """What strikes when."""
    for planned in schedule:
        yield f"{planned.at_s:7.1f} s  for {planned.length_s:4.1f} s  {planned.name:22} {FAULTS[planned.name].what}"


def command_of(settings: Settings) -> str:
    """The command that repeats a run."""
    words = ["python", "-m", "tests.faults", "--minutes", f"{settings.length_s / 60:g}", "--seed", str(settings.seed)]
    if settings.faults is not None:
        words += ["--faults", ",".join(settings.faults)]
    if settings.server is not None:
        words += ["--server", str(settings.server)]
    if settings.durability is not None:
        words += ["--durability", settings.durability]
    defaults = Settings(0, 0)
    for option, name in NUMBERS.items():
        if (value := getattr(settings, name)) != getattr(defaults, name):
            words += [option, f"{value:g}"]
    for option, name in SPANS.items():
        if (span := getattr(settings, name)) != getattr(defaults, name):
            words += [option, *(f"{length:g}" for length in span)]
    return shlex.join(words)


# Options of the command that are numbers of Settings.
NUMBERS = {
    "--masters": "masters",
    "--replicas": "replicas",
    "--shards": "shards",
    "--keys": "keys",
    "--producers": "producers",
    "--workers": "workers",
    "--coordinators": "coordinators",
    "--lease": "lease_s",
    "--handler": "handler_s",
    "--pause": "pause_s",
}

# And those that are two: at least and at most.
SPANS = {"--gap": "gap_s", "--lasts": "lasts_s"}


def report_lines(report: Report) -> Iterator[str]:
    verdict = report.verdict
    settings, counts = report.settings, verdict.counts
    struck = Counter(fault.name for fault in verdict.story.faults.values())
    cluster = f"{settings.masters} masters with {settings.replicas} replica(s) each"
    yield f"{server_version(settings.server or report.server)}, {cluster}"
    yield f"durability {report.durability}, {ran_for_s(report):.0f} s, seed {settings.seed}"
    yield "faults: " + (", ".join(f"{name} {times}" for name, times in sorted(struck.items())) or "none")
    for name, why in sorted(report.skipped.items()):
        yield f"left out: {name}: {why}"
    yield "messages: " + ", ".join(f"{number:,} {name}" for name, number in counts.items())
    state = report.state
    if state.resumed_s is not None and state.drained_s is not None:
        resumed, drained = f"{state.resumed_s:.1f} s", f"{state.drained_s:.1f} s"
        yield f"after the faults: sending again within {resumed}, all handled {drained} after the last send"
    yield ""
    yield from _table(report)
    yield ""
    if verdict.findings:
        yield f"{verdict.findings} findings; the histories and logs are in {report.folder}"
        yield f"repeat it: {command_of(settings)}"
    else:
        yield "nothing wrong was found"


def _table(report: Report) -> Iterator[str]:
    for check in report.verdict.checks:
        result = "ok" if not check.findings else f"{len(check.findings)} WRONG"
        looked = f"{check.looked_at:,} {check.unit}"
        yield f"{result:>9}  {check.name:10} {check.asks:62} {looked:>18}{'  ' if check.note else ''}{check.note}"
    for check in report.verdict.checks:
        if check.findings:
            yield ""
            yield f"{check.name}: {check.asks}. It is not so:"
            yield from (f"  {line}" for line in report.verdict.evidence(check))
