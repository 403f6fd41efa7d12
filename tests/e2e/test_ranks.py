"""Workers of two ranks in a whole stack: prompts computed by two processes, handed over in two
parts, streams decoded by two others; and what becomes of a stream whose rank dies."""

import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio
import torch
from transformers import PreTrainedModel

from e2e.client import Client
from e2e.stack import Stack, until
from engine.tiny import WORDS, prompt_of, save_model

COUNT = 24


def expected(model: PreTrainedModel, prompt: tuple[int, ...]) -> list[int]:
    ids = torch.tensor([prompt])
    made = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=COUNT,
        min_new_tokens=COUNT,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return [int(token) for token in made[0, len(prompt) :]]


@pytest_asyncio.fixture
async def ranks(tmp_path: Path) -> AsyncIterator[tuple[Stack, PreTrainedModel]]:
    model = save_model(tmp_path, WORDS)
    stack = Stack(
        environ={"SLIPSTREAM_MODEL": str(tmp_path)},
        served_model_name="words",
        tensor_parallel_size=2,
        kv_cache_bytes="2MiB",
        max_model_len=512,
        disaggregation="always",
        transports="shm,bus",
        threads=1,
    )
    yield stack, model
    stack.close()


def followers(worker: int) -> list[int]:
    """Processes of our ranks whose parent this worker is."""
    tasks = Path(f"/proc/{worker}/task")
    children = [task / "children" for task in tasks.iterdir()]
    return [int(pid) for file in children for pid in file.read_text().split()]


async def test_ranks_answer_as_one_process_does(ranks: tuple[Stack, PreTrainedModel]) -> None:
    stack, model = ranks
    body = {"model": "words", "temperature": 0.0, "max_tokens": COUNT, "ignore_eos": True}
    async with Client(stack.url) as client:
        for seed, length in ((1, 40), (2, 5), (1, 40), (3, 333)):
            prompt = prompt_of(length, seed)
            answer = await client.complete(list(prompt), **body)
            assert answer.status == 200, answer.error
            assert stack.answer_tokens(answer.id) == expected(model, prompt)
            assert stack.path(answer.id) == "prefill-0>decode-0"
        stack.until_settled()
        decode = stack.pids()["decode-0"]
        (follower,) = followers(decode)
        os.kill(follower, signal.SIGKILL)
        until(lambda: stack.pids().get("decode-0") not in (None, decode), "another decode-0")
        stack.until_whole()
        assert "slipstream decode: rank 1 is gone, and with it this worker" in stack.log
        prompt = prompt_of(50, 4)
        answer = await client.complete(list(prompt), **body)
        assert stack.answer_tokens(answer.id) == expected(model, prompt)
