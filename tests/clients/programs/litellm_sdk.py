"""`litellm`: answers, streams, tools, its own classes of errors."""

import litellm
from common import BASE_URL, CITY, HI, MODEL, WEATHER, check_weather

litellm.suppress_debug_info = True
WHERE = {"api_base": BASE_URL, "api_key": "none", "temperature": 0, "timeout": 120}

for provider in ("openai", "hosted_vllm"):
    asked = {"model": f"{provider}/{MODEL}", **WHERE}
    whole = litellm.completion(messages=HI, max_tokens=12, **asked)
    assert whole.choices[0].message.content and whole.usage.completion_tokens <= 12
    chunks = list(litellm.completion(messages=HI, max_tokens=12, stream=True, **asked))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    called = litellm.completion(
        messages=CITY,
        tools=WEATHER,
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=80,
        **asked,
    )
    (call,) = called.choices[0].message.tool_calls
    check_weather(call.function.arguments)
    print(provider, "ok", flush=True)

plain = litellm.text_completion(
    model=f"text-completion-openai/{MODEL}", prompt="One, two,", max_tokens=5, **WHERE
)
assert plain.choices[0].text
asked = {"model": f"openai/{MODEL}", **WHERE}
try:
    litellm.completion(messages=[{"role": "user", "content": "word " * 20_000}], **asked)
except litellm.ContextWindowExceededError:
    pass
else:
    raise AssertionError("too long, and taken")
try:
    litellm.completion(messages=HI, max_tokens=1, model="openai/none", **WHERE)
except litellm.NotFoundError:
    pass
else:
    raise AssertionError("nobody, and taken")
print("errors ok", flush=True)
