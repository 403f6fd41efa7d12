"""What the clients ask for: every kind of answer that a fault could spoil, each with a name under
which its right answer is kept."""

import random
from typing import Any

import msgspec

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
VOCABULARY = range(200, 40_000)
SHARED_TOKENS, LONG_TOKENS = 160, 420
TIMEOUT_S = 60.0


class Ask(msgspec.Struct, frozen=True):
    name: str
    path: str
    body: dict[str, Any]
    stop_share: float = 0.0
    """So far into the answer lies its stop string; 0: it has none."""

    @property
    def streamed(self) -> bool:
        return bool(self.body.get("stream"))


def draw(seed: int, model: str) -> list[Ask]:
    """The mix of one run: the load asks for one after another, scenarios by name."""
    rng = random.Random(seed)
    shared = rng.choices(VOCABULARY, k=SHARED_TOKENS)

    def words(count: int) -> list[int]:
        return rng.choices(VOCABULARY, k=count)

    def of_tokens(name: str, prompt: list[int], max_tokens: int, **more: Any) -> Ask:
        stop_share = more.pop("stop_share", 0.0)
        common = {"max_tokens": max_tokens, "temperature": 0, "ignore_eos": not stop_share}
        return Ask(name, COMPLETIONS, {"prompt": prompt, **common, **more}, stop_share)

    seeded = {"temperature": 0.8, "seed": rng.randrange(2**31)}
    penalties = {**seeded, "frequency_penalty": 0.7, "presence_penalty": 0.3}
    held = {**seeded, "structured_outputs": {"regex": "([a-z]{3} ){400}"}}
    question = {"messages": [{"role": "user", "content": "Tell me of the sea."}]}
    sea = {"sea": {"type": "string", "maxLength": 60}}
    schema = {"type": "object", "properties": sea, "required": ["sea"]}
    form = {"type": "json_schema", "json_schema": {"name": "sea", "schema": schema}}
    asks = [
        of_tokens("greedy", words(33), 40, stream=True),
        of_tokens("seeded", words(60), 40, stream=True, **seeded),
        of_tokens("whole", words(18), 24),
        of_tokens("two choices", words(45), 24, stream=True, n=2, **seeded),
        of_tokens("shared prefix", shared + words(7), 24, stream=True),
        of_tokens("penalties", words(40), 32, stream=True, **penalties),
        of_tokens("shared prefix, whole", shared + words(20), 16, **seeded),
        of_tokens("log probabilities", words(30), 24, stream=True, logprobs=2, **seeded),
        of_tokens("held to a regex", words(25), 32, stream=True, **held),
        of_tokens("stop string", words(50), 48, stream=True, stop_share=0.6, **seeded),
        Ask("chat", CHAT, {**question, "stream": True, "max_tokens": 32, **seeded}),
        Ask("schema", CHAT, {**question, "response_format": form, "max_tokens": 64, **seeded}),
        of_tokens("long prompt", words(LONG_TOKENS), 24, stream=True, **seeded),
        of_tokens("long answer", words(20), 120, stream=True),
    ]
    return [msgspec.structs.replace(ask, body=_whole(ask.body, model)) for ask in asks]


def _whole(body: dict[str, Any], model: str) -> dict[str, Any]:
    more = {"stream_options": {"include_usage": True}} if body.get("stream") else {}
    return {"model": model, "timeout": TIMEOUT_S, **body, **more}


def stopped(ask: Ask, text: str) -> Ask:
    """The same with a stop string, out of the answer that it has without one."""
    at = int(len(text) * ask.stop_share)
    return msgspec.structs.replace(ask, body={**ask.body, "stop": [text[at : at + 4]]})


MIX = (
    *("greedy", "seeded", "whole", "two choices", "shared prefix", "penalties"),
    *("shared prefix, whole", "log probabilities", "held to a regex", "stop string", "chat"),
    *("schema", "long prompt"),
)
"""Of the steady load."""
