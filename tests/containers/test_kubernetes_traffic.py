"""The Kubernetes manifests: who may speak to whom, and by what numbers replicas come and go."""

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from containers.manifests import FOLDER, Manifest, built, chosen, documents, of_kind, pods
from e2e.test_metrics import selectors
from slipstream.runtime.metric_table import KINDS
from slipstream.types import Role

AUTOSCALED = {"prefill", "decode", "tokenizer", "frontend"}


# --- Who may speak to whom ------------------------------------------------------------------------


def lets(cluster: list[Manifest], way: str, pod: str, peer: str, port: int) -> bool:
    """Whether the policies let `pod` have traffic that way with `peer`, at this port of the end
    that listens."""
    listens = pods(cluster)[pod if way == "Ingress" else peer]["spec"]
    names = {
        each["containerPort"]: each["name"]
        for one in listens["containers"]
        for each in one.get("ports", [])
    }
    policies = [
        policy["spec"]
        for policy in of_kind(cluster, "NetworkPolicy").values()
        if way in policy["spec"]["policyTypes"]
        and pod in chosen(policy["spec"]["podSelector"], cluster)
    ]
    assert policies, "a pod without a policy may do anything"
    for spec in policies:
        for rule in spec.get(way.lower(), []):
            sides = rule.get("from" if way == "Ingress" else "to")
            known = sides is None or any(
                "podSelector" in side and peer in chosen(side["podSelector"], cluster)
                for side in sides
            )
            wanted = rule.get("ports")
            if known and (
                wanted is None
                or any(
                    p["port"] in (port, names.get(port)) and p["protocol"] == "TCP" for p in wanted
                )
            ):
                return True
    return False


def test_the_network_lets_through_what_is_needed(cluster: list[Manifest]) -> None:
    def reaches(sender: str, receiver: str, port: int) -> bool:
        return lets(cluster, "Egress", sender, receiver, port) and lets(
            cluster, "Ingress", receiver, sender, port
        )

    workers = {"prefill", "decode"}
    for sender in Role:
        assert reaches(sender, "redis", 6379) == (sender in (Role.KVINDEX, Role.FRONTEND))
        for receiver in Role:
            assert reaches(sender, receiver, 7000)
            assert reaches(sender, receiver, 40000) == ({sender, receiver} <= workers)
        assert not reaches("redis", sender, 7000)
        assert lets(cluster, "Ingress", sender, "redis", 8000) == (sender is Role.FRONTEND)
        assert lets(cluster, "Egress", sender, "redis", 53)


# --- Autoscaling ----------------------------------------------------------------------------------


def known_metrics() -> set[str]:
    """As pages show them: the workers' and the scheduler's on a frontend's, the others' on their
    own."""
    front = {Role.PREFILL: "worker_", Role.DECODE: "worker_", Role.SCHEDULER: "scheduler_"}
    return {
        f"slipstream_{front.get(Role(kind), '') if kind in set(Role) else ''}{key}"
        for kind, (plain, _) in KINDS.items()
        for key in plain
    }


def adapter_rules() -> list[Manifest]:
    file = FOLDER / "components" / "hpa" / "adapter-rules.yaml"
    rules: list[Manifest] = yaml.safe_load(file.read_text(encoding="utf-8"))["externalRules"]
    return rules


def adapted(rule: Manifest) -> str:
    """Its question, with the labels that prometheus-adapter puts in."""
    return str(rule["metricsQuery"].replace("<<.LabelMatchers>>", 'namespace="slipstream"'))


def scaled_objects() -> dict[str, Manifest]:
    folder = FOLDER / "components" / "keda"
    names = yaml.safe_load((folder / "kustomization.yaml").read_text(encoding="utf-8"))["resources"]
    found = [documents((folder / name).read_text(encoding="utf-8")) for name in names]
    return {one["metadata"]["name"]: one["spec"] for each in found for one in each}


def queries() -> list[str]:
    asked = [t["metadata"]["query"] for one in scaled_objects().values() for t in one["triggers"]]
    return asked + [adapted(rule) for rule in adapter_rules()]


def test_autoscaling_asks_for_metrics_that_exist() -> None:
    known = known_metrics()
    for query in queries():
        found = list(selectors(query))
        assert found, query
        for name, labels in found:
            assert name in known, f"{name} in {query}"
            assert "namespace" in labels, f"{name} in {query}: of another cluster, too"
            assert labels <= {"namespace", "role"}


def test_prometheus_understands_what_autoscaling_asks(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("no promtool here; it is in Debian's package prometheus")
    rules = [{"record": f"x:{i}", "expr": query} for i, query in enumerate(queries())]
    file = tmp_path / "asked.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "asked", "rules": rules}]}), "utf-8")
    told = subprocess.run([promtool, "check", "rules", file], capture_output=True, check=False)
    assert told.returncode == 0, told.stdout + told.stderr


def test_both_autoscalers_are_the_same(tree: Path) -> None:
    """Equal queries, thresholds, bounds and pace."""
    rules = {rule["name"]["as"]: rule for rule in adapter_rules()}
    hpas = of_kind(built(tree / "overlays" / "rest"), "HorizontalPodAutoscaler")
    asked = set()
    assert hpas.keys() == scaled_objects().keys() == AUTOSCALED
    for name, keda in scaled_objects().items():
        hpa = hpas[name]["spec"]
        assert keda["scaleTargetRef"]["name"] == hpa["scaleTargetRef"]["name"] == name
        assert (keda["minReplicaCount"], keda["maxReplicaCount"]) == (
            *(hpa["minReplicas"], hpa["maxReplicas"]),
        )
        assert keda["advanced"]["horizontalPodAutoscalerConfig"]["behavior"] == hpa["behavior"]
        assert len(keda["triggers"]) == len(hpa["metrics"])
        for trigger, metric in zip(keda["triggers"], hpa["metrics"], strict=True):
            rule = rules[metric["external"]["metric"]["name"]]
            asked.add(rule["name"]["as"])
            assert adapted(rule) == trigger["metadata"]["query"]
            assert rule["seriesQuery"].partition("{")[0] in adapted(rule)
            target = metric["external"]["target"]["averageValue"]
            value = int(target[:-1]) / 1000 if target.endswith("m") else float(target)
            assert value == float(trigger["metadata"]["threshold"])
    assert asked == set(rules)


def test_who_is_scaled_has_no_number_of_its_own(cluster: list[Manifest]) -> None:
    """Each `kubectl apply` would set it back. And streams need time to go."""
    for name, one in of_kind(cluster, "Deployment").items():
        assert ("replicas" in one["spec"]) == (
            name in {"scheduler", "redis"}
            or (name == "kvindex" and "ScaledObject" in {each["kind"] for each in cluster})
        )
    for spec in scaled_objects().values():
        down = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]["scaleDown"]
        assert down["stabilizationWindowSeconds"] >= 300
        assert all(
            p["type"] == "Pods" and p["value"] == 1 and p["periodSeconds"] >= 60
            for p in down["policies"]
        )
