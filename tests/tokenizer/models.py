"""Tokenizers for the tests: two tiny ones trained here, and the demo model's."""

import json
import os
from pathlib import Path

import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from slipstream.tokenizer.codec import TokenizerCodec

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CORPUS = [
    "The quick brown fox jumps over the lazy dog.",
    "Hello world, hello there! How are you today?",
    "Ünïcödé is naïve; 你好,世界 and こんにちは with 😀 emoji 🚀.",
    "def main():\n    return 1 + 2  # spaces  and\ttabs",
    "user system assistant im_start im_end",
]


def demo_folder() -> Path | None:
    """The demo model's folder. None only where SLIPSTREAM_NO_DEMO=1 says that there is none."""
    if os.environ.get("SLIPSTREAM_NO_DEMO") == "1":
        return None
    default = Path.home() / ".cache/slipstream/models/smollm2-135m-instruct"
    folder = Path(os.environ.get("SLIPSTREAM_DEMO_MODEL") or default)
    assert (folder / "tokenizer.json").exists(), (
        f"no demo model in {folder}: run `make test`, which prepares it, set SLIPSTREAM_DEMO_MODEL "
        "to its folder, or set SLIPSTREAM_NO_DEMO=1 to go without"
    )
    return folder


def codec_of(codecs: dict[str, TokenizerCodec], family: str) -> TokenizerCodec:
    """Skips the test where `demo_folder` is None and the family is the demo model's."""
    if family not in codecs:
        pytest.skip("SLIPSTREAM_NO_DEMO=1")
    return codecs[family]


def save(tokenizer: Tokenizer, folder: Path, **config: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    plain = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(plain))
    return folder


def byte_level(folder: Path, **config: object) -> Path:
    """Byte-level BPE, the family of GPT-2, Llama 3, Qwen and SmolLM."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return save(tokenizer, folder, **{"chat_template": CHATML, **config})


def sentencepiece(folder: Path, **config: object) -> Path:
    """BPE over characters with byte fallback, the family of Llama 2, Mistral and Gemma."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=480,
        special_tokens=["<unk>", *SPECIALS, *bytes_],
        show_progress=False,
        limit_alphabet=60,
    )
    tokenizer.train_from_iterator(CORPUS[:2] * 3, trainer)
    file = json.loads(tokenizer.to_str())
    # The trainer makes bytes special; in real files they are ordinary vocabulary.
    file["added_tokens"] = [t for t in file["added_tokens"] if not t["content"].startswith("<0x")]
    tokenizer = Tokenizer.from_str(json.dumps(file))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return save(tokenizer, folder, **{"chat_template": CHATML, **config})
