"""`shardq acl`: prints the rules of a Redis user for one role. Connects to nothing and changes nothing."""

from __future__ import annotations

import os
import sys

import click

from shardq.cli.options import json_option
from shardq.cli.output import print_json
from shardq.core.acl import check_user, user_rules
from shardq.errors import UsageError
from shardq.storage.acl import ROLES, Wanted, grants


@click.command(epilog="Example: shardq acl worker --queue orders --group billing --user billing >> users.acl")
@click.argument("role", type=click.Choice(ROLES))
@click.option("--queue", "queues", multiple=True, metavar="QUEUE", help="What it works on; may be given several times.")
@click.option("--prefix", default="shardq", show_default=True, metavar="PREFIX", help="What all keys begin with.")
@click.option("--group", metavar="GROUP", help="For a worker or coordinator: this group only.")
@click.option("--user", metavar="NAME", help="The user's name; shardq-ROLE otherwise.")
@click.option("--bounded", is_flag=True, help="For a producer: a queue has max_backlog. It may read the stream then.")
@click.option("--fsync", is_flag=True, help='For durability="fsync" (Redis 7.2 and newer, Valkey).')
@click.option("--sends-to", multiple=True, metavar="QUEUE", help="For a worker: its handlers send there (tx.send).")
@click.option("--effects", multiple=True, metavar="GLOB", help="For a worker: its handlers write these keys too.")
@click.option("--reshards", is_flag=True, help="For a worker or coordinator: carries on reshards, removes old shards.")
@click.option("--broadcast", is_flag=True, help="May broadcast, and listen to channels by name.")
@click.option("--listen", multiple=True, metavar="PATTERN", help="May listen to this pattern of channels.")
@click.option("--password-env", metavar="VARIABLE", help="Put in the password that stands in this variable, hashed.")
@click.option("--password-stdin", is_flag=True, help="Put in the password that stands on standard input, hashed.")
@json_option
def acl(
    role: str,
    prefix: str,
    user: str | None,
    password_env: str | None,
    password_stdin: bool,
    as_json: bool,
    **wanted: object,
) -> None:
    """Print the least rights that a Redis user in ROLE needs.

    One line, for an aclfile; with ACL SETUSER in the place of `user` it is a command. Users are each node's own: give
    it to all of them. Without a password nobody can log in until one is set.
    """
    name = check_user(user or f"shardq-{role}")
    rules = user_rules(grants(Wanted(role, prefix=prefix, **wanted)), _password(password_env, password_stdin))  # type: ignore[arg-type]  # click's types
    if as_json:
        print_json([{"user": name, "role": role, "rules": rules}])
    else:
        click.echo(f"user {name} {' '.join(rules)}")


def _password(variable: str | None, from_stdin: bool) -> str | None:
    """Never from an argument: those stand in every list of processes."""
    if variable is not None and from_stdin:
        raise UsageError("--password-env and --password-stdin: choose one")
    if variable is not None:
        if not os.environ.get(variable):
            raise UsageError(f"the environment variable {variable} is not set: it should hold the password")
        return os.environ[variable]
    if from_stdin:
        found = sys.stdin.readline().rstrip("\r\n")
        if not found:
            raise UsageError("standard input has no password: write it there, followed by a line break")
        return found
    return None
