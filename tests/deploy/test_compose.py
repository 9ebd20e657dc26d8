"""compose.yaml is what the Compose Specification allows, its Prometheus' configuration what Prometheus does, and what
it names is there. No container is started; test_rollout.py runs its commands.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import compose_spec
import pytest

from tests.deploy.manifests import DEPLOY, compose, find, image, of_kind, pod_templates, rendered, scraped_port


def services() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = compose()["services"]
    return found


def ours() -> dict[str, dict[str, Any]]:
    return {name: each for name, each in services().items() if each["image"].startswith("shardq-orders")}


def test_it_follows_the_specification() -> None:
    compose_spec.PyCompose.from_json(json.dumps(compose())).validate()


def test_a_misspelt_field_would_be_seen() -> None:
    spoilt = compose() | {"services": services() | {"worker": services()["worker"] | {"comand": []}}}
    with pytest.raises(ValueError, match="comand"):
        compose_spec.PyCompose.from_json(json.dumps(spoilt)).validate()


def test_everything_is_there() -> None:
    assert len([name for name in services() if name.startswith("redis-")]) == 6
    assert services()["worker"]["deploy"]["replicas"] == 3
    assert {"load", "coordinator", "exporter", "prometheus", "grafana"} <= services().keys()


def test_what_a_service_needs_exists() -> None:
    for name, each in services().items():
        for needed in each.get("depends_on", []):
            assert needed in services(), (name, needed)
        for mounted in each.get("volumes", []):
            source = mounted.split(":")[0]
            if source.startswith("."):
                assert (DEPLOY / source).resolve().exists(), source
            else:
                assert source in compose()["volumes"]
        for port in each.get("ports", []):
            assert port.startswith("127.0.0.1:"), "reachable from this machine only"
        assert re.search(r":[\w.]+$", each["image"]), "an image has a version"
        assert not each["image"].endswith(":latest")


def test_our_containers_have_no_rights_to_spare() -> None:
    for name, each in ours().items():
        assert each["read_only"], name
        assert each["cap_drop"] == ["ALL"]
        assert each["security_opt"] == ["no-new-privileges:true"]


def test_what_compose_runs_is_what_kubernetes_runs() -> None:
    manifests = rendered("local")
    (config,) = [each for name, each in of_kind(manifests, "ConfigMap").items() if name.startswith("shardq-")]
    for name in ("worker", "coordinator", "exporter", "load"):
        template = pod_templates(manifests)[name]["spec"]
        (container,) = template["containers"]
        port = container["ports"][0]["containerPort"]
        assert port == scraped_port(name), name
        said = " ".join([*services()[name]["command"], services()[name]["environment"]["METRICS_PORT"]])
        assert str(port) in said
        if "stop_grace_period" in services()[name]:
            assert services()[name]["stop_grace_period"] == f"{template['terminationGracePeriodSeconds']}s"
        else:
            assert template["terminationGracePeriodSeconds"] <= 10, "compose's own default"
        for setting, value in config["data"].items():
            assert services()[name]["environment"][setting] == value
    load = pod_templates(manifests)["load"]["spec"]["containers"][0]
    assert load["command"] == services()["load"]["entrypoint"]
    assert load["command"][:2] == list(image().entrypoint[:2])


def test_prometheus_takes_its_configuration(tmp_path: Path) -> None:
    for mounted in services()["prometheus"]["volumes"]:
        source, target = mounted.split(":")[:2]
        if source.startswith("."):
            shutil.copyfile(DEPLOY / source, tmp_path / Path(target).name)
    promtool = find("promtool", "Debian's package prometheus")
    command = [promtool, "check", "config", str(tmp_path / "prometheus.yml")]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert said.returncode == 0, said.stdout + said.stderr
    assert "SUCCESS" in said.stdout


def test_grafana_finds_the_dashboards_where_its_provisioning_looks() -> None:
    mounts = dict(mounted.split(":")[:2] for mounted in services()["grafana"]["volumes"])
    provider = (DEPLOY / "../grafana/provisioning/dashboards/shardq.yml").read_text()
    assert f"path: {mounts['../grafana/dashboards']}" in provider
    assert mounts["../grafana/provisioning"] == "/etc/grafana/provisioning"
    assert "${PROMETHEUS_URL}" in (DEPLOY / "../grafana/provisioning/datasources/prometheus.yml").read_text()
    assert services()["grafana"]["environment"]["PROMETHEUS_URL"] == "http://prometheus:9090"
