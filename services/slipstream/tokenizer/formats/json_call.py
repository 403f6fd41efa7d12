"""A call written as a JSON object: `{"name": "f", "arguments": {…}}`."""

import json
import re

from slipstream.tokenizer.formats.parser import Head, Reading, ToolParser, first_reading

_STRING = ('"', r'(?P<name>(?:[^"\\]|\\.)+)', '"')
_NAME = (r"\s*", r"\{", r"\s*", *'"name"', r"\s*", ":", r"\s*", *_STRING, r"\s*")
_ARGUMENTS = (r"\s*", ":", r"\s*", r"(?P<arguments>\{)", r"\s*", '["}]')
HEADS = tuple(
    Head(*_NAME, ",", r"\s*", *f'"{key}"', *_ARGUMENTS) for key in ("arguments", "parameters")
)
NO_ARGUMENTS = Head(*_NAME, r"\}")

_in_string = re.compile(r'[^"\\]*').match
_outside = re.compile(r"[\s\d.,:+\-eEtrufalsn]*").match


class JsonScan:
    """Where an object that a text begins with ends: only strings and brackets are looked at."""

    def __init__(self, depth: int = 0) -> None:
        self._depth = depth
        self._quoted = self._escaped = False
        self.done = self.broken = False

    def feed(self, text: str) -> int:
        """How much of the text belongs to it."""
        at = 0
        while at < len(text) and not (self.done or self.broken):
            if self._escaped:
                self._escaped = False
                at += 1
                continue
            run = (_in_string if self._quoted else _outside)(text, at)
            assert run is not None
            at = run.end()
            if at < len(text):
                at += self._sign(text[at])
        return at

    def _sign(self, sign: str) -> int:
        if self._quoted:
            self._quoted, self._escaped = sign != '"', sign == "\\"
        elif sign == '"':
            self._quoted = True
        elif sign in "{[":
            self._depth += 1
        elif sign in "}]":
            self._depth -= 1
            self.done = self._depth == 0
        else:
            self.broken = True
            return 0
        return 1


class JsonCalls(ToolParser):
    """Formats whose calls are JSON objects: they say where one begins, and what comes after it."""

    _heads: tuple[Head, ...] = HEADS
    _scan: JsonScan | None = None
    _told = False
    """Whether what is scanned are arguments, or what the object has after them."""
    _wrapped = True
    """Whether there is such an object."""

    def _begin_call(self) -> Reading:
        """If a call is in front, it is begun; `_scanned` does the rest."""
        reading = first_reading(self._heads, self._text)
        match = reading.match
        if match is not None:
            self._call(_unescaped(match["name"]))
            if "arguments" in match.groupdict():
                self._take(match.start("arguments"))
                self._scan, self._told = JsonScan(), True
            else:
                self._take(match.end())
                self._arguments("{}")
        return reading

    def _scanned(self) -> bool:
        """Goes on with the call; True when nothing of it is left."""
        scan = self._scan
        if scan is None:
            return True
        taken = self._take(scan.feed(self._text))
        if self._told:
            self._arguments(taken)
        if scan.done and self._told and self._wrapped:
            self._scan, self._told = JsonScan(depth=1), False
            return False
        if scan.done or scan.broken:
            self._scan = None
        return self._scan is None


def _unescaped(name: str) -> str:
    try:
        return str(json.loads(f'"{name}"'))
    except ValueError:
        return name
