"""A conversation and the commands that change it; knows neither terminal nor network."""

import json
from pathlib import Path
from typing import NamedTuple

import msgspec

from slipstream.cli.answers import Message, Sampling
from slipstream.config import did_you_mean

HELP = """\
/system TEXT      system prompt from now on; without TEXT: none
/clear            forget the conversation, keep the system prompt
/retry            the last answer again
/save FILE        the conversation, .json as messages, else as text
/set NAME VALUE   temperature, top_p, max_tokens or seed; VALUE auto: as the model says
/help             this
/quit             end; Ctrl-D does the same, Ctrl-C stops an answer"""
COMMANDS = tuple(line.split()[0].removeprefix("/") for line in HELP.splitlines())
_BOUNDS: dict[str, tuple[type[int] | type[float], float, float]] = {
    "temperature": (float, 0, 2),
    "top_p": (float, 0, 1),
    "max_tokens": (int, 1, 10_000_000),
    "seed": (int, 0, 2**63 - 1),
}
_AUTO = "auto"


class Said(NamedTuple):
    """What came of a line."""

    text: str = ""
    """To be shown."""
    ask: bool = False
    """The conversation ends with the user's turn: an answer is due."""
    over: bool = False
    failed: bool = False


class Conversation:
    def __init__(self, system: str, sampling: Sampling) -> None:
        self.system = system
        self.sampling = sampling
        self.turns: list[Message] = []
        self._before: list[Message] = []
        """The turns before the last question, or before it was asked again."""

    @property
    def messages(self) -> list[Message]:
        first = [{"role": "system", "content": self.system}] if self.system else []
        return first + self.turns

    def answered(self, text: str) -> None:
        """By as much as came, if it was stopped; by nothing, all is as it was before the question:
        an answer that should only have been made anew is still there."""
        if text:
            self.turns.append({"role": "assistant", "content": text})
        else:
            self.turns = self._before

    def take(self, line: str) -> Said:
        """One line that the user typed."""
        line = line.strip()
        if not line:
            return Said()
        if not line.startswith("/"):
            self._before = list(self.turns)
            self.turns.append({"role": "user", "content": line})
            return Said(ask=True)
        command, _, rest = line[1:].partition(" ")
        rest = rest.strip()
        match command:
            case "help":
                return Said(HELP)
            case "quit" | "exit":
                return Said(over=True)
            case "clear":
                self.turns.clear()
                return Said("forgotten")
            case "system":
                self.system = rest
                return Said("system prompt set" if rest else "no system prompt")
            case "retry":
                return self._retry()
            case "save":
                return self._save(rest)
            case "set":
                return self._set(rest)
        hint = did_you_mean(command, COMMANDS).replace("mean ", "mean /")
        return Said(f"unknown command /{command}{hint}; /help lists them", failed=True)

    def _retry(self) -> Said:
        if not any(turn["role"] == "user" for turn in self.turns):
            return Said("nothing has been asked yet", failed=True)
        self._before = list(self.turns)
        while self.turns[-1]["role"] != "user":
            self.turns.pop()
        return Said(ask=True)

    def _save(self, name: str) -> Said:
        if not name:
            return Said("/save FILE: a file is missing", failed=True)
        path = Path(name).expanduser()
        if path.suffix == ".json":
            text = json.dumps(self.messages, ensure_ascii=False, indent=2) + "\n"
        else:
            text = "".join(f"{turn['role']}:\n{turn['content']}\n\n" for turn in self.messages)
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            return Said(f"{path} is there already; take another name", failed=True)
        except OSError as error:
            return Said(f"{path}: {error.strerror}", failed=True)
        return Said(f"{len(self.messages)} messages saved in {path}")

    def _set(self, words: str) -> Said:
        name, _, value = words.partition(" ")
        name, value = name.replace("-", "_"), value.strip()
        if not name:
            return Said(self._settings())
        if name not in _BOUNDS:
            hint = did_you_mean(name, _BOUNDS)
            known = ", ".join(_BOUNDS)
            return Said(f"/set {name}: expected one of {known}{hint}", failed=True)
        kind, low, high = _BOUNDS[name]
        if value == _AUTO:
            self.sampling = msgspec.structs.replace(self.sampling, **{name: None})
            return Said(self._settings())
        try:
            number = kind(value)
            if not low <= number <= high:
                raise ValueError(value)
        except ValueError:
            noun = "an int" if kind is int else "a number"
            wanted = f"expected {noun} from {low:g} to {high:g} or {_AUTO}"
            return Said(f"/set {name}: {wanted}, got {value or 'nothing'}", failed=True)
        self.sampling = msgspec.structs.replace(self.sampling, **{name: number})
        return Said(self._settings())

    def _settings(self) -> str:
        held = msgspec.structs.asdict(self.sampling)
        return ", ".join(f"{k} {_AUTO if v is None else f'{v:g}'}" for k, v in held.items())
