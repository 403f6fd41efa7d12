"""Answers told apart: each format, and that it does not matter how the text is cut."""

import json
from collections.abc import Callable, Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.messages import PartKind
from slipstream.tokenizer.formats.parser import HEAD_CHARS_MAX, Parser, merged
from slipstream.tokenizer.formats.tool_formats import FORMATS, ONE, THINKING, THINKS, parser
from slipstream.tokenizer.text import well_formed

Read = list[tuple[str, str]]


def read(answer_format: str, text: str, cuts: Iterable[int] = ()) -> Read:
    made: Parser = parser(answer_format)
    parts, last = [], 0
    for cut in sorted({*cuts, len(text)}):
        parts += made.push(text[last:cut])
        last = cut
    parts += made.end()
    for part in parts:
        part.text.encode()  # as it travels
    return [(part.kind.value, part.text) for part in merged(parts)]


def call(name: str, arguments: str = "{}") -> Read:
    return [("call", name), ("arguments", arguments)]


def says(text: str) -> Read:
    return [("content", text)]


NESTED = r'{"a": {"b": "}]<\"</tool_call>"}, "c": [1, {"d": "\\"}], "e": "\u00e9é"}'
WORDS = '{"a": True, "b": [None, False, NaN], "c": undefined, "d": -Infinity}'
"""What models write that know Python and JavaScript better than JSON."""
ARRAY_OF_TWO = '[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]'

CASES: list[tuple[str, str, Read]] = [
    # Hermes
    (
        "hermes",
        f'Well.\n<tool_call>\n{{"name": "f", "arguments": {NESTED}}}\n</tool_call>\n',
        says("Well.") + call("f", NESTED),
    ),
    (
        "hermes",
        '<tool_call>{"name":"f","arguments":{}}</tool_call>\n'
        '<tool_call>\n{"name": "g", "arguments": {"x": -1.5e3, "y": null}} </tool_call> and so on ',
        call("f") + call("g", '{"x": -1.5e3, "y": null}') + says("and so on"),
    ),
    ("hermes", '<tool_call>\n{"name": "f"}\n</tool_call>', call("f")),
    ("hermes", '<tool_call>{"id": None, "name": "f", "arguments": None}</tool_call>', call("f")),
    (
        "hermes",
        r'<tool_call>{"name": "f", "arguments": "{\"a\": \"x\ny\"}"}</tool_call>',
        call("f", r'{"a": "x\ny"}'),
    ),
    ("hermes", '<tool_call>{"name": "f", "parameters": {"a": 1}}', call("f", '{"a": 1}')),
    ("hermes", '<tool_call>{"name": "a\\"b", "arguments": {}}</tool_call>', call('a"b')),
    (
        "hermes",
        '<tool_call>{"name": "f", "arguments": {"a": 1}, "id": "x}"}</tool_call>!',
        call("f", '{"a": 1}') + says("!"),
    ),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": ["cut', call("f", '{"a": ["cut')),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}</tool_call>', call("f", '{"a": 1}')),
    (
        "hermes",
        '<tool_call>{"type": "function", "id": 7, "name": "f", "x": null, "parameters": {"a": 1}}'
        "</tool_call>!",
        call("f", '{"a": 1}') + says("!"),
    ),
    ("hermes", '<tool_call>{"name": "f", "arguments": null, "id": "x"}</tool_call>', call("f")),
    ("hermes", '<tool_call>{"id": "x", "name": "f", "arguments": ""}</tool_call>', call("f")),
    (
        "hermes",
        r'<tool_call>{"name": "f", "arguments": "{\"a\": \"\\n\ud83d\ude00\u00e9\ud83d \uZ\"}", '
        '"id": 1}</tool_call>!',
        call("f", '{"a": "\\n😀é\ufffd \\uZ"}') + says("!"),
    ),
    (
        "hermes",
        '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>',
        says('<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>'),
    ),
    (
        "hermes",
        '<tool_call>{"arguments": "x", "name": "f"}</tool_call>',
        says('<tool_call>{"arguments": "x", "name": "f"}</tool_call>'),
    ),
    (
        "hermes",
        f'<tool_call>{{"name": "f", "arguments": {WORDS}}}</tool_call>!',
        call("f", WORDS) + says("!"),
    ),
    (
        "hermes",
        '<tool_call>{"name": "f", "arguments": {\n"a": "x = 1\n\ty\\\n\x00é"\r\n}}</tool_call>!',
        call("f", '{\n"a": "x = 1\\n\\ty\\u000a\\u0000é"\r\n}') + says("!"),
    ),
    ("llama3_json", f'{{"name": "f", "parameters": {WORDS}}}', call("f", WORDS)),
    (
        "llama3_json",
        '{"type": "function", "name": "f", "parameters": {"a": 1}}',
        call("f", '{"a": 1}'),
    ),
    ("llama3_json", '{"name": "Ann", "age": 7}', says('{"name": "Ann", "age": 7}')),
    (
        "mistral",
        '[TOOL_CALLS][{"id": "abc", "name": "f", "arguments": null}, {"name": "g", '
        '"arguments": "{}"}]',
        call("f") + call("g"),
    ),
    ("hermes", " \n Hello <tool\n", says(" \n Hello <tool\n")),
    ("hermes", "if a <tool_call> b", says("if a <tool_call> b")),
    (
        "hermes",
        "<tool_call>{'name': 'f'}</tool_call>",
        says("<tool_call>{'name': 'f'}</tool_call>"),
    ),
    (
        "hermes",
        '<tool_call>{"name": "f", "arguments": {a: 1}}</tool_call>',
        says('<tool_call>{"name": "f", "arguments": {a: 1}}</tool_call>'),
    ),
    (
        "hermes",
        '<tool_call><tool_call>{"name": "f", "arguments": {}}</tool_call>',
        says("<tool_call>") + call("f"),
    ),
    ("hermes", '<tool_call>{"name": "f', says('<tool_call>{"name": "f')),
    # Llama 3
    ("llama3_json", '{"name": "f", "parameters": {"a": {"b": 1}}}', call("f", '{"a": {"b": 1}}')),
    (
        "llama3_json",
        '<|python_tag|>{"name": "f", "parameters": {}}; {"name": "g", "parameters": {"a": "}"}}\n',
        call("f") + call("g", '{"a": "}"}'),
    ),
    ("llama3_json", ' {"name": "Ann", "age": 3} ', says(' {"name": "Ann", "age": 3} ')),
    (
        "llama3_json",
        'So: {"name": "f", "parameters": {}}',
        says('So: {"name": "f", "parameters": {}}'),
    ),
    (
        "llama3_json",
        'So: <|python_tag|>{"name": "f", "parameters": {}}',
        says("So:") + call("f"),
    ),
    ("llama3_json", "<|python_tag|>print(1)", says("<|python_tag|>print(1)")),
    ("llama3_json", '{"name": "f"}', says('{"name": "f"}')),
    # Mistral
    ("mistral", ARRAY_OF_TWO, call("f", '{"a": 1}') + call("g")),
    ("mistral", "Hm [TOOL_CALLS] [1, 2]", says("Hm [TOOL_CALLS] [1, 2]")),
    ("mistral", "[TOOL_CALLS] calls", says("[TOOL_CALLS] calls")),
    (
        "mistral_named",
        'Hm.[TOOL_CALLS]f[ARGS]{"a": "]"}[TOOL_CALLS]g[CALL_ID]a1B2c3D4e[ARGS]{}',
        says("Hm.") + call("f", '{"a": "]"}') + call("g"),
    ),
    ("mistral_named", '[TOOL_CALLS]add{"a": 3.5}', call("add", '{"a": 3.5}')),
    ("mistral_named", '[TOOL_CALLS]f[ARGS]{"a": "1\n2"}', call("f", '{"a": "1\\n2"}')),
    ("mistral_named", "[TOOL_CALLS]f[ARGS]{}] x", call("f") + says("] x")),
    # Pythonic
    (
        "pythonic",
        """[f(a=1, b="x, y)"), g(), m.h(x=[1, {"k": None}], y=True, z='it\\'s', w=-2.5)]""",
        call("f", '{"a": 1, "b": "x, y)"}')
        + call("g")
        + call("m.h", '{"x": [1, {"k": null}], "y": true, "z": "it\'s", "w": -2.5}'),
    ),
    ("pythonic", "<|python_start|>[f(a=true)]<|python_end|>", call("f", '{"a": true}')),
    ("pythonic", "See [this](http://x) and [1, 2]", says("See [this](http://x) and [1, 2]")),
    ("pythonic", "[this](http://x)", says("[this](http://x)")),
    ("pythonic", "[f(1)]", says("[f(1)]")),
    (
        "pythonic",
        "[f(a=1e999, b={1, 2}, c=NaN)]",
        call("f", '{"a": 1e999, "b": "{1, 2}", "c": "NaN"}'),
    ),
    ("pythonic", '[f(a="two\nlines", )]', call("f", '{"a": "two\\nlines"}')),
    (
        "pythonic",
        r'[f(a="hi \ud83d\ude00", b=["\ud83d x", true], c={"\ude00": "\ud83d"})]',
        call("f", '{"a": "hi 😀", "b": ["\\ud83d x", true], "c": {"\ufffd": "\ufffd"}}'),
    ),
    ("pythonic", "[f(a=1, 2)] no", call("f", '{"a": 1}') + says(", 2)] no")),
    ("pythonic", "[f(a=[1, 2", call("f", '{"a": ')),
    # Reasoning
    (
        f"{THINKS}",
        "<think>\nI see.\n\nYes </thi\n</think>\n\nHi ",
        [("reasoning", "I see.\n\nYes </thi"), *says("Hi ")],
    ),
    (f"{THINKS}", " Hi <think>x</think>", says(" Hi <think>x</think>")),
    (f"{THINKS}", "<thin", says("<thin")),
    (f"{THINKING}", "I see.\n</think>\nHi", [("reasoning", "I see."), *says("Hi")]),
    (f"{THINKING}", "<think>\nI see.</think>Hi", [("reasoning", "I see."), *says("Hi")]),
    (f"{THINKING}", "No end </thi\n", [("reasoning", "No end </thi")]),
    (f"{THINKING}", "", []),
    (
        f"{THINKING} hermes",
        '<tool_call>?\n</think>\n\n<tool_call>{"name": "f", "arguments": {}}</tool_call>',
        [("reasoning", "<tool_call>?"), *call("f")],
    ),
    (
        f"{THINKING} llama3_json",
        'a</think>\n{"name": "f", "parameters": {}}',
        [("reasoning", "a"), *call("f")],
    ),
    # One call, and no format at all
    (f"mistral {ONE}", ARRAY_OF_TWO, call("f", '{"a": 1}')),
    ("", "<think>a</think><tool_call>", says("<think>a</think><tool_call>")),
]


@pytest.mark.parametrize(("answer_format", "text", "parts"), CASES)
def test_answers(answer_format: str, text: str, parts: Read) -> None:
    assert read(answer_format, text) == parts


@pytest.mark.parametrize(("answer_format", "text", "parts"), CASES)
def test_it_does_not_matter_how_the_text_is_cut(answer_format: str, text: str, parts: Read) -> None:
    for cut in range(len(text)):
        assert read(answer_format, text, [cut]) == parts, cut
    assert read(answer_format, text, range(len(text))) == parts


SNIPPETS = [
    *("<tool_call>", "</tool_call>", '{"name": "f", "arguments": ', '{"a": [1, "}"]}', "}", "{}"),
    *("<think>", "</think>", "<|python_tag|>", '{"name": "f", "parameters": ', ";", " ", "\n"),
    *("[TOOL_CALLS]", "[ARGS]", "[", "]", "f(", "a=", "'x'", '"', ")", ",", "\\", "{", "f", "<"),
    *('[f(a="\\ud83d', '\\ude00")', '{"a": "\\ud83d\n', "None"),
]
FORMAT_NAMES = st.sampled_from(
    [f"{first} {name}" for first in ("", THINKS, THINKING) for name in ("", *FORMATS)]
)


@given(FORMAT_NAMES, st.lists(st.sampled_from(SNIPPETS), max_size=14), st.data())
def test_nor_where_drawn_texts_are(
    answer_format: str, snippets: list[str], data: st.DataObject
) -> None:
    text = "".join(snippets)
    whole = read(answer_format, text)
    assert read(answer_format, text, range(len(text))) == whole
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=6))
    assert read(answer_format, text, cuts) == whole


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=12,
)  # fmt: skip
NAMES = st.from_regex(r"[a-zA-Z_][a-zA-Z0-9_]{0,20}", fullmatch=True)
CALLS = st.lists(st.tuples(NAMES, st.dictionaries(NAMES, JSON, max_size=4)), min_size=1, max_size=3)

WRITERS: dict[str, Callable[[list[tuple[str, str]]], str]] = {
    "hermes": lambda calls: "\n".join(
        f'<tool_call>\n{{"name": "{name}", "arguments": {told}}}\n</tool_call>'
        for name, told in calls
    ),
    "llama3_json": lambda calls: "; ".join(
        f'{{"name": "{name}", "parameters": {told}}}' for name, told in calls
    ),
    "mistral": lambda calls: (
        "[TOOL_CALLS]["
        + ", ".join(f'{{"name": "{name}", "arguments": {told}}}' for name, told in calls)
        + "]"
    ),
    "mistral_named": lambda calls: "".join(
        f"[TOOL_CALLS]{name}[ARGS]{told}" for name, told in calls
    ),
}


@given(st.sampled_from(sorted(WRITERS)), CALLS, st.booleans(), st.booleans(), st.data())
def test_what_is_written_is_read(
    name: str,
    calls: list[tuple[str, dict[str, object]]],
    indented: bool,
    ascii_only: bool,
    data: st.DataObject,
) -> None:
    def dumped(value: object) -> str:
        return json.dumps(value, indent=2 if indented else None, ensure_ascii=ascii_only)

    written = [(called, dumped(arguments)) for called, arguments in calls]
    text = WRITERS[name](written)
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=8))
    assert read(name, text, cuts) == [part for one in written for part in call(*one)]


@given(CALLS, st.data())
def test_python_literals_are_read(
    calls: list[tuple[str, dict[str, object]]], data: st.DataObject
) -> None:
    told = (f"{name}({', '.join(f'{k}={v!r}' for k, v in a.items())})" for name, a in calls)
    text = f"[{', '.join(told)}]"
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=8))
    parts = read("pythonic", text, cuts)
    assert [text for kind, text in parts if kind == "call"] == [name for name, _ in calls]
    found = [json.loads(text) for kind, text in parts if kind == "arguments"]
    assert found == [arguments for _, arguments in calls]


LONE = st.text(st.characters() | st.characters(categories=["Cs"]) | st.sampled_from('\n\t\\"'))
"""With halves of surrogate pairs, which JSON can write and UTF-8 cannot."""


@given(st.sampled_from([*sorted(WRITERS), "pythonic"]), st.dictionaries(NAMES, LONE), st.data())
def test_halves_of_pairs_are_no_text(
    name: str, arguments: dict[str, str], data: st.DataObject
) -> None:
    if name == "pythonic":
        text = f"[f({', '.join(f'{k}={json.dumps(v)}' for k, v in arguments.items())})]"
    else:
        text = WRITERS[name]([("f", json.dumps(arguments))])
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=8))
    kinds, texts = zip(*read(name, text, cuts), strict=True)
    assert kinds == ("call", "arguments")
    assert well_formed(json.dumps(json.loads(texts[1]), ensure_ascii=False)) == well_formed(
        json.dumps(arguments, ensure_ascii=False)
    )


CONTROL = st.text(st.characters(max_codepoint=0x7F, exclude_characters="\\"), max_size=20)


@given(st.sampled_from(sorted(WRITERS)), st.dictionaries(NAMES, CONTROL, min_size=1), st.data())
def test_arguments_with_raw_lines_are_json(
    name: str, arguments: dict[str, str], data: st.DataObject
) -> None:
    """As of a model that writes a program, and forgets that its lines are inside of a string."""
    raw = json.dumps(arguments)
    for sign in range(0x20):
        raw = raw.replace(json.dumps(chr(sign))[1:-1], chr(sign))
    text = WRITERS[name]([("f", raw)])
    assert json.loads(raw, strict=False) == arguments
    for cuts in (data.draw(st.lists(st.integers(0, len(text)), max_size=8)), range(len(text))):
        told = read(name, text, cuts)
        assert [kind for kind, _ in told] == ["call", "arguments"]
        assert json.loads(told[1][1]) == arguments


def test_a_name_comes_with_the_first_argument_and_arguments_as_they_are_written() -> None:
    made = parser("hermes")
    assert made.push('<tool_call>{"name": "f", "arguments": {') == []
    began = made.push('"')
    assert [part.kind for part in began] == [PartKind.CALL, PartKind.ARGUMENTS]
    assert [part.text for letter in 'a": [1' for part in made.push(letter)] == list('a": [1')
    assert made.push("]}}") == [(PartKind.ARGUMENTS, "]}")] or made.end() == []


def test_what_looks_like_a_call_is_held_for_so_long_and_no_longer() -> None:
    for answer_format, begin in (
        ("hermes", '<tool_call>{"name": "'),
        ("llama3_json", '{"name": "'),
        ("mistral", "[TOOL_CALLS]"),
        ("pythonic", "[a"),
    ):
        made = parser(answer_format)
        made.push(begin)
        said = made.push("x" * (HEAD_CHARS_MAX + 100))
        assert merged(said)[0].kind is PartKind.CONTENT, answer_format


@pytest.mark.parametrize(
    ("answer_format", "begin", "letters"),
    [
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "', "\\n"),
        ("hermes", "<tool_call>", " "),
        ("hermes", '<tool_call>{"name": "f", "arguments": {}}', " "),
        ("mistral", "[TOOL_CALLS] ", " "),
        ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": {}}', " "),
        ("llama3_json", "", "\n"),
        ("pythonic", "", "\n"),
        ("pythonic", "[f(a=1", ", "),
        (THINKING, "a", " "),
        (THINKING, "", " "),
        (THINKS, "", " "),
    ],
)
def test_little_is_read_twice(answer_format: str, begin: str, letters: str) -> None:
    """What a parser keeps in front of it, and reads again with each token, is bounded."""
    made = parser(answer_format)
    made.push(begin)
    for _ in range(2 * HEAD_CHARS_MAX):
        made.push(letters)
    assert len(vars(made)["_text"]) <= HEAD_CHARS_MAX + len(begin)
