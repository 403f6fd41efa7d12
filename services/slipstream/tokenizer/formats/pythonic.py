"""`[f(a=1), g(b="x")]`, perhaps between `<|python_start|>` and `<|python_end|>`: Llama 3.2 and 4.

An answer is a list of calls if it begins like one. Arguments become JSON one by one.
"""

import ast
import json
import re
from collections.abc import Iterator, Sequence
from typing import NoReturn

from slipstream.tokenizer.formats import lark
from slipstream.tokenizer.formats.lark import Function, Ref
from slipstream.tokenizer.formats.parser import Head, ToolParser
from slipstream.tokenizer.text import well_formed

START, END = "<|python_start|>", "<|python_end|>"

_NAME = (r"(?P<name>[^\W\d][\w.]*)", r"\s*")
_CALL = (*_NAME, r"\(", r"\s*")
_CALLS = (
    Head(*_CALL, r"\)"),
    Head(*_CALL, r"(?P<argument>[^\W\d]\w*)", r"\s*", "=", "(?=[^=])", "."),
)
_argument = re.compile(r"\s*(?P<name>[^\W\d]\w*)\s*=").match
_may_be_argument = re.compile(r"\s*(?:[^\W\d]\w*\s*)?").fullmatch
_ARGUMENT_CHARS_MAX = 256

_in_string = {quote: re.compile(f"[^{quote}\\\\]*").match for quote in "'\""}
_outside = re.compile(r"[^'\"()\[\]{},]*").match


class ValueScan:
    """Where a value ends that a text begins with: at a comma or bracket that is not its own."""

    def __init__(self) -> None:
        self._depth = 0
        self._quote = ""
        self._escaped = False
        self.done = False

    def feed(self, text: str) -> int:
        """How much of the text belongs to it."""
        at = 0
        while at < len(text) and not self.done:
            if self._escaped:
                self._escaped = False
                at += 1
                continue
            run = (_in_string[self._quote] if self._quote else _outside)(text, at)
            assert run is not None
            at = run.end()
            if at < len(text):
                at += self._sign(text[at])
        return at

    def _sign(self, sign: str) -> int:
        if self._quote:
            self._escaped = sign == "\\"
            if sign == self._quote:
                self._quote = ""
        elif sign in "'\"":
            self._quote = sign
        elif sign in "([{":
            self._depth += 1
        elif self._depth == 0:
            self.done = True
            return 0
        elif sign in ")]}":
            self._depth -= 1
        return 1


class PythonicParser(ToolParser):
    def __init__(self) -> None:
        super().__init__()
        self._state = self._start
        self._value: list[str] = []
        self._scan = ValueScan()
        self._arguments_said = 0

    def _step(self) -> bool:
        return self._state()

    def _start(self) -> bool:
        body = self._text.lstrip()
        self._content(self._take(len(self._text) - len(body)))
        if not body or (START.startswith(body) and body != START and not self._ended):
            return False
        announced = body.startswith(START)
        self._state = self._announced if announced else self._list if body[0] == "[" else self._free
        return True

    def _free(self) -> bool:
        if not self._content_until(START):
            return False
        self._state = self._announced
        return True

    def _announced(self) -> bool:
        return self._called_by(START)

    def _list(self) -> bool:
        return self._called_by("")

    def _called_by(self, marker: str) -> bool:
        """In front: the marker, a bracket, and what may be the first call."""
        body = self._text[len(marker) :].lstrip()
        space = len(self._text) - len(marker) - len(body)
        if not body and not self._ended:
            return False
        if not body.startswith("["):
            return self._give_up(marker)
        return self._begun(len(marker) + space + 1, marker or "[")

    def _begun(self, skipped: int, otherwise: str) -> bool:
        """Begins the call that is in front after so many characters; if it is none, what was in
        front is content."""
        body = self._text[skipped:].lstrip()
        skipped = len(self._text) - len(body)
        readings = [head.read(body) for head in _CALLS]
        for reading in readings:
            if match := reading.match:
                self._call(match["name"])
                self._take(skipped + match.start(0) + len(match[0]))
                self._arguments_said = 0
                if "argument" in match.groupdict():
                    self._text = match[0][-1] + self._text
                    self._open_argument(match["argument"])
                else:
                    self._arguments("{}")
                    self._state = self._between
                return True
        hopeless = all(reading.hopeless for reading in readings)
        return (hopeless or self._ended) and self._give_up(otherwise)

    def _give_up(self, marker: str) -> bool:
        self._content(self._take(len(marker)))
        self._state = self._free
        return True

    def _open_argument(self, name: str) -> None:
        before = ", " if self._arguments_said else "{"
        self._arguments_said += 1
        self._arguments(f"{before}{json.dumps(name, ensure_ascii=False)}: ")
        self._value, self._scan = [], ValueScan()
        self._state = self._in_value

    def _in_value(self) -> bool:
        self._value.append(self._take(self._scan.feed(self._text)))
        if self._scan.done:
            self._arguments(_json("".join(self._value)))
            self._state = self._after_value
        return bool(self._text)

    def _after_value(self) -> bool:
        """In front: what ended a value."""
        if self._text[0] == ",":
            window = self._text[1 : 1 + _ARGUMENT_CHARS_MAX]
            if match := _argument(window):
                self._take(1 + match.end())
                self._open_argument(match["name"])
                return True
            full = len(window) == _ARGUMENT_CHARS_MAX
            if _may_be_argument(window) and not (full or self._ended):
                return False
            if window.lstrip()[:1] == ")":
                self._take(self._text.index(")"))
        closed = self._text[0] == ")"
        self._arguments("}")
        self._take(closed)
        self._state = self._between if closed else self._free
        return True

    def _between(self) -> bool:
        self._text = self._text.lstrip()
        if not self._text:
            return False
        if self._text[0] == ",":
            return self._begun(1, ",")
        self._text = self._text.removeprefix("]")
        self._state = self._closing
        return True

    def _closing(self) -> bool:
        self._text = self._text.lstrip()
        if END.startswith(self._text) and self._text != END and not self._ended:
            return False
        self._text = self._text.removeprefix(END)
        self._state = self._free
        return True


def _refused(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _json(value: str) -> str:
    """A Python literal as JSON; JSON stays as it is, and what is neither becomes a string."""
    value = value.strip()
    try:
        literal = ast.literal_eval(value)
        return well_formed(json.dumps(literal, ensure_ascii=False, allow_nan=False))
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        pass
    try:
        json.loads(value, parse_constant=_refused)
    except (ValueError, RecursionError):
        quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
        return json.dumps(value[1:-1] if quoted else value, ensure_ascii=False)
    return value


def rules(functions: Sequence[Function], calls_max: int, ref: Ref) -> str:
    """Rule `calls`: a list of one call or more. ValueError: a function cannot be written so."""
    calls = lark.repeated("call", lark.text(", "), calls_max)
    options = [f"{lark.text(f'{f.name}(')} arguments_{i}" for i, f in enumerate(functions)]
    lines = [
        f"calls: {lark.text('[')} {calls} {lark.text(']')}",
        f"call: {lark.either([f'({option})' for option in options])}",
    ]
    num_chars = 0
    for i, function in enumerate(functions):
        for line in _argument_rules(i, function):
            num_chars += len(line)
            if num_chars > lark.CHARS_MAX:  # definitions are repeated in each argument
                raise ValueError(f"it makes a grammar of more than {lark.CHARS_MAX} characters")
            lines.append(line)
    return "\n".join(lines)


def _argument_rules(number: int, function: Function) -> Iterator[str]:
    """Rule `arguments_<number>`: those that are required, then some of the others, in the order of
    the schema, and the bracket that ends them."""
    schema = function.schema
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    properties, needed = schema.get("properties", {}), schema.get("required", [])
    if not isinstance(properties, dict):
        raise ValueError("properties must be an object")
    if not isinstance(needed, list) or not all(isinstance(name, str) for name in needed):
        raise ValueError("required must be a list of names")
    once = dict.fromkeys(needed)
    required = [name for name in once if name in properties]
    names = required + [n for n in properties if n not in once and n.isidentifier()]
    for name in (function.name.replace(".", "_"), *required):
        if not name.isidentifier():
            raise ValueError(f"{name!r} is no name in calls of this model's kind")
    end = lark.text(")")
    for i, name in enumerate(names):
        value = {**properties[name], **shared} if isinstance(properties[name], dict) else {}
        yield f"a_{number}_{i}: {lark.text(f'{name}=')} {lark.arguments(value)}"
    # rest_i: what may follow before argument i; first_i: the same where none has come yet.
    yield f"rest_{number}_{len(names)}: {end}"
    yield f"first_{number}_{len(names)}: {end}"
    for i in reversed(range(len(names))):
        told, rest = f"a_{number}_{i} rest_{number}_{i + 1}", f"rest_{number}_{i + 1}"
        if i < len(required):
            yield f"rest_{number}_{i}: {lark.text(', ')} {told}"
            yield f"first_{number}_{i}: {told}"
        else:
            yield f"rest_{number}_{i}: {lark.text(', ')} {told} | {rest}"
            yield f"first_{number}_{i}: {told} | first_{number}_{i + 1}"
    yield f"arguments_{number}: first_{number}_0"
