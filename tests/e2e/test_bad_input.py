"""What is refused, and how, by a real stack."""

import asyncio

import pytest
from openai import BadRequestError, NotFoundError, OpenAI

from e2e.client import MODEL, Answer, Client, eventually
from e2e.stack import Stack

CONTEXT = 2048
PATH = "/v1/completions"


async def test_an_unknown_model_is_404(client: Client) -> None:
    answer = await client.post(PATH, {"model": "gpt-5", "prompt": "Hello"})
    assert answer.status == 404
    assert answer.error["code"] == "model_not_found"
    assert "gpt-5" in answer.error["message"] and MODEL in answer.error["message"]


async def test_malformed_json_is_400(client: Client) -> None:
    for body in (b"", b"{", b'{"model": ', b"\xff", b"[" * 100_000):
        answer = await client.post(PATH, body)
        assert answer.status == 400, body[:20]
        assert answer.error["type"] == "invalid_request_error"


async def test_wrong_types_and_values_are_400_and_named(client: Client) -> None:
    wrong: list[tuple[str, object]] = [
        ("model", 7),
        ("prompt", {"text": "Hello"}),
        ("prompt", [1, "two"]),
        ("prompt", [-1]),
        ("prompt", [10**9]),
        ("max_tokens", "many"),
        ("max_tokens", 0),
        ("temperature", 2.5),
        ("temperature", "warm"),
        ("top_p", -0.1),
        ("seed", 2**64),
        ("stop", [""]),
        ("stream", "yes"),
    ]
    for name, value in wrong:
        answer = await client.post(PATH, {"model": MODEL, "prompt": "Hello", name: value})
        assert answer.status == 400, (name, value)
        assert answer.error["param"] == name, (name, value, answer.error)


async def test_a_prompt_too_long_by_one_token_is_400_with_both_numbers(client: Client) -> None:
    async def ask(num_prompt: int, max_tokens: int, **body: object) -> tuple[int, str]:
        asked = {"model": MODEL, "prompt": [500] * num_prompt, "max_tokens": max_tokens, **body}
        answer = await client.post(PATH, asked)
        return answer.status, answer.error.get("message", "")

    # Fits exactly; leaves at once, so that nothing waits for it.
    answer = await client.complete([500] * (CONTEXT - 1), max_tokens=1)
    assert answer.usage["total_tokens"] == CONTEXT
    for num_prompt, max_tokens in ((CONTEXT, 1), (CONTEXT - 1, 2), (CONTEXT + 1, 1)):
        status, message = await ask(num_prompt, max_tokens)
        assert status == 400
        assert str(CONTEXT) in message and str(num_prompt) in message, message
    status, message = await ask(CONTEXT, 1, stream=True)
    assert status == 400 and str(CONTEXT) in message


def test_openai_s_own_client_understands_a_refusal(stack: Stack) -> None:
    client = OpenAI(base_url=f"{stack.url}/v1", api_key="unused")
    for error, model, temperature in ((NotFoundError, "gpt-5", 1), (BadRequestError, MODEL, 9)):
        with pytest.raises(error):
            client.completions.create(model=model, prompt="Hello", temperature=temperature)


async def test_not_ready_is_503_and_a_full_queue_429() -> None:
    stack = Stack(wait=False, max_requests=1, kv_cache_bytes="96MiB")
    try:
        async with Client(stack.url) as client:
            refused = await _first_refusal(stack, client)
            assert refused.status == 503 and refused.error["code"] == "not_ready"
            assert int(refused.headers["Retry-After"]) >= 1
            await asyncio.to_thread(stack.until_ready)
            answer, following = client.stream([500] * 20, max_tokens=1500, ignore_eos=True)
            await eventually(lambda: answer.chunks > 0)
            full = await client.post(PATH, {"model": MODEL, "prompt": "Hello", "max_tokens": 1})
            assert full.status == 429 and full.error["type"] == "rate_limit_error"
            assert int(full.headers["Retry-After"]) >= 1
            following.cancel()
            await asyncio.to_thread(stack.until_settled)
            assert (await client.complete("Hello", max_tokens=1)).finish_reason
        stack.close()
    finally:
        stack.kill()


async def _first_refusal(stack: Stack, client: Client) -> Answer:
    """The answer of a frontend that is there before the workers are."""
    while True:
        assert "\nREADY " not in stack.log, "ready before it answered at all"
        try:
            return await client.post(PATH, {"model": MODEL, "prompt": "Hello", "max_tokens": 1})
        except OSError:
            await asyncio.sleep(0.02)
