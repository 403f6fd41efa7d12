"""A stack whose workers made int8 of their weights, or whose weights were quantized already: said
at its start, right in its answers."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from e2e.client import Client
from e2e.reference import model_folder
from e2e.stack import Stack
from engine.quantizers import FORMATS, quantized

COUNTING = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17,"


async def test_int8_answers_sensibly_through_a_transfer() -> None:
    stack = Stack(dtype="bfloat16", quantization="int8")
    try:
        assert ", int8 weights)\n" in stack.log
        async with Client(stack.url) as client:
            answer = await client.complete(COUNTING, max_tokens=8)
            assert answer.text.startswith(" 18, 19")
            again = await client.complete(COUNTING, max_tokens=8)
            assert again.text == answer.text
        reads = [fields for _, name, fields in stack.story("decode-0") if name == "PullDone"]
        assert reads and all(fields["error"] is None for fields in reads)
        stack.close()
    finally:
        stack.kill()


def generated(folder: Path, prompt: str, count: int) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = torch.tensor([tokenizer(prompt)["input_ids"]])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    made = model.generate(tokens, do_sample=False, max_new_tokens=count)
    return str(tokenizer.decode(made[0, tokens.shape[1] :], skip_special_tokens=True))


async def test_a_checkpoint_of_4_bits_answers_as_the_numbers_meant(tmp_path: Path) -> None:
    folder = tmp_path / "demo-w4a16"
    form = FORMATS["compressed-tensors pack-quantized: 4 bits, groups"]
    plain = quantized(Path(model_folder()), folder, form)
    stack = Stack(environ={"SLIPSTREAM_MODEL": str(folder)})
    try:
        assert ", w4a16 weights)\n" in stack.log
        async with Client(stack.url) as client:
            for prompt in (COUNTING, "The capital of France is"):
                answer = await client.complete(prompt, max_tokens=12, model=folder.name)
                assert answer.text == generated(plain, prompt, 12)
        reads = [fields for _, name, fields in stack.story("decode-0") if name == "PullDone"]
        assert reads and all(fields["error"] is None for fields in reads)
        stack.close()
    finally:
        stack.kill()
