"""Writes docs/metrics.md from the metrics themselves: `python -m shardq.ops.metrics_page > docs/metrics.md`. A test
holds the page to the code. Connects to nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client.core import Metric

from shardq.core.meters import Meters
from shardq.ops.own_metrics import MetersCollector
from shardq.ops.queue_metrics import Snapshot, families

_HEAD = """# Metrics

Every metric shardq has. This page is written by `python -m shardq.ops.metrics_page`; the descriptions are the `# HELP`
lines that Prometheus is given.

Seconds and bytes are the only units. A counter's name ends in `_total`. Labels are `queue`, `shard`, `group` and few
fixed words: nothing that grows with the traffic, no keys, no message ids, no worker names.

## From the exporter

`shardq exporter --port 9400` reads the counters that lie in Redis beside the data, so any number of exporters show the
same totals and a restarted one has lost none. One that starts while Redis is away waits for it: `shardq_exporter_up` is
0, and `/readyz` says why. A wrong password or a server that is no cluster ends it with status 1.

One exporter is enough. Where several are scraped each says the same, so take the largest before you sum, as dashboards
and alerts in `grafana/` do: `sum by (queue, group) (max by (queue, group, shard) (shardq_backlog_messages))`.

{exporter}

`appended = acked + dead - replayed + backlog` holds for each shard and group at every instant.

## From a process of yours

`shardq work billing:worker --metrics-port 9401` (and `shardq coordinator ... --metrics-port`) serves what that process
counts itself, with `/livez` and `/readyz` for probes beside it. With `--processes 4` the ports are 9401 to 9404.
With that option it also waits for a Redis that is away when it starts; without it the command ends and says why.
A program of your own does it with two lines:

```python
import prometheus_client
import shardq

meters = shardq.Meters()
prometheus_client.REGISTRY.register(shardq.MetersCollector(meters))
client = shardq.connect("redis://127.0.0.1:7000", meters=meters)
```

{process}

Without `meters` no handler and no send is timed.
"""


def page() -> str:
    """The whole page."""
    return _HEAD.format(exporter=_table(families(Snapshot(), 0.0)), process=_table(MetersCollector(Meters()).collect()))


def _table(metrics: Iterable[Metric]) -> str:
    return "\n".join(["| metric | type | labels | what it is |", "| --- | --- | --- | --- |", *_rows(metrics)])


def _rows(metrics: Iterable[Metric]) -> Iterator[str]:
    for metric in sorted(metrics, key=lambda metric: metric.name):
        name = f"{metric.name}_total" if metric.type == "counter" else metric.name
        labels = ", ".join(f"`{label}`" for label in getattr(metric, "_labelnames", ()))
        yield f"| `{name}` | {metric.type} | {labels} | {metric.documentation} |"


if __name__ == "__main__":
    print(page(), end="")
