"""`slipstream doctor`: each check finds what it is for, and says the way out."""

import json
import os
import resource
import socket
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cli.fake_server import FakeServer
from cli.fakes import write_model
from slipstream.cli import checks_around, checks_host, checks_software
from slipstream.cli.checkup import Check, State, fail, ok, screen, warn
from slipstream.cli.main import main
from slipstream.cli.plan import redis_binary
from slipstream.curve import generate
from slipstream.errors import ExitCode
from slipstream.types import Role

Capture = pytest.CaptureFixture[str]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def test_every_check_has_a_line(tmp_path: Path, capsys: Capture) -> None:
    model = write_model(tmp_path / "toy")
    port = free_port()
    code = main(["doctor", str(model), "--port", port, "--json"])
    found = {one["name"]: one for one in json.loads(capsys.readouterr().out)}
    for name in ("python", "torch", "pyzmq", "msgspec", "kernels", "cores", "memory", "clock"):
        assert found[name]["state"] in ("ok", "warn"), found[name]
    for name in ("shared memory", "huge pages", "open files", "gpu", "nixl", "docker", "redis"):
        assert name in found
    assert found[f"port {port}"] == {
        **{"name": f"port {port}", "state": "ok", "found": "free", "way_out": ""}
    }
    assert found["keys"]["state"] == "ok"
    failed = [one for one in found.values() if one["state"] == "FAIL"]
    assert code == (ExitCode.FAILED if failed else ExitCode.OK)
    assert all(one["way_out"] for one in found.values() if one["state"] != "ok")


def test_a_failure_is_the_exit_code(tmp_path: Path, capsys: Capture) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        code = main(["doctor", "--port", port, "--shm-dir", str(tmp_path / "none")])
    out = capsys.readouterr().out
    assert code == ExitCode.FAILED
    lines = [line for line in out.splitlines() if line.startswith("FAIL")]
    assert len(lines) == 2, out
    assert f"{tmp_path / 'none'}: No such file or directory -> --shm-dir FOLDER" in lines[0]
    assert f"port {port} is taken by pid {os.getpid()}" in lines[1]
    assert "-> --port N" in lines[1]


def test_a_slipstream_on_the_port_is_no_fault(fake: FakeServer) -> None:
    port = int(fake.url.rpartition(":")[2])
    found = checks_around.port("127.0.0.1", port)
    assert (found.state, found.found) == (State.OK, "a Slipstream answers: ready, fake-1b")


def test_the_screen_counts() -> None:
    lines = screen([ok("a", "fine"), warn("bb", "so so", "do this"), fail("c", "x", "y")])
    assert lines.splitlines() == [
        "ok    a   fine",
        "warn  bb  so so -> do this",
        "FAIL  c   x -> y",
        "",
        "1 ok, 1 warn, 1 FAIL",
    ]


@pytest.mark.parametrize(
    ("info", "state", "said"),
    [
        ({"redis_version": "7.0.15", "maxmemory_policy": "noeviction"}, State.OK, "7.0.15"),
        ({"redis_version": "6.0.1"}, State.FAIL, "6.2 or newer"),
        (
            {"redis_version": "7.2", "maxmemory_policy": "noeviction", "maxmemory": 1 << 20},
            State.WARN,
            "stands still: volatile-lru",
        ),
        (
            {
                "redis_version": "6.2.14",
                "maxmemory_policy": "volatile-lru",
                "maxmemory": 2 << 20,
                "used_memory": 1 << 20,
            },
            State.OK,
            "1MiB used of 2MiB",
        ),
        (
            {"redis_version": "7.2", "maxmemory_policy": "allkeys-lru", "maxmemory": 1 << 20},
            State.WARN,
            "months of API keys",
        ),
    ],
)
def test_what_redis_says_of_itself(info: dict[str, Any], state: State, said: str) -> None:
    found = checks_around.judged_redis(info)
    assert found.state is state and said in f"{found.found} {found.way_out}"


@pytest.mark.parametrize(
    "url",
    [
        "redis://:hunter2@127.0.0.1:9/0",
        "rediss://:hunter2@127.0.0.1:9/0",
        "unix://:hunter2@/nowhere/redis.sock",
        "redis+cluster://:hunter2@127.0.0.1:9",
        "redis+sentinel://:hunter2@127.0.0.1:9/m/0",
    ],
)
def test_a_redis_that_is_not_there(url: str) -> None:
    found = checks_around.redis(url, {})
    assert found.state is State.FAIL and "hunter2" not in found.found + found.way_out


def test_a_redis_that_is_there(short_path: Path) -> None:
    server = redis_binary("redis-server", os.environ)
    words = [server, "--port", "0", "--unixsocket", str(short_path / "r"), "--save", ""]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL) as process:
        try:
            deadline_s = time.monotonic() + 20
            while not (short_path / "r").exists() and time.monotonic() < deadline_s:
                time.sleep(0.02)
            found = checks_around.redis(f"unix://{short_path / 'r'}", {})
            assert found.state is State.OK and "noeviction" in found.found, found
        finally:
            process.terminate()


def test_a_url_that_is_none() -> None:
    found = checks_around.redis("http://h", {})
    assert found.state is State.FAIL and "expected redis://" in found.found


def keys(folder: Path) -> dict[str, Check]:
    return {one.name: one for one in checks_around.keys(str(folder))}


def test_keys(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    generate(folder)
    assert keys(folder)["keys"].found == f"of {len(Role)} roles, 0 days old"
    secret = folder / "decode" / "secret"
    secret.chmod(0o444)
    found = keys(folder)["keys decode"]
    assert found.state is State.FAIL and found.way_out == "chmod 400 it"
    secret.chmod(0o400)
    (folder / "prefill" / "decode.public").unlink()
    assert "No such file" in keys(folder)["keys prefill"].found
    old_s = time.time() - 400 * 86_400
    os.utime(secret, (old_s, old_s))
    assert keys(folder)["keys"].state is State.WARN
    assert len(keys(tmp_path / "nowhere")) == len(Role)


@pytest.mark.parametrize(
    ("limit", "state"),
    [
        (100, State.FAIL),
        (1024, State.WARN),
        (65_536, State.OK),
        (resource.RLIM_INFINITY, State.OK),
    ],
)
def test_open_files(limit: int, state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks_host.resource, "getrlimit", lambda _: (limit, 65_536))
    assert checks_host.open_files().state is state


def test_a_quota_below_the_cores_is_pointed_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks_host.os, "sched_getaffinity", lambda _: set(range(8)))
    (tmp_path / "cpu.max").write_text("250000 100000\n")
    found = checks_host.cores(tmp_path)
    assert found.state is State.WARN
    assert "allows 2.5" in found.found and found.way_out.startswith("--threads 2,")
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert checks_host.cores(tmp_path).state is State.OK


@pytest.mark.parametrize(
    ("kernel", "enabled", "state"),
    [
        ("6.18.44-x", "always [madvise] never", State.OK),
        ("5.15.0-91", "always [madvise] never", State.WARN),
        ("6.18.44", "always madvise [never]", State.WARN),
        ("6.18.44", None, State.WARN),
    ],
)
def test_huge_pages(tmp_path: Path, kernel: str, enabled: str | None, state: State) -> None:
    if enabled is not None:
        (tmp_path / "enabled").write_text(enabled)
    assert checks_host.huge_pages(kernel, tmp_path).state is state


def test_shared_memory_of_a_container(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = SimpleNamespace(free=64 << 20, total=64 << 20)
    monkeypatch.setattr(checks_host.shutil, "disk_usage", lambda _: usage)
    found = checks_host.shared_memory(str(tmp_path))
    assert found.state is State.WARN and "--shm-size" in found.way_out


def test_a_model_that_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "m"
    model.mkdir()
    (model / "a.safetensors").write_bytes(b"x" * 4096)
    monkeypatch.setattr(checks_host, "available_memory", lambda: 4095)
    found = checks_host.memory(str(model), {})
    assert found.state is State.FAIL and "has 4KiB of weights" in found.found
    monkeypatch.setattr(checks_host, "available_memory", lambda: 4097)
    assert checks_host.memory(str(model), {}).state is State.WARN
    monkeypatch.setattr(checks_host, "available_memory", lambda: 64 << 30)
    assert checks_host.memory(str(model), {}).state is State.OK
    quantized = {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128}}
    plain_bytes = checks_host.weight_bytes(str(model), {})
    (model / "config.json").write_text(json.dumps(quantized))
    assert checks_host.weight_bytes(str(model), {}) == 4 * (plain_bytes or 0) > 0
    assert "its size is not known" in checks_host.memory("org/name", {}).found
    assert checks_host.memory("nowhere", {}).state is State.WARN


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks_software, "compiled", lambda: None)
    monkeypatch.setattr(checks_software.shutil, "which", lambda _: None)
    found = checks_software.kernels()
    assert found.state is State.WARN and found.way_out == "apt-get install g++"


def test_packages_that_are_missing_or_old(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "torch":
            raise checks_software.metadata.PackageNotFoundError(name)
        return "1.0" if name == "pyzmq" else "99.1+cpu"

    wanted = ["pyzmq>=26", 'torch>=2.10; extra == "worker"', "redis>=5,<9"]
    monkeypatch.setattr(checks_software.metadata, "version", version)
    monkeypatch.setattr(checks_software.metadata, "requires", lambda _: wanted)
    found = {one.name: one for one in checks_software.packages()}
    assert (found["torch"].state, found["torch"].found) == (State.WARN, "not installed")
    assert "slipstream[worker]" in found["torch"].way_out
    assert (found["pyzmq"].state, found["pyzmq"].found) == (State.FAIL, "1.0 is older than 26")
    assert found["redis"].state is State.OK


def docker(folder: Path, script: str) -> Check:
    program = folder / "docker"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return checks_around.containers({"PATH": f"{folder}:/usr/bin:/bin"})


def test_docker(tmp_path: Path) -> None:
    assert checks_around.containers({"PATH": str(tmp_path)}).state is State.OK
    assert docker(tmp_path, "echo 27.1").found == "27.1, compose 27.1"
    found = docker(tmp_path, "echo no daemon >&2; exit 1")
    assert (found.state, found.found) == (State.WARN, "no daemon")
    found = docker(tmp_path, "[ $1 = version ] && echo 27 || exit 1")
    assert found.way_out == "install the plugin docker-compose-v2"


@pytest.mark.parametrize(
    ("said", "state", "found"),
    [
        ("cuda: Optional[str] = '13.0'", "ok", "CUDA 13.0"),
        ("cuda: Optional[str] = None", "warn", "it has none"),
        (None, "warn", "torch is not installed"),
    ],
)
def test_what_torch_was_built_for(tmp_path: Path, said: str | None, state: str, found: str) -> None:
    if said is not None:
        (tmp_path / "version.py").write_text(f"__version__ = '2.11.0'\n{said}\nhip = None\n")
    check = checks_host.torch_cuda([str(tmp_path)] if said is not None else [])
    assert (check.state, check.found) == (state, found)
