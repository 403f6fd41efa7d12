"""What a child would refuse is one line of `slipstream serve`, before anything starts."""

import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import pytest

from cli.fakes import write_model
from slipstream.cli.main import main
from slipstream.config import ConfigError, load
from slipstream.config.rules import check_transports
from slipstream.decode.config import DecodeConfig
from slipstream.errors import ExitCode
from slipstream.types import TRANSPORTS

Refusal: TypeAlias = Callable[..., tuple[int, str]]


@pytest.fixture
def refusal(
    short_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Refusal:
    """Runs `serve` with these flags; the code, and the only line on the screen."""

    def supervise(*_: object) -> object:
        raise AssertionError("children were started")

    monkeypatch.setattr("slipstream.cli.serve._supervise", supervise)
    monkeypatch.chdir(short_path)
    (short_path / "file").touch()
    model = write_model(short_path / "toy")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])

    def run(*flags: str) -> tuple[int, str]:
        code = main(
            ["serve", str(model), "--port", port, "--run-dir", str(short_path / "r"), *flags]
        )
        (line,) = capsys.readouterr().err.splitlines()
        return code, line

    return run


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        ("--transports foo", 2, "serve: --transports: expected auto, or some of cuda_ipc, shm"),
        ("--transports shm,", 2, "got 'shm,'"),
        ("--transports shm,auto", 2, "got auto"),
        ("--transports bus,bus", 2, "--transports: bus is there 2 times in bus,bus"),
        (
            "--otlp-endpoint localhost:4318",
            2,
            "serve: --otlp-endpoint localhost:4318: expected http",
        ),
        ("--transports cuda_ipc", 3, "no cuda_ipc: the pool is in host memory; leave it out"),
        ("--device cuda --transports shm", 3, "no shm: the pool is in a GPU's memory; leave it"),
        (
            "--device cuda:1 --gpu-memory-share 0.6",
            3,
            "--gpu-memory-share 0.6 for each of 2 workers on cuda:1 is more than the GPU has; give",
        ),
        (
            "--tensor-parallel-size 2 --offload-host-bytes 1MiB",
            2,
            "there are no tiers below the pools of several ranks; leave --offload-host-bytes",
        ),
        ("--redis-url http://:hunter2@h:1", 2, "serve: --redis-url: expected redis://"),
        ("--redis-url redis://h:99999", 2, "--redis-url: expected redis://"),
        ("--redis-url redis://:hunter2@h:1/0?bogus=1", 2, "an option behind ?"),
        ("--offload-dir file --offload-disk-bytes 1GiB", 3, "--offload-dir file: not a folder"),
        ("--offload-dir file/x --offload-disk-bytes 1GiB", 3, "give a folder that can be written"),
        ("--offload-dir x", 2, "--offload-dir x needs --offload-disk-bytes SIZE"),
        ("--offload-disk-bytes 1GiB", 2, "--offload-disk-bytes 1GiB needs --offload-dir FOLDER"),
        ("--shm-dir nowhere", 3, "--shm-dir nowhere: no such folder"),
        ("--kv-cache-bytes 900TiB", 6, "serve: --kv-cache-bytes 1800TiB for 2 workers together is"),
        ("--record file", 3, "/file: not a folder"),
        ("--run-dir file", 3, "/file: not a folder"),
        ("--metrics-port 65534", 2, "--metrics-port 65534: 6 processes need one each"),
        ("--config toml", 2, "slipstream prefill: --renew-s 2 must be less than --lease-s 1"),
    ],
)
def test_it_is_said_before_anything_starts(
    refusal: Refusal, short_path: Path, flags: str, code: int, said: str
) -> None:
    (short_path / "toml").write_text("[prefill]\nlease_s = 1\n")
    got, line = refusal(*flags.split())
    assert (got, said in line) == (code, True), line
    assert line.startswith("slipstream") and "hunter2" not in line


def test_ports_of_metrics_may_not_be_those_of_http(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--port", "9003", "--metrics-port", "9000"]) == ExitCode.USAGE
    assert "6 processes take ports up to 9005, and --port 9003 is among" in capsys.readouterr().err


def test_a_variable_that_only_children_read_is_checked_too(
    refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLIPSTREAM_PULL_TIMEOUT_S", "soon")
    code, line = refusal()
    assert code == ExitCode.USAGE
    assert line.startswith("slipstream prefill: SLIPSTREAM_PULL_TIMEOUT_S: expected a number")


def test_sound_settings_get_past_it(refusal: Refusal, short_path: Path) -> None:
    with pytest.raises(AssertionError, match="children were started"):
        refusal(
            *("--transports", ",".join(TRANSPORTS[1:]), "--redis-url", "redis://h:1/0"),
            *("--offload-dir", str(short_path / "a/b"), "--offload-disk-bytes", "1GiB"),
        )
    assert (short_path / "a/b").is_dir()


def test_a_worker_by_itself_says_the_same() -> None:
    for flags in (["--transports", "foo"], ["--offload-dir", "x"]):
        with pytest.raises(ConfigError, match=f"^slipstream decode: {flags[0]}"):
            load(DecodeConfig, "decode", ["--model", "m", *flags], {})


def test_every_transport_may_be_asked_for() -> None:
    check_transports(",".join(TRANSPORTS))
    for name in (*TRANSPORTS, "auto"):
        check_transports(name)


def test_what_a_killed_run_has_left_does_not_count_as_memory_in_use(
    refusal: Refusal, short_path: Path
) -> None:
    """It is gone by the time anything is held against this machine."""
    shm, left = short_path / "shm", short_path / "r" / "slipstream-killed"
    left.mkdir(parents=True, mode=0o700)
    (left / "lock").touch()
    shm.mkdir()
    segment = shm / "slipstream-slipstream-killed-decode-0-1"
    segment.write_bytes(b"x")
    code, line = refusal("--shm-dir", str(shm), "--kv-cache-bytes", "900TiB")
    assert (code, "is too much" in line) == (6, True), line
    assert not segment.exists() and not left.exists()


def test_a_package_that_traces_need_is_asked_for_before_the_start(
    refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.proto.collector.trace.v1", None)
    code, line = refusal("--otlp-endpoint", "http://localhost:4318")
    assert (code, line.partition(":")[0]) == (3, "slipstream serve")
    assert "install 'slipstream[otel]'" in line
