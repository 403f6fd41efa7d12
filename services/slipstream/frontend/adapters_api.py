"""POST /v1/load_lora_adapter, /v1/unload_lora_adapter: as vLLM has them, for all frontends at
once."""

import msgspec
from aiohttp import web

from slipstream.config.lora import ADAPTER_NAME, ADAPTER_NAME_WORDS
from slipstream.errors import ErrorCode
from slipstream.frontend import validate
from slipstream.frontend.callers import CALLER
from slipstream.frontend.context import CONTEXT, Context
from slipstream.frontend.problems import ApiError, api_error

PATH_CHARS_MAX = 1024


class LoadAdapterRequest(msgspec.Struct, kw_only=True):
    lora_name: str
    lora_path: str
    load_inplace: bool = False
    """In the place of the one that has the name; requests that run keep theirs."""
    base_model: str | None = None
    """Whose adapter it is, where several models are served."""


class UnloadAdapterRequest(msgspec.Struct, kw_only=True):
    lora_name: str
    base_model: str | None = None


_load = msgspec.json.Decoder(LoadAdapterRequest)
_unload = msgspec.json.Decoder(UnloadAdapterRequest)


async def load(request: web.Request) -> web.Response:
    context = _allowed(request)
    body = await validate.read_json(request, _load)
    name, path = _name(body.lora_name), body.lora_path
    validate.some_chars("lora_path", path, PATH_CHARS_MAX)
    if not path.isprintable():
        validate.refuse(f"lora_path is no path: {validate.shown(path)}.", "lora_path")
    model = _base(context, body.base_model)
    await _change(request, model, name, path, body.load_inplace)
    return web.Response(text=f"Success: LoRA adapter '{name}' added successfully.")


async def unload(request: web.Request) -> web.Response:
    context = _allowed(request)
    body = await validate.read_json(request, _unload)
    name = _name(body.lora_name)
    cards = {card.name: card for card in context.gateway.status().models}
    found = cards[name].parent if name in cards else None
    model = body.base_model or found or _base(context, None)
    await _change(request, model, name, "", False)
    return web.Response(text=f"Success: LoRA adapter '{name}' removed successfully.")


async def _change(request: web.Request, model: str, name: str, path: str, replace: bool) -> None:
    context = request.app[CONTEXT]
    problem = await context.gateway.adapter(model, name, path, replace)
    if problem is not None:
        raise ApiError(problem)
    if context.audit is not None:
        who, what = request[CALLER].tenant, f"{path} as {name}" if path else f"{name} away"
        context.audit.act("adapter", f"{what}, of {model}" + (f", by {who}" if who else ""))


def _allowed(request: web.Request) -> Context:
    context = request.app[CONTEXT]
    if not context.allow_lora_updates:
        text = f"{request.path} is not open here; start the frontends with --allow-lora-updates."
        raise api_error(ErrorCode.FORBIDDEN, text)
    if not request[CALLER].operator:
        text = (
            f"{request.path} changes what all clients see; it takes a key with 'operator = true'."
        )
        raise api_error(ErrorCode.FORBIDDEN, text)
    return context


def _name(name: str) -> str:
    if not ADAPTER_NAME.fullmatch(name):
        validate.refuse(
            f"lora_name must have {ADAPTER_NAME_WORDS}, but is {validate.shown(name)}.",
            "lora_name",
        )
    return name


def _base(context: Context, named: str | None) -> str:
    status = context.gateway.status(named or "")
    validate.check_ready(status)
    if named is not None:
        validate.check_model(named, status)
        return status.model
    models = [card.name for card in status.models if card.root == card.name]
    if len(models) != 1:
        names = ", ".join(models[: validate.NAMES_SHOWN])
        validate.refuse(
            f"Several models are served: {names}. Name one in base_model.", "base_model"
        )
    return models[0]
