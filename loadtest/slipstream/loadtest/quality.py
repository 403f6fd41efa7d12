"""What int8 or fp8 costs in quality: one text, its next tokens predicted with and without.

    python -m slipstream.loadtest.quality [--model demo] [--dtype bfloat16] [--text FILE]
        [--quantization int8] [--kv-cache-dtype auto]

Perplexity is of the whole text as one sequence. Agreement is how often both take the same token to
be the likeliest. Wanted: perplexity at most 1.02 times, agreement at least 95 %; the exit code is 1
if that is missed. The text that comes with it is ours: stories, a recipe, a letter, a program, a
table, questions and answers.
"""

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from slipstream.core.machine import Row
from slipstream.engine.backends import choose_backend
from slipstream.engine.batch import Inputs, build_batch
from slipstream.engine.decoder import Decoder
from slipstream.engine.model_config import ModelConfig
from slipstream.engine.runner import allocate_pool
from slipstream.engine.weights import load_weights
from slipstream.kernels.ops import Quantization
from slipstream.kv.layout import KvDtype
from slipstream.types import BLOCK_TOKENS

TEXT = Path(__file__).with_name("quality.txt")
PERPLEXITY_RATIO_MAX = 1.02
AGREEMENT_MIN = 0.95
_CHUNK = 256


@dataclass(frozen=True)
class Predictions:
    """Of each token but the first."""

    log_probabilities: Tensor
    """Of the token that the text has: float32 `[T - 1]`."""
    likeliest: Tensor
    """int64 `[T - 1]`"""

    @property
    def perplexity(self) -> float:
        return math.exp(-float(self.log_probabilities.double().mean()))


@dataclass(frozen=True)
class Quality:
    plain: Predictions
    quantized: Predictions

    @property
    def perplexity_ratio(self) -> float:
        return self.quantized.perplexity / self.plain.perplexity

    @property
    def agreement(self) -> float:
        return float((self.quantized.likeliest == self.plain.likeliest).float().mean())

    @property
    def good(self) -> bool:
        return self.perplexity_ratio <= PERPLEXITY_RATIO_MAX and self.agreement >= AGREEMENT_MIN


def measure(
    folder: Path,
    dtype: KvDtype,
    tokens: Sequence[int],
    quantization: Quantization = "int8",
    kv_dtype: KvDtype | None = None,
) -> Quality:
    """Both predictions of `tokens`, which have to fit into the model's context."""
    plain = predict(folder, dtype, tokens)
    return Quality(plain, predict(folder, dtype, tokens, quantization, kv_dtype))


def predict(
    folder: Path,
    dtype: KvDtype,
    tokens: Sequence[int],
    quantization: Quantization = "none",
    kv_dtype: KvDtype | None = None,
) -> Predictions:
    config, wide = ModelConfig.read(folder), getattr(torch, dtype)
    blocks = tuple(range(-(-len(tokens) // BLOCK_TOKENS)))
    pool = allocate_pool(config.kv_layout(kv_dtype or dtype), len(blocks))
    backend = choose_backend(config, wide, pool.device, quantization, kv_dtype=pool.dtype)
    weights = load_weights(folder, config, wide, pool.device, backend)
    decoder = Decoder(config, weights, backend)
    known, likeliest = [], []
    for start in range(0, len(tokens) - 1, _CHUNK):
        chunk = tuple(tokens[start : start + _CHUNK])
        row = Row("text", 1, chunk, start, blocks, True)
        batch = build_batch([row], [Inputs(chunk, start)], pool.device)
        batch = replace(batch, sample_indices=torch.arange(len(chunk)))
        with torch.inference_mode():
            logits = decoder.forward(batch, pool)
            following = torch.tensor(tokens[start + 1 : start + 1 + len(chunk)])
            logits = logits[: len(following)]
            chosen = logits.gather(1, following[:, None])[:, 0]
            known.append(chosen - logits.logsumexp(-1))
            likeliest.append(logits.argmax(-1))
    return Predictions(torch.cat(known), torch.cat(likeliest))


def prepared(model: str) -> Path:
    """The folder of what `slipstream serve` would take this for."""
    command = [sys.executable, "-m", "slipstream.cli.main", "model", "prepare", model]
    made = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return Path(made.stdout.strip())


def encode(folder: Path, text: str) -> list[int]:
    tokens: list[int] = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    return tokens


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo", help="as for slipstream serve")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--quantization", choices=["none", "int8", "fp8"], default="int8")
    parser.add_argument("--kv-cache-dtype", choices=["auto", "fp8"], default="auto")
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--json", action="store_true", help="both numbers as JSON, no more")
    options = parser.parse_args()
    folder = prepared(options.model)
    tokens = encode(folder, options.text.read_text(encoding="utf-8"))
    kv_dtype: KvDtype | None = "float8_e4m3fn" if options.kv_cache_dtype == "fp8" else None
    quality = measure(folder, options.dtype, tokens, options.quantization, kv_dtype)
    if options.json:
        numbers = {"perplexity_ratio": quality.perplexity_ratio, "agreement": quality.agreement}
        print(json.dumps(numbers))
        return 0 if quality.good else 1
    print(f"{folder.name}, {options.text.name}, {len(tokens)} tokens")
    print(f"perplexity {options.dtype:<9}{quality.plain.perplexity:9.4f}")
    print(f"perplexity {'quantized':<9}{quality.quantized.perplexity:9.4f}", end="")
    print(f"  {quality.perplexity_ratio:.4f} times, wanted: at most {PERPLEXITY_RATIO_MAX}")
    print(f"agreement           {quality.agreement:9.2%}  wanted: at least {AGREEMENT_MIN:.0%}")
    return 0 if quality.good else 1


if __name__ == "__main__":
    sys.exit(main())
