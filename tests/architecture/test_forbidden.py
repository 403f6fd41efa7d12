"""What may not occur in the source at all: pickle, eval, the environment, paths of one machine."""

import ast
import re
import subprocess
from collections.abc import Iterator

from architecture.sources import REPOSITORY, source_files

UNSAFE_MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__"}
ENVIRONMENT_READERS = {
    "services/slipstream/cli/main.py",
    "services/slipstream/offline/llm.py",  # the same for a program: it calls no command
    "kernels/slipstream/kernels/build.py",  # the lowest layer: nobody above it chooses the compiler
}
MACHINE_PATHS = re.compile("/" + "opt/dev|/" + "work/|/" + "root/")
"""Put together so that this file does not contain what it looks for."""


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]


def unsafe_calls(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id=name)) if name in UNSAFE_CALLS:
                yield f"{name}() in line {node.lineno}"


def environment_reads(tree: ast.AST) -> Iterator[int]:
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id="os"), attr="environ" | "environb" | "getenv"):
                yield node.lineno


def test_nothing_unpickles_or_evaluates() -> None:
    for path in source_files():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert not UNSAFE_MODULES & set(imported(tree)), path
        assert not list(unsafe_calls(tree)), path


def test_only_the_command_reads_the_environment() -> None:
    readers = {}
    for path in source_files():
        name = path.relative_to(REPOSITORY).as_posix()
        lines = list(environment_reads(ast.parse(path.read_text(encoding="utf-8"))))
        if lines and name not in ENVIRONMENT_READERS:
            readers[name] = lines
    assert not readers


def test_no_path_of_one_machine() -> None:
    listing = subprocess.run(
        ["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    for name in filter(None, listing.stdout.split("\0")):
        path = REPOSITORY / name
        if path.is_file() and path.stat().st_size < 2**20:
            found = MACHINE_PATHS.search(path.read_bytes().decode("utf-8", "replace"))
            assert found is None, f"{name} names {found}"
