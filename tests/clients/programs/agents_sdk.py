"""`pydantic-ai` and `openai-agents`: agents whose tools and outputs are forced."""

import asyncio
from typing import Literal

import agents
import openai
from common import BASE_URL, MODEL
from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider


class Place(BaseModel):
    city: Literal["Paris", "Oslo"]
    people: int = Field(ge=0, le=9)


async def pydantic() -> None:
    provider = OpenAIProvider(base_url=BASE_URL, api_key="none")
    settings = {"max_tokens": 100, "temperature": 0, "parallel_tool_calls": False}
    for kind in (OpenAIChatModel, OpenAIResponsesModel):
        model = kind(MODEL, provider=provider)
        for output in (Place, NativeOutput(Place)):
            agent = Agent(model, output_type=output, model_settings=settings)
            result = await agent.run("A place, please.")
            assert isinstance(result.output, Place)
    print("pydantic-ai ok", flush=True)


asked: list[tuple[str, int]] = []


@agents.function_tool
def get_weather(city: Literal["Oslo", "Paris"], days: Literal[1, 2, 3]) -> str:
    """The weather of the next days."""
    asked.append((city, days))
    return "Rain."


async def openai_agents() -> None:
    agents.set_tracing_disabled(True)
    client = openai.AsyncOpenAI(base_url=BASE_URL, api_key="none")
    settings = agents.ModelSettings(
        tool_choice="required", max_tokens=100, temperature=0, parallel_tool_calls=False
    )
    for kind in (agents.OpenAIChatCompletionsModel, agents.OpenAIResponsesModel):
        agent = agents.Agent(
            name="weather",
            model=kind(model=MODEL, openai_client=client),
            tools=[get_weather],
            model_settings=settings,
            tool_use_behavior="stop_on_first_tool",
        )
        result = await agents.Runner.run(agent, "Weather in Oslo?")
        assert result.final_output == "Rain." and asked.pop()
        streamed = agents.Runner.run_streamed(agent, "Weather in Oslo?")
        async for _ in streamed.stream_events():
            pass
        assert streamed.final_output == "Rain." and asked.pop()
        writer = agents.Agent(
            name="writer",
            model=kind(model=MODEL, openai_client=client),
            output_type=Place,
            model_settings=agents.ModelSettings(max_tokens=100, temperature=0),
        )
        assert isinstance((await agents.Runner.run(writer, "Where?")).final_output, Place)
    print("openai-agents ok", flush=True)


asyncio.run(pydantic())
asyncio.run(openai_agents())
