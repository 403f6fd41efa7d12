"""The command as a user types it."""

import subprocess
import sys
import time

import pytest

from slipstream.cli.main import main


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


def test_misspelt_variable_is_pointed_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLIPSTREAM_PROT", "1")
    assert main(["serve", "/no/such/model", "--port", "59872"]) == 4
    assert "SLIPSTREAM_PROT (did you mean SLIPSTREAM_PORT?); ignored" in capsys.readouterr().err


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
