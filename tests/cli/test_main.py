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
    way_out = "give one, a hub id such as org/name, or demo"
    assert result.stderr == f"slipstream serve: /no/such/model: no such folder or file; {way_out}\n"


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
        (["config", "show", "srve"], "got srve (did you mean serve?)"),
        (["simulate", "fti", "x"], "expected fit, got fti (did you mean fit?)"),
        (["doctor", "a", "b"], "slipstream doctor: unexpected argument b"),
        (["prepare"], "unknown command prepare (did you mean model prepare?)"),
        (["transprots"], "(did you mean doctor transports?)"),
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
    assert 'redis_url = "…"  # --redis-url, not shown' in shown and "hunter2" not in shown
    assert "worker_ttl_s = 30.0  # default" in shown


def test_config_show_is_a_file_for_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLIPSTREAM_DECODE", "3")
    assert main(["config", "show", "--origin", "--port", "9000", "--log-json"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("[serve]\n") and "decode = 3  # SLIPSTREAM_DECODE\n" in shown
    monkeypatch.delenv("SLIPSTREAM_DECODE")
    file = tmp_path / "again.toml"
    file.write_text(shown)
    assert main(["config", "show", "serve", "--no-origin", "--config", str(file)]) == 0
    again = capsys.readouterr().out
    assert again == "".join(line.partition("  #")[0] + "\n" for line in shown.splitlines())


@pytest.mark.parametrize("by", ["flag", "flag=", "environment"])
def test_a_section_of_no_command_is_no_secret(
    by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "c.toml"
    file.write_text('[serv]\nport = 9000\n["model prepare"]\n')
    words = {"flag": ["--config", str(file)], "flag=": [f"--config={file}"]}.get(by, [])
    if by == "environment":
        monkeypatch.setenv("SLIPSTREAM_CONFIG", str(file))
    assert main(["config", "show", "serve", *words]) == ExitCode.USAGE
    expected = f"slipstream config show: {file}: [serv] is no command (did you mean serve?)\n"
    assert capsys.readouterr().err == expected
    file.write_text('[serve]\nport = 9000\n["model prepare"]\n')
    assert main(["config", "show", "serve", *words]) == 0


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


HEAVY = ("torch", "transformers", "aiohttp", "zmq", "redis", "numpy", "rich", "prometheus_client")


@pytest.mark.parametrize("words", [["--help"], ["run", "--help"], ["config", "show", "bench"]])
def test_what_only_prints_imports_nothing_heavy(words: list[str]) -> None:
    program = (
        "import sys\nfrom slipstream.cli.main import main\n"
        f"assert main({words!r}) == 0\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert result.stderr == "[]\n"


def test_help_is_quick() -> None:
    """It imports no service, no torch and no web server."""
    run("--help")
    started = time.monotonic()
    run("--help")
    assert time.monotonic() - started < 2.0
