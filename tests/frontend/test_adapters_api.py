"""Adapters come and go over HTTP, where that is allowed, and are names like those of models."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from frontend.fakes import MODEL, FakeGateway, Server, chat_body, serving
from slipstream.errors import ErrorCode, Problem
from slipstream.frontend.api_keys import ApiKey, add
from slipstream.frontend.app import AppSettings, Books
from slipstream.frontend.audit import Audit
from slipstream.frontend.gateway import ModelCard

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
BODY = {"lora_name": "x", "lora_path": "/loras/x"}


class Gateway(FakeGateway):
    def __init__(self) -> None:
        super().__init__()
        self.changes: list[tuple[str, str, str, bool]] = []
        self.problem: Problem | None = None

    async def adapter(self, model: str, name: str, path: str, replace: bool) -> Problem | None:
        self.changes.append((model, name, path, replace))
        return self.problem


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    async with serving(Gateway(), AppSettings(allow_lora_updates=True)) as server:
        yield server


def gateway(server: Server) -> Gateway:
    assert isinstance(server.gateway, Gateway)
    return server.gateway


async def test_an_adapter_comes_and_goes(server: Server) -> None:
    reply = await server.post(LOAD, BODY)
    assert (reply.status, await reply.text()) == (
        200,
        "Success: LoRA adapter 'x' added successfully.",
    )
    assert (await server.post(LOAD, {**BODY, "load_inplace": True})).status == 200
    reply = await server.post(UNLOAD, {"lora_name": "x"})
    assert await reply.text() == "Success: LoRA adapter 'x' removed successfully."
    assert gateway(server).changes == [
        (MODEL, "x", "/loras/x", False),
        (MODEL, "x", "/loras/x", True),
        (MODEL, "x", "", False),
    ]


async def test_what_the_cluster_refuses_is_told(server: Server) -> None:
    gateway(server).problem = Problem(
        code=ErrorCode.INVALID_VALUE, message="rank 99 is above 64.", param="lora_path"
    )
    reply = await server.post(LOAD, BODY)
    error = (await reply.json())["error"]
    assert (reply.status, error["message"]) == (400, "rank 99 is above 64.")
    assert error["param"] == "lora_path"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (LOAD, {"lora_name": "x"}, "lora_path"),
        (LOAD, {**BODY, "lora_name": ""}, "lora_name"),
        (LOAD, {**BODY, "lora_name": "a b"}, "lora_name"),
        (LOAD, {**BODY, "lora_name": "a" * 65}, "lora_name"),
        (LOAD, {**BODY, "lora_path": ""}, "lora_path"),
        (LOAD, {**BODY, "lora_path": "/a\nb"}, "lora_path"),
        (LOAD, {**BODY, "base_model": "none"}, "model"),
        (UNLOAD, {}, "lora_name"),
    ],
)
async def test_bad_bodies(server: Server, path: str, body: Any, param: str) -> None:
    reply = await server.post(path, body)
    assert reply.status in (400, 404) and (await reply.json())["error"]["param"] == param
    assert not gateway(server).changes


async def test_of_several_models_one_is_named(server: Server) -> None:
    other = ModelCard(name="other", max_model_len=9, root="other")
    now = gateway(server).now
    gateway(server).now = msgspec.structs.replace(now, models=[*now.models, other])
    reply = await server.post(LOAD, BODY)
    assert reply.status == 400 and "Name one in base_model" in await reply.text()
    assert (await server.post(LOAD, {**BODY, "base_model": MODEL})).status == 200


async def test_it_is_closed_unless_it_is_opened() -> None:
    async with serving(Gateway(), AppSettings()) as server:
        reply = await server.post(LOAD, BODY)
        assert reply.status == 403 and "--allow-lora-updates" in await reply.text()


async def test_it_takes_an_operators_key(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    keys = {
        name: add(file, ApiKey(name=name, sha256="", operator=name == "boss"))
        for name in ("boss", "guest")
    }
    settings = AppSettings(allow_lora_updates=True, api_keys_file=str(file))
    async with serving(Gateway(), settings) as server:
        for name, status in (("boss", 200), ("guest", 403)):
            reply = await server.post(LOAD, BODY, Authorization=f"Bearer {keys[name]}")
            assert reply.status == status, await reply.text()


async def test_the_audit_log_says_what_came_and_by_whom(tmp_path: Path) -> None:
    keys, log = tmp_path / "keys.toml", tmp_path / "audit.jsonl"
    key = add(keys, ApiKey(name="boss", sha256="", operator=True))
    audit = Audit(str(log), "frontend-0")
    settings = AppSettings(allow_lora_updates=True, api_keys_file=str(keys))
    async with serving(Gateway(), settings, Books(audit=audit)) as server:
        for path, body in ((LOAD, BODY), (UNLOAD, {"lora_name": "x"})):
            await server.post(path, body, Authorization=f"Bearer {key}")
    audit.close()
    lines = [msgspec.json.decode(line) for line in log.read_bytes().splitlines()]
    assert [line["text"] for line in lines if line["act"] == "adapter"] == [
        f"/loras/x as x, of {MODEL}, by boss",
        f"x away, of {MODEL}, by boss",
    ]


async def test_a_request_that_names_an_adapter_gets_its_version(server: Server) -> None:
    now = gateway(server).now
    gateway(server).now = msgspec.structs.replace(now, adapter="x@12", name="x")
    reply = await server.post("/v1/chat/completions", chat_body())
    assert (await reply.json())["model"] == "x"
    (submission,) = gateway(server).submissions
    assert (submission.model, submission.adapter) == (MODEL, "x@12")
