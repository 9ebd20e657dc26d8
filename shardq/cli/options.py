"""Options that several commands share, so that they are spelled and explained alike everywhere. Never runs anything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

DEFAULT_URL = "redis://127.0.0.1:7000"

Command = TypeVar("Command", bound=Callable[..., Any])


def url_option(command: Command) -> Command:
    """`--url` or SHARDQ_URL, passed to the command as `url`."""
    return click.option(
        "--url",
        envvar="SHARDQ_URL",
        default=DEFAULT_URL,
        show_default=True,
        show_envvar=True,
        metavar="URL",
        help="Any node of the cluster; rediss:// for TLS.",
    )(command)


def over_option(what: str) -> Callable[[Command], Command]:
    """`--over`, passed to the command as `over_s`: the time between the two looks that `what` is measured over."""
    text = f"Measure {what} over this time; 0 leaves {'them' if what.endswith('s') else 'it'} out."
    kind = click.FloatRange(0, 3600)
    return click.option("--over", "over_s", type=kind, default=1.0, show_default=True, metavar="SECONDS", help=text)


def json_option(command: Command) -> Command:
    """`--json`, passed to the command as `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON for programs instead of text for people.")(
        command
    )


def metrics_options(command: Command) -> Command:
    """`--metrics-port` and `--metrics-host`, passed to the command as such; the port is None where it is not given."""
    host = click.option(
        "--metrics-host", default="127.0.0.1", show_default=True, metavar="ADDRESS", help="Where to listen for them."
    )
    port = click.option(
        "--metrics-port",
        type=click.IntRange(0, 65535),
        metavar="PORT",
        help="Serve /metrics, /livez and /readyz there; with several processes PORT, PORT+1, ...; 0 takes a free one.",
    )
    return port(host(command))


def log_level_option(command: Command) -> Command:
    """`--log-level`, passed to the command as `log_level`."""
    return click.option(
        "--log-level",
        type=click.Choice(["debug", "info", "warning", "error"]),
        default="info",
        show_default=True,
        help="How much is told on stderr.",
    )(command)
