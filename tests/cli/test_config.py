"""The loader: precedence, bounds, names, and one line for everything that is wrong."""

import socket
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import pytest
from msgspec import Meta

from slipstream.cli.config import ServeConfig
from slipstream.config import (
    ByteSize,
    ConfigError,
    HelpRequested,
    format_bytes,
    load,
    load_with_origin,
    parse_bytes,
    resolve,
)
from slipstream.decode.config import DecodeConfig
from slipstream.errors import ExitCode
from slipstream.frontend.config import FrontendConfig
from slipstream.prefill.config import PrefillConfig
from slipstream.scheduler.config import SchedulerConfig


class Toy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A toy."""

    name: Annotated[str, Meta(description="Name.", extra={"positional": "NAME"})] = "x"
    port: Annotated[int, Meta(ge=1, le=65535, description="Port.")] = 8000
    pause_s: Annotated[float, Meta(gt=0, description="Pause.")] = 1.5
    cache_bytes: Annotated[ByteSize, Meta(description="Cache.")] = 0
    mode: Annotated[Literal["always", "never"], Meta(description="Mode.")] = "always"
    verbose: Annotated[bool, Meta(description="Talk.")] = False


def toy(argv: str = "", **environ: str) -> Toy:
    return load(Toy, "toy", argv.split(), {f"SLIPSTREAM_{k}": v for k, v in environ.items()})


def refusal(argv: str = "", **environ: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        toy(argv, **environ)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "slipstream.toml"
    path.write_text('[toy]\nport = 7000\npause_s = 2\ncache_bytes = "1GiB"\n[other]\nx = 1\n')
    return path


def test_defaults() -> None:
    assert toy() == Toy()


def test_flag_wins_over_environment_over_file_over_default(file: Path) -> None:
    environ = {"PORT": "7001", "PAUSE_S": "3"}
    loaded = load_with_origin(
        Toy,
        "toy",
        ["--config", str(file), "--port", "7002"],
        {f"SLIPSTREAM_{k}": v for k, v in environ.items()},
    )
    assert loaded.config == Toy(port=7002, pause_s=3.0, cache_bytes=2**30)
    assert loaded.origin == {
        "name": "default",
        "port": "--port",
        "pause_s": "SLIPSTREAM_PAUSE_S",
        "cache_bytes": str(file),
        "mode": "default",
        "verbose": "default",
    }


def test_file_named_by_the_environment(file: Path) -> None:
    assert toy(CONFIG=str(file)).port == 7000


def test_empty_variable_counts_as_not_set() -> None:
    assert toy(PORT="") == Toy()


def test_booleans_have_two_flags() -> None:
    assert toy("--verbose").verbose
    assert not toy("--no-verbose", VERBOSE="1").verbose
    assert toy(VERBOSE="Yes").verbose
    assert refusal(VERBOSE="maybe").exit_code is ExitCode.USAGE


def test_positional_argument() -> None:
    assert toy("hello --port 1").name == "hello"
    assert toy(NAME="there").name == "there"
    assert str(refusal("a b")) == "slipstream toy: unexpected argument b"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--port 70000", "--port: expected an int <= 65535, got 70000"),
        ("--port 0", "--port: expected an int >= 1, got 0"),
        ("--port x", "--port: expected an int >= 1 and <= 65535, got x"),
        ("--port 1.5", "--port: expected an int >= 1 and <= 65535, got 1.5"),
        ("--port", "--port: expected one argument"),
        ("--pause-s 0", "--pause-s: expected a number > 0.0, got 0"),
        ("--pause-s nan", "--pause-s: expected a number > 0, got nan"),
        ("--pause-s inf", "--pause-s: expected a number > 0, got inf"),
        ("--cache-bytes 4GoB", "--cache-bytes: expected a size such as 512MiB or 4GiB, got 4GoB"),
        ("--cache-bytes -1", "--cache-bytes: expected a size such as 512MiB or 4GiB, got -1"),
        (
            "--mode alwys",
            "--mode: expected one of always, never, got alwys (did you mean always?)",
        ),
        ("--prot 1", "unknown flag --prot (did you mean --port?)"),
        ("--no-verbos", "unknown flag --no-verbos (did you mean --no-verbose?)"),
        ("--por 1", "unknown flag --por (did you mean --port?)"),
    ],
)
def test_usage_errors(argv: str, message: str) -> None:
    error = refusal(argv)
    assert str(error) == f"slipstream toy: {message}"
    assert error.exit_code is ExitCode.USAGE


def test_environment_error_names_the_variable() -> None:
    error = refusal(PORT="70000")
    assert str(error) == "slipstream toy: SLIPSTREAM_PORT: expected an int <= 65535, got 70000"
    assert error.exit_code is ExitCode.USAGE


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[toy]\nprot = 1\n", "[toy] has unknown key prot (did you mean port?)"),
        ("[toy]\nport = true\n", "[toy] port: expected an int >= 1 and <= 65535, got True"),
        ("[toy]\nport = 70000\n", "[toy] port: expected an int <= 65535, got 70000"),
        ("toy = 3\n", "[toy] is not a table"),
        ("port = 3\n", "port stands outside of a section; write it under [toy]"),
        ("[toy\n", "Expected ']'"),
    ],
)
def test_file_errors(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    error = refusal(f"--config {path}")
    assert message in str(error) and str(path) in str(error)
    assert error.exit_code is ExitCode.USAGE


def test_missing_file() -> None:
    assert str(refusal("--config /no/such.toml")).endswith("No such file or directory")


def test_help_is_an_exception_of_its_own() -> None:
    with pytest.raises(HelpRequested):
        toy("--help")


@pytest.mark.parametrize(
    ("text", "count"),
    [("0", 0), ("4096", 4096), ("4GiB", 4 << 30), ("512 mib", 512 << 20), ("1.5GB", 1_500_000_000)],
)
def test_sizes(text: str, count: int) -> None:
    assert parse_bytes(text) == count


def test_sizes_are_shown_exactly_where_they_can() -> None:
    assert format_bytes(8 << 20) == "8MiB"
    assert format_bytes(1_500_000_000) == "1.4GiB"
    assert format_bytes(12) == "12B"


def test_required_setting() -> None:
    with pytest.raises(ConfigError, match="--model is required"):
        load(DecodeConfig, "decode", [], {})


def test_settings_that_contradict_each_other() -> None:
    with pytest.raises(ConfigError, match="--renew-s 20 must be less than --lease-s 10"):
        load(DecodeConfig, "decode", ["--model", "m", "--renew-s", "20"], {})
    with pytest.raises(ConfigError, match="--prefill 0 needs"):
        load(ServeConfig, "serve", ["--prefill", "0", "--disaggregation", "always"], {})
    load(ServeConfig, "serve", ["--prefill", "0"], {})


def test_roles_differ_where_they_should() -> None:
    argv = ["--model", "m"]
    assert not load(PrefillConfig, "prefill", argv, {}).accept_decode
    assert load(DecodeConfig, "decode", argv, {}).accept_decode


def test_resolve_finds_the_scheduler_in_the_run_directory() -> None:
    environ = {"XDG_RUNTIME_DIR": "/run/user/7"}
    scheduler = resolve(load(SchedulerConfig, "scheduler", [], {}), environ)
    frontend = resolve(load(FrontendConfig, "frontend", ["--node-id", "f"], {}), environ)
    assert frontend.scheduler == scheduler.listen == scheduler.scheduler
    assert frontend.listen == frontend.advertise == f"ipc://{frontend.run_dir}/f.sock"
    assert scheduler.node_id.startswith("scheduler-")


def test_resolve_turns_a_wildcard_into_an_address_that_peers_can_use() -> None:
    words = ["--listen", "tcp://*:7000", "--insecure-bus"]
    config = resolve(load(FrontendConfig, "frontend", words, {}), {})
    assert config.listen == "tcp://*:7000"
    assert config.advertise.startswith("tcp://") and "*" not in config.advertise


@pytest.mark.parametrize(
    ("scheduler", "ours", "advertised"),
    [
        ("tcp://10.0.0.1:7000", "10.0.0.9", "tcp://10.0.0.9:7001"),
        ("tcp://127.0.0.1:7000", "127.0.0.1", f"tcp://{socket.gethostname()}:7001"),
        ("tcp://unreachable:7000", "", f"tcp://{socket.gethostname()}:7001"),
    ],
)
def test_resolve_advertises_a_number_not_a_name_that_may_be_gone(
    monkeypatch: pytest.MonkeyPatch, scheduler: str, ours: str, advertised: str
) -> None:
    class Probe(socket.socket):
        def connect(self, place: object) -> None:
            if not ours:
                raise OSError("Network is unreachable")

        def getsockname(self) -> tuple[str, int]:
            return ours, 4711

    numeric = [(socket.AF_INET, socket.SOCK_DGRAM, 17, "", ("10.0.0.1", 7000))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: numeric)
    monkeypatch.setattr(socket, "socket", Probe)
    words = ["--listen", "tcp://0.0.0.0:7001", "--scheduler", scheduler, "--insecure-bus"]
    assert resolve(load(FrontendConfig, "frontend", words, {}), {}).advertise == advertised


@pytest.mark.parametrize("address", ["udp://x:1", "tcp://x", "tcp://*:0", "ipc://", "x"])
def test_resolve_refuses_what_the_bus_cannot_bind(address: str) -> None:
    with pytest.raises(ConfigError, match="--listen: expected ipc"):
        resolve(load(FrontendConfig, "frontend", ["--listen", address], {}), {})


def test_resolve_refuses_a_socket_path_that_the_kernel_would_cut() -> None:
    with pytest.raises(ConfigError, match="at most 107 bytes"):
        resolve(load(FrontendConfig, "frontend", ["--run-dir", "/tmp/" + "x" * 120], {}), {})
