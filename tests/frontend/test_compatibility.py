"""Every field of the clients' own types has a verdict, and the verdict is what happens."""

from typing import Any, get_type_hints

import anthropic.types
import pytest
from anthropic.types import message_count_tokens_params, message_create_params
from openai.types import completion_create_params as completion_params
from openai.types.chat import completion_create_params as chat_params
from openai.types.responses import response_create_params as response_params

from frontend.catalogue import CHAT, COMPLETE
from frontend.fakes import Server
from frontend.test_openapi import BODIES, LIMITS
from slipstream.frontend.api_table import OPERATIONS, limits
from slipstream.frontend.compatibility import verdicts
from slipstream.frontend.unserved import UNSERVED

TABLES = {
    operation.path: verdicts(operation.body, limits(LIMITS))
    for operation in OPERATIONS
    if operation.body is not None
}
PARAMS: dict[str, Any] = {
    CHAT: chat_params.CompletionCreateParamsBase,
    COMPLETE: completion_params.CompletionCreateParamsBase,
    "/v1/responses": response_params.ResponseCreateParamsBase,
    "/v1/messages": message_create_params.MessageCreateParamsBase,
    "/v1/messages/count_tokens": message_count_tokens_params.MessageCountTokensParams,
}
SERVED_OTHERWISE = {"stream", "parallel_tool_calls"}
"""In the types of the two kinds of calls; and what comes with tools."""


@pytest.mark.parametrize("path", PARAMS)
def test_every_field_of_the_client_has_a_verdict(path: str) -> None:
    names = set(get_type_hints(PARAMS[path], vars(anthropic.types)))
    assert names
    unknown = names - TABLES[path].keys() - SERVED_OTHERWISE
    assert not unknown


def of(verdict: str) -> list[Any]:
    return [
        pytest.param(path, name, id=f"{path} {name}")
        for path, table in TABLES.items()
        for name, (said, _) in table.items()
        if said == verdict
    ]


@pytest.mark.parametrize(("path", "name"), of("refused"))
async def test_refused(server: Server, path: str, name: str) -> None:
    response = await server.post(path, {**BODIES[path], name: [{"x": 1}]})
    assert response.status == 400 and name in await response.text()
    assert (await server.post(path, {**BODIES[path], name: None})).status == 200


@pytest.mark.parametrize(("path", "name"), of("ignored"))
async def test_ignored(server: Server, path: str, name: str) -> None:
    given: Any = {"truncation": "auto", "user": "u", "service_tier": "auto"}.get(name, {})
    response = await server.post(path, {**BODIES[path], name: given})
    assert response.status == 200, await response.text()


@pytest.mark.parametrize("path", UNSERVED)
async def test_paths_that_are_refused(server: Server, path: str) -> None:
    for method, where in (
        ("POST", path),
        ("GET", path),
        ("GET", f"{path}/x"),
        ("DELETE", f"{path}/x"),
    ):
        response = await server.client.request(method, server.url + where)
        assert response.status == 404 and path in (text := await response.text())
        assert "unsupported_endpoint" in text or "not_found_error" in text
