"""The Kubernetes manifests, built as kubectl builds them: schemas, references, settings, keys."""

import math
import os
import shutil
import stat
import subprocess
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

from containers.crds import SCHEMAS
from containers.manifests import (
    FOLDER,
    WORKLOADS,
    Manifest,
    chosen,
    containers,
    documents,
    of_kind,
    pods,
    ports,
    services,
)
from slipstream import curve
from slipstream.cli.commands import SERVICES, unknown_variables
from slipstream.config import SetupError, load
from slipstream.config.service import resolve
from slipstream.types import Role

VERSIONS = ("1.30", "1.37")
LABELS = ("app.kubernetes.io/name", "app.kubernetes.io/component")


def check_schema(manifest: Manifest) -> None:
    schema = SCHEMAS.get((manifest["apiVersion"], manifest["kind"]))
    if schema is not None:
        jsonschema.validate(manifest, schema)
        return
    for version in VERSIONS:
        kubernetes_validate.validate(manifest, version, strict=True)


# --- The files ------------------------------------------------------------------------------------


def listed(kustomization: Path) -> set[Path]:
    """Files and folders that a kustomization names."""
    said = yaml.safe_load(kustomization.read_text(encoding="utf-8"))
    names = [*said.get("resources", []), *said.get("components", [])]
    names += [patch["path"] for patch in said.get("patches", []) if "path" in patch]
    names += [file for each in said.get("secretGenerator", []) for file in each["files"]]
    return {(kustomization.parent / name).resolve() for name in names}


def test_every_file_is_listed_and_every_listed_file_is_there(tree: Path) -> None:
    kustomizations = sorted(tree.rglob("kustomization.yaml"))
    found: set[Path] = set()
    for kustomization in kustomizations:
        for path in listed(kustomization):
            assert path.exists(), f"{kustomization}: {path}"
            found.add(path)
    ours = {path.resolve() for path in tree.rglob("*") if path.is_file()}
    folders = {path.parent for path in kustomizations if path.parent.parent.name == "components"}
    assert folders <= found, "a component that no overlay tries"
    adapter = tree / "components" / "hpa" / "adapter-rules.yaml"
    rest = ours - found - set(kustomizations) - {adapter, tree / "keys" / ".gitignore"}
    assert not rest


def test_whole_files_follow_their_schemas() -> None:
    """Also where nothing can build the overlays; patches are no whole manifests."""
    checked = 0
    for kustomization in FOLDER.rglob("kustomization.yaml"):
        said = yaml.safe_load(kustomization.read_text(encoding="utf-8"))
        for name in said.get("resources", []):
            if (path := kustomization.parent / name).is_file():
                for manifest in documents(path.read_text(encoding="utf-8")):
                    if manifest["kind"] not in WORKLOADS:  # what the parts add is missing
                        check_schema(manifest)
                        checked += 1
    assert checked > 20


def test_nobody_commits_a_key() -> None:
    ignored = (FOLDER / "keys" / ".gitignore").read_text(encoding="utf-8").splitlines()
    assert "*/" in ignored
    tracked = subprocess.run(
        ["git", "ls-files", "keys"], cwd=FOLDER, capture_output=True, text=True, check=True
    )
    assert set(tracked.stdout.split()) <= {"keys/.gitignore", "keys/kustomization.yaml"}


# --- What is built --------------------------------------------------------------------------------


def test_everything_follows_its_schema(cluster: list[Manifest]) -> None:
    for manifest in cluster:
        check_schema(manifest)
        if manifest["kind"] != "Namespace":
            assert manifest["metadata"]["namespace"] == "slipstream"
    assert set(services(cluster)) == set(Role)


def test_selectors_name_pods_that_are_there(cluster: list[Manifest]) -> None:
    for name, one in of_kind(cluster, "Deployment", "DaemonSet").items():
        assert set(one["spec"]["selector"]["matchLabels"]) == set(LABELS)
        assert chosen(one["spec"]["selector"], cluster) == {name}
    for name, one in of_kind(cluster, "Service").items():
        assert chosen({"matchLabels": one["spec"]["selector"]}, cluster) == {name}
        for port in one["spec"]["ports"]:
            assert port["targetPort"] in ports(pods(cluster)[name]["spec"]), name
    for name, one in of_kind(cluster, "PodDisruptionBudget").items():
        assert chosen(one["spec"]["selector"], cluster) == {name}
    for name, one in of_kind(cluster, "PodMonitor").items():
        found = chosen(one["spec"]["selector"], cluster)
        assert found and found <= set(Role)
        for endpoint in one["spec"]["podMetricsEndpoints"]:
            assert all(endpoint["port"] in ports(services(cluster)[each]) for each in found), name
    single = {"scheduler", "redis", "kv-folder", "model"}
    assert set(of_kind(cluster, "PodDisruptionBudget")) == set(pods(cluster)) - single


def test_what_pods_ask_for_is_there(cluster: list[Manifest]) -> None:
    claims = of_kind(cluster, "PersistentVolumeClaim")
    maps, secrets = of_kind(cluster, "ConfigMap"), of_kind(cluster, "Secret")
    for name, pod in pods(cluster).items():
        volumes = {volume["name"]: volume for volume in pod["spec"].get("volumes", [])}
        mounted = set()
        for volume in volumes.values():
            assert len(volume) == 2, f"{name}: {volume} has one source"
            assert "secret" not in volume or volume["secret"]["secretName"] in secrets
            claim = volume.get("persistentVolumeClaim")
            assert claim is None or claim["claimName"] in claims
        for container in containers(pod["spec"]):
            mounted |= {mount["name"] for mount in container.get("volumeMounts", [])}
            for source in container.get("envFrom", []):
                assert source["configMapRef"]["name"] in maps
            for variable in container.get("env", []):
                key = variable.get("valueFrom", {}).get("configMapKeyRef")
                assert key is None or key["key"] in maps[key["name"]]["data"]
        assert mounted == set(volumes), name


def test_pods_are_restricted_and_bounded(cluster: list[Manifest]) -> None:
    """Pod Security's "restricted", but for the one container that makes a node's folder."""
    for name, pod in pods(cluster).items():
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False and not spec["enableServiceLinks"]
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not any(spec.get(each) for each in ("hostNetwork", "hostPID", "hostIPC")), name
        for container in containers(spec):
            own = container["securityContext"]
            where = f"{name}: {container['name']}"
            assert own["allowPrivilegeEscalation"] is False and own["readOnlyRootFilesystem"], where
            assert container["resources"]["limits"]["memory"], where
            assert {"cpu", "memory"} <= container["resources"]["requests"].keys(), where
            if (name, container["name"]) == ("kv-folder", "folder"):
                assert own["capabilities"] == {"drop": ["ALL"], "add": ["CHOWN", "FOWNER"]}
                continue
            both = {**spec["securityContext"], **own}
            assert own["capabilities"] == {"drop": ["ALL"]}, where
            assert both["runAsNonRoot"] and both["runAsUser"] == 10001, where
    enforced = of_kind(cluster, "Namespace")["slipstream"]["metadata"]["labels"]
    on_host = any("hostPath" in v for p in pods(cluster).values() for v in p["spec"]["volumes"])
    wanted = "privileged" if on_host else "restricted"
    assert enforced["pod-security.kubernetes.io/enforce"] == wanted


def test_every_service_has_probes_and_time_to_end(cluster: list[Manifest]) -> None:
    for role, spec in services(cluster).items():
        (service,) = spec["containers"]
        assert service["args"] == [role]
        for probe, path in (
            ("startup", "/readyz"),
            ("readiness", "/readyz"),
            ("liveness", "/livez"),
        ):
            assert service[f"{probe}Probe"]["httpGet"] == {"path": path, "port": "metrics"}
        end_s = spec["terminationGracePeriodSeconds"]
        if role == Role.SCHEDULER:
            assert end_s == 1, "while it drains it refuses what comes"
        elif role == Role.FRONTEND:
            assert end_s >= int(service["lifecycle"]["preStop"]["exec"]["command"][1]) + 45
        else:
            assert end_s >= 45
    strategies = {n: one["spec"]["strategy"] for n, one in of_kind(cluster, "Deployment").items()}
    assert strategies["scheduler"] == {"type": "Recreate"}


def _cpus(said: str) -> int:
    """Whole ones, rounded up, as the kubelet says them."""
    return math.ceil(int(said[:-1]) / 1000 if said.endswith("m") else int(said))


def environment(role: str, cluster: list[Manifest]) -> dict[str, str]:
    """What the kubelet gives the service of a role."""
    (service,) = services(cluster)[role]["containers"]
    maps = of_kind(cluster, "ConfigMap")
    env: dict[str, str] = {}
    for source in service["envFrom"]:
        env |= maps[source["configMapRef"]["name"]]["data"]
    told = {"metadata.name": f"{role}-6d4cf56db6-x7k2p", "status.podIP": "10.1.2.3"}
    for variable in service["env"]:
        if "resourceFieldRef" in variable.get("valueFrom", {}):
            value = str(_cpus(service["resources"]["requests"]["cpu"]))
        elif "value" in variable:
            value = variable["value"].replace("$(POD_IP)", env.get("POD_IP", "$(POD_IP)"))
        else:
            value = told[variable["valueFrom"]["fieldRef"]["fieldPath"]]
        env[variable["name"]] = value
    return env


def test_services_understand_their_settings(cluster: list[Manifest]) -> None:
    for role in Role:
        env = environment(role, cluster)
        assert not unknown_variables(env)
        config = resolve(load(SERVICES[role], role, [], env), env)
        name = "scheduler" if role is Role.SCHEDULER else "10.1.2.3"
        assert config.advertise == f"tcp://{name}:7000"
        assert config.scheduler == "tcp://scheduler:7000"
        assert config.node_id.startswith(f"{role}-") and config.metrics_port == 9100
        (service,) = services(cluster)[role]["containers"]
        mounts = {mount["mountPath"] for mount in service["volumeMounts"]}
        wanted = {config.keys_dir, config.run_dir}
        if role in (Role.PREFILL, Role.DECODE):
            assert (
                config.threads
                == {"500m": 1, "2": 2, "8": 8}[service["resources"]["requests"]["cpu"]]
            )
            wanted |= {env["SLIPSTREAM_SHM_DIR"], env["SLIPSTREAM_PACKED_WEIGHTS_DIR"]}
        assert wanted <= mounts


# --- Keys -----------------------------------------------------------------------------------------


def test_a_pod_has_the_keys_of_its_role_alone(cluster: list[Manifest]) -> None:
    secrets = of_kind(cluster, "Secret")
    assert len(secrets) == len(Role)
    for name, pod in pods(cluster).items():
        volumes = [v["secret"] for v in pod["spec"]["volumes"] if "secret" in v]
        if name not in set(Role):
            assert not volumes
            continue
        assert [v["secretName"].rpartition("-")[0] for v in volumes] == [f"keys-{name}"]
        assert volumes[0]["defaultMode"] == 0o440, "others than the pod's group may not read it"
        held = secrets[volumes[0]["secretName"]]["data"]
        assert held.keys() == {"secret", *(f"{role}.public" for role in Role)}


def test_keys_as_the_kubelet_mounts_them_become_keys_that_are_taken(
    cluster: list[Manifest], tree: Path, tmp_path: Path
) -> None:
    mounted = tmp_path / "secret"
    shutil.copytree(tree / "keys" / "decode", mounted)
    for path in mounted.iterdir():
        path.chmod(0o440)
    as_mounted = tmp_path / "as-mounted"
    as_mounted.mkdir()
    (as_mounted / "decode").symlink_to(mounted)
    with pytest.raises(SetupError, match="read by others"):
        curve.load(str(as_mounted), Role.DECODE)
    (command,) = (
        c["command"] for c in services(cluster)["decode"]["initContainers"] if c["name"] == "keys"
    )
    script = command[-1].replace("/secret/", f"{mounted}/").replace("/keys/", f"{tmp_path}/keys/")
    for _ in range(2):  # a pod's init containers can run again
        subprocess.run(
            [*command[:-1], script], env={"PATH": os.environ["PATH"], "ROLE": "decode"}, check=True
        )
    assert curve.load(str(tmp_path / "keys"), Role.DECODE) is not None
    assert stat.S_IMODE((tmp_path / "keys" / "decode" / "secret").stat().st_mode) == 0o400
