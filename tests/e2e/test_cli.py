"""The commands for people against a real stack, as they are typed."""

import json
import os
import subprocess
import sys

import psutil

from e2e.client import MODEL
from e2e.stack import PATIENCE_S, Stack

QUESTION = "What is the capital of France?"


MARK = "E2E_CLI"
"""In the environment of what we start, and of all that this starts."""


def is_marked(process: psutil.Process) -> bool:
    try:
        return process.environ().get(MARK) == str(os.getpid())
    except psutil.Error:  # it has just ended, or is somebody else's
        return False


def slipstream(*words: str, typed: str = "", **settings: str) -> "subprocess.CompletedProcess[str]":
    environ = {k: v for k, v in os.environ.items() if not k.startswith("SLIPSTREAM_")}
    return subprocess.run(
        [sys.executable, "-m", "slipstream.cli.main", *words],
        input=typed,
        env={
            **environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            MARK: str(os.getpid()),
            **{f"SLIPSTREAM_{name}": value for name, value in settings.items()},
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
    )


def test_run(stack: Stack) -> None:
    words = ("--url", stack.url, "--temperature", "0", "--max-tokens", "12")
    first = slipstream("run", QUESTION, *words)
    assert first.returncode == 0, first.stderr
    assert "Paris" in first.stdout and "prefill-0>decode-0" in first.stderr
    again = slipstream("run", MODEL, "-", *words, "--json", typed=QUESTION)
    said = json.loads(again.stdout)
    assert said["text"] == first.stdout.rstrip("\n") and said["finish_reason"] in ("stop", "length")
    assert said["ttft_s"] > 0 and said["tokens_per_s"] > 0


def test_run_starts_a_server_of_its_own_and_ends_it() -> None:
    settings = {"KV_CACHE_BYTES": "64MiB", "MAX_MODEL_LEN": "512", "DTYPE": "float32"}
    asked = slipstream(
        "run", "demo", "--temperature", "0", "--max-tokens", "12", QUESTION, **settings
    )
    assert asked.returncode == 0, asked.stderr
    assert "Paris" in asked.stdout
    (line,) = asked.stderr.splitlines()
    assert line.startswith("first token ")
    left = [process for process in psutil.process_iter() if is_marked(process)]
    assert not left


def test_a_server_that_cannot_start_says_why() -> None:
    asked = slipstream("run", QUESTION, KV_CACHE_BYTES="900TiB")
    assert asked.returncode == 6 and not asked.stdout
    (line,) = asked.stderr.splitlines()
    assert "--kv-cache-bytes 900TiB" in line


def test_chat_remembers(stack: Stack) -> None:
    typed = f"/set temperature 0\n/set max_tokens 12\n{QUESTION}\nAre you sure?\n"
    talked = slipstream("chat", "--url", stack.url, typed=typed)
    assert talked.returncode == 0, talked.stderr
    assert "Paris" in talked.stdout
    numbers = [line for line in talked.stderr.splitlines() if line.startswith("first token")]
    prompts = [int(line.partition("prompt ")[2].split()[0]) for line in numbers]
    assert len(prompts) == 2 and prompts[1] > prompts[0] + 5
    assert "of 2048" in numbers[0]


def test_a_context_that_is_too_small_is_said_with_numbers(stack: Stack) -> None:
    talked = slipstream("chat", "--url", stack.url, typed="word " * 3000 + "\n")
    assert talked.returncode == 1
    assert "maximum context length is 2048 tokens" in talked.stderr
    assert "/clear forgets the conversation" in talked.stderr


def test_bench_and_top(stack: Stack) -> None:
    load = ("--requests", "6", "--concurrency", "3", "--prompt-tokens", "40", "--output-tokens")
    loaded = slipstream("bench", "--url", stack.url, *load, "20", "--json")
    assert loaded.returncode == 0, loaded.stderr
    report = json.loads(loaded.stdout)
    assert (report["answers"], report["prompt_tokens"], report["output_tokens"]) == (6, 240, 120)
    shown = slipstream("top", "--url", stack.url, "--once", "--json")
    assert shown.returncode == 0, shown.stderr
    seen = json.loads(shown.stdout)
    assert (seen["state"], seen["model"]) == ("ready", MODEL)
    assert {one["node_id"] for one in seen["workers"]} == {"prefill-0", "decode-0"}
    assert all(one["kv_used"] is not None for one in seen["workers"])
    assert {"frontend-0", "tokenizer-0", "kvindex-0"} <= seen["services"].keys()
    table = slipstream("top", "--url", stack.url, "--once").stdout
    assert "decode-0" in table and max(map(len, table.splitlines()[3:])) <= 80
