"""A stack with a model that Transformers' code computes, prompts handed over from worker to worker:
tokens equal `generate`'s."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from openai import OpenAI
from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM

from e2e.reference import model_folder
from e2e.stack import Stack

PROMPTS = ("One, two, three, four,", "The river " * 30, "a")
COUNT = 24
END = 2


@pytest.fixture(scope="module")
def gemma() -> Iterator[Path]:
    """A tiny random Gemma 2, with windows that end within the prompts, and the demo's tokenizer."""
    demo = Path(model_folder())
    config = Gemma2Config(
        vocab_size=json.loads((demo / "config.json").read_text())["vocab_size"],
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=24,
        max_position_embeddings=512,
        eos_token_id=END,
        pad_token_id=0,
    )
    torch.manual_seed(3)
    model = Gemma2ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.15)
    with tempfile.TemporaryDirectory(prefix="gemma-", dir="/tmp") as name:
        model.save_pretrained(name)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(demo / file, name)
        yield Path(name)


def generated(folder: Path, prompt: Any) -> str:
    """What `generate` says to a text, or to the messages of a chat."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not isinstance(prompt, str):
        prompt = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    tokens = torch.tensor([tokenizer(prompt)["input_ids"]])
    model = Gemma2ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    made = model.generate(tokens, do_sample=False, max_new_tokens=COUNT)
    return str(tokenizer.decode(made[0, tokens.shape[1] :], skip_special_tokens=True))


def test_answers_equal_generate_through_a_transfer(gemma: Path) -> None:
    stack = Stack(environ={"SLIPSTREAM_MODEL": str(gemma)}, max_model_len=512)
    try:
        client = OpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0)
        wanted: dict[str, Any] = {"model": gemma.name, "temperature": 0, "max_tokens": COUNT}
        for prompt in PROMPTS:
            answer = client.completions.create(prompt=prompt, **wanted)
            assert answer.choices[0].text == generated(gemma, prompt)
        messages: Any = [{"role": "user", "content": "Who are you?"}]
        chat = client.chat.completions.create(messages=messages, **wanted)
        assert chat.choices[0].message.content == generated(gemma, messages)
        reads = [fields for _, name, fields in stack.story("decode-0") if name == "PullDone"]
        assert len(reads) > len(PROMPTS) and all(fields["error"] is None for fields in reads)
        stack.close()
    finally:
        stack.kill()
