"""The layers hold, a broken one is found, and the control plane runs without torch."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from architecture.sources import REPOSITORY, ROOTS, module_name, source_files

LIGHT = (
    *("frontend", "tokenizer", "scheduler", "kvindex", "cli", "client"),
    *("runtime", "core", "config"),
)
HEAVY = {"slipstream.cli.gguf_folder"}
"""Imported inside a function, when a GGUF file is to be converted."""

LINT = """
import sys
repository, tree, roots = sys.argv[1], sys.argv[2], sys.argv[3].split(",")
elsewhere = [p for p in sys.path if not p.startswith(repository) or "site-packages" in p]
sys.path[:] = [f"{tree}/{root}" for root in roots] + [p for p in elsewhere if p]
import site  # its .pth lines have already run; the roots of the repository are gone again now
from importlinter.cli import lint_imports
sys.exit(lint_imports(config_filename=f"{tree}/pyproject.toml", cache_dir=None))
"""


def lint(tree: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", LINT, str(REPOSITORY), str(tree), ",".join(ROOTS)],
        cwd=tree,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for root in ROOTS:
        shutil.copytree(
            REPOSITORY / root, tmp_path / root, ignore=shutil.ignore_patterns("__pycache__")
        )
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    (tmp_path / "shared" / "slipstream" / "__init__.py").unlink()  # the linter would see no more
    return tmp_path


def test_layers_hold(copy: Path) -> None:
    result = lint(copy)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("file", "line", "contract"),
    [
        ("services/slipstream/scheduler/config.py", "import slipstream.decode.config", "layers"),
        ("shared/slipstream/types.py", "import socket", "machines are pure"),
        ("services/slipstream/frontend/config.py", "import torch", "control plane is light"),
    ],
)
def test_planted_violation_is_found(copy: Path, file: str, line: str, contract: str) -> None:
    with (copy / file).open("a", encoding="utf-8") as source:
        source.write(f"\n{line}\n")
    result = lint(copy)
    assert result.returncode != 0
    assert f"{contract} BROKEN" in result.stdout, result.stdout + result.stderr


@pytest.mark.parametrize("package", LIGHT)
def test_control_plane_needs_no_torch(package: str) -> None:
    """Imports every module of a package in an interpreter in which torch cannot be imported."""
    modules = [
        name
        for path in source_files()
        if (name := module_name(path)).startswith(f"slipstream.{package}") and name not in HEAVY
    ]
    if not modules:
        pytest.skip(f"no package {package}")
    roots = [str(REPOSITORY / root) for root in ROOTS]
    program = (
        f"import importlib, sys\nsys.path[:0] = {roots!r}\n"
        "for name in ('torch', 'triton', 'transformers'):\n    sys.modules[name] = None\n"
        f"for name in {modules!r}:\n    importlib.import_module(name)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
