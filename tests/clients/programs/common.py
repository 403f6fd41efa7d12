"""What the programs ask for. Their server is in the environment."""

import json
import os

BASE_URL = os.environ["SLIPSTREAM_BASE_URL"]
ROOT_URL = BASE_URL.removesuffix("/v1")
MODEL = os.environ["SLIPSTREAM_MODEL"]
MODEL_PATH = os.environ["SLIPSTREAM_MODEL_PATH"]
HI = [{"role": "user", "content": "Say hello to the sea."}]
CITY = [{"role": "user", "content": "What is the weather in Oslo?"}]
PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": ["Oslo", "Paris"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of the next days.",
            "parameters": PARAMETERS,
        },
    }
]


def check_weather(arguments: str | dict) -> None:
    """Held to the schema: no luck is needed."""
    given = json.loads(arguments) if isinstance(arguments, str) else arguments
    assert given["city"] in ("Oslo", "Paris") and 1 <= given["days"] <= 9, given
    assert given.keys() == {"city", "days"}
