"""Clients that people have, unchanged, in front of a real stack.

What they must get back is forced by grammars, never by luck: the demo model is small.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from clients import environments
from e2e.client import MODEL
from e2e.reference import model_folder
from e2e.stack import Stack

PROGRAMS = environments.HERE / "programs"
SDKS = ["openai_sdk", "anthropic_sdk", "langchain_sdk", "agents_sdk"]
NODE = ["openai_sdk", "ai_sdk"]
TIMEOUT_S = 500.0


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    stack = Stack(kv_cache_bytes="512MiB", max_model_len=4096)
    yield stack
    stack.close()


@pytest.fixture(scope="module")
def environ(stack: Stack) -> dict[str, str]:
    return {
        "SLIPSTREAM_BASE_URL": f"{stack.url}/v1",
        "SLIPSTREAM_MODEL": MODEL,
        "SLIPSTREAM_MODEL_PATH": model_folder(),
    }


needs_python = pytest.mark.skipif(
    bool(environments.lacks_python()), reason=environments.lacks_python()
)
needs_node = pytest.mark.skipif(bool(environments.lacks_node()), reason=environments.lacks_node())
needs_vllm = pytest.mark.skipif(bool(environments.lacks_vllm()), reason=environments.lacks_vllm())


@needs_python
@pytest.mark.parametrize("program", [*SDKS, "litellm_sdk"])
def test_python(program: str, environ: dict[str, str]) -> None:
    python = environments.SDK if program in SDKS else environments.TOOLS
    command = [str(python), f"{program}.py"]
    said = environments.run(command, PROGRAMS, TIMEOUT_S, **environ)
    assert said.count(" ok") >= 2, said


@needs_node
@pytest.mark.parametrize("program", NODE)
def test_node(program: str, environ: dict[str, str], tmp_path: Path) -> None:
    """Node looks for packages beside the program."""
    (tmp_path / "node_modules").symlink_to(environments.NODE_MODULES)
    for name in ("common.mjs", f"{program}.mjs"):
        shutil.copy(PROGRAMS / name, tmp_path)
    shutil.copy(environments.HERE / "package.json", tmp_path)
    said = environments.run(["node", f"{program}.mjs"], tmp_path, TIMEOUT_S, **environ)
    assert said.count(" ok") >= 3, said


@needs_python
def test_lm_eval(environ: dict[str, str], tmp_path: Path) -> None:
    """Log probabilities of given continuations, by completions with echo."""
    for name in ("lm_eval_task.yaml", "words.jsonl"):
        shutil.copy(PROGRAMS / name, tmp_path)
    arguments = {
        "model": environ["SLIPSTREAM_MODEL"],
        "base_url": environ["SLIPSTREAM_BASE_URL"] + "/completions",
        "tokenizer": environ["SLIPSTREAM_MODEL_PATH"],
        "num_concurrent": "4",
        "tokenized_requests": "False",
    }
    command = [
        *(str(environments.TOOLS), "-m", "lm_eval", "--model", "local-completions"),
        *("--model_args", ",".join(f"{name}={value}" for name, value in arguments.items())),
        *("--tasks", "slipstream_words", "--include_path", str(tmp_path)),
        *("--output_path", str(tmp_path / "out")),
    ]
    environments.run(command, tmp_path, TIMEOUT_S, HF_DATASETS_CACHE=str(tmp_path / "cache"))
    (found,) = (tmp_path / "out").rglob("results_*.json")
    accuracy = json.loads(found.read_text())["results"]["slipstream_words"]["acc,none"]
    # A model of 135 million parameters knows that the sun rises in the east; guessing gives 0.36.
    assert accuracy >= 0.75, accuracy


@needs_python
def test_guidellm(environ: dict[str, str], tmp_path: Path) -> None:
    root = environ["SLIPSTREAM_BASE_URL"].removesuffix("/v1")
    command = [
        *(str(environments.TOOLS), "-m", "guidellm", "run", "--disable-console-interactive"),
        *("--backend", f"kind=openai_http,target={root},model={environ['SLIPSTREAM_MODEL']}"),
        *("--tokenizer", f"kind=hf_auto,model={environ['SLIPSTREAM_MODEL_PATH']}"),
        *("--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=8"),
        *("--profile", "kind=concurrent,streams=2"),
        *("--constraint", "kind=max_requests,count=6"),
        *("--output", f"kind=json,path={tmp_path / 'out.json'}"),
    ]
    environments.run(command, tmp_path, TIMEOUT_S)
    (found,) = tmp_path.rglob("*.json")
    (benchmark,) = json.loads(found.read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    assert totals["successful"] >= 6 and not totals["errored"], totals


@needs_vllm
@pytest.mark.parametrize("backend", ["openai", "openai-chat"])
def test_vllm_bench_serve(backend: str, environ: dict[str, str], tmp_path: Path) -> None:
    path = "/v1/completions" if backend == "openai" else "/v1/chat/completions"
    command = [
        *(str(environments.VLLM), "-m", "vllm.entrypoints.cli.main", "bench", "serve"),
        *("--backend", backend, "--endpoint", path),
        *("--base-url", environ["SLIPSTREAM_BASE_URL"].removesuffix("/v1")),
        *("--model", environ["SLIPSTREAM_MODEL"]),
        *("--tokenizer", environ["SLIPSTREAM_MODEL_PATH"]),
        *("--dataset-name", "random", "--random-input-len", "64", "--random-output-len", "8"),
        *("--num-prompts", "6", "--max-concurrency", "2", "--ignore-eos"),
        *("--save-result", "--result-dir", str(tmp_path)),
    ]
    environments.run(command, tmp_path, TIMEOUT_S)
    (found,) = tmp_path.glob("*.json")
    result = json.loads(found.read_text())
    assert result["completed"] == 6 and result["total_output_tokens"] == 48, result
