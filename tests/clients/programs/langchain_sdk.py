"""`langchain-openai`: answers, streams, tools, structured output."""

from typing import Literal

from common import BASE_URL, MODEL, PARAMETERS, check_weather
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field


class Place(BaseModel):
    """A place."""

    city: Literal["Paris", "Oslo"]
    people: int = Field(ge=0, le=9)


def model(max_tokens: int = 12, **more: object) -> ChatOpenAI:
    return ChatOpenAI(
        base_url=BASE_URL,
        api_key="none",
        model=MODEL,
        temperature=0,
        max_tokens=max_tokens,
        timeout=120,
        **more,
    )


whole = model().invoke("Say hello to the sea.")
assert whole.content and whole.usage_metadata["output_tokens"] <= 12
chunks = list(model(stream_usage=True).stream("Say hello to the sea."))
assert "".join(chunk.content for chunk in chunks) == whole.content
assert sum(chunk.usage_metadata is not None for chunk in chunks) >= 1
print("answers ok", flush=True)

tool = {"name": "get_weather", "description": "Weather.", "parameters": PARAMETERS}
bound = model(80).bind_tools([tool], tool_choice="any", parallel_tool_calls=False)
(call,) = bound.invoke("Weather in Oslo?").tool_calls
check_weather(call["args"])
summed = None
for chunk in bound.stream("Weather in Oslo?"):
    summed = chunk if summed is None else summed + chunk
assert summed.tool_calls[0]["args"] == call["args"] and len(summed.tool_calls) == 1
print("tools ok", flush=True)

for method in ("json_schema", "function_calling"):
    place = model(80).with_structured_output(Place, method=method).invoke("Where?")
    assert isinstance(place, Place)
print("structured ok", flush=True)

answer = model(use_responses_api=True).invoke("Say hello to the sea.")
assert answer.text
print("responses ok", flush=True)
