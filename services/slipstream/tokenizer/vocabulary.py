"""What each token id stands for, in bytes: the decoding half of a `tokenizer.json`.

Read from the file instead of asked from the library for each token, because decoding must be a
function of one token and the bytes before it. Two families cover the decoder-only models:
byte-level BPE, and SentencePiece with byte fallback. Others are refused by name.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

Json: TypeAlias = Mapping[str, Any]


class UnknownDecoderError(ValueError):
    """The file asks for a decoder whose text is not a concatenation of its tokens' bytes."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    pieces: tuple[bytes, ...]
    """Bytes of each id; empty where the id is not in use."""
    special_ids: frozenset[int]
    special_texts: dict[str, int]
    added_texts: dict[str, int]
    """The special ones, and others that were added to what was trained."""
    strip_leading: int


def read_vocabulary(file: Json, tokens: Mapping[str, int]) -> Vocabulary:
    """`tokens` is the vocabulary with the added tokens. UnknownDecoderError: see there."""
    steps = _decoder_steps(file.get("decoder"))
    names = [step.get("type") for step in steps]
    pieces = [b""] * (max(tokens.values(), default=-1) + 1)
    if names == ["ByteLevel"]:
        for token, token_id in tokens.items():
            pieces[token_id] = _byte_level(token)
        strip = 0
    else:
        strip = _fill_sentencepiece(pieces, tokens, steps)
    entries = file.get("added_tokens", ())
    added = {entry["content"]: tokens[entry["content"]] for entry in entries}
    special = {e["content"]: added[e["content"]] for e in entries if e.get("special")}
    return Vocabulary(tuple(pieces), frozenset(special.values()), special, added, strip)


def _decoder_steps(decoder: Json | None) -> list[Json]:
    if decoder is None:
        raise UnknownDecoderError("it names no decoder")
    if decoder.get("type") != "Sequence":
        return [decoder]
    return [inner for step in decoder["decoders"] for inner in _decoder_steps(step)]


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's table: each byte as a printable character."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + i): byte for i, byte in enumerate(rest)
    }


_BYTE_OF = _byte_alphabet()


def _byte_level(token: str) -> bytes:
    try:
        return bytes([_BYTE_OF[char] for char in token])
    except KeyError:
        return token.encode()  # an added token, spelled as it is


def _fill_sentencepiece(pieces: list[bytes], tokens: Mapping[str, int], steps: list[Json]) -> int:
    replacements: list[tuple[str, str]] = []
    byte_fallback, strip = False, 0
    for step in steps:
        match step:
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
                replacements.append((old, new))
            case {"type": "Metaspace"}:
                replacements.append((step.get("replacement", "▁"), " "))
                strip += step.get("prepend_scheme", "always") != "never"
            case {"type": "ByteFallback"}:
                byte_fallback = True
            case {"type": "Fuse"}:
                pass
            case {"type": "Strip", "content": " ", "start": int(start), "stop": 0}:
                strip += start
            case _:
                raise UnknownDecoderError(f"its decoder {step.get('type')!r} is not served")
    for token, token_id in tokens.items():
        if byte_fallback and len(token) == 6 and token.startswith("<0x") and token[5] == ">":
            pieces[token_id] = bytes.fromhex(token[3:5])
            continue
        for old, new in replacements:
            token = token.replace(old, new)
        pieces[token_id] = token.encode()
    return strip
