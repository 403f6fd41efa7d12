"""The formats by name, and how an answer is read by what its prompt was."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from slipstream.tokenizer.formats import hermes, llama3_json, mistral, pythonic, think
from slipstream.tokenizer.formats.lark import Function, Ref
from slipstream.tokenizer.formats.parser import FirstCall, Parser, Plain


class ToolFormat(NamedTuple):
    """A way of writing calls."""

    name: str
    parser: Callable[[], Parser]
    rules: Callable[[Sequence[Function], int, Ref], str]
    """Lark for rule `calls`: at least one and at most so many calls of these functions."""
    markers: tuple[str, ...]
    """What the parser must see of an answer though they may be special tokens."""


FORMATS = {
    made.name: made
    for made in (
        ToolFormat("hermes", hermes.HermesParser, hermes.rules, (hermes.OPEN, hermes.CLOSE)),
        ToolFormat(
            "llama3_json", llama3_json.Llama3JsonParser, llama3_json.rules, (llama3_json.TAG,)
        ),
        ToolFormat("mistral", mistral.MistralParser, mistral.listed_rules, mistral.MARKERS),
        ToolFormat("mistral_named", mistral.MistralParser, mistral.named_rules, mistral.MARKERS),
        ToolFormat(
            "pythonic", pythonic.PythonicParser, pythonic.rules, (pythonic.START, pythonic.END)
        ),
    )
}

THINKS, THINKING = "thinks", "thinking"
"""The answer may begin with reasoning; it begins inside of it."""
ONE = "one"
"""One call at most."""


def parser(answer_format: str) -> Parser:
    """`answer_format`: some of the words above and the name of a tool format, in any order."""
    words = answer_format.split()
    made: Parser = Plain()
    for name in FORMATS.keys() & words:
        made = FORMATS[name].parser()
    if ONE in words:
        made = FirstCall(made)
    if THINKS in words or THINKING in words:
        made = think.ThinkParser(THINKING in words, made)
    return made


def markers(answer_format: str) -> frozenset[str]:
    """Texts that must reach the parser, special tokens or not."""
    found: set[str] = set()
    for word in answer_format.split():
        if word in FORMATS:
            found.update(FORMATS[word].markers)
        elif word in (THINKS, THINKING):
            found.update((think.OPEN, think.CLOSE))
    return frozenset(found)
