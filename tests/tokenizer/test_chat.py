"""Templates: what they are given, what they may do, and what happens when they refuse."""

from typing import Any

import pytest

from slipstream.errors import ErrorCode
from slipstream.messages import ChatPrompt
from slipstream.tokenizer import chat
from slipstream.tokenizer.chat import ChatTemplate, PromptError


def render(source: str, content: Any = "hi", **prompt: Any) -> str:
    template = ChatTemplate(source, {"bos_token": "<s>"})
    asked = ChatPrompt(messages=[{"role": "user", "content": content}], **prompt)
    return template.render(asked, template.plain_messages(asked.messages))


def refused(source: str, content: Any = "hi", **prompt: Any) -> PromptError:
    with pytest.raises(PromptError) as caught:
        render(source, content, **prompt)
    return caught.value


def test_what_templates_rely_on() -> None:
    assert render("{{ bos_token }}{{ messages[0].content }}") == "<s>hi"
    assert render("{% if true %}\n  x\n{% endif %}\ny") == "  x\ny"
    assert (
        render("{% for i in [1,2,3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}")
        == "1"
    )
    assert render("{{ {'a': '<é>'} | tojson }}") == '{"a": "<é>"}'
    assert render("{{ {'b': 1} | tojson(indent=2) }}") == '{\n  "b": 1\n}'
    assert len(render("{{ strftime_now('%Y-%m-%d') }}")) == 10
    assert render("{% set n = namespace(x=1) %}{% set n.x = 2 %}{{ n.x }}") == "2"
    assert render("{% generation %}{{ messages[0].content }}{% endgeneration %}!") == "hi!"


def test_content_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    assert render("{{ messages[0].content }}", parts) == "a b"
    assert render("[{{ messages[0].content }}]", None) == "[]"


def test_other_parts_are_refused_by_place() -> None:
    problem = refused("x", [{"type": "image_url", "image_url": {"url": "file:///x"}}]).problem
    assert problem.code is ErrorCode.UNSUPPORTED_CONTENT
    assert problem.param == "messages[0].content[0]"
    assert refused("x", 5).problem.code is ErrorCode.INVALID_TYPE


def test_a_developer_is_the_system_unless_the_template_knows_one() -> None:
    messages = [{"role": "developer", "content": "x"}]
    for source, role in (
        ("{{ messages[0].role }}", "system"),
        ("{{ messages[0].role }}{# developer #}", "developer"),
    ):
        template = ChatTemplate(source, {})
        asked = ChatPrompt(messages=messages)
        assert template.render(asked, template.plain_messages(messages)) == role


def test_tool_arguments_become_objects() -> None:
    template = ChatTemplate("{{ messages[0].tool_calls[0].function.arguments.x }}", {})
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x": 7}'}}
    messages = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    plain = template.plain_messages(messages)
    assert template.render(ChatPrompt(messages=messages), plain) == "7"
    assert call["function"] == {"name": "f", "arguments": '{"x": 7}'}, (
        "the client's stays as it was"
    )


@pytest.mark.parametrize(
    ("arguments", "told"),
    [("", "{}"), (" \n", "{}"), ("{}", "{}"), ("[", '"["'), ('{"a":"\\ud83d"}', '{"a": "\ufffd"}')],
)
def test_arguments_of_the_history_are_what_a_template_can_write(arguments: str, told: str) -> None:
    """None is an empty object, half a pair is replaced; what is no JSON stays the client's text."""
    template = ChatTemplate("{{ messages[0].tool_calls[0].function.arguments | tojson }}", {})
    function = {"name": "f", "arguments": arguments}
    messages = [{"role": "assistant", "content": None, "tool_calls": [{"function": function}]}]
    said = template.render(ChatPrompt(messages=messages), template.plain_messages(messages))
    assert said == told and said.encode()


def test_the_templates_refusal_reaches_the_client() -> None:
    problem = refused("{{ raise_exception('Only user and assistant roles!') }}").problem
    assert problem.code is ErrorCode.INVALID_VALUE and problem.param == "messages"
    assert "Only user and assistant roles!" in problem.message


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({}) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{% set n = namespace() %}{% set n.__class__ = 1 %}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{{ 1 / 0 }}",
        "{{ messages[0].content + 1 }}",
        "{{ nothing.at.all }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_what_a_template_may_not_do(source: str) -> None:
    try:
        assert "class" not in render(source)  # undefined renders as nothing
    except PromptError as error:
        assert error.problem.code is ErrorCode.INVALID_VALUE


def test_output_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "RENDERED_CHARS_MAX", 1000)
    source = "{% for i in range(1000) %}{{ messages[0].content }}{% endfor %}"
    assert "exceeds 1000 characters" in refused(source).problem.message


def test_arguments_are_those_that_the_template_reads() -> None:
    source = "{% if enable_thinking %}t{% endif %}{{ messages[0].content }}{{ bos_token }}"
    assert ChatTemplate(source, {"bos_token": "<s>"}).arguments == {"enable_thinking"}
    assert render(source, template_args={"enable_thinking": True}) == "thi<s>"
    for name in ("messages", "bos_token", "tools", "raise_exception", "other"):
        problem = refused(source, template_args={name: "x"}).problem
        assert problem.param == "chat_template_kwargs" and "enable_thinking" in problem.message
