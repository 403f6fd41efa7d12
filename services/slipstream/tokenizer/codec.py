"""A model folder's tokenizer: prompts to token ids, ids to bytes and text."""

import json
import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import msgspec
import tokenizers

from slipstream.errors import ErrorCode
from slipstream.messages import ChatPrompt, Prompt, TextPrompt, TokenPrompt
from slipstream.tokenizer.chat import ChatTemplate, PromptError, refuse
from slipstream.tokenizer.detokenizer import TextAssembler
from slipstream.tokenizer.dialect import AUTO, NONE, DialectError, detect
from slipstream.tokenizer.vocabulary import UnknownDecoderError, Vocabulary, read_vocabulary
from slipstream.types import unpack_tokens

__all__ = ["CodecError", "PromptError", "TokenizerCodec"]


_END_TOKENS = 32
"""Enough for `</think>` and white space, however it is cut into tokens."""


class CodecError(Exception):
    """The model folder's tokenizer cannot be used; one line that names the file."""


class TokenizerCodec:
    """Immutable after construction; may be used by several threads at once."""

    def __init__(
        self, model_path: Path, tool_format: str = AUTO, reasoning_format: str = AUTO
    ) -> None:
        file = model_path / "tokenizer.json"
        self._source = _read(file)
        parsed = _object(self._source, file)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(self._source)
            self._vocabulary: Vocabulary = read_vocabulary(
                parsed, self._tokenizer.get_vocab(with_added_tokens=True)
            )
        except UnknownDecoderError as error:
            raise CodecError(f"{file}: {error}") from error
        except Exception as error:  # the library raises no narrower one for a bad file
            raise CodecError(f"{file}: not a tokenizer ({_first_line(error)})") from error
        # A file may ask to cut or fill its input; a prompt is encoded as it is or refused.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        config = _optional_object(model_path / "tokenizer_config.json")
        named = _special_tokens(model_path, config)
        self._templates = _templates(model_path, config, named)
        try:
            self.dialect = detect(self._templates.values(), tool_format, reasoning_format)
        except DialectError as error:
            raise CodecError(str(error)) from error
        self._longest_piece = max(map(len, self._vocabulary.pieces), default=1) or 1
        specials = sorted(self._vocabulary.special_texts, key=len, reverse=True)
        self._special_text = re.compile("|".join(map(re.escape, specials)) or "(?!)")

    # --- ids to text ---

    @property
    def vocab_size(self) -> int:
        """One more than the highest token id."""
        return len(self._vocabulary.pieces)

    @property
    def special_ids(self) -> frozenset[int]:
        return self._vocabulary.special_ids

    @property
    def added_texts(self) -> Mapping[str, int]:
        """Tokens that were added to the vocabulary whole, special or not, by what they spell."""
        return self._vocabulary.added_texts

    @property
    def strip_leading(self) -> int:
        return self._vocabulary.strip_leading

    @property
    def has_chat_template(self) -> bool:
        return bool(self._templates)

    def token_bytes(self, token_id: int) -> bytes:
        """Empty for an id outside the vocabulary: models pad their output layer."""
        pieces = self._vocabulary.pieces
        return pieces[token_id] if 0 <= token_id < len(pieces) else b""

    def token_text(self, token_id: int) -> str:
        """The token alone; bytes that are no text by themselves are U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        assembler = TextAssembler(self, skip_special_tokens)
        return "".join(map(assembler.push, ids)) + assembler.flush()

    def end_of(self, ids: Sequence[int]) -> str:
        """The last words of a prompt."""
        return self.decode(ids[-_END_TOKENS:], skip_special_tokens=False)

    # --- prompts to ids ---

    def encode(self, prompt: Prompt, *, max_tokens: int | None = None) -> list[int]:
        """Token ids of a prompt; at least one. PromptError says what is wrong with it.

        A text that must exceed `max_tokens`, whatever its tokens are, is refused without encoding
        it. A shorter one may exceed them still: the caller counts.
        """
        match prompt:
            case TokenPrompt():
                ids = self._checked_ids(prompt)
            case TextPrompt():
                self._check_length(prompt.text, max_tokens, "prompt")
                encoding = self._tokenizer.encode(
                    prompt.text, add_special_tokens=prompt.add_special_tokens
                )
                ids = encoding.ids
            case ChatPrompt():
                ids = self._encode_chat(prompt, max_tokens)
        if not ids:
            refuse(ErrorCode.INVALID_VALUE, "The prompt has no tokens; send some text.", "prompt")
        return ids

    def avoided(self, words: Iterable[str]) -> tuple[tuple[int, ...], ...]:
        """Token sequences that spell these words, alone and after a space. PromptError: a word is
        empty, or spells a special token."""
        found: dict[tuple[int, ...], None] = {}
        for word in words:
            bare = word.lstrip()
            if not bare:
                refuse(ErrorCode.INVALID_VALUE, "A word of bad_words is empty.", "bad_words")
            for text in (bare, f" {bare}"):
                ids = tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)
                if self.special_ids.intersection(ids):
                    refuse(
                        ErrorCode.INVALID_VALUE,
                        f"bad_words: {bare[:64]!r} spells a special token; use logit_bias.",
                        "bad_words",
                    )
                found[ids] = None
        return tuple(found)

    def _checked_ids(self, prompt: TokenPrompt) -> list[int]:
        try:
            ids = unpack_tokens(prompt.tokens)
        except ValueError:
            refuse(ErrorCode.INVALID_VALUE, "The prompt's tokens are not packed int32.", "prompt")
        for token_id in (min(ids, default=0), max(ids, default=0)):
            if not 0 <= token_id < self.vocab_size:
                refuse(
                    ErrorCode.INVALID_VALUE,
                    f"Token id {token_id} is outside the vocabulary (0 to {self.vocab_size - 1}).",
                    "prompt",
                )
        return ids

    def _check_length(self, text: str, max_tokens: int | None, param: str) -> None:
        if max_tokens is None:
            return
        least = len(text) // self._longest_piece
        if least > max_tokens:
            refuse(
                ErrorCode.CONTEXT_LENGTH,
                f"This model's maximum context length is {max_tokens} tokens, but the prompt of "
                f"{len(text)} characters has at least {least}. Please shorten it.",
                param,
            )

    def _encode_chat(self, prompt: ChatPrompt, max_tokens: int | None) -> list[int]:
        with_tools = prompt.tools and prompt.tool_choice != NONE
        template = self._templates.get("tool_use") if with_tools else None
        template = template or self._templates.get("default")
        if template is None:
            refuse(
                ErrorCode.INVALID_VALUE,
                "This model has no chat template; use /v1/completions.",
                "messages",
            )
        prompt, messages = self.dialect.adapted(prompt, template.plain_messages(prompt.messages))
        if self._spells_special((messages, prompt.tools, prompt.template_args)):
            return self._guard.encode(template, prompt, messages, self._special_text, max_tokens)
        text = template.render(prompt, messages)
        self._check_length(text, max_tokens, "messages")
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _spells_special(self, value: Any) -> bool:
        found = False

        def look(text: str) -> str:
            nonlocal found
            found = found or self._special_text.search(text) is not None
            return text

        _map_strings(value, look)
        return found

    @cached_property
    def _guard(self) -> "_SpecialTextGuard":
        # Built when first needed: nearly no client spells special tokens, and it costs a second
        # copy of the tokenizer.
        return _SpecialTextGuard(self._source, self._vocabulary.special_texts, self._check_length)


class _SpecialTextGuard:
    """Encodes chats whose own text spells special tokens: only the template may add real ones.

    The tokenizer is loaded once more with its special tokens under secret names. The user's
    spellings are hidden from the template behind placeholders; in the rendered text each special
    token that is left came from the template and gets its secret name, and each placeholder its
    spelling back. So one ordinary encoding yields the ids that the library gives to such a text.
    """

    def __init__(
        self,
        source: bytes,
        special_texts: dict[str, int],
        check_length: Callable[[str, int | None, str], None],
    ) -> None:
        nonce = secrets.token_hex(8)
        self._texts = list(special_texts)
        self._index = {text: i for i, text in enumerate(self._texts)}
        self._held = [f"\U000f0000{nonce}p{i}\U000f0001" for i in range(len(self._texts))]
        self._secret = [f"\U000f0000{nonce}s{i}\U000f0001" for i in range(len(self._texts))]
        self._placeholder = re.compile(f"\U000f0000{nonce}p([0-9]+)\U000f0001")
        self._check_length = check_length
        names = dict(zip(self._texts, self._secret, strict=True))
        self._tokenizer = tokenizers.Tokenizer.from_buffer(_renamed(source, names))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._original = {
            self._tokenizer.token_to_id(secret): special_texts[text]
            for text, secret in names.items()
        }

    def encode(
        self,
        template: ChatTemplate,
        prompt: ChatPrompt,
        messages: list[dict[str, Any]],
        special_text: re.Pattern[str],
        max_tokens: int | None,
    ) -> list[int]:
        def hide(text: str) -> str:
            return special_text.sub(lambda found: self._held[self._index[found[0]]], text)

        hidden = msgspec.structs.replace(
            prompt,
            tools=_map_strings(prompt.tools, hide),
            template_args=_map_strings(prompt.template_args, hide),
        )
        text = template.render(hidden, _map_strings(messages, hide))
        text = special_text.sub(lambda found: self._secret[self._index[found[0]]], text)
        text = self._placeholder.sub(lambda found: self._texts[int(found[1])], text)
        self._check_length(text, max_tokens, "messages")
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return [self._original.get(token_id, token_id) for token_id in ids]


def _renamed(source: bytes, names: dict[str, str]) -> bytes:
    """The tokenizer file with other names for its special tokens, in the model's vocabulary too."""
    file = msgspec.json.decode(source)
    for token in file["added_tokens"]:
        if token["special"]:
            token["content"] = names[token["content"]]
    model = file["model"]
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(text, text): number for text, number in vocabulary.items()}
    else:
        model["vocab"] = [[names.get(text, text), score] for text, score in vocabulary]
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    file["post_processor"] = None
    return msgspec.json.encode(file)


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """A copy of plain JSON data with every string changed, names of members included."""
    match value:
        case str():
            return change(value)
        case dict():
            return {change(name): _map_strings(item, change) for name, item in value.items()}
        case list() | tuple():
            return [_map_strings(item, change) for item in value]
        case _:
            return value


# --- Files ----------------------------------------------------------------------------------------


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise CodecError(f"{file}: {error.strerror or error}") from error


def _object(data: bytes, file: Path) -> dict[str, Any]:
    try:
        parsed = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CodecError(f"{file}: not JSON ({_first_line(error)})") from error
    if not isinstance(parsed, dict):
        raise CodecError(f"{file}: not a JSON object")
    return parsed


def _optional_object(file: Path) -> dict[str, Any]:
    return _object(_read(file), file) if file.exists() else {}


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _special_tokens(model_path: Path, config: dict[str, Any]) -> dict[str, str]:
    """`bos_token` and its like, as templates name them."""
    named: dict[str, str] = {}
    for source in (_optional_object(model_path / "special_tokens_map.json"), config):
        for name, value in source.items():
            text = value.get("content") if isinstance(value, dict) else value
            if name.endswith("_token") and isinstance(text, str):
                named[name] = text
    return named


def _templates(
    model_path: Path, config: dict[str, Any], special_tokens: dict[str, str]
) -> dict[str, ChatTemplate]:
    file = model_path / "chat_template.jinja"
    sources: dict[str, str] = {}
    if file.exists():
        sources = {"default": _read(file).decode("utf-8", "replace")}
    else:
        file = model_path / "tokenizer_config.json"
        match config.get("chat_template"):
            case str(source):
                sources = {"default": source}
            case list(entries):
                sources = {
                    entry["name"]: entry["template"]
                    for entry in entries
                    if isinstance(entry, dict) and {"name", "template"} <= entry.keys()
                }
    try:
        return {name: ChatTemplate(text, special_tokens) for name, text in sources.items()}
    except jinja2.TemplateSyntaxError as error:
        raise CodecError(f"{file}: chat template, line {error.lineno}: {error.message}") from error
