"""Writes grafana/dashboards/*.json; a test holds them to their source."""

from __future__ import annotations

from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from grafana.source.pages import PAGES

FOLDER = Path(__file__).parents[1] / "dashboards"


def render(name: str) -> str:
    """One dashboard's JSON."""
    return JSONEncoder(sort_keys=True, indent=2).encode(PAGES[name]().build()) + "\n"


if __name__ == "__main__":
    for name in PAGES:
        (FOLDER / f"{name}.json").write_text(render(name), encoding="utf-8")
