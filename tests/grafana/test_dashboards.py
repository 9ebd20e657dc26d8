"""The dashboards are what their source makes, and what Grafana's own types can hold: a field they don't know would be
lost when they are read and written again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from grafana.source.__main__ import render
from grafana.source.pages import PAGES

FOLDER = Path(__file__).parents[2] / "grafana/dashboards"


@pytest.mark.parametrize("name", sorted(PAGES))
def test_the_file_is_what_the_source_makes(name: str) -> None:
    assert (FOLDER / f"{name}.json").read_text() == render(name), "run: python -m grafana.source"


@pytest.mark.parametrize("name", sorted(PAGES))
def test_grafana_s_types_hold_all_of_it(name: str) -> None:
    register_default_plugins()
    raw = json.loads((FOLDER / f"{name}.json").read_text())
    read = json.loads(JSONEncoder().encode(Dashboard.from_json(raw)))
    assert not lost(raw, read)


def lost(raw: Any, read: Any, path: str = "") -> list[str]:
    """What is in `raw` and not, or otherwise, in `read`; defaults that were added are none of it."""
    if isinstance(raw, dict) and isinstance(read, dict):
        return [fault for name, value in raw.items() for fault in lost(value, read.get(name), f"{path}.{name}")]
    if isinstance(raw, list) and isinstance(read, list) and len(raw) == len(read):
        return [fault for index, value in enumerate(raw) for fault in lost(value, read[index], f"{path}[{index}]")]
    return [] if raw == read else [f"{path}: {raw!r} became {read!r}"]


def test_a_field_that_grafana_does_not_know_is_found() -> None:
    register_default_plugins()
    raw = json.loads((FOLDER / "overview.json").read_text())
    raw["panels"][0]["titel"] = "misspelt"
    raw["panels"][0]["targets"][0]["expression"] = "misspelt too"
    read = json.loads(JSONEncoder().encode(Dashboard.from_json(raw)))
    assert len(lost(raw, read)) == 2


@pytest.mark.parametrize("name", sorted(PAGES))
def test_panels_lie_side_by_side_and_say_what_they_show(name: str) -> None:
    page = json.loads((FOLDER / f"{name}.json").read_text())
    taken: dict[tuple[int, int], str] = {}
    for panel in page["panels"]:
        for cell in cells(panel["gridPos"]):
            assert cell not in taken, f"{panel['title']} lies on {taken[cell]}"
            taken[cell] = panel["title"]
        if panel["type"] != "row":
            assert panel["description"]
            assert panel["datasource"]["uid"] == "${datasource}"


def cells(place: dict[str, Any]) -> list[tuple[int, int]]:
    assert place["x"] >= 0
    assert place["x"] + place["w"] <= 24
    columns, lines = range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
    return [(column, line) for column in columns for line in lines]


def test_no_file_is_left_over() -> None:
    assert {path.stem for path in FOLDER.glob("*.json")} == set(PAGES)
