"""Every overlay is what Kubernetes' own schemas allow, and keeps what deploy/README.md says: who may be stopped when,
for how long, with which rights, talking to whom. Asks no API server.
"""

from __future__ import annotations

import re
from itertools import chain
from typing import Any

import kubernetes_validate  # type: ignore[import-untyped]  # it ships no types
import pytest

from shardq.runtime.settings import WorkerSettings
from tests.deploy.manifests import (
    DEPLOY,
    OVERLAYS,
    Manifest,
    containers,
    image,
    instructions,
    of_kind,
    pod_templates,
    rendered,
)

KUBERNETES = ("1.30", "1.37")  # the oldest that has every field used here as stable or beta, and the newest known
CUSTOM = {"ScaledObject", "ServiceMonitor", "PodMonitor"}  # no schema of theirs can be had: see the tests below
OURS = ("worker", "coordinator", "exporter", "setup", "load")


def settings(overlay: tuple[Manifest, ...]) -> dict[str, str]:
    """The ConfigMap that our containers read."""
    (found,) = [each for name, each in of_kind(overlay, "ConfigMap").items() if name.startswith("shardq-")]
    data: dict[str, str] = found["data"]
    return data


@pytest.fixture(params=OVERLAYS)
def overlay(request: pytest.FixtureRequest) -> tuple[Manifest, ...]:
    return rendered(str(request.param))


def test_there_are_the_overlays_the_guide_names() -> None:
    assert OVERLAYS == ["elasticache", "local", "memorydb", "operator"]


@pytest.mark.parametrize("version", KUBERNETES)
def test_every_manifest_is_valid(overlay: tuple[Manifest, ...], version: str) -> None:
    for manifest in overlay:
        if manifest["kind"] not in CUSTOM:
            kubernetes_validate.validate(manifest, version, strict=True)


def test_a_misspelt_field_would_be_seen() -> None:
    (worker,) = [
        each for each in rendered("local") if each["metadata"]["name"] == "worker" and each["kind"] == "Deployment"
    ]
    spoilt = worker | {"spec": worker["spec"] | {"terminationGracePeriod": 45}}
    with pytest.raises(kubernetes_validate.ValidationError, match="terminationGracePeriod"):
        kubernetes_validate.validate(spoilt, KUBERNETES[-1], strict=True)


def test_a_worker_has_time_to_finish(overlay: tuple[Manifest, ...]) -> None:
    template, config = pod_templates(overlay)["worker"], settings(overlay)
    lease_s, drain_s = float(config["LEASE_S"]), float(config["DRAIN_S"])
    leader_lease_s = min(3.0, 0.6 * lease_s)
    assert template["spec"]["terminationGracePeriodSeconds"] > lease_s + drain_s + leader_lease_s
    assert "lifecycle" not in template["spec"]["containers"][0]


def test_the_settings_of_the_manifests_are_the_defaults_of_shardq() -> None:
    config = settings(rendered("operator"))
    assert float(config["LEASE_S"]) == WorkerSettings().lease_s
    assert float(config["DRAIN_S"]) == WorkerSettings().drain_limit_s


def test_no_roll_out_takes_a_worker_away_before_another_is_ready(overlay: tuple[Manifest, ...]) -> None:
    for name in ("worker", "coordinator"):
        spec = of_kind(overlay, "Deployment")[name]["spec"]
        assert spec["strategy"] == {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}
        assert spec["minReadySeconds"] >= WorkerSettings().lease_s
        budget = of_kind(overlay, "PodDisruptionBudget")[name]["spec"]
        assert budget["maxUnavailable"] == 1
        assert budget["selector"] == spec["selector"]
    exporter = of_kind(overlay, "Deployment")["exporter"]["spec"]
    assert exporter["replicas"] == 1
    assert exporter["strategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}, "two would be counted twice"
    assert of_kind(overlay, "Deployment")["coordinator"]["spec"]["replicas"] == 2


def test_every_selector_finds_its_pods(overlay: tuple[Manifest, ...]) -> None:
    labels = {name: template["metadata"]["labels"] for name, template in pod_templates(overlay).items()}
    for kind in ("Deployment", "StatefulSet"):
        for name, each in of_kind(overlay, kind).items():
            assert each["spec"]["selector"]["matchLabels"].items() <= labels[name].items()
            for spread in each["spec"]["template"]["spec"].get("topologySpreadConstraints", []):
                assert spread["labelSelector"]["matchLabels"].items() <= labels[name].items()
    for each in of_kind(overlay, "Service").values():
        assert [name for name in labels if each["spec"]["selector"].items() <= labels[name].items()] == [
            each["metadata"]["name"]
        ]


def test_the_workers_are_spread_over_zones_and_nodes(overlay: tuple[Manifest, ...]) -> None:
    found = pod_templates(overlay)["worker"]["spec"]["topologySpreadConstraints"]
    assert [each["topologyKey"] for each in found] == ["topology.kubernetes.io/zone", "kubernetes.io/hostname"]
    assert all(each["matchLabelKeys"] == ["pod-template-hash"] for each in found), "else a roll-out would be skewed"


def test_no_container_has_rights_it_does_not_need(overlay: tuple[Manifest, ...]) -> None:
    (namespace,) = of_kind(overlay, "Namespace").values()
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    for template in pod_templates(overlay).values():
        pod = template["spec"]["securityContext"]
        assert pod["runAsNonRoot"]
        assert pod["seccompProfile"] == {"type": "RuntimeDefault"}
        assert template["spec"]["automountServiceAccountToken"] is False
        for each in containers(template):
            assert each["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert {"cpu", "memory"} <= each["resources"]["requests"].keys()
            assert each["resources"]["limits"].keys() == {"memory"}, "a throttled worker loses its leases"


def test_the_pods_run_as_the_images_user(overlay: tuple[Manifest, ...]) -> None:
    for name in pod_templates(overlay).keys() & set(OURS):
        pod = pod_templates(overlay)[name]["spec"]["securityContext"]
        assert f"{pod['runAsUser']}:{pod['runAsGroup']}" == image().user


def test_every_image_has_a_version(overlay: tuple[Manifest, ...]) -> None:
    for template in pod_templates(overlay).values():
        for each in containers(template):
            tag = each["image"].rpartition("/")[2].partition(":")[2]
            assert tag not in ("", "latest"), each["image"]


def test_the_probes_ask_what_the_process_serves(overlay: tuple[Manifest, ...]) -> None:
    for name in ("worker", "coordinator", "exporter"):
        (each,) = pod_templates(overlay)[name]["spec"]["containers"]
        (port,) = each["ports"]
        assert each["livenessProbe"]["httpGet"] == {"path": "/livez", "port": port["name"]}
        assert each["startupProbe"]["httpGet"] == each["livenessProbe"]["httpGet"]
        assert each["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": port["name"]}
        assert str(port["containerPort"]) in " ".join(each["args"])
        assert "0.0.0.0" in " ".join(each["args"]), "a probe can't reach 127.0.0.1 of a pod"
        # /readyz answers in 9 s at the latest, /livez at once.
        assert each["readinessProbe"]["timeoutSeconds"] > 9


def test_every_name_that_is_read_is_there_or_told_of(overlay: tuple[Manifest, ...]) -> None:
    told = {"shardq-redis", "shardq-redis-admin", "shardq-redis-tls"}
    guide = (DEPLOY / "README.md").read_text()
    for template in pod_templates(overlay).values():
        for each in containers(template):
            for source in each.get("envFrom", []):
                assert source["configMapRef"]["name"] in of_kind(overlay, "ConfigMap")
            for item in each.get("env", []):
                wanted = item.get("valueFrom", {}).get("secretKeyRef", {}).get("name")
                assert wanted is None or wanted in of_kind(overlay, "Secret") or (wanted in told and wanted in guide)
            mounted = {mount["name"] for mount in each.get("volumeMounts", [])}
            assert mounted <= {volume["name"] for volume in template["spec"].get("volumes", [])}
        for volume in template["spec"].get("volumes", []):
            assert volume.get("secret", {}).get("secretName", "shardq-redis-tls") in told


def test_no_password_stands_in_a_manifest(overlay: tuple[Manifest, ...]) -> None:
    for template in pod_templates(overlay).values():
        for each in containers(template):
            words = chain(
                each.get("args", []), each.get("command", []), (e.get("value", "") for e in each.get("env", []))
            )
            assert not [word for word in words if re.search(r"rediss?://", word)]


# -- who may talk to whom ---------------------------------------------------------------------------------------------


def _selects(selector: Manifest, labels: dict[str, str]) -> bool:
    wanted = selector.get("matchLabels", {}).items() <= labels.items()
    return wanted and all(
        each["operator"] == "In" and labels.get(each["key"]) in each["values"]
        for each in selector.get("matchExpressions", [])
    )


def _rules(overlay: tuple[Manifest, ...], workload: str, way: str) -> list[dict[str, Any]]:
    labels = pod_templates(overlay)[workload]["metadata"]["labels"]
    policies = [each["spec"] for each in of_kind(overlay, "NetworkPolicy").values()]
    chosen = [spec for spec in policies if _selects(spec["podSelector"], labels)]
    assert any(way.capitalize() in spec["policyTypes"] for spec in chosen), f"{workload} is not closed"
    return [rule for spec in chosen for rule in spec.get(way, [])]


def test_our_pods_reach_redis_and_dns_and_nothing_else(overlay: tuple[Manifest, ...]) -> None:
    for workload in pod_templates(overlay).keys() & set(OURS):
        rules = _rules(overlay, workload, "egress")
        assert all(rule["to"] for rule in rules), "an overlay says where Redis is"
        ports = sorted((port["port"], port["protocol"]) for rule in rules for port in rule["ports"])
        assert ports == [(53, "TCP"), (53, "UDP"), (6379, "TCP")], "the bus port is the nodes' own"


def test_only_prometheus_reaches_our_pods(overlay: tuple[Manifest, ...]) -> None:
    for workload in ("worker", "coordinator", "exporter"):
        (rule,) = _rules(overlay, workload, "ingress")
        assert rule["ports"] == [{"protocol": "TCP", "port": "metrics"}]
        assert rule["from"] == [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}]
    assert _rules(overlay, "setup", "ingress") == []


# -- scaling and scraping: kinds whose schemas are their operators' own -----------------------------------------------


def _query(overlay: str) -> str:
    (scaled,) = of_kind(rendered(overlay), "ScaledObject").values()
    (trigger,) = scaled["spec"]["triggers"]  # of several the largest would count, not their sum
    query = trigger["metadata"]["query"]
    assert isinstance(query, str)
    return query


@pytest.mark.parametrize("name", ["elasticache", "operator"])
def test_keda_scales_on_the_whole_backlog(name: str) -> None:
    (scaled,) = of_kind(rendered(name), "ScaledObject").values()
    assert scaled["apiVersion"] == "keda.sh/v1alpha1"
    spec = scaled["spec"]
    # Fields of KEDA 2.10 and later, as its documentation has them; KEDA itself refuses others.
    known = {
        "scaleTargetRef",
        "minReplicaCount",
        "maxReplicaCount",
        "pollingInterval",
        "fallback",
        "advanced",
        "triggers",
    }
    assert spec.keys() <= known
    assert spec["scaleTargetRef"] == {"name": "worker"}
    (trigger,) = spec["triggers"]
    assert trigger["type"] == "prometheus"
    assert trigger["metadata"].keys() == {"serverAddress", "query", "threshold", "ignoreNullValues"}
    assert all(isinstance(value, str) for value in trigger["metadata"].values()), "KEDA's metadata are strings"
    assert "replicas" not in of_kind(rendered(name), "Deployment")["worker"]["spec"], (
        "each apply would undo the scaling"
    )


def test_both_ways_of_scaling_have_the_same_bounds() -> None:
    config = settings(rendered("operator"))
    (scaled,) = of_kind(rendered("operator"), "ScaledObject").values()
    (hpa,) = of_kind(rendered("memorydb"), "HorizontalPodAutoscaler").values()
    shards = int(config["SHARDS"])
    assert scaled["spec"]["maxReplicaCount"] == hpa["spec"]["maxReplicas"] == shards, "a worker more would own nothing"
    assert scaled["spec"]["minReplicaCount"] == hpa["spec"]["minReplicas"] == 2
    behaviour = scaled["spec"]["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    assert behaviour == hpa["spec"]["behavior"]
    assert behaviour["scaleDown"]["policies"] == [{"type": "Pods", "value": 1, "periodSeconds": 60}]
    (metric,) = hpa["spec"]["metrics"]
    assert metric["external"]["target"]["averageValue"] == scaled["spec"]["triggers"][0]["metadata"]["threshold"]
    assert "replicas" not in of_kind(rendered("memorydb"), "Deployment")["worker"]["spec"]
    labels = metric["external"]["metric"]["selector"]["matchLabels"]
    assert {"queue": config["QUEUE"], "group": config["GROUP"]} == labels
    assert all(f'{name}="{value}"' in _query("operator") for name, value in labels.items())


def test_prometheus_finds_every_process() -> None:
    overlay = rendered("operator")
    (service,) = of_kind(overlay, "ServiceMonitor").values()
    (pods,) = of_kind(overlay, "PodMonitor").values()
    assert {service["apiVersion"], pods["apiVersion"]} == {"monitoring.coreos.com/v1"}
    exporter = of_kind(overlay, "Service")["exporter"]
    assert _selects(service["spec"]["selector"], exporter["metadata"]["labels"])
    (endpoint,) = service["spec"]["endpoints"]
    assert endpoint["port"] in [port["name"] for port in exporter["spec"]["ports"]]
    for name in ("worker", "coordinator"):
        template = pod_templates(overlay)[name]
        assert _selects(pods["spec"]["selector"], template["metadata"]["labels"])
        (monitored,) = pods["spec"]["podMetricsEndpoints"]
        assert monitored["port"] in [port["name"] for port in template["spec"]["containers"][0]["ports"]]
    assert not _selects(pods["spec"]["selector"], pod_templates(overlay)["exporter"]["metadata"]["labels"])


def test_a_certificate_of_your_own_reaches_every_container() -> None:
    for name, template in pod_templates(rendered("operator")).items():
        for each in containers(template):
            assert each["volumeMounts"] == [{"name": "tls", "mountPath": "/tls", "readOnly": True}], name
        (volume,) = template["spec"]["volumes"]
        assert volume["secret"] == {"secretName": "shardq-redis-tls", "defaultMode": 0o440}
        assert template["spec"]["securityContext"]["fsGroup"] == template["spec"]["securityContext"]["runAsGroup"]


def test_the_reader_of_dockerfiles_joins_lines_and_leaves_comments_out() -> None:
    found = instructions("# said\nFROM a AS b\nRUN one \\\n && two\n  # inside\nUSER 1\n")
    assert found == [("FROM", "a AS b"), ("RUN", "one   && two"), ("USER", "1")]
