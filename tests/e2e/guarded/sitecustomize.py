"""Watches a process for what none of ours may do: Python imports this before anything else, if this
folder is on its path.

Unpickling, and unmarshalling of anything but modules, is told and fails. What a client said carries
a mark; where that turns up in code, in the name of a file, a host or a command, it is told. Nothing
of the product knows of this.
"""

import os
import pickle
import sys
from types import CodeType
from typing import Any, NoReturn

MARK = os.environ["E2E_MARK"]
_TOLD = os.open(os.environ["E2E_TOLD"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
REACHES_OUT = ("open", "os.", "shutil.", "socket.", "subprocess.", "ctypes.dlopen", "import")
_IMPORTERS = ("<frozen importlib", "<frozen zipimport", "<frozen runpy")


def tell(line: str) -> None:
    os.write(_TOLD, f"{os.getpid()} {line}\n".encode())


def _refuse(what: str) -> NoReturn:
    tell(what)
    raise RuntimeError(what)


def _marked(value: object) -> bool:
    if isinstance(value, CodeType):
        return any(map(_marked, (*value.co_names, *value.co_consts)))
    if isinstance(value, list | tuple):
        return any(map(_marked, value))
    if isinstance(value, bytes | bytearray):
        return MARK.encode() in value
    return isinstance(value, str | os.PathLike) and MARK in os.fsdecode(value)


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "pickle.find_class":
        _refuse(event)
    if event.startswith("marshal."):
        caller = sys._getframe(1).f_code.co_filename
        if not caller.startswith(_IMPORTERS):
            _refuse(f"{event} in {caller}")
    if (event in ("compile", "exec") or event.startswith(REACHES_OUT)) and _marked(arguments):
        _refuse(f"{event} with what a client said")


def _never(*_: object, **__: object) -> NoReturn:
    _refuse("pickle")


class _Unpickler(pickle.Unpickler):
    """Others may inherit from it, as long as they make none."""

    def __init__(self, *_: object, **__: object) -> None:
        _never()


pickle.load = pickle.loads = pickle._load = pickle._loads = _never  # type: ignore[attr-defined]
pickle.Unpickler = _Unpickler  # type: ignore[misc]
sys.addaudithook(_hook)
tell("watched " + " ".join(sys.orig_argv[1:]))
