"""A call written as a JSON object: `{"name": "f", "arguments": {…}}`, as models write it.

Members that are no call's part are passed over where they are numbers, strings, or words. Arguments
may be null, or a string of JSON. The name comes before them: without it nothing can be streamed.
"""

import json
import re
from typing import NamedTuple, TypeAlias

from slipstream.tokenizer.formats.parser import HEAD_CHARS_MAX, ToolParser
from slipstream.tokenizer.text import well_formed

_Token: TypeAlias = tuple[re.Pattern[str], re.Pattern[str]]
"""A whole one, and any beginning of one."""


def _token(whole: str, begun: str = "") -> _Token:
    return (
        re.compile(rf"\s*(?:{whole})", re.DOTALL),
        re.compile(rf"\s*(?:{begun})?", re.DOTALL),
    )


_STRING, _HALF = r'"(?P<text>(?:[^"\\]|\\.)*)"', r'"(?:[^"\\]|\\.)*\\?'
_OPEN, _COLON, _NEXT = _token(r"\{"), _token(":"), _token("(?P<sign>[,}])")
_KEY = _token(_STRING, _HALF)
_VALUE = _token(
    rf"{_STRING}|-?\d[\d.eE+\-]*|[tT]rue|[fF]alse|null|None",
    rf"{_HALF}|-|[tT]r?u?|[fF]a?l?s?|nu?l?|No?n?",
)
_ARGUMENTS = _token(
    r'(?P<object>\{)\s*["}]|null|None|""|(?P<quoted>")(?=[^"])', r'\{\s*|nu?l?|No?n?|"'
)


class CallHead(NamedTuple):
    """What an object begins with, up to where its arguments begin."""

    name: str = ""
    """Empty: it is no call, or not yet."""
    hopeless: bool = False
    """It is none, whatever follows."""
    end: int = 0
    arguments: str = ""
    """`{` or `\"`, which is at `end`; `}`: there are none, and the object has ended; or there are
    none, and it goes on."""


class _Unread(Exception):
    """There is something else in front, or only the beginning of what is wanted."""


class _Members:
    def __init__(self, text: str) -> None:
        self._text = text
        self.at = 0
        self.hopeless = False

    def take(self, token: _Token) -> re.Match[str]:
        whole, begun = token
        if match := whole.match(self._text, self.at):
            self.at = match.end()
            return match
        self.hopeless |= not begun.fullmatch(self._text, self.at)
        raise _Unread

    def head(self, bare: bool) -> CallHead:
        """_Unread."""
        self.take(_OPEN)
        name = ""
        while True:
            key = self.take(_KEY)["text"]
            self.take(_COLON)
            is_arguments = key in ("arguments", "parameters")
            if is_arguments and name:
                found = self.take(_ARGUMENTS)
                kind = found["object"] or found["quoted"] or ""
                at = found.start(found.lastgroup) if found.lastgroup else found.end()
                return CallHead(name, False, at, kind)
            value = self.take(_VALUE)["text"]
            if key == "name":
                name = value or ""
            self.hopeless |= is_arguments or (key == "name" and not name)
            ended = self.take(_NEXT)["sign"] == "}"
            if ended and name and bare and not self.hopeless:
                return CallHead(name, False, self.at, "}")
            self.hopeless |= ended
            if self.hopeless:
                raise _Unread


def read_head(text: str, bare: bool) -> CallHead:
    """`bare`: a name is enough."""
    window = text[:HEAD_CHARS_MAX]
    members = _Members(window)
    try:
        return members.head(bare)
    except _Unread:
        return CallHead(hopeless=members.hopeless or len(window) == HEAD_CHARS_MAX)


_in_string = re.compile(r'[^"\\]*').match
_outside = re.compile(r"[\s\d.,:+\-eEtrufalsnTFNaoIiyd]*").match
"""Numbers and words; those of Python and JavaScript too, which models mix up."""
_control = re.compile(r"[\x00-\x1f]")


class JsonScan:
    """Where an object that a text begins with ends: only strings and brackets are looked at."""

    def __init__(self, depth: int = 0) -> None:
        self._depth = depth
        self._quoted = self._escaped = False
        self._said = ""
        self.done = self.broken = False

    def feed(self, text: str) -> int:
        """How much of the text belongs to it."""
        at, self._said = 0, ""
        while at < len(text) and not (self.done or self.broken):
            if self._escaped:
                self._escaped = False
                self._said += _control.sub(lambda sign: f"u{ord(sign[0]):04x}", text[at])
                at += 1
                continue
            run = (_in_string if self._quoted else _outside)(text, at)
            assert run is not None
            at = run.end()
            # A model that writes a program leaves its lines as they are, which JSON does not allow.
            self._said += _control.sub(_escape, run[0]) if self._quoted else run[0]
            if at < len(text):
                count = self._sign(text[at])
                self._said += text[at : at + count]
                at += count
        return at

    def shown(self) -> str:
        """Of what was fed last: what belongs to it, as JSON."""
        return self._said

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


def _escape(sign: re.Match[str]) -> str:
    return json.dumps(sign[0])[1:-1]


_HEX = r"[0-9a-fA-F]"
_HIGH, _LOW = rf"\\u[dD][89abAB]{_HEX}{{2}}", rf"\\u[dD][c-fC-F]{_HEX}{{2}}"
_LOW_BEGUN = rf"(?:\\(?:u(?:[dD](?:[c-fC-F]{_HEX}?)?)?)?)?\Z"
_ESCAPE = rf"{_HIGH}{_LOW}|{_HIGH}(?!{_LOW_BEGUN})|\\u(?![dD][89abAB]){_HEX}{{4}}|\\[^u]"
_NO_ESCAPE = rf"\\u(?!{_HEX}{{4}}|{_HEX}{{0,3}}\Z)"
_escapes = re.compile(_ESCAPE, re.DOTALL)
_quoted = re.compile(rf'(?:[^"\\]+|{_ESCAPE}|{_NO_ESCAPE})*', re.DOTALL).match


class StringScan:
    """Where a string ends that a text is inside of, and what it says."""

    done = broken = False

    def __init__(self) -> None:
        self._said = self._rest = ""
        """Of what was fed last, and the beginning of an escape after it."""
        self._inner = JsonScan()

    def feed(self, text: str) -> int:
        """How much of the text belongs to it, the quote that ends it included."""
        whole = self._rest + text
        run = _quoted(whole)
        assert run is not None
        self._said, rest = run[0], whole[run.end() :]
        self.done = rest.startswith('"')
        if self.done:
            return len(text) - len(rest) + 1
        self._rest = rest
        return len(text)

    def shown(self) -> str:
        said = _escapes.sub(lambda found: _unescaped(found[0]), self._said)
        taken = self._inner.feed(said)
        return self._inner.shown() + said[taken:]


class JsonCalls(ToolParser):
    """Formats whose calls are JSON objects: they say where one begins, and what comes after it."""

    _bare = False
    """Whether an object with nothing but a name is a call."""
    _scan: JsonScan | StringScan | None = None
    _told = False
    """Whether what is scanned are arguments, or what the object has after them."""
    _wrapped = True
    """Whether there is such an object."""

    def _begin_call(self) -> CallHead:
        """If a call is in front, it is begun; `_scanned` does the rest."""
        head = read_head(self._text, self._bare)
        if head.name:
            self._call(_unescaped(head.name))
            self._take(head.end + (head.arguments == '"'))
            self._told = head.arguments in ("{", '"')
            if head.arguments == "{":
                self._scan = JsonScan()
            elif head.arguments == '"':
                self._scan = StringScan()
            else:
                self._arguments("{}")
                self._scan = None if head.arguments == "}" else JsonScan(depth=1)
        return head

    def _scanned(self) -> bool:
        """Goes on with the call; True when nothing of it is left."""
        scan = self._scan
        if scan is None:
            return True
        self._take(scan.feed(self._text))
        if self._told:
            self._arguments(scan.shown())
        if scan.done and self._told and self._wrapped:
            self._scan, self._told = JsonScan(depth=1), False
            return False
        if scan.done or scan.broken:
            self._scan = None
        return self._scan is None


def _unescaped(text: str) -> str:
    """Of what is between quotes; as it is where that is no JSON."""
    try:
        said = str(json.loads(f'"{text}"', strict=False))
    except ValueError:
        return text
    return well_formed(said)
