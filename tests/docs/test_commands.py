"""Every command and every program in the docs is run against a real stack, or accounted for."""

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from docs.accounts import NEVER_RUN, account_of
from docs.pages import REPOSITORY, Block, blocks_of, commands_of, pages
from e2e.client import MODEL
from e2e.stack import PATIENCE_S, Stack, free_port, ports_in_a_row, until

BLOCKS = [block for page in pages() for block in blocks_of(page)]
SHELL = {"sh", "bash", "console"}
SHOWN = {"text", "mermaid", "ini", "yaml", "js", "ts"}
"""What is looked at by people, or read by programs that are not here."""
SHORTER = [
    (r"--synthetic \d+", "--synthetic 20"),
    (r"( bench .*)--requests \d+", r"\1--requests 2 --output-tokens 8"),
    (r"--find-rate", "--requests 8"),  # a search takes many runs
]
"""The same commands with less to do."""
CLIENTS = {"langchain_openai", "litellm", "llama_index"}
"""Packages that are not among ours: a program with one that is not installed is only parsed."""
TRACE = {"timestamp": 0, "input_length": 700, "output_length": 20, "hash_ids": [0, 1]}


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    port = ports_in_a_row(7)
    stack = Stack(port=port, metrics_port=port + 1, kv_cache_bytes="512MiB", transports="shm")
    yield stack
    stack.close()


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What somebody sees who has just cloned the repository and made `.venv`; what a command writes
    stays in it."""
    folder = tmp_path_factory.mktemp("clone")
    for path in REPOSITORY.iterdir():
        if path.name not in (".git", ".venv"):
            (folder / path.name).symlink_to(path)
    (folder / ".venv").symlink_to(sys.prefix)
    (folder / ".curlrc").write_text("fail-with-body\nsilent\nshow-error\n", encoding="utf-8")
    lines = [json.dumps({**TRACE, "timestamp": 300 * n}) for n in range(20)]
    (folder / "trace.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def answer_id(stack: Stack) -> str:
    """Of an answer that is there."""
    body = {"model": MODEL, "max_tokens": 8, "messages": [{"role": "user", "content": "Hello"}]}
    request = urllib.request.Request(
        f"{stack.url}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as reply:
        return str(json.load(reply)["id"])


def here(text: str, stack: Stack, answer_id: str) -> str:
    """With the address of our stack, its recordings, and an answer of its own."""
    text = re.sub(r"\bchatcmpl-[0-9a-f]{32}\b", answer_id, text)
    text = re.sub(r"(127\.0\.0\.1|localhost):8000", f"127.0.0.1:{stack.port}", text)
    return re.sub(r"\bFOLDER\b", str(stack.records), text)


def run(words: list[str], stack: Stack, clone: Path) -> str:
    environ = {k: v for k, v in os.environ.items() if not k.startswith("SLIPSTREAM_")}
    done = subprocess.run(
        words,
        cwd=clone,
        env={
            **environ,
            "PATH": os.pathsep.join([str(Path(sys.prefix) / "bin"), environ["PATH"]]),
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "CURL_HOME": str(clone),
            "SLIPSTREAM_URL": stack.url,
            "SLIPSTREAM_PORT": str(free_port()),
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",  # `cut` counts bytes
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, f"{words[-1]}\n{done.stdout}{done.stderr}"[-4000:]
    return done.stdout


def named(language: set[str]) -> list[object]:
    return [pytest.param(one, id=one.where) for one in BLOCKS if one.language in language]


def test_every_block_is_of_a_kind_that_is_looked_after() -> None:
    kinds = SHELL | SHOWN | {"python", "json", "toml"}
    assert not [block.where for block in BLOCKS if block.language not in kinds]
    assert len(named(SHELL)) > 10, "the blocks are found"


@pytest.mark.parametrize("block", named(SHELL))
def test_commands(block: Block, stack: Stack, answer_id: str, clone: Path) -> None:
    commands = commands_of(block)
    assert commands, "a block of commands without one"
    for command in commands:
        if check := account_of(command):
            check(command.removeprefix("cd compose && "))
            continue
        assert not NEVER_RUN.search(command), f"{command}: neither run nor accounted for"
        for pattern, shorter in SHORTER:
            command = re.sub(pattern, shorter, command)
        bash = shutil.which("bash") or "bash"
        run([bash, "-e", "-o", "pipefail", "-c", here(command, stack, answer_id)], stack, clone)


@pytest.mark.parametrize("block", named({"python"}))
def test_programs(block: Block, stack: Stack, answer_id: str, clone: Path) -> None:
    tree = ast.parse(block.text)
    roots = set[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            roots |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            roots.add(node.module.partition(".")[0])
    away = {root for root in roots if importlib.util.find_spec(root) is None}
    assert away <= CLIENTS, f"{block.where}: not installed: {away}"
    if not away:
        printed = run([sys.executable, "-c", here(block.text, stack, answer_id)], stack, clone)
        assert printed.strip(), f"{block.where} printed nothing"


@pytest.mark.parametrize("block", named({"json", "toml"}))
def test_data(block: Block) -> None:
    if block.language == "toml":
        tomllib.loads(block.text)
    else:
        json.loads(block.text)


METRIC = re.compile(r"\b((?:slipstream_|vllm:)[a-z0-9_]*[a-z0-9])\b(?!_|\*)")


def test_metrics_that_pages_name_are_there(stack: Stack, answer_id: str) -> None:
    until(lambda: stack.worker("transfer_shm_bytes_total").get("decode-0"), f"READ of {answer_id}")
    there = set[str]()
    for port in range(stack.port, stack.port + 7):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as reply:
            there |= set(re.findall(r"^([a-z0-9_:]+)", reply.read().decode(), re.MULTILINE))
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in there}
    away = {}
    for page in pages():
        named = set(METRIC.findall(page.read_text(encoding="utf-8")))
        if missing := sorted(named - there - families):
            away[page.name] = missing
    assert not away
