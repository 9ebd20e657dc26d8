"""The three dashboards: all queues, one queue shard by shard, the workers. Every metric is one of docs/metrics.md."""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard

from grafana.source.panels import RATE, Query, lines, number, page, rows, states, variable

QUEUES = '{queue=~"$queue"}'
GROUPS = '{queue=~"$queue", group=~"$group"}'
QUEUE = '{queue="$queue"}'
GROUP = '{queue="$queue", group="$group"}'
BY_SHARD, BY_GROUP = "queue, shard", "queue, group, shard"


def once(expression: str, by: str) -> str:
    """One series for what several exporters say of the same thing: summed without, two of them would count double."""
    return f"max by ({by}) ({expression})"


def shard(metric: str, labels: str = QUEUES) -> str:
    """What the exporter says of each shard."""
    return once(f"{metric}{labels}", BY_SHARD)


def grouped(metric: str, labels: str = GROUPS) -> str:
    """What the exporter says of each shard's groups."""
    return once(f"{metric}{labels}", BY_GROUP)


def over_time(function: str, metric: str, labels: str) -> str:
    """`function` (rate, increase, changes) of what the exporter says of each shard, or of its groups."""
    return once(f"{function}({metric}{labels}[{RATE}])", BY_GROUP if "group" in labels else BY_SHARD)


def rate(metric: str, labels: str) -> str:
    return over_time("rate", metric, labels)


def own_rate(metric: str, labels: str) -> str:
    """Of what each worker process counts itself: nobody else counts it, too."""
    return f"rate({metric}{labels}[{RATE}])"


def overview() -> dashboard.Dashboard:
    """Every queue at a glance."""
    choices = [
        variable("queue", "Queue", "label_values(shardq_queue_up, queue)"),
        variable("group", "Group", 'label_values(shardq_members{queue=~"$queue"}, group)'),
    ]
    owned = grouped("shardq_lease_owned")
    return (
        page("shardq-overview", "shardq: overview", "All queues: what comes in, what is done, what waits.", choices)
        .with_panel(
            number(
                "Stored", "Messages stored a second.", Query(f"sum({rate('shardq_messages_appended_total', QUEUES)})")
            )
        )
        .with_panel(
            number(
                "Handled", "Messages finished a second.", Query(f"sum({rate('shardq_messages_acked_total', GROUPS)})")
            )
        )
        .with_panel(
            number("Backlog", "Messages stored and not finished.", Query(f"sum({grouped('shardq_backlog_messages')})"))
        )
        .with_panel(number("Dead letters", "Kept now.", Query(f"sum({grouped('shardq_dead_letters')})"), bad_above=1))
        .with_panel(
            number(
                "Shards without owner",
                "Leases that nobody holds.",
                Query(f"sum(1 - {owned})"),
                bad_above=1,
            )
        )
        .with_panel(
            number(
                "Can't be read",
                "Queues that the exporter could not read.",
                Query(f"sum(1 - {once('shardq_queue_up', 'queue')})"),
                bad_above=1,
            )
        )
        .with_row(dashboard.Row("Traffic"))
        .with_panel(
            lines(
                "Stored by queue",
                "Messages a second.",
                Query(f"sum by (queue) ({rate('shardq_messages_appended_total', QUEUES)})", "{{queue}}"),
                unit="cps",
            )
        )
        .with_panel(
            lines(
                "Handled by group",
                "Messages a second.",
                Query(
                    f"sum by (queue, group) ({rate('shardq_messages_acked_total', GROUPS)})", "{{queue}} / {{group}}"
                ),
                unit="cps",
            )
        )
        .with_panel(
            lines(
                "Bytes stored by queue",
                "Record batches, as they lie in Redis.",
                Query(f"sum by (queue) ({rate('shardq_appended_bytes_total', QUEUES)})", "{{queue}}"),
                unit="Bps",
            )
        )
        .with_panel(
            lines(
                "Failed and dead",
                "Handlings that failed and are repeated, and messages given up, a second.",
                Query(
                    f"sum by (queue, group) ({rate('shardq_messages_retried_total', GROUPS)})",
                    "retried {{queue}} / {{group}}",
                ),
                Query(
                    f"sum by (queue, group) ({rate('shardq_messages_dead_total', GROUPS)})",
                    "dead {{queue}} / {{group}}",
                ),
                unit="cps",
            )
        )
        .with_row(dashboard.Row("What waits"))
        .with_panel(
            lines(
                "Backlog by group",
                "Messages stored and not finished.",
                Query(f"sum by (queue, group) ({grouped('shardq_backlog_messages')})", "{{queue}} / {{group}}"),
            )
        )
        .with_panel(
            lines(
                "PEL by group",
                "Messages delivered and not finished.",
                Query(f"sum by (queue, group) ({grouped('shardq_pel_messages')})", "{{queue}} / {{group}}"),
            )
        )
        .with_panel(
            lines(
                "Oldest unread",
                "Age of the oldest entry that no worker has got.",
                Query(f"max by (queue, group) (shardq_oldest_unread_age_seconds{GROUPS})", "{{queue}} / {{group}}"),
                unit="s",
            )
        )
        .with_panel(
            lines(
                "Oldest pending",
                "Age of the oldest entry that a worker has and has not finished.",
                Query(f"max by (queue, group) (shardq_oldest_pending_age_seconds{GROUPS})", "{{queue}} / {{group}}"),
                unit="s",
            )
        )
        .with_panel(
            lines(
                "Delayed",
                "Messages that are not due yet.",
                Query(f"sum by (queue) ({shard('shardq_delayed_messages')})", "{{queue}}"),
            )
        )
        .with_panel(
            lines(
                "Waiting for a retry",
                "Messages whose next try is due later, and those of their key behind them.",
                Query(f"sum by (queue, group) ({grouped('shardq_waiting_messages')})", "{{queue}} / {{group}}"),
            )
        )
        .with_row(dashboard.Row("Groups"))
        .with_panel(
            lines(
                "Members",
                "Workers and coordinators.",
                Query(once(f"shardq_members{GROUPS}", "queue, group"), "{{queue}} / {{group}}"),
            )
        )
        .with_panel(
            lines(
                "Rebalances",
                "Plans made.",
                Query(
                    once(f"increase(shardq_rebalances_total{GROUPS}[{RATE}])", "queue, group"), "{{queue}} / {{group}}"
                ),
            )
        )
        .with_row(dashboard.Row("Exporter"))
        .with_panel(
            lines(
                "Reading",
                "Seconds that a reading of all counters takes.",
                Query("shardq_exporter_read_seconds", "{{instance}}"),
                unit="s",
            )
        )
        .with_panel(
            lines(
                "Not read",
                "Queues and shards that could not be read.",
                Query(f"increase(shardq_exporter_errors_total[{RATE}])", "{{instance}}"),
            )
        )
    )


def queue() -> dashboard.Dashboard:
    """One queue, one group, shard by shard."""
    choices = [
        variable("queue", "Queue", "label_values(shardq_queue_up, queue)", several=False),
        variable("group", "Group", 'label_values(shardq_members{queue="$queue"}, group)', several=False),
    ]
    by_shard = "{{shard}}"
    return (
        page("shardq-queue", "shardq: one queue", "One queue and group, shard by shard.", choices)
        .with_panel(
            number("Stored", "Messages a second.", Query(f"sum({rate('shardq_messages_appended_total', QUEUE)})"))
        )
        .with_panel(
            number("Handled", "Messages a second.", Query(f"sum({rate('shardq_messages_acked_total', GROUP)})"))
        )
        .with_panel(
            number("Backlog", "Messages not finished.", Query(f"sum({grouped('shardq_backlog_messages', GROUP)})"))
        )
        .with_panel(
            number(
                "PEL", "Messages delivered and not finished.", Query(f"sum({grouped('shardq_pel_messages', GROUP)})")
            )
        )
        .with_panel(
            number("Dead letters", "Kept now.", Query(f"sum({grouped('shardq_dead_letters', GROUP)})"), bad_above=1)
        )
        .with_panel(
            number(
                "Shards without owner",
                "Leases nobody holds.",
                Query(f"sum(1 - {grouped('shardq_lease_owned', GROUP)})"),
                bad_above=1,
            )
        )
        .with_row(dashboard.Row("Throughput per shard"))
        .with_panel(
            rows(
                "Stored",
                "A row for each shard, messages a second. One row much brighter than the others is a hot shard.",
                Query(f"sum by (shard) ({rate('shardq_messages_appended_total', QUEUE)})", by_shard),
                unit="cps",
            )
        )
        .with_panel(
            rows(
                "Handled",
                "A row for each shard, messages a second.",
                Query(f"sum by (shard) ({rate('shardq_messages_acked_total', GROUP)})", by_shard),
                unit="cps",
            )
        )
        .with_panel(
            lines(
                "Stored",
                "Messages a second.",
                Query(f"sum by (shard) ({rate('shardq_messages_appended_total', QUEUE)})", by_shard),
                unit="cps",
            )
        )
        .with_panel(
            lines(
                "Handled",
                "Messages a second.",
                Query(f"sum by (shard) ({rate('shardq_messages_acked_total', GROUP)})", by_shard),
                unit="cps",
            )
        )
        .with_row(dashboard.Row("PEL and backlog per shard"))
        .with_panel(
            rows(
                "PEL depth",
                "Messages delivered and not finished.",
                Query(grouped("shardq_pel_messages", GROUP), by_shard),
            )
        )
        .with_panel(
            rows("Backlog", "Messages not finished.", Query(grouped("shardq_backlog_messages", GROUP), by_shard))
        )
        .with_panel(
            lines(
                "PEL depth",
                "Messages delivered and not finished.",
                Query(grouped("shardq_pel_messages", GROUP), by_shard),
            )
        )
        .with_panel(
            lines("Backlog", "Messages not finished.", Query(grouped("shardq_backlog_messages", GROUP), by_shard))
        )
        .with_panel(
            lines(
                "Oldest pending",
                "Age of the oldest entry delivered and not finished.",
                Query(grouped("shardq_oldest_pending_age_seconds", GROUP), by_shard),
                unit="s",
            )
        )
        .with_panel(
            lines(
                "Oldest unread",
                "Age of the oldest entry not delivered.",
                Query(grouped("shardq_oldest_unread_age_seconds", GROUP), by_shard),
                unit="s",
            )
        )
        .with_row(dashboard.Row("Owners"))
        .with_panel(
            states(
                "Owned",
                "Whether a worker holds the shard's lease.",
                Query(grouped("shardq_lease_owned", GROUP), by_shard),
            )
        )
        .with_panel(
            lines(
                "Changes of owner",
                "How often each shard changed hands.",
                Query(over_time("changes", "shardq_lease_epoch", GROUP), by_shard),
                stacked=True,
            )
        )
        .with_panel(
            lines(
                "Leases that stand still",
                "Seconds without a renewal: a dead worker's lease, or one that is about to be taken.",
                Query(grouped("shardq_lease_still_seconds", GROUP), by_shard),
                unit="s",
            )
        )
        .with_panel(
            lines(
                "Rebalances",
                "Plans made.",
                Query(once(f"increase(shardq_rebalances_total{GROUP}[{RATE}])", "queue, group"), "plans"),
            )
        )
        .with_row(dashboard.Row("Failures and memory"))
        .with_panel(
            lines(
                "Retried and dead",
                "Messages a second.",
                Query(f"sum({rate('shardq_messages_retried_total', GROUP)})", "retried"),
                Query(f"sum({rate('shardq_messages_dead_total', GROUP)})", "dead"),
                unit="cps",
            )
        )
        .with_panel(
            lines(
                "Stream entries", "Entries that lie in Redis.", Query(shard("shardq_stream_entries", QUEUE), by_shard)
            )
        )
    )


def workers() -> dashboard.Dashboard:
    """What the workers' own /metrics show."""
    choices = [
        variable("queue", "Queue", "label_values(shardq_worker_shards, queue)"),
        variable("group", "Group", 'label_values(shardq_worker_shards{queue=~"$queue"}, group)'),
    ]

    def quantile(share: float, metric: str, labels: str = GROUPS) -> str:
        return f"histogram_quantile({share}, sum by (le) ({own_rate(f'{metric}_bucket', labels)}))"

    return (
        page("shardq-workers", "shardq: workers", "What each worker process does, from its own /metrics.", choices)
        .with_panel(
            rows(
                "Handler seconds",
                "How long handlers took.",
                Query(f"sum by (le) ({own_rate('shardq_handler_seconds_bucket', GROUPS)})", "{{le}}"),
                buckets=True,
                unit="cps",
            )
        )
        .with_panel(
            lines(
                "Handler and end to end",
                "Half, and 99 of 100, are faster. End to end: from the send to the handler's return.",
                Query(quantile(0.5, "shardq_handler_seconds"), "handler p50"),
                Query(quantile(0.99, "shardq_handler_seconds"), "handler p99"),
                Query(quantile(0.5, "shardq_end_to_end_seconds"), "end to end p50"),
                Query(quantile(0.99, "shardq_end_to_end_seconds"), "end to end p99"),
                unit="s",
            )
        )
        .with_panel(
            lines(
                "Handlings",
                "Calls of handlers a second, by outcome.",
                Query(f"sum by (outcome) ({own_rate('shardq_handler_seconds_count', GROUPS)})", "{{outcome}}"),
                unit="cps",
            )
        )
        .with_panel(
            lines(
                "In flight",
                "Messages whose handler runs now.",
                Query(f"sum by (instance) (shardq_in_flight_messages{GROUPS})", "{{instance}}"),
                stacked=True,
            )
        )
        .with_panel(
            lines(
                "Shards by worker",
                "Who owns how many, over time.",
                Query(f"sum by (instance) (shardq_worker_shards{GROUPS})", "{{instance}}"),
                stacked=True,
            )
        )
        .with_panel(
            lines(
                "Fenced",
                "Leases that were taken from a worker: it was paused or cut off for longer than its lease.",
                Query(f"sum by (instance) (increase(shardq_fenced_commits_total{GROUPS}[{RATE}]))", "{{instance}}"),
            )
        )
        .with_row(dashboard.Row("Redis"))
        .with_panel(
            lines(
                "Steps",
                "A call that fetches and commits.",
                Query(quantile(0.5, "shardq_step_seconds"), "p50"),
                Query(quantile(0.99, "shardq_step_seconds"), "p99"),
                unit="s",
            )
        )
        .with_panel(
            lines(
                "Sends",
                "From a record batch's first message to its being stored.",
                Query(quantile(0.5, "shardq_send_seconds", QUEUES), "p50"),
                Query(quantile(0.99, "shardq_send_seconds", QUEUES), "p99"),
                unit="s",
            )
        )
        .with_panel(
            lines(
                "Calls sent again",
                "Redirects, time-outs and nodes that were away.",
                Query(f"sum by (action) ({own_rate('shardq_store_retries_total', '')})", "{{action}}"),
                unit="cps",
            )
        )
        .with_panel(
            lines(
                "Memory",
                "Resident bytes of each process.",
                Query("process_resident_memory_bytes and on (instance) shardq_worker_shards", "{{instance}}"),
                unit="bytes",
            )
        )
    )


PAGES = {"overview": overview, "queue": queue, "workers": workers}
