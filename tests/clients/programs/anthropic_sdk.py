"""The `anthropic` package: messages, streams, tools, counting, errors."""

import anthropic
from common import CITY, HI, MODEL, PARAMETERS, ROOT_URL, check_weather

client = anthropic.Anthropic(base_url=ROOT_URL, api_key="none", timeout=120)
QUICK = {"model": MODEL, "max_tokens": 12, "extra_body": {"temperature": 0}}
TOOLS = [{"name": "get_weather", "description": "Weather.", "input_schema": PARAMETERS}]


def messages() -> None:
    whole = client.messages.create(system="Be kind.", messages=HI, **QUICK)
    assert whole.content[0].text and whole.usage.output_tokens <= 12
    assert whole.stop_reason in ("max_tokens", "end_turn")
    with client.messages.stream(system="Be kind.", messages=HI, **QUICK) as stream:
        text = "".join(stream.text_stream)
        assert stream.get_final_message().usage.output_tokens == whole.usage.output_tokens
    assert text == whole.content[0].text
    blocks = [{"role": "user", "content": [{"type": "text", "text": "Say hello to the sea."}]}]
    system = [{"type": "text", "text": "Be kind.", "cache_control": {"type": "ephemeral"}}]
    same = client.messages.create(system=system, messages=blocks, **QUICK)
    assert same.content[0].text == text
    stopped = client.messages.create(messages=HI, stop_sequences=["a", "e", "o"], **QUICK)
    assert stopped.stop_reason == "stop_sequence" and stopped.stop_sequence in ("a", "e", "o")
    count = client.messages.count_tokens(model=MODEL, system="Be kind.", messages=HI)
    assert count.input_tokens == whole.usage.input_tokens + (
        whole.usage.cache_read_input_tokens or 0
    )


def tools() -> None:
    long = {**QUICK, "max_tokens": 80}
    choice = {"type": "tool", "name": "get_weather", "disable_parallel_tool_use": True}
    whole = client.messages.create(messages=CITY, tools=TOOLS, tool_choice=choice, **long)
    assert whole.stop_reason == "tool_use"
    (call,) = [block for block in whole.content if block.type == "tool_use"]
    check_weather(call.input)
    with client.messages.stream(messages=CITY, tools=TOOLS, tool_choice=choice, **long) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_message()
    assert "input_json" in kinds
    assert [b.input for b in final.content if b.type == "tool_use"] == [call.input]
    history = [
        *CITY,
        {"role": "assistant", "content": [block.model_dump() for block in whole.content]},
        {
            "role": "user",
            "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "Rain."}],
        },
    ]
    after = client.messages.create(messages=history, tools=TOOLS, **QUICK)
    assert after.usage.input_tokens > 0


def errors() -> None:
    for kind, body in (
        (anthropic.NotFoundError, {**QUICK, "model": "none", "messages": HI}),
        (anthropic.BadRequestError, {**QUICK, "messages": []}),
        (anthropic.BadRequestError, {**QUICK, "messages": HI, "extra_body": {"temperature": 1.5}}),
    ):
        try:
            client.messages.create(**body)
        except kind as error:
            assert error.body["type"] == "error" and error.request_id, error
        else:
            raise AssertionError(f"nothing was refused: {body}")


for part in (messages, tools, errors):
    part()
    print(part.__name__, "ok", flush=True)
