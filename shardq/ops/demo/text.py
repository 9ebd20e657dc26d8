"""The report as people read it. Judges nothing."""

from __future__ import annotations

from shardq.ops.demo.report import Report


def report_text(report: Report) -> str:
    """A short table and a verdict."""
    rows = [
        ("sent", f"{report.sent:,}", "flights"),
        ("handled", f"{report.handled:,}", f"{report.lost:,} lost"),
        ("out of order", f"{report.out_of_order:,}", "per tail number, over all workers"),
        ("duplicates", f"{report.duplicates:,}", _duplicates(report)),
        ("totals equal", "yes" if report.totals_match else "NO", f"{len(report.carriers)} carriers, against the file"),
        ("takeover", _seconds(report.takeover_seconds), _takeover(report)),
        ("messages/s", f"{report.messages_per_second:,.0f}", f"best second {report.peak_messages_per_second:,}"),
    ]
    head = f"{report.server}, {report.masters} masters, {report.shards} shards, {report.seconds:.1f} s"
    table = "\n".join(f"  {name:<14}{figure:>9}   {note}" for name, figure, note in rows)
    shares = "\n".join(
        f"  {worker:<14}{count:>9,}   {_fate(report, worker)}" for worker, count in report.workers.items()
    )
    return f"{head}\n\n{table}\n\n{shares}\n\n{verdict(report)}"


def verdict(report: Report) -> str:
    """One line: what held, or what did not."""
    if report.ok:
        return "OK: every flight was handled, in order for each tail number, and the totals equal the file's."
    faults = []
    if report.lost:
        faults.append(f"{report.lost:,} flights lost")
    if report.out_of_order:
        faults.append(f"{report.out_of_order:,} handled out of order")
    if not report.totals_match:
        faults.append("totals differ from the file's")
    return f"FAILED: {', '.join(faults)}."


def _seconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.1f} s"


def _duplicates(report: Report) -> str:
    if report.duplicates_not_by_the_kill:
        return f"{report.duplicates_not_by_the_kill:,} of them NOT explained by the kill"
    return "handled but not committed at the kill, so handled again" if report.duplicates else "none"


def _takeover(report: Report) -> str:
    if report.takeover_seconds is None:
        return "nothing was left to take over"
    last = _seconds(report.takeover_seconds_last_shard)
    return f"from SIGKILL to the first message of its {report.killed_shards} shards; the last: {last}"


def _fate(report: Report, worker: str) -> str:
    return "flights, then killed" if worker == report.killed_worker else "flights"
