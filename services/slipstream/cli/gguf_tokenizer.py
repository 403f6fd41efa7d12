"""Tokenizer of a GGUF file as `tokenizer.json`: byte-level BPE (`gpt2`), SentencePiece's (`llama`).

Source: llama.cpp's table of pre-tokenizers (`llama-vocab.cpp`), and the `tokenizer.json` of the
models that it names.
"""

from collections.abc import Sequence
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    normalizers,
    pre_tokenizers,
    processors,
)
from tokenizers.models import BPE

from slipstream.cli.model_error import ModelError

_SPACE = "▁"
_CONTROL, _USER_DEFINED = 3, 4  # gguf's TokenType

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def build_tokenizer(fields: dict[str, Any]) -> Tokenizer:
    """The tokenizer that the GGUF metadata describe. ModelError if we would have to guess."""
    kind = fields.get("tokenizer.ggml.model")
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    if kind == "gpt2":
        tokenizer = _byte_level(fields, tokens)
    elif kind == "llama":
        tokenizer = _sentencepiece(fields, tokens)
    else:
        raise ModelError(
            f"its tokenizer is of kind {kind}, and only gpt2 (byte-level BPE) and llama "
            "(SentencePiece) are read"
        )
    types = fields.get("tokenizer.ggml.token_type", [1] * len(tokens))
    for token, token_type in zip(tokens, types, strict=True):
        if token_type == _CONTROL:
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif token_type == _USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, special=False, normalized=False)])
    if fields.get("tokenizer.ggml.add_bos_token", kind == "llama"):
        bos = int(fields["tokenizer.ggml.bos_token_id"])
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]} $A", special_tokens=[(tokens[bos], bos)]
        )
    return tokenizer


def _byte_level(fields: dict[str, Any], tokens: list[str]) -> Tokenizer:
    pre = str(fields.get("tokenizer.ggml.pre", "default"))
    tokenizer = Tokenizer(
        BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=_merges(fields),
            ignore_merges=pre == "llama-bpe",
        )
    )
    tokenizer.pre_tokenizer = _pre_tokenizer(pre)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(fields: dict[str, Any], tokens: list[str]) -> Tokenizer:
    """Spaces are `▁` there. What has no token of its own is spelled in bytes."""
    gemma = str(fields["general.architecture"]).startswith("gemma")
    if gemma:  # its runs of spaces are stored as spaces
        tokens = [_SPACE * len(each) if each and not each.strip(" ") else each for each in tokens]
    vocab = {token: index for index, token in enumerate(tokens)}
    unknown = fields.get("tokenizer.ggml.unknown_token_id")
    # Pairs merge in the order of their scores; Gemma's say nothing, there it is that of the tokens.
    ranks = [-index for index in range(len(tokens))] if gemma else fields["tokenizer.ggml.scores"]
    tokenizer = Tokenizer(
        BPE(
            vocab=vocab,
            merges=_merges(fields) or _implied_merges(vocab, ranks),
            byte_fallback=True,
            fuse_unk=True,
            unk_token=None if unknown is None else tokens[int(unknown)],
        )
    )
    back = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if fields.get("tokenizer.ggml.add_space_prefix", True):
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
            replacement=_SPACE, prepend_scheme="first", split=False
        )
        back.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
    tokenizer.decoder = decoders.Sequence(back)
    return tokenizer


def _merges(fields: dict[str, Any]) -> list[tuple[str, str]]:
    merges = (merge.split(" ", 1) for merge in fields.get("tokenizer.ggml.merges", ()))
    return [(left, right) for left, right in merges]


def _implied_merges(vocab: dict[str, int], ranks: Sequence[float]) -> list[tuple[str, str]]:
    """Each way in which two tokens make a third, those first that make the highest in rank."""
    found = []
    for token, index in vocab.items():
        pairs = [(token[:at], token[at:]) for at in range(1, len(token))]
        known = [pair for pair in pairs if pair[0] in vocab and pair[1] in vocab]
        known.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        found += [(ranks[index], len(left), len(right), left, right) for left, right in known]
    found.sort(key=lambda each: each[:3], reverse=True)
    return [(left, right) for *_, left, right in found]


def _pre_tokenizer(pre: str) -> pre_tokenizers.PreTokenizer:
    if pre == "smollm":
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    if pre in ("gpt-2", "default"):
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if pre in ("llama-bpe", "qwen2"):
        pattern = Regex(_LLAMA3 if pre == "llama-bpe" else _QWEN2)
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(pattern, behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    raise ModelError(f"its pre-tokenizer {pre} is not known here")


def tokenizer_config(fields: dict[str, Any], context_length: int) -> dict[str, Any]:
    """`tokenizer_config.json`: special tokens by name, and the chat template."""
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        index = fields.get(f"tokenizer.ggml.{key}_token_id")
        if index is not None:
            config[f"{name}_token"] = tokens[int(index)]
    if template := fields.get("tokenizer.chat_template"):
        config["chat_template"] = template
    return config
