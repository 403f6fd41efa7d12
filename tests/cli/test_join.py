"""One more model in a cluster that runs: which processes, under which names, in which folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from slipstream.cli.config import ServeConfig
from slipstream.cli.plan import Layout, plan
from slipstream.cli.run_dir import is_alive, joined, private_run_dir, running
from slipstream.config import SetupError

LONGEST_PATH = 107


def layout(run_dir: Path, name: str, **settings: object) -> Layout:
    config = ServeConfig(join=str(run_dir), **settings)  # type: ignore[arg-type]
    given = ["join", *settings]
    where = {"config_file": "", "model": Path("/m"), "run_dir": run_dir, "environ": {}}
    return Layout(config=config, given=given, model_name=name, **where)  # type: ignore[arg-type]


def names(run_dir: Path, name: str, **settings: object) -> list[str]:
    return [child.node_id for child in plan(layout(run_dir, name, **settings))]


def test_tokenizers_and_workers_alone(tmp_path: Path) -> None:
    children = plan(layout(tmp_path, "next", decode=2))
    assert [child.role for child in children] == ["tokenizer", "prefill", "decode", "decode"]
    assert len({child.node_id for child in children}) == 4
    assert all("next" in child.node_id for child in children)
    for child in children:
        assert child.flags[child.flags.index("--run-dir") + 1] == str(tmp_path)
        assert "--join" not in child.flags
        assert not any("REDIS" in name for name in child.env)


def test_names_that_begin_alike_are_told_apart(tmp_path: Path) -> None:
    alike = ("Llama-3.1-8B-Instruct-FP8-a", "Llama-3.1-8B-Instruct-FP8-b", "my-model", "my_model")
    found = [name for model in alike for name in names(tmp_path, model)]
    assert len(set(found)) == len(found) == 3 * len(alike)
    longest = max(found, key=len)
    socket = Path("/run/user/1000/slipstream-12345678") / f"{longest.replace('-0', '-63')}.sock"
    assert len(os.fsencode(socket)) <= LONGEST_PATH


def test_ports_of_metrics_are_for_what_is_started(tmp_path: Path) -> None:
    config = layout(tmp_path, "m", metrics_port=9100).config
    assert config.num_services == 3


def test_the_run_that_is_there_is_found(tmp_path: Path) -> None:
    environ = {"XDG_RUNTIME_DIR": str(tmp_path)}
    with pytest.raises(SetupError, match="--join auto: none runs in"):
        joined("auto", environ)
    with private_run_dir(tmp_path, "/dev/shm") as first:
        # A lock is the process's: who looks is another one.
        code = "import sys; from pathlib import Path; from slipstream.cli import run_dir as r; "
        code += "print(r.joined(sys.argv[1], {'XDG_RUNTIME_DIR': sys.argv[2]}))"
        for wanted in ("auto", str(first)):
            done = subprocess.run(
                [sys.executable, "-c", code, wanted, str(tmp_path)],
                env=os.environ | {"PYTHONPATH": ":".join(filter(None, sys.path))},
                capture_output=True,
                text=True,
                check=True,
                timeout=60,
            )
            assert done.stdout.strip() == str(first)
        assert running(tmp_path) == [first] and is_alive(first)
        with private_run_dir(tmp_path, "/dev/shm") as second:
            with pytest.raises(SetupError, match=f"several run: .*{first.name}"):
                joined("auto", environ)
            assert joined(str(second), environ) == second
        with pytest.raises(SetupError, match="give the run directory that READY names"):
            joined(str(second), environ)
    assert not is_alive(first) and running(tmp_path) == []


def test_a_cluster_is_joined_or_begun() -> None:
    with pytest.raises(ValueError, match="leave --run-dir out"):
        ServeConfig(join="auto", run_dir="/tmp/x")
