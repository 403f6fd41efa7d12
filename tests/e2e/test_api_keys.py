"""Two clients with keys of their own on one stack: neither can tell what the other has asked."""

import json
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import openai
import pytest

from e2e.client import MODEL
from e2e.stack import Stack
from slipstream.frontend.api_keys import ApiKey, add

PROMPT = "The tide comes in twice a day, and each time it brings other things along. " * 12


def client(stack: Stack, key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{stack.url}/v1", api_key=key, max_retries=0)


def cached(stack: Stack, key: str, **extra: Any) -> int:
    """Prompt tokens that were found, of an answer that is always the same."""
    reply = client(stack, key).completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=4, temperature=0, extra_body=extra
    )
    assert reply.usage is not None and reply.usage.prompt_tokens_details is not None
    return reply.usage.prompt_tokens_details.cached_tokens or 0


def test_clients_are_known_limited_and_apart(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    wanted = {
        "alice": ApiKey(name="alice", sha256="0" * 64),
        "bob": ApiKey(name="bob", sha256="0" * 64),
        "carl": ApiKey(name="carl", sha256="0" * 64, share_prefixes="team"),
        "dora": ApiKey(name="dora", sha256="0" * 64, share_prefixes="team"),
        "few": ApiKey(name="few", sha256="0" * 64, requests_per_minute=1),
    }
    keys = {name: add(path, entry) for name, entry in wanted.items()}
    again = add(path, wanted["alice"])
    stack = Stack(api_keys_file=path)
    try:
        assert cached(stack, keys["alice"]) == 0
        found = cached(stack, keys["alice"])
        assert found > 0 and cached(stack, again) == found, "one client under two keys"
        assert cached(stack, keys["bob"]) == 0, "whatever others have sent"
        assert cached(stack, keys["bob"], cache_salt="alice") == 0
        assert cached(stack, keys["carl"]) == 0 and cached(stack, keys["dora"]) == found
        assert cached(stack, keys["bob"]) == found
        with pytest.raises(openai.AuthenticationError):
            cached(stack, "sk-slipstream-nobodys")
        cached(stack, keys["few"])
        with pytest.raises(openai.RateLimitError) as limited:
            cached(stack, keys["few"])
        assert limited.value.code == "rate_limit_exceeded"
        operator = add(path, ApiKey(name="root", sha256="0" * 64, operator=True))
        assert _operator_sees(stack, operator), "a key that came while it ran"
        told = {name: key for name, key in keys.items() if key in stack.log}
        assert not told and '-H "Authorization: Bearer $API_KEY"' in stack.log
    finally:
        stack.kill()


def _operator_sees(stack: Stack, key: str) -> bool:
    headers = {"Authorization": f"Bearer {key}"}
    for _ in range(100):
        request = urllib.request.Request(f"{stack.url}/cluster", headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=5) as reply:
                return bool(json.load(reply)["workers"])
        except urllib.error.HTTPError as error:
            assert error.code == 401
            time.sleep(0.1)
    return False
