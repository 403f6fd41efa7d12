"""Constraints and forced calls: what a grammar lets through, and how it is read."""

import asyncio
import contextlib
import json
import random
import time
import tracemalloc
from pathlib import Path
from typing import Any

import msgspec
import pytest
from llguidance import LLMatcher, LLTokenizer

from slipstream.core.machine import Encoded, EncodePrompt, Event
from slipstream.errors import ErrorCode
from slipstream.grammar import limits, tokenizer
from slipstream.messages import ChatPrompt, Part, PartKind, Prompt, TextPrompt
from slipstream.tokenizer.chat import PromptError
from slipstream.tokenizer.codec import TokenizerCodec
from slipstream.tokenizer.constraints import Answer, planned
from slipstream.tokenizer.detokenizer import TextAssembler, spelled
from slipstream.tokenizer.dialect import Dialect
from slipstream.tokenizer.executor import EncodeExecutor
from slipstream.tokenizer.formats.parser import merged
from slipstream.tokenizer.formats.tool_formats import FORMATS, markers, parser
from slipstream.tokenizer.grammar_check import GrammarCheck
from slipstream.types import Constraint, ConstraintKind
from tokenizer import templates
from tokenizer.models import CHATML

FIND = {
    "type": "function",
    "function": {
        "name": "find",
        "parameters": {
            "type": "object",
            "properties": {
                "kind": {"enum": ["cat", "dog"]},
                "age": {"$ref": "#/$defs/age"},
                "tame": {"type": "boolean"},
            },
            "required": ["kind"],
            "$defs": {"age": {"type": "integer", "minimum": 0, "maximum": 9}},
        },
    },
}
STOP = {"type": "function", "function": {"name": "stop"}}
STOP_SCHEMA = {"type": "object", "properties": {}}
HALT = {"type": "function", "function": {"name": "halt", "parameters": STOP_SCHEMA}}
PLAIN = Dialect(None, False, False)
YES = Constraint(kind=ConstraintKind.CHOICE, text='["yes", "no"]')


class Model:
    """One that knows nothing: it draws from what the grammar lets through."""

    def __init__(self, template: str, folder: Path, *, special: bool = True) -> None:
        made = templates.folder_of(template, folder, special=special)
        self.codec = TokenizerCodec(made)
        self.eos = self.codec.added_texts["<|im_end|>"]
        self.tokens: LLTokenizer = tokenizer(made, self.codec.vocab_size, [self.eos])

    def planned(self, constraint: Constraint | None = None, **prompt: Any) -> Answer:
        chat = ChatPrompt(messages=[{"role": "user", "content": "Go"}], **prompt)
        ids = self.codec.encode(chat)
        end = self.codec.end_of(ids)
        return planned(chat, constraint, self.codec.dialect, self.codec.added_texts, end)

    def matcher(self, grammar: str) -> LLMatcher:
        made = LLMatcher(self.tokens, grammar, limits=limits())
        assert not made.is_error(), made.get_error()
        return made

    def takes(self, grammar: str, text: str) -> bool:
        """Whether the whole text is an answer."""
        matcher = self.matcher(grammar)
        ids = self.codec._tokenizer.encode(text, add_special_tokens=False).ids
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    def drawn(self, answer: Answer, seed: int) -> list[Part]:
        """An answer, read; it ends as soon as it may, half of the time."""
        rng = random.Random(seed)
        matcher = self.matcher(answer.grammar)
        shown = spelled(self.codec, markers(answer.format))
        text = TextAssembler(self.codec, True, shown)
        reader = parser(answer.format)
        parts: list[Part] = []
        for _ in range(2000):
            mask = matcher.compute_logit_bias()
            may = [token for token, allowed in enumerate(mask) if allowed]
            if self.eos in may and (len(may) == 1 or rng.random() < 0.5):
                return merged([*parts, *reader.push(text.flush()), *reader.end()])
            token = rng.choice([token for token in may if token != self.eos])
            assert matcher.consume_token(token)
            parts += reader.push(text.push(token))
        raise AssertionError("it does not end")


NATIVE = [
    templates.QWEN,
    templates.LLAMA3,
    templates.LLAMA4,
    templates.MISTRAL,
    templates.MISTRAL_NAMED,
]


@pytest.fixture(scope="module", params=range(2 * len(NATIVE)))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    template = NATIVE[request.param // 2]
    special = request.param % 2 == 0
    return Model(template, tmp_path_factory.mktemp("model"), special=special)


def calls_of(parts: list[Part]) -> list[tuple[str, dict[str, Any]]]:
    """ValueError if the parts are anything but whole calls."""
    kinds = [part.kind for part in parts]
    assert kinds == [PartKind.CALL, PartKind.ARGUMENTS] * (len(kinds) // 2), parts
    texts = [part.text for part in parts]
    return [(name, json.loads(told)) for name, told in zip(texts[::2], texts[1::2], strict=True)]


def is_right(name: str, arguments: dict[str, Any]) -> bool:
    if name == "halt":
        return arguments == {}
    kind, age = arguments.get("kind"), arguments.get("age", 0)
    known = arguments.keys() <= {"kind", "age", "tame"}
    return name == "find" and known and kind in ("cat", "dog") and 0 <= age <= 9


@pytest.mark.parametrize("seed", range(10))
def test_required_calls_are_whole_and_follow_their_schema(model: Model, seed: int) -> None:
    answer = model.planned(tools=[FIND, HALT], tool_choice="required")
    calls = calls_of(model.drawn(answer, seed))
    assert calls and all(is_right(*call) for call in calls)
    answer = model.planned(tools=[FIND, HALT], tool_choice="required", parallel_tool_calls=False)
    assert len(calls_of(model.drawn(answer, seed))) == 1
    answer = model.planned(tools=[FIND, HALT], tool_choice="=find")
    ((name, arguments),) = calls_of(model.drawn(answer, seed))
    assert name == "find" and is_right(name, arguments)


def test_several_calls_can_be_drawn(model: Model) -> None:
    answer = model.planned(tools=[FIND, HALT], tool_choice="required")
    counts = [len(calls_of(model.drawn(answer, seed))) for seed in range(30)]
    assert min(counts) == 1 and max(counts) > 1


def test_an_answer_that_may_be_a_call_or_follow_a_schema(model: Model) -> None:
    answer = model.planned(YES, tools=[HALT])
    found = {tuple(part.kind for part in model.drawn(answer, seed)) for seed in range(30)}
    assert (PartKind.CONTENT,) in found and len(found) > 1
    assert model.planned(tools=[HALT]) == Answer(format=answer.format), "free text otherwise"


def test_required_calls_win_over_a_response_format(model: Model) -> None:
    told = {"tools": [FIND], "tool_choice": "required"}
    assert model.planned(YES, **told) == model.planned(**told)


def test_a_function_without_parameters_takes_any_object(tmp_path: Path) -> None:
    model = Model(templates.QWEN, tmp_path)
    grammar = model.planned(tools=[STOP], tool_choice="=stop").grammar
    for arguments in ("{}", '{"x": {"y": [1]}}'):
        text = f'<tool_call>\n{{"name": "stop", "arguments": {arguments}}}\n</tool_call>'
        assert model.takes(grammar, text)
    assert not model.takes(grammar, '<tool_call>\n{"name": "stop", "arguments": 1}\n</tool_call>')


def test_who_names_a_tool_must_have_it(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="no tool 'x'") as raised:
        Model(templates.QWEN, tmp_path).planned(tools=[STOP], tool_choice="=x")
    assert raised.value.problem.param == "tool_choice"


def test_names_that_python_does_not_know(tmp_path: Path) -> None:
    model = Model(templates.LLAMA4, tmp_path)
    bad = {"type": "object", "properties": {"a-b": {}}, "required": ["a-b"]}
    tool = {"type": "function", "function": {"name": "f", "parameters": bad}}
    with pytest.raises(PromptError, match="'a-b' is no name") as raised:
        model.planned(tools=[tool], tool_choice="required")
    assert raised.value.problem.code is ErrorCode.INVALID_SCHEMA


OBJECT = {"type": "object"}
WIDE = {f"p{i}": {"type": "string"} for i in range(2000)}


@pytest.mark.parametrize(
    "parameters",
    [
        {**OBJECT, "properties": WIDE, "$defs": {"a": {"description": "x" * 200_000}}},
        {**OBJECT, "properties": None},
        {**OBJECT, "properties": ["a"]},
        {**OBJECT, "properties": {"a": {}}, "required": [["a"]]},
        {**OBJECT, "properties": {"a": {}}, "required": None},
    ],
)
def test_parameters_that_are_no_schema_or_too_long(parameters: dict[str, Any]) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    prompt = ChatPrompt(messages=[], tools=[tool], tool_choice="required")
    tracemalloc.start()
    with pytest.raises(PromptError) as raised:
        planned(prompt, None, Dialect(FORMATS["pythonic"], True, False), {}, "")
    _, most_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert raised.value.problem.code is ErrorCode.INVALID_SCHEMA
    assert raised.value.problem.param == "tools" and most_bytes < 16 << 20


def test_who_is_required_twice_is_given_once(tmp_path: Path) -> None:
    model = Model(templates.LLAMA4, tmp_path)
    twice = {**OBJECT, "properties": {"a": {"type": "integer"}}, "required": ["a", "a"]}
    tool = {"type": "function", "function": {"name": "f", "parameters": twice}}
    assert model.takes(model.planned(tools=[tool], tool_choice="required").grammar, "[f(a=1)]")


# --- Constraints ----------------------------------------------------------------------------------

TAKEN: list[tuple[ConstraintKind, str, list[str], list[str]]] = [
    (ConstraintKind.JSON, "", ["{}", '{\n  "a": [1, "x"]\n}'], ["[]", "{} ", '{"a":   1}']),
    (
        ConstraintKind.JSON_SCHEMA,
        '{"type": "array", "items": {"oneOf": [{"type": "integer"}, {"type": "null"}]}}',
        ["[]", "[1, null]"],
        ["[true]", "{}"],
    ),
    (ConstraintKind.REGEX, "^[a-c]+/x$", ["abc/x"], ["/x", "abd/x"]),
    (ConstraintKind.CHOICE, '["yes", "a \\"b\\"\\n"]', ["yes", 'a "b"\n'], ["no", "yes "]),
    (ConstraintKind.GRAMMAR, 'start: "a" b\nb: /[0-9]/', ["a1"], ["a", "b1"]),
    (ConstraintKind.GRAMMAR, 'root ::= "a" b\nb ::= [0-9]', ["a1"], ["a", "b1"]),
    (ConstraintKind.GRAMMAR, '?start: "a" b\nb: "::=" /[0-9]/', ["a::=1"], ["a", "a1"]),
]


@pytest.mark.parametrize(("kind", "text", "good", "bad"), TAKEN)
@pytest.mark.parametrize("template", [CHATML, templates.R1, templates.QWEN3])
def test_what_a_constraint_takes(
    tmp_path: Path, template: str, kind: ConstraintKind, text: str, good: list[str], bad: list[str]
) -> None:
    """Of a model that reasons, after the reasoning and not before."""
    model = Model(template, tmp_path, special=kind is not ConstraintKind.JSON)
    grammar = model.planned(Constraint(kind=kind, text=text)).grammar
    thoughts = {
        CHATML: [""],
        templates.R1: ["{} </thi\n</think>\n\n", "</think>"],
        templates.QWEN3: ["<think>\n{}\n</think>\n", ""],
    }
    for thought in thoughts[template]:
        assert all(model.takes(grammar, thought + answer) for answer in good), thought
        assert not any(model.takes(grammar, thought + answer) for answer in bad), thought
    assert not model.takes(grammar, f"<think>{good[0]}")


def test_where_the_reasoning_is(tmp_path: Path) -> None:
    r1 = Model(templates.R1, tmp_path / "r1")
    assert r1.planned().format == "thinking"
    qwen = Model(templates.QWEN3, tmp_path / "qwen")
    assert qwen.planned().format == "thinks"
    assert qwen.planned(tools=[STOP], parallel_tool_calls=False).format == "thinks hermes one"
    assert qwen.planned(template_args={"enable_thinking": False}).format == ""

    def goes_on(text: str) -> str:
        chat = ChatPrompt(
            messages=[{"role": "assistant", "content": text}], continue_final_message=True
        )
        return planned(chat, None, qwen.codec.dialect, {}, "").format

    assert [goes_on("<think>a"), goes_on("<think>a</think>b"), goes_on("b")] == ["thinking", "", ""]
    text = planned(None, YES, r1.codec.dialect, r1.codec.added_texts, "<think>\n")
    assert "think" not in text.grammar and text.format == "", "a completion is text"


@pytest.mark.parametrize("lines", ["root ::={}#", '{}start: "a"', 'root ::= "a"{}b ::= "b"'])
def test_a_grammar_of_empty_lines_is_read_in_no_time(lines: str) -> None:
    text = lines.format("\n" * 32_000)
    began_s = time.process_time()
    with contextlib.suppress(PromptError):
        planned(None, Constraint(kind=ConstraintKind.GRAMMAR, text=text), PLAIN, {}, "")
    assert time.process_time() - began_s < 1


def test_what_cannot_be_enforced_is_refused_or_left_out(tmp_path: Path) -> None:
    model = Model(CHATML, tmp_path)
    odd = Constraint(kind=ConstraintKind.JSON_SCHEMA, text='{"type": "array", "uniqueItems": true}')
    assert LLMatcher(model.tokens, model.planned(odd).grammar, limits=limits()).is_error()
    lenient = msgspec.structs.replace(odd, lenient=True)
    assert model.takes(model.planned(lenient).grammar, "[1, 1]")


# --- In a process of its own ----------------------------------------------------------------------

SCHEMA = ConstraintKind.JSON_SCHEMA
DEEP = '{"type":"object","properties":{"a":' * 1000 + "{}" + "}}" * 1000
SLOW = json.dumps(
    {"allOf": [{"type": "string", "pattern": f".*{c}.*"} for c in "abcdefghijklmnopqrstuv"]}
)
BAD = {
    "a type": (SCHEMA, '{"type": "wrong"}', "Invalid type: wrong"),
    "a pattern": (SCHEMA, '{"type": "string", "pattern": "("}', "unclosed group"),
    "itself": (SCHEMA, '{"$ref": "#"}', "no text follows it"),
    "far away": (SCHEMA, '{"$ref": "http://127.0.0.1:1/x"}', "not present in a registry"),
    "deep": (SCHEMA, DEEP, "recursion"),
    "large": (SCHEMA, json.dumps({"description": "x" * 2_000_000}), "at most 1048576"),
    "many": (SCHEMA, json.dumps({"enum": [f"value{i}" for i in range(100_000)]}), "at most"),
    "slow": (SCHEMA, SLOW, " s of a core"),
    "not an object": (SCHEMA, "[]", "Expected `object`"),
    "not JSON": (SCHEMA, "{", "truncated"),
    "keyword": (SCHEMA, '{"not": {}}', "Unimplemented keys"),
    "option": (SCHEMA, '{"not": {}, "x-guidance": {"lenient": true}}', "Unimplemented keys"),
    "regex": (ConstraintKind.REGEX, "(", "unclosed group"),
    "choices": (ConstraintKind.CHOICE, "[]", "no choices"),
    "choice": (ConstraintKind.CHOICE, "[1]", "Expected `str`"),
    "name": (ConstraintKind.GRAMMAR, "start: other", "unknown name"),
    "gbnf": (ConstraintKind.GRAMMAR, "root ::= (", "Expected ')'"),
    "no root": (ConstraintKind.GRAMMAR, 'start ::= "a"', "No 'root' rule"),
    "neither": (ConstraintKind.GRAMMAR, "yes or no", "Expected"),
    "lines": (ConstraintKind.GRAMMAR, "root ::=" + "\n" * 40_000, "at most 32768"),
    "rules": (ConstraintKind.GRAMMAR, "root ::= a\n" * 300, "256 rules"),
    "brackets": (ConstraintKind.GRAMMAR, "root ::= " + "(" * 30_000, "recursion"),
    "long": (ConstraintKind.GRAMMAR, "x" * 70_000, "at most 65536"),
}
GOOD = {
    "recursive": '{"type": "object", "properties": {"a": {"$ref": "#"}}}',
    "backtracking": '{"type": "string", "pattern": "^(a+)+b$"}',
    "enum": json.dumps({"enum": [f"value{i}" for i in range(1000)]}),
    "long string": '{"type": "string", "maxLength": 1000000000}',
}


async def asked(
    codec: TokenizerCodec,
    folder: Path,
    effects: list[EncodePrompt],
    grammars: GrammarCheck | None = None,
) -> list[Encoded]:
    """In the order of the questions."""
    checker = grammars or GrammarCheck(folder, codec.vocab_size, [0])
    executor = EncodeExecutor(codec, checker, 2, lambda: 0)
    loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()
    await executor.start(lambda event: loop.call_soon_threadsafe(events.put_nowait, event))
    for effect in effects:
        executor.execute(effect)
    found: dict[str, Encoded] = {}
    for _ in effects:
        event = await asyncio.wait_for(events.get(), 30)
        assert isinstance(event, Encoded)
        found[event.request_id] = event
    if grammars is None:
        await executor.close()
    return [found[effect.request_id] for effect in effects]


HI: Prompt = TextPrompt(text="Hi")


async def test_bad_constraints_are_refused_with_the_reason(
    byte_level_codec: TokenizerCodec, byte_level_folder: Path
) -> None:
    questions = [
        EncodePrompt(name, HI, Constraint(kind=kind, text=text, param="response_format"))
        for name, (kind, text, _) in BAD.items()
    ]
    for answer in await asked(byte_level_codec, byte_level_folder, questions):
        problem = answer.problem
        reason = BAD[answer.request_id][2]
        assert problem is not None, answer.request_id
        if problem.code is ErrorCode.QUEUE_FULL and answer.request_id == "slow":
            continue  # on a machine where nothing gets a quarter of a second within two
        assert problem.code is ErrorCode.INVALID_SCHEMA, answer.request_id
        assert reason in problem.message and problem.param == "response_format", problem
        assert len(problem.message) < 400
    questions = [
        EncodePrompt(name, HI, Constraint(kind=SCHEMA, text=text)) for name, text in GOOD.items()
    ]
    for answer in await asked(byte_level_codec, byte_level_folder, questions):
        assert answer.problem is None and answer.grammar, answer
        assert answer.tokens == tuple(byte_level_codec.encode(HI))


async def test_tools_that_cannot_be_forced(
    byte_level_codec: TokenizerCodec, byte_level_folder: Path
) -> None:
    broken = {"type": "object", "properties": {"a": {"type": "wrong"}}, "required": ["a"]}
    odd = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    questions = []
    for name, schema in (("broken", broken), ("odd", odd)):
        tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
        chat = ChatPrompt(messages=[], tools=[tool], tool_choice="required")
        questions.append(EncodePrompt(name, chat, parse=True))
    no, yes = await asked(byte_level_codec, byte_level_folder, questions)
    assert no.problem is not None and no.problem.param == "tools"
    assert no.problem.code is ErrorCode.INVALID_SCHEMA and "wrong" in no.problem.message
    assert yes.problem is None and yes.answer_format == "hermes", (
        "what cannot be held is passed over"
    )
