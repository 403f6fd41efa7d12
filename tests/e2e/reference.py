"""What Transformers answers to the prompts of the exactness tests, in a process of its own."""

import hashlib
import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

NUM_PROMPTS, PROMPT_TOKENS_MAX, MAX_TOKENS, NUM_TEXTS = 40, 1500, 64, 4
TIE_GAP = 1e-4
"""Two logits that are nearer than this may change places between two right implementations."""
CORPUS = Path(__file__).parents[2] / "LICENSE"
BATCH, PADDING_MAX = 16, 96


@dataclass(frozen=True)
class Expected:
    prompt: list[int]
    tokens: list[int]
    """Up to the end-of-text token, that one included."""
    text: str


@dataclass(frozen=True)
class Reference:
    expected: list[Expected]
    texts: list[tuple[str, Expected]]
    """Prompts to be sent as text, and the answers to the tokens that they stand for."""
    ends: list[int]
    """Tokens that end an answer."""
    model: str

    @classmethod
    def made(cls, config: Any) -> "Reference":
        """Computed once for a model, a set of prompts and a Transformers; pytest keeps it."""
        model = model_folder()
        made_by = [version(name) for name in ("transformers", "torch")]
        source = Path(__file__).read_bytes() + CORPUS.read_bytes()
        prepared = (Path(model) / "slipstream.json").read_bytes()
        digest = hashlib.sha256(source + prepared + json.dumps(made_by).encode()).hexdigest()
        kept = config.cache.get("slipstream/reference", None)
        if not kept or kept["digest"] != digest:
            kept = {"digest": digest, **_run(model, "generate", None)}
            config.cache.set("slipstream/reference", kept)
        expected = [Expected(**one) for one in kept["expected"]]
        texts = [(text, Expected(**one)) for text, one in kept["texts"]]
        return cls(expected, texts, kept["ends"], model)

    def gap(self, tokens: list[int]) -> float:
        """Distance of the two largest logits after these tokens."""
        return float(_run(self.model, "gap", tokens)["gap"])


def model_folder() -> str:
    made = subprocess.run(
        [sys.executable, "-m", "slipstream.cli.main", "model", "prepare", "demo"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=True,
    )
    return made.stdout.strip()


def _run(model: str, what: str, given: Any) -> dict[str, Any]:
    """Threads that spin would be slow where anything else runs beside them."""
    made = subprocess.run(
        [sys.executable, __file__, model, what],
        env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"},
        input=json.dumps(given),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return dict(json.loads(made.stdout))


def draw(corpus: list[int], rng: random.Random) -> list[list[int]]:
    """Pieces of one text, from its beginning (so that they share it) or from anywhere, of every
    magnitude of length, those around a block's border among them; and tokens without sense."""
    lengths = [1, 15, 16, 17, 31, 32, 33, 129, PROMPT_TOKENS_MAX]
    while len(lengths) < NUM_PROMPTS:
        lengths.append(round(PROMPT_TOKENS_MAX ** rng.uniform(0.2, 0.95)))
    prompts = []
    for length in lengths:
        start = rng.choice([0, 0, rng.randrange(len(corpus) - length)])
        prompts.append(corpus[start : start + length])
    for index in rng.sample(range(NUM_PROMPTS), 5):
        prompts[index] = rng.choices(corpus, k=len(prompts[index]))
    return prompts


def _batches(prompts: list[list[int]]) -> list[list[int]]:
    """Indices of prompts of nearly one length, so that little is computed for padding."""
    batches: list[list[int]] = []
    for index in sorted(range(len(prompts)), key=lambda i: len(prompts[i])):
        last = batches[-1] if batches else []
        room = len(prompts[last[0]]) + PADDING_MAX if last else 0
        if len(last) == BATCH or len(prompts[index]) > room:
            batches.append([])
        batches[-1].append(index)
    return batches


def _generate(folder: str) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    pad, ends = model.generation_config.pad_token_id, model.generation_config.eos_token_id
    ends = [ends] if isinstance(ends, int) else ends
    words = CORPUS.read_text(encoding="utf-8").split()
    rng = random.Random(20)
    prompts = draw(tokenizer(" ".join(words))["input_ids"], rng)
    starts = [rng.randrange(len(words) - 100) for _ in range(NUM_TEXTS)]
    texts = [" ".join(words[s : s + 10 * (i + 1)]) for i, s in enumerate(starts)]
    # These take the places of the shortest ones drawn, so that all is one set of 40.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    replaced = order[8 : 8 + NUM_TEXTS]
    for index, text in zip(replaced, texts, strict=True):
        prompts[index] = tokenizer(text)["input_ids"]
    answers: dict[int, list[int]] = {}
    for group in _batches(prompts):
        longest = max(len(prompts[i]) for i in group)
        rows = [[pad] * (longest - len(prompts[i])) + prompts[i] for i in group]
        mask = [[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in group]
        with torch.inference_mode():
            made = model.generate(
                torch.tensor(rows),
                attention_mask=torch.tensor(mask),
                do_sample=False,
                temperature=None,
                top_p=None,
                max_new_tokens=MAX_TOKENS,
            )
        for index, row in zip(group, made[:, longest:].tolist(), strict=True):
            end = next((at + 1 for at, token in enumerate(row) if token in ends), len(row))
            answers[index] = row[:end]
    expected = [
        {
            "prompt": prompt,
            "tokens": answers[index],
            "text": tokenizer.decode(answers[index], skip_special_tokens=True),
        }
        for index, prompt in enumerate(prompts)
    ]
    as_text = [(text, expected[i]) for i, text in zip(replaced, texts, strict=True)]
    plain = [one for index, one in enumerate(expected) if index not in replaced]
    return {"expected": plain, "texts": as_text, "ends": ends}


def _gap(folder: str, tokens: list[int]) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        best = model(torch.tensor([tokens])).logits[0, -1].topk(2).values
    return {"gap": float(best[0] - best[1])}


if __name__ == "__main__":
    given = json.loads(sys.stdin.read())
    folder, what = sys.argv[1:]
    print(json.dumps(_generate(folder) if what == "generate" else _gap(folder, given)))
