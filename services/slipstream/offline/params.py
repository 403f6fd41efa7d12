"""How answers are sampled, under the names that users of vLLM know."""

import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from slipstream import types
from slipstream.types import Constraint, ConstraintKind

_SEED_BITS = 63
CHOICES_MAX = 256


@dataclass(frozen=True)
class LoRARequest:
    """A LoRA adapter that prompts are answered with: a name, and the folder that PEFT saved."""

    lora_name: str
    lora_int_id: int
    """vLLM's users know it; what counts here is the name."""
    lora_path: str

    def __post_init__(self) -> None:
        if not self.lora_name or not self.lora_path:
            raise ValueError("a LoRARequest needs lora_name and lora_path")
        object.__setattr__(self, "lora_path", os.path.abspath(self.lora_path))


@dataclass(kw_only=True)
class SamplingParams:
    """Of one prompt. ValueError for what cannot be: the name, the value and what may be; of fields
    that are changed later it comes with the prompts.

    `json_schema` (a dict or its text), `regex`, `choice` and `grammar` say what the answer must be;
    one of them at most.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0 or -1: all tokens."""
    min_p: float = 0.0
    max_tokens: int | None = 16
    """None: what the context leaves."""
    min_tokens: int = 0
    seed: int | None = None
    """None: drawn anew for each prompt."""
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    json_schema: Mapping[str, Any] | str | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    # What vLLM has beside: nothing but these values is served.
    detokenize: bool = True
    extra_args: None = None
    flat_logprobs: bool = False
    guided_decoding: None = None
    logits_processors: None = None
    spaces_between_special_tokens: bool = True
    structured_outputs: None = None
    truncate_prompt_tokens: None = None

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """ValueError, as of the whole."""
        for name in _UNSERVED:
            if (value := getattr(self, name)) != getattr(SamplingParams, name):
                instead = _INSTEAD.get(name, "leave it out")
                raise ValueError(f"{name}={value!r:.40} is not served; {instead}")
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) == -1:
                raise ValueError(f"{name} is -1: of all tokens they are not given; name 0 to 20")
        if not 1 <= self.n <= CHOICES_MAX:
            raise ValueError(f"n is {self.n}; it may be 1 to {CHOICES_MAX}")
        if "" in self.stop_strings:
            raise ValueError("stop has an empty string, which every answer would begin with")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens is {self.min_tokens}; it may be 0 to max_tokens ({self.max_tokens})"
            )
        self.constraint()
        self.wire(max_model_len=2)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def wire(self, max_model_len: int, choice: int = 0, seed: int = 0) -> types.SamplingParams:
        """As it crosses the bus. `seed`: where none is named."""
        top_k = 0 if self.top_k == -1 else self.top_k
        plain = types.SamplingParams(
            max_tokens=max_model_len - 1 if self.max_tokens is None else self.max_tokens,
            seed=seed if self.seed is None else self.seed,
            choice=choice,
            top_k=top_k,
            stop=self.stop_strings,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            logit_bias=tuple((self.logit_bias or {}).items()),
            allowed_token_ids=tuple(self.allowed_token_ids or ()),
            **{name: getattr(self, name) for name in _SAME},
        )
        try:  # the bounds of the bus are those of an answer
            return msgspec.convert(msgspec.to_builtins(plain), types.SamplingParams)
        except msgspec.ValidationError as error:
            raise ValueError(f"SamplingParams: {error}") from None

    def constraint(self) -> Constraint | None:
        """What the answer must be."""
        schema = self.json_schema
        if schema is not None and not isinstance(schema, str):
            schema = msgspec.json.encode(schema).decode()
        choice = None if self.choice is None else msgspec.json.encode(list(self.choice)).decode()
        given = {
            ConstraintKind.JSON_SCHEMA: schema,
            ConstraintKind.REGEX: self.regex,
            ConstraintKind.CHOICE: choice,
            ConstraintKind.GRAMMAR: self.grammar,
        }
        named = {kind: text for kind, text in given.items() if text is not None}
        if len(named) > 1:
            raise ValueError(f"{' and '.join(named)} exclude each other; name one of them")
        return next((Constraint(kind=kind, text=text) for kind, text in named.items()), None)

    def drawn_seed(self, drawer: random.Random) -> int:
        return drawer.getrandbits(_SEED_BITS) if self.seed is None else self.seed


_SAME = (
    *("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty"),
    *("repetition_penalty", "min_tokens", "ignore_eos", "logprobs", "prompt_logprobs"),
    *("include_stop_str_in_output", "skip_special_tokens"),
)
_UNSERVED = (
    *("detokenize", "extra_args", "flat_logprobs", "guided_decoding", "logits_processors"),
    *("spaces_between_special_tokens", "structured_outputs", "truncate_prompt_tokens"),
)
_AS_OURS = "name json_schema, regex, choice or grammar"
_INSTEAD = {"guided_decoding": _AS_OURS, "structured_outputs": _AS_OURS}
