"""The `openai` package: chat, completions, responses, helpers, tools, errors."""

from typing import Literal

import openai
from common import BASE_URL, CITY, HI, MODEL, WEATHER, check_weather
from pydantic import BaseModel, Field

client = openai.OpenAI(base_url=BASE_URL, api_key="none", timeout=120)
QUICK = {"model": MODEL, "max_tokens": 12, "temperature": 0}


class Place(BaseModel):
    city: Literal["Paris", "Oslo"]
    people: int = Field(ge=0, le=9)


def chat() -> None:
    whole = client.chat.completions.create(messages=HI, **QUICK)
    assert whole.choices[0].message.content and whole.usage.completion_tokens <= 12
    stream = client.chat.completions.create(
        messages=HI, stream=True, stream_options={"include_usage": True}, **QUICK
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens <= 12
    twice = client.chat.completions.create(messages=HI, n=2, **QUICK)
    assert [choice.message.content for choice in twice.choices] == [text, text]
    scored = client.chat.completions.create(messages=HI, logprobs=True, top_logprobs=3, **QUICK)
    for token in scored.choices[0].logprobs.content:
        assert token.logprob <= 0 and token.top_logprobs[0].token == token.token
    with client.chat.completions.stream(messages=HI, **{**QUICK, "max_tokens": 300}) as helper:
        final = helper.get_final_completion()
    assert final.choices[0].message.content.startswith(text)


def completions() -> None:
    whole = client.completions.create(
        prompt="The capital of France is", echo=True, logprobs=1, **{**QUICK, "max_tokens": 0}
    )
    (choice,) = whole.choices
    assert choice.text == "The capital of France is" == "".join(choice.logprobs.tokens)
    assert choice.logprobs.token_logprobs[0] is None and max(choice.logprobs.token_logprobs[1:]) < 0
    assert choice.logprobs.text_offset[0] == 0 and whole.usage.completion_tokens == 0
    batch = client.completions.create(prompt=["One, two,", "A, B,"], **QUICK)
    assert [choice.index for choice in batch.choices] == [0, 1]
    barred = client.completions.create(prompt="One, two,", stop=["a", "e", "i", "o"], **QUICK)
    assert not set("aeio") & set(barred.choices[0].text)


def parsed() -> None:
    reply = client.chat.completions.parse(
        messages=HI, response_format=Place, **{**QUICK, "max_tokens": 60}
    )
    assert isinstance(reply.choices[0].message.parsed, Place)
    extra = {"structured_outputs": {"choice": ["yes", "no"]}}
    word = client.chat.completions.create(messages=HI, extra_body=extra, **QUICK)
    assert word.choices[0].message.content in ("yes", "no")


def tools() -> None:
    named = {"type": "function", "function": {"name": "get_weather"}}
    for choice, reason in (("required", "tool_calls"), (named, "stop")):
        asked = {"messages": CITY, "tools": WEATHER, "tool_choice": choice}
        long = {**QUICK, "max_tokens": 80, "parallel_tool_calls": False}
        whole = client.chat.completions.create(**asked, **long)
        assert whole.choices[0].finish_reason == reason, whole
        (call,) = whole.choices[0].message.tool_calls
        assert call.function.name == "get_weather"
        check_weather(call.function.arguments)
        with client.chat.completions.stream(**asked, **long) as helper:
            kinds = [event.type for event in helper]
            final = helper.get_final_completion()
        assert "tool_calls.function.arguments.delta" in kinds
        assert final.choices[0].message.tool_calls[0].function.arguments == call.function.arguments
    history = [
        *CITY,
        {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]},
        {"role": "tool", "tool_call_id": call.id, "content": "Rain."},
    ]
    after = client.chat.completions.create(messages=history, tools=WEATHER, **QUICK)
    assert after.choices[0].message.content or after.choices[0].message.tool_calls


def responses() -> None:
    quick = {"model": MODEL, "max_output_tokens": 120, "temperature": 0}
    first = client.responses.create(input="Hi", instructions="Be kind.", **quick)
    assert first.output_text and first.usage.output_tokens <= 120
    with client.responses.stream(input="Hi", instructions="Be kind.", **quick) as stream:
        kinds = [event.type for event in stream]
        assert stream.get_final_response().output_text == first.output_text
    assert kinds[0] == "response.created" and "response.output_text.delta" in kinds
    second = client.responses.create(input="Go on.", previous_response_id=first.id, **quick)
    assert second.output_text and second.usage.input_tokens > first.usage.input_tokens
    assert client.responses.retrieve(first.id).output_text == first.output_text
    reply = client.responses.parse(
        input="Where?", text_format=Place, **{**quick, "max_output_tokens": 60}
    )
    assert isinstance(reply.output_parsed, Place)
    flat = [{"type": "function", **WEATHER[0]["function"], "strict": False}]
    called = client.responses.create(
        input="Weather in Oslo?",
        tools=flat,
        tool_choice="required",
        parallel_tool_calls=False,
        **{**quick, "max_output_tokens": 80},
    )
    (call,) = [item for item in called.output if item.type == "function_call"]
    check_weather(call.arguments)
    try:
        client.responses.create(input="x", previous_response_id="resp_none", **quick)
    except openai.NotFoundError as error:
        assert error.code == "previous_response_not_found"
    else:
        raise AssertionError("gone, and found")


def errors() -> None:
    wrong = [
        (openai.NotFoundError, "model_not_found", {"model": "none", "messages": HI}),
        (openai.BadRequestError, "empty_array", {**QUICK, "messages": []}),
        (
            openai.BadRequestError,
            "context_length_exceeded",
            {**QUICK, "messages": [{"role": "user", "content": "word " * 20_000}]},
        ),
        (
            openai.BadRequestError,
            "invalid_schema",
            {
                **QUICK,
                "messages": HI,
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"type": "strange"}},
                },
            },
        ),
    ]
    for kind, code, body in wrong:
        try:
            client.chat.completions.create(**body)
        except kind as error:
            assert error.code == code and error.request_id, error
        else:
            raise AssertionError(f"{code}: nothing was refused")
    try:
        client.embeddings.create(model=MODEL, input="x")
    except openai.NotFoundError as error:
        assert error.code == "unsupported_endpoint"
    else:
        raise AssertionError("there are no embeddings here")
    assert [model.id for model in client.models.list()] == [MODEL]


for part in (chat, completions, parsed, tools, responses, errors):
    part()
    print(part.__name__, "ok", flush=True)
