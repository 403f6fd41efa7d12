"""What is asked: messages that depend on the seed and a number alone. Pure."""

from random import Random
from typing import Literal

import msgspec

from slipstream.loadtest.load.scenarios import Mix
from slipstream.loadtest.load.settings import Settings

Kind = Literal["usual", "long", "cancelled", "slow", "turn"]
Message = dict[str, str]
REPEATED = 12
"""Prompts that come again and again."""
WORDS = (
    "time year people way day man thing woman life child world school state family student group "
    "country problem hand part place case week company system program question work government "
    "number night point home water room mother area money story fact month lot right study book "
    "eye job word business issue side kind head house service friend father power hour game line "
    "end member law car city community name president team minute idea body information back "
    "parent face others level office door health person art war history party result change "
    "morning reason research girl guy moment air teacher force education foot boy age policy"
)

_VOCABULARY = WORDS.split()


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    """Of the prompt; equal names are equal prompts."""
    kind: Kind
    messages: list[Message]
    leave_after: int = 0
    """Pieces of text after which the client goes away; 0: it stays."""


class Asks:
    def __init__(self, settings: Settings, mix: Mix) -> None:
        self._settings, self._mix = settings, mix
        self._shared = self._words("shared", settings.shared_tokens) if mix.shared_prompt else ""

    def first(self, number: int) -> Ask:
        """The request of that number, or the first turn of the conversation."""
        settings, mix = self._settings, self._mix
        draw = Random(f"{settings.seed} ask {number}")
        again = draw.random() < settings.repeat_share
        name = f"repeated {draw.randrange(REPEATED)}" if again else f"new {number}"
        long = Random(f"{settings.seed} {name} long").random() < mix.long
        text = self._words(name, settings.long_tokens if long else settings.prompt_tokens)
        kind: Kind = "long" if long else "usual"
        leave_after = 0
        chance = draw.random()
        if chance < mix.cancelled:
            kind, leave_after = "cancelled", draw.randint(1, max(1, settings.output_tokens - 1))
        elif chance < mix.cancelled + mix.slow:
            kind = "slow"
        messages = [{"role": "user", "content": text}]
        if self._shared:
            messages.insert(0, {"role": "system", "content": self._shared})
        return Ask(name=name, kind=kind, messages=messages, leave_after=leave_after)

    def next(self, ask: Ask, answer: str) -> Ask | None:
        """The turn after it; None: the conversation is over."""
        turn = sum(message["role"] == "user" for message in ask.messages)
        if turn >= self._mix.turns:
            return None
        first = ask.name.partition(", turn")[0]
        name = f"{first}, turn {turn + 1}"
        said = {"role": "assistant", "content": answer}
        text = self._words(name, max(1, self._settings.prompt_tokens // 2))
        messages = [*ask.messages, said, {"role": "user", "content": text}]
        return Ask(name=name, kind="turn", messages=messages)

    def _words(self, name: str, count: int) -> str:
        """Begins with the name, so that other prompts share nothing with it."""
        draw = Random(f"{self._settings.seed} {name}")
        return " ".join([f"{name}:", *draw.choices(_VOCABULARY, k=max(1, count - 4))])
