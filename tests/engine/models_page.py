"""Writes docs/models.md: `PYTHONPATH=tests python -m engine.models_page > docs/models.md`."""

import re
import sys
from collections.abc import Iterable

import torch
import transformers

from engine.architectures import ARCHITECTURES, TOLERANCE, Verdict, judge
from engine.quantizers import CLOSE, FORMATS, made_and_right
from slipstream.cli.gguf_kinds import KINDS
from slipstream.engine.families import FAMILIES
from slipstream.engine.quantized_config import METHODS, read_quantization
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
may be byte-level BPE or SentencePiece's, and the chat template comes along.

## Quantized checkpoints

Safetensors may be quantized already, by {methods}. Nothing has to be set: config.json says how.
Both codes serve them. Below is what was quantized by compressed-tensors, or as AutoAWQ and
AutoGPTQ do it, in a tiny random model, and gave the logits of Transformers on the numbers meant,
to {close:g}. `w4a16`: weights of 4 bits, multiplied with activations of 16. That is what the log
and `/readyz` call it.

| method | format | on a CPU | on a GPU |
|---|---|---|---|
{formats}
On a CPU weights are made plain when they are loaded, in the type of `--dtype`: memory and speed
are those of bfloat16, four times the size of a file of 4 bits. Only `w8a8` stays int8, in the
compiled kernels of `--quantization int8`. On a GPU (compute capability 8.0 or more; 8.9 for
float8) levels stay as they are, and a kernel multiplies with them; Transformers' code, experts,
embedding and vocabulary have plain weights there too. Each row is scaled by itself: a
checkpoint's static scales for activations are not used, nor are those for a float8 KV cache.

Refused, in one line: every other method (bitsandbytes, MXFP4, NVFP4, torchao), other numbers of
bits, formats made for one kernel (Marlin, GEMV), sparsity, transforms; and `--quantization` on
top. Of GPT-OSS, for one, a copy in bfloat16 is needed. More in
[0036](adr/0036-quantized-checkpoints-are-levels.md).

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


def format_row(name: str, right: bool = True) -> str:
    """`right`: logits came out as they should."""
    method, _, what = name.partition(" ")
    found = read_quantization({"quantization_config": FORMATS[name].config})
    assert found is not None
    words = f"`{found.word('int')}` | `{found.word('float')}`" if right else "**wrong** | "
    return f"| {method.removesuffix(':')} | {what} | {words} |\n"


def row(model_type: str, verdict: Verdict) -> str:
    if verdict.reason:
        said = f"{'refused' if verdict.tried else 'not tried'}: {verdict.reason}"
    else:
        windows = sorted({reach.window for reach in verdict.reaches} - {0})
        said = "**passes**" + (", with windows" if windows else "")
    return f"| {model_type} | {ARCHITECTURES[model_type]} | {_escaped(said)} |\n"


def _escaped(text: str) -> str:
    return re.sub(r"([|<>*_`])", r"\\\1", text) if not text.startswith("**") else text


def page(verdicts: dict[str, Verdict], formats: Iterable[str]) -> str:
    """`formats`: rows of theirs."""
    passing = sum(not verdict.reason for verdict in verdicts.values())
    head = _HEAD.format(
        gguf=", ".join(KINDS),
        native=", ".join(name.removesuffix("ForCausalLM") for name in FAMILIES),
        passing=passing,
        all=len(verdicts),
        proof=sum(PROVED),
        version=transformers.__version__,
        tolerance=TOLERANCE,
        methods=" or ".join([", ".join(METHODS[:-1]), METHODS[-1]]),
        close=CLOSE,
        formats="".join(formats),
    )
    return head + "".join(row(*each) for each in sorted(verdicts.items()))


def main() -> int:
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    verdicts = {model_type: judge(model_type) for model_type in ARCHITECTURES}
    right = {name: made_and_right(name) for name in FORMATS}
    sys.stdout.write(page(verdicts, [format_row(*each) for each in right.items()]))
    return any(verdict.wrong for verdict in verdicts.values()) or not all(right.values())


if __name__ == "__main__":
    sys.exit(main())
