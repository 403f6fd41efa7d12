"""Reads and builds the Kubernetes manifests, and finds things in them."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from slipstream.types import Role

FOLDER = Path(__file__).parents[2] / "compose" / "kubernetes"
WORKLOADS = {"Deployment", "DaemonSet", "Job"}

Manifest = dict[str, Any]


def documents(text: str) -> list[Manifest]:
    return [each for each in yaml.safe_load_all(text) if each]


def built(folder: Path) -> list[Manifest]:
    kubectl, kustomize = shutil.which("kubectl"), shutil.which("kustomize")
    if not (kubectl or kustomize):
        pytest.skip("neither kubectl nor kustomize is here to build the overlays")
    words = [kustomize, "build"] if kustomize else [str(kubectl), "kustomize"]
    done = subprocess.run(
        [*words, str(folder)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "deprecated" not in done.stderr.lower(), done.stderr
    return documents(done.stdout)


def of_kind(cluster: list[Manifest], *kinds: str) -> dict[str, Manifest]:
    return {one["metadata"]["name"]: one for one in cluster if one["kind"] in kinds}


def pods(cluster: list[Manifest]) -> dict[str, Manifest]:
    """The pod templates, by workload."""
    found = of_kind(cluster, *WORKLOADS)
    return {name: one["spec"]["template"] for name, one in found.items()}


def services(cluster: list[Manifest]) -> dict[str, Manifest]:
    """Those that are processes of ours, by role."""
    return {role: pods(cluster)[role]["spec"] for role in map(str, Role)}


def containers(spec: Manifest) -> Iterator[Manifest]:
    yield from spec.get("initContainers", [])
    yield from spec["containers"]


def chosen(selector: Manifest, cluster: list[Manifest]) -> set[str]:
    """Workloads whose pods a label selector names."""
    wanted = selector.get("matchLabels", {}).items()
    one_of = selector.get("matchExpressions", [])
    assert all(each["operator"] == "In" for each in one_of)
    return {
        name
        for name, pod in pods(cluster).items()
        if wanted <= pod["metadata"]["labels"].items()
        and all(pod["metadata"]["labels"].get(e["key"]) in e["values"] for e in one_of)
    }


def ports(spec: Manifest) -> set[str | int]:
    each = [port for one in spec["containers"] for port in one.get("ports", [])]
    return {port["name"] for port in each} | {port["containerPort"] for port in each}
