"""Writes docs/models.md: `PYTHONPATH=tests python -m engine.models_page > docs/models.md`."""

import re
import sys

import torch
import transformers

from engine.architectures import ARCHITECTURES, TOLERANCE, Verdict, judge
from slipstream.cli.gguf_kinds import KINDS
from slipstream.engine.families import FAMILIES
from slipstream.engine.transformers_model import PROVED

_HEAD = """\
# Models

<!-- Written by `make docs`, which asks each architecture. -->

A model is computed by one of two codes. `--model-impl` says by which; `auto`, the default, takes
the first one that knows the model.

| `--model-impl` | code | serves |
|---|---|---|
| `native` | ours, with compiled kernels and `--quantization` | {native} |
| `transformers` | Transformers' own, with our attention in it | what passes below |

What neither can serve ends the start with one line that says why, and exit code 4. Code that comes
with a model is never run. On a CPU, models with experts (Mixtral, Qwen's) and those of
Transformers' code have no compiled kernels, and are slower by what
[0033](adr/0033-foreign-models-run-in-transformers.md) says.

Both read folders of safetensors; `slipstream serve FILE.gguf` makes such a folder, once. It reads
{gguf}, with any type of quantization, which is undone: weights become bfloat16. The tokenizer
may be byte-level BPE or SentencePiece's, and the chat template comes along. Safetensors that are
quantized are refused: of GPT-OSS, for one, a copy in bfloat16 is needed.

## By Transformers' code

An architecture passes if its layers keep keys and values of one shape, and nothing else. A worker
finds that out in two steps: the model is built without memory, and each layer is asked what it
keeps and who sees what; then the loaded model computes {proof} tokens both ways, at once as
Transformers does and in pieces over KV blocks.

Below is what came out for each class that Transformers {version} has for causal language models,
tiny, random, in float32: passing means that every token's logits equal Transformers' own to
{tolerance:g} of their spread. Prompts came whole, in chunks, on blocks of another request, in mixed
batches and token by token, and went on in another pool. A model type that stands for pictures and
sound too is served for its text.

{passing} of {all} pass.

| model type | class | |
|---|---|---|
"""


def row(model_type: str, verdict: Verdict) -> str:
    if verdict.reason:
        said = f"{'refused' if verdict.tried else 'not tried'}: {verdict.reason}"
    else:
        windows = sorted({reach.window for reach in verdict.reaches} - {0})
        said = "**passes**" + (", with windows" if windows else "")
    return f"| {model_type} | {ARCHITECTURES[model_type]} | {_escaped(said)} |\n"


def _escaped(text: str) -> str:
    return re.sub(r"([|<>*_`])", r"\\\1", text) if not text.startswith("**") else text


def page(verdicts: dict[str, Verdict]) -> str:
    passing = sum(not verdict.reason for verdict in verdicts.values())
    head = _HEAD.format(
        gguf=", ".join(KINDS),
        native=", ".join(name.removesuffix("ForCausalLM") for name in FAMILIES),
        passing=passing,
        all=len(verdicts),
        proof=sum(PROVED),
        version=transformers.__version__,
        tolerance=TOLERANCE,
    )
    return head + "".join(row(*each) for each in sorted(verdicts.items()))


def main() -> int:
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    verdicts = {model_type: judge(model_type) for model_type in ARCHITECTURES}
    sys.stdout.write(page(verdicts))
    return any(verdict.wrong for verdict in verdicts.values())


if __name__ == "__main__":
    sys.exit(main())
