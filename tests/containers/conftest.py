"""The Kubernetes manifests with keys, and each of the overlays as it is applied."""

import shutil
from pathlib import Path

import pytest
import yaml

from containers.manifests import FOLDER, Manifest, built
from slipstream import curve


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy with keys, and an overlay for what no other has."""
    copy = tmp_path_factory.mktemp("kubernetes") / "all"
    shutil.copytree(FOLDER, copy, ignore=shutil.ignore_patterns("secret", "*.public"))
    assert curve.generate(copy / "keys")
    overlay = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": "slipstream",
        "resources": ["../../base", "../../keys"],
        "components": [f"../../components/{name}" for name in ("monitoring", "hpa", "gpu")],
    }
    (copy / "overlays" / "rest").mkdir()
    file = copy / "overlays" / "rest" / "kustomization.yaml"
    file.write_text(yaml.safe_dump(overlay), encoding="utf-8")
    return copy


@pytest.fixture(scope="module", params=["demo", "production", "rest"])
def cluster(request: pytest.FixtureRequest, tree: Path) -> list[Manifest]:
    return built(tree / "overlays" / request.param)
