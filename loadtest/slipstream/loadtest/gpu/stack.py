"""A whole stack on one card, prefill and decode apart, and Transformers' continuous batching with
the same model, prompts and lengths."""

import asyncio
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

from slipstream.engine.model_config import ModelConfig
from slipstream.loadtest.chaos.stack import free_port
from slipstream.loadtest.gpu.floors import DEVICE
from slipstream.loadtest.gpu.results import Row, rate_row
from slipstream.loadtest.sse_client import Connection, Counted, connect, post

STREAMS, PROMPT_TOKENS, ANSWER_TOKENS = 64, 512, 128
READY_S, WARM_STREAMS = 100.0, 4
OURS = f"{STREAMS} streams of {ANSWER_TOKENS} tokens, output"


def read_vocab(folder: Path) -> int:
    return ModelConfig.read(folder, dummy=True).vocab_size


def prompts(count: int, vocab: int, seed: int) -> list[list[int]]:
    """No two alike: nothing is found in a cache."""
    return [
        [(seed + 7919 * (i * PROMPT_TOKENS + j)) % (vocab - 1) for j in range(PROMPT_TOKENS)]
        for i in range(count)
    ]


class Served:
    """`slipstream serve` of the folder, and its streams."""

    def __init__(self, folder: Path, device: str, *flags: str) -> None:
        self.port = free_port()
        words = ["--load-format", "dummy", "--device", device, "--kvindex", "0"]
        words += ["--disaggregation", "always", "--max-model-len", "2048"]
        words += ["--prefill-budget-tokens", "4096", "--port", str(self.port)]
        command = [sys.executable, "-m", "slipstream.cli.main", "serve", str(folder), *words]
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 it lives as long as we do
        self._process = subprocess.Popen(
            [*command, *flags], stdout=self._log, stderr=subprocess.STDOUT
        )

    def until_ready(self, patience_s: float) -> None:
        """RuntimeError: it is not; with what it said last."""
        end_s = time.monotonic() + patience_s
        while time.monotonic() < end_s and self._process.poll() is None:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/readyz", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        self._log.seek(0)
        raise RuntimeError("not ready: " + " ".join(self._log.read().split())[-250:])

    async def ask(self, asked: Sequence[list[int]], tokens: int) -> tuple[list[float], float]:
        """All at once: seconds to each first token, and until all were there."""
        connections = [await connect(self.port, Counted()) for _ in asked]
        began_s = time.monotonic()
        firsts = await asyncio.gather(
            *(_one(each, prompt, tokens) for each, prompt in zip(connections, asked, strict=True))
        )
        taken_s = time.monotonic() - began_s
        for each in connections:
            each.close()
        return list(firsts), taken_s

    def close(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


async def _one(connection: Connection, prompt: list[int], tokens: int) -> float:
    body: dict[str, object] = {
        "model": "shape",
        "prompt": prompt,
        "max_tokens": tokens,
        "ignore_eos": True,
        "temperature": 0.0,
        "stream": True,
    }
    sent_s = await connection.stream(post("/v1/completions", body))
    return connection.first_s - sent_s


def ours(folder: Path, floors: dict[str, float], tell: Callable[[Row], None]) -> None:
    served = Served(folder, str(DEVICE), "--served-model-name", "shape")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        served.until_ready(READY_S)
        vocab = read_vocab(folder)
        asyncio.run(served.ask(prompts(WARM_STREAMS, vocab, 1), 16))
        (first_s,), alone_s = asyncio.run(served.ask(prompts(1, vocab, 2), ANSWER_TOKENS))
        tell(Row("one stream, first token", first_s * 1e3, "ms"))
        tell(Row("one stream, each token", (alone_s - first_s) / (ANSWER_TOKENS - 1) * 1e3, "ms"))
        firsts, taken_s = asyncio.run(served.ask(prompts(STREAMS, vocab, 3), ANSWER_TOKENS))
        tell(Row(OURS, STREAMS * ANSWER_TOKENS / taken_s, "tokens/s"))
        tell(Row(f"{STREAMS} streams, first token, median", statistics.median(firsts) * 1e3, "ms"))
    finally:
        served.close()


def theirs(folder: Path, floors: dict[str, float], tell: Callable[[Row], None]) -> None:
    """What `generate_batch` makes of the same prompts; our rate beside it is the share."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    config = AutoConfig.from_pretrained(folder)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    how = GenerationConfig(
        max_new_tokens=ANSWER_TOKENS,
        do_sample=False,
        eos_token_id=-1,
        pad_token_id=0,
    )

    def seconds(asked: list[list[int]]) -> float:
        began_s = time.monotonic()
        made = model.generate_batch(asked, generation_config=how, persistent_manager=True)
        taken_s = time.monotonic() - began_s
        lengths = {len(each.generated_tokens) for each in made.values()}
        if len(made) != len(asked) or lengths != {ANSWER_TOKENS}:
            errors = {str(each.error) for each in made.values()}
            raise RuntimeError(f"{len(made)} answers of {sorted(lengths)} tokens: {errors}")
        return taken_s

    seconds(prompts(STREAMS, config.vocab_size, 1))  # sizes its cache, captures its graphs
    rate = STREAMS * ANSWER_TOKENS / seconds(prompts(STREAMS, config.vocab_size, 3))
    tell(Row(f"Transformers: {OURS}", rate, "tokens/s"))
    if OURS in floors:
        tell(rate_row("ours beside it", floors[OURS], "tokens/s", rate, 1.0))
