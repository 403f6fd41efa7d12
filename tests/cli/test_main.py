"""The command as a user types it."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from slipstream.cli.commands import COMMANDS
from slipstream.cli.main import main
from slipstream.errors import ExitCode


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "slipstream.cli.main", *argv],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "serve" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("slipstream ")


@pytest.mark.parametrize("command", ["serve", "frontend", "decode", "kvindex"])
def test_help_of_a_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert f"Usage: slipstream {command}" in capsys.readouterr().out


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["srve"]) == 2
    expected = "slipstream: unknown command srve (did you mean serve?)\n"
    assert capsys.readouterr().err == expected


def test_errors_are_one_line_without_a_traceback() -> None:
    result = run("serve", "--port", "70000")
    assert result.returncode == 2
    assert result.stderr == ("slipstream serve: --port: expected an int <= 65535, got 70000\n")


def test_missing_model_stops_before_anything_starts() -> None:
    result = run("serve", "/no/such/model", "--port", "59871")
    assert result.returncode == 4
    assert result.stderr == "slipstream serve: /no/such/model: no such folder or file\n"


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_misspelt_variable_is_pointed_out_by_every_command(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLIPSTREAM_PROT", "1")
    monkeypatch.setenv("SLIPSTREAM_CPU_KERNELS", "reference")
    assert main([*command.split(), "--help"]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    wanted = "unknown variable SLIPSTREAM_PROT (did you mean SLIPSTREAM_PORT?); ignored"
    assert line == f"slipstream {command}: {wanted}"


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_what_is_wrong_in_itself_is_usage_wherever_it_stands(
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = command.split()
    if command == "config show":
        words.append("decode")
    broken = tmp_path / "broken.toml"
    broken.write_text("[serve\n")
    assert main([*words, "--no-such-flag"]) == ExitCode.USAGE
    assert main([*words, "--config", str(broken)]) == ExitCode.USAGE
    monkeypatch.setenv("SLIPSTREAM_CONFIG", str(tmp_path / "none.toml"))
    assert main(words) == ExitCode.USAGE
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all(line.startswith("slipstream ") for line in lines)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["model"], "slipstream model: expected prepare, got nothing"),
        (
            ["doctor", "transprots"],
            "expected transports, got transprots (did you mean transports?)",
        ),
        (["config", "--docs"], "slipstream config: expected show or docs, got --docs"),
        (["config", "show"], "got nothing"),
        (["config", "show", "srve"], "got srve (did you mean serve?)"),
        (["simulate", "fti", "x"], "slipstream simulate: unexpected argument fti"),
    ],
)
def test_half_a_command_says_what_is_missing(
    argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == ExitCode.USAGE
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_help_of_half_a_command_lists_the_other_halves(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "config show" in shown and "config docs" in shown and "doctor" not in shown


def test_config_show_names_origins_and_hides_secrets(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["config", "show", "kvindex", "--redis-url", "redis://:hunter2@h"]) == 0
    shown = capsys.readouterr().out
    assert "redis_url = '…'  # --redis-url" in shown and "hunter2" not in shown
    assert "worker_ttl_s = 30.0  # default" in shown


def test_ps_shows_the_service_and_no_secret() -> None:
    program = (
        "from slipstream.cli.main import _set_title\n"
        "_set_title('kvindex', ['--node-id', 'kvindex-0', '--redis-url', 'redis://:hunter2@h'])\n"
        "_set_title('kvindex', ['--node-id', 'kvindex-0', '--redis-url=redis://:hunter2@h'])\n"
        "print(open('/proc/self/cmdline').read())"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert result.stdout.startswith("slipstream kvindex --node-id kvindex-0 --redis-url=…")
    assert "hunter2" not in result.stdout


def test_help_is_quick() -> None:
    """It imports no service, no torch and no web server."""
    run("--help")
    started = time.monotonic()
    run("--help")
    assert time.monotonic() - started < 2.0
