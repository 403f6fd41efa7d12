"""Every field of the clients' own types has a verdict, and the verdict is what happens."""

from typing import Any, get_type_hints

import anthropic.types
import msgspec
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


async def asked(server: Server, path: str, **members: Any) -> Any:
    """What leaves the frontend for a body with these members, but for ids and drawn seeds."""
    response = await server.post(path, {**BODIES[path], **members})
    assert response.status == 200, await response.text()
    if not server.gateway.submissions:
        return server.gateway.codec_calls[-1]
    submission = server.gateway.submissions[-1]
    sampling = msgspec.structs.replace(submission.sampling, seed=0)
    return msgspec.structs.replace(submission, request_id="", sampling=sampling)


@pytest.mark.parametrize(("path", "name"), of("ignored"))
async def test_ignored(server: Server, path: str, name: str) -> None:
    words = {"truncation": "auto", "user": "u", "service_tier": "auto"}
    given: Any = words.get(name, {"effort": "low"})
    assert await asked(server, path, **{name: given}) == await asked(server, path)


NEUTRALS = [
    pytest.param(operation.path, name, value, id=f"{operation.path} {name} {value}")
    for operation in OPERATIONS
    if operation.body is not None and operation.body.refused is not None
    for name in operation.body.refused.__struct_fields__
    for value in operation.body.neutral.get(name, ())
]


@pytest.mark.parametrize(("path", "name", "value"), NEUTRALS)
async def test_values_that_change_nothing(server: Server, path: str, name: str, value: Any) -> None:
    assert await asked(server, path, **{name: value}) == await asked(server, path)


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages"])
def test_no_field_of_a_chat_is_ignored_elsewhere(path: str) -> None:
    """But for those that change no token: what a client sends to the wrong path it should hear."""
    chats = {name for name, (verdict, _) in TABLES[CHAT].items() if verdict != "ignored"}
    assert chats - TABLES[path].keys() <= {"messages", "stream_options"}


async def test_true_is_no_one(server: Server) -> None:
    for path in ("/v1/responses", "/v1/messages"):
        assert (await server.post(path, {**BODIES[path], "n": True})).status == 400


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
