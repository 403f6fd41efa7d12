"""Readable without scrolling: 400 lines a file, 60 lines a function (Triton kernels: 90)."""

import ast
from collections.abc import Iterator
from pathlib import Path

from architecture.sources import REPOSITORY, source_files

FILE_LINES = 400
FUNCTION_LINES = 60
TRITON_LINES = 90
LARGER_FILES = {"shared/slipstream/messages.py": 850, "shared/slipstream/core/machine.py": 550}
"""Vocabularies: that of the wire, and that of machines. Each is one table and stays in one file."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(path: Path) -> Iterator[Function]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, Function):
            yield node


def limit_of(function: Function) -> int:
    decorators = {ast.unparse(decorator) for decorator in function.decorator_list}
    return TRITON_LINES if any("triton.jit" in name for name in decorators) else FUNCTION_LINES


def test_files_are_short() -> None:
    too_long = {}
    for path in source_files():
        name = path.relative_to(REPOSITORY).as_posix()
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > LARGER_FILES.get(name, FILE_LINES):
            too_long[name] = lines
    assert not too_long


def test_functions_are_short() -> None:
    too_long = {}
    for path in source_files():
        for function in functions(path):
            lines = (function.end_lineno or function.lineno) - function.lineno + 1
            if lines > limit_of(function):
                name = path.relative_to(REPOSITORY).as_posix()
                too_long[f"{name}:{function.lineno} {function.name}"] = lines
    assert not too_long
