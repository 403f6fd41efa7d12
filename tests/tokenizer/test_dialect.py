"""What is read off a chat template, and what a template is given."""

import json
from pathlib import Path
from typing import Any

import pytest

from slipstream.errors import ErrorCode
from slipstream.messages import ChatPrompt
from slipstream.tokenizer.chat import ChatTemplate, PromptError
from slipstream.tokenizer.codec import CodecError, TokenizerCodec
from slipstream.tokenizer.dialect import DialectError, detect
from tokenizer import templates
from tokenizer.models import CHATML, byte_level, demo_folder

WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}},
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Bonn"}'}}
HISTORY = [
    {"role": "user", "content": "Rain?"},
    {"role": "assistant", "content": None, "tool_calls": [{"id": "call_1", **CALL}]},
    {"role": "tool", "tool_call_id": "call_1", "content": "no"},
    {"role": "tool", "tool_call_id": "call_2", "content": [{"type": "text", "text": "yes"}]},
]


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (CHATML, "tools: hermes, told in a system message; reasoning: none"),
        (templates.QWEN, "tools: hermes, by its chat template; reasoning: none"),
        (templates.QWEN3, "tools: hermes, by its chat template; reasoning: think"),
        (templates.LLAMA3, "tools: llama3_json, by its chat template; reasoning: none"),
        (templates.LLAMA4, "tools: pythonic, by its chat template; reasoning: none"),
        (templates.MISTRAL, "tools: mistral, by its chat template; reasoning: none"),
        (templates.MISTRAL_NAMED, "tools: mistral_named, by its chat template; reasoning: none"),
        (templates.R1, "tools: hermes, told in a system message; reasoning: think"),
        (templates.CODER, "tools: hermes, told in a system message; reasoning: none"),
    ],
)
def test_what_a_template_says(template: str, said: str) -> None:
    assert str(detect([ChatTemplate(template, {})], "auto", "auto")) == said


def test_what_a_setting_says() -> None:
    qwen = [ChatTemplate(templates.QWEN3, {})]
    assert str(detect(qwen, "llama3_json", "none")) == (
        "tools: llama3_json, by its chat template; reasoning: none"
    )
    assert str(detect(qwen, "none", "think")) == "tools: none; reasoning: think"
    with pytest.raises(DialectError, match="--tool-format pythonic"):
        detect([ChatTemplate(CHATML, {})], "pythonic", "auto")


def test_a_setting_that_the_template_cannot_do(tmp_path: Path) -> None:
    with pytest.raises(CodecError, match="does not read tools"):
        TokenizerCodec(byte_level(tmp_path), "mistral")
    codec = TokenizerCodec(byte_level(tmp_path), "none")
    with pytest.raises(PromptError, match="--tool-format none") as raised:
        codec.encode(ChatPrompt(messages=HISTORY[:1], tools=[WEATHER]))
    assert raised.value.problem.param == "tools"
    assert codec.encode(ChatPrompt(messages=HISTORY[:1], tools=[WEATHER], tool_choice="none"))


def rendered(codec: TokenizerCodec, messages: list[dict[str, Any]], **prompt: Any) -> str:
    ids = codec.encode(ChatPrompt(messages=messages, **prompt))
    return codec.decode(ids, skip_special_tokens=False)


def test_a_template_that_reads_tools_gets_them(tmp_path: Path) -> None:
    codec = templates.codec_of(templates.QWEN, tmp_path, special=False)
    text = rendered(codec, HISTORY, tools=[WEATHER])
    assert text.startswith(f"TOOLS {json.dumps([WEATHER])}")
    assert '{"name": "weather", "arguments": {"city": "Bonn"}}\n</tool_call><|im_end|>' in text
    assert text.endswith("tool\nyes<|im_end|>\n<|im_start|>assistant\n")
    assert "TOOLS" not in rendered(codec, HISTORY, tools=[WEATHER], tool_choice="none")


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_one_that_does_not_is_told_in_a_system_message(tmp_path: Path, system: str | None) -> None:
    codec = TokenizerCodec(byte_level(tmp_path))
    messages = [{"role": "developer", "content": system}] if system else []
    text = rendered(codec, [*messages, *HISTORY], tools=[WEATHER])
    said = f"{system}\n\n" if system else ""
    assert text.startswith(f"<|im_start|>system\n{said}# Tools\n")
    assert f"<tools>\n{json.dumps(WEATHER)}\n</tools>" in text
    assert '{"name": "<name>", "arguments": {<arguments>}}' in text
    turns = text.split("<|im_start|>")
    assert turns[-3:-1] == [
        'assistant\n<tool_call>\n{"name": "weather", "arguments": {"city": "Bonn"}}\n</tool_call>'
        "<|im_end|>\n",
        "user\n<tool_response>\nno\n</tool_response>\n<tool_response>\nyes\n</tool_response>"
        "<|im_end|>\n",
    ]
    without = rendered(codec, [*messages, *HISTORY], tools=[WEATHER], tool_choice="none")
    assert "# Tools" not in without and "<tool_response>\nno" in without


def test_the_demo_model_can_be_told_of_tools() -> None:
    folder = demo_folder()
    if folder is None:
        pytest.skip("no demo model")
    codec = TokenizerCodec(folder)
    text = rendered(codec, HISTORY, tools=[WEATHER])
    assert text.startswith("<|im_start|>system\n# Tools") and text.count("<|im_start|>") == 5


def test_mistral_gets_ids_of_nine_letters(tmp_path: Path) -> None:
    codec = templates.codec_of(templates.MISTRAL, tmp_path)
    ids = [rendered(codec, HISTORY).split('"id": "')[1][:10] for _ in range(2)]
    assert ids[0] == ids[1] and ids[0][:9].isalnum() and ids[0][9] == '"'
    kept = [{"role": "assistant", "content": "", "tool_calls": [{"id": "a1B2c3D4e", **CALL}]}]
    assert '"id": "a1B2c3D4e"' in rendered(codec, kept)


# --- The last message goes on ---------------------------------------------------------------------


def test_the_last_message_goes_on(tmp_path: Path) -> None:
    codec = TokenizerCodec(byte_level(tmp_path))
    messages = [{"role": "user", "content": "Sing"}, {"role": "assistant", "content": "La la "}]
    text = rendered(codec, messages, continue_final_message=True)
    assert text == "<|im_start|>user\nSing<|im_end|>\n<|im_start|>assistant\nLa la "


def test_it_goes_on_where_its_text_is_a_special_token_or_trimmed(tmp_path: Path) -> None:
    codec = TokenizerCodec(byte_level(tmp_path / "a"))
    messages = [{"role": "assistant", "content": "a <|im_end|> b"}]
    text = rendered(codec, messages, continue_final_message=True)
    assert text == "<|im_start|>assistant\na <|im_end|> b"
    trims = CHATML.replace("message['content']", "message['content'] | trim")
    codec = TokenizerCodec(byte_level(tmp_path / "b", chat_template=trims))
    messages = [{"role": "assistant", "content": " La la  "}]
    text = rendered(codec, messages, continue_final_message=True)
    assert text == "<|im_start|>assistant\nLa la"


@pytest.mark.parametrize("text", ["<", "i", "e", "|>", "CONTINUED_HERE", "<|im_end|>"])
def test_it_goes_on_where_the_end_of_a_message_has_the_same_text(tmp_path: Path, text: str) -> None:
    codec = templates.codec_of(templates.QWEN3, tmp_path)
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
    told = rendered(codec, messages, continue_final_message=True)
    assert told == f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n{text}"


def test_a_template_that_drops_the_last_message_has_nothing_to_go_on_from(tmp_path: Path) -> None:
    drops = CHATML.replace("message['content']", "''")
    codec = TokenizerCodec(byte_level(tmp_path, chat_template=drops))
    with pytest.raises(PromptError) as raised:
        rendered(codec, [{"role": "assistant", "content": "m"}], continue_final_message=True)
    assert raised.value.problem.param == "continue_final_message"


@pytest.mark.parametrize("content", ["", "  ", None])
def test_there_must_be_something_to_go_on_from(tmp_path: Path, content: str | None) -> None:
    codec = TokenizerCodec(byte_level(tmp_path))
    with pytest.raises(PromptError) as raised:
        rendered(codec, [{"role": "user", "content": content}], continue_final_message=True)
    assert raised.value.problem.param == "continue_final_message"
    with pytest.raises(PromptError):
        rendered(codec, [], continue_final_message=True)


# --- Words that must not come ---------------------------------------------------------------------


def test_bad_words_are_avoided_alone_and_after_a_space(codecs: dict[str, TokenizerCodec]) -> None:
    codec = codecs["byte_level"]
    found = codec.avoided(["hello", " hello", "dog"])
    assert [codec.decode(ids) for ids in found] == ["hello", " hello", "dog", " dog"]
    for name, other in codecs.items():
        assert len(other.avoided(["fox"])) == 2, name
    for word in ("", " ", "<|im_end|>", "a<|im_end|>"):
        with pytest.raises(PromptError) as raised:
            codec.avoided([word])
        problem = raised.value.problem
        assert (problem.code, problem.param) == (ErrorCode.INVALID_VALUE, "bad_words")
