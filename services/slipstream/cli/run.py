"""`slipstream run`: one prompt, one answer."""

import asyncio
import sys
from collections.abc import Mapping
from pathlib import Path

import msgspec

from slipstream.cli.answers import Answer, Sampling, Screen, follow
from slipstream.cli.client_config import RunConfig, base_url
from slipstream.cli.models import DEMO
from slipstream.cli.private_server import server
from slipstream.client.api import Api, ApiError
from slipstream.client.stream import AnswerError
from slipstream.config import ConfigError, Loaded, SetupError, StartError, load_with_origin
from slipstream.errors import ErrorCode, ExitCode

PROG = "slipstream run"
STANDARD_INPUT = "-"


def run(loaded: Loaded, environ: Mapping[str, str]) -> int:
    """The exit code, after the answer's last word."""
    config = _understood(loaded, environ)
    prompt = sys.stdin.read() if config.text == STANDARD_INPUT else config.text
    if not prompt.strip():
        raise ConfigError(f"{PROG}: no prompt on standard input")
    url = base_url(config.url)
    with server(PROG, url, config.model, loaded.file, environ) as (url, model):
        try:
            return asyncio.run(_answer(config, url, model, prompt))
        except AnswerError as error:
            raise start_error(PROG, error) from None


def _understood(loaded: Loaded, environ: Mapping[str, str]) -> RunConfig:
    """One word alone is the prompt, not the model."""
    config = loaded.config
    assert isinstance(config, RunConfig)
    if not config.text and loaded.origin["model"] == "MODEL":
        word = config.model
        if word == DEMO or Path(word).exists():
            raise ConfigError(
                f'{PROG}: {word} is a model; a prompt is missing: {PROG} {word} "…", or for a '
                f"conversation: slipstream chat {word}"
            )
        file = ["--config", loaded.file] if loaded.file else []
        unsaid = load_with_origin(RunConfig, "run", file, environ).config.model
        config = msgspec.structs.replace(config, model=unsaid, text=word)
    if not config.text:
        raise ConfigError(f'{PROG}: PROMPT is missing: {PROG} "What is a KV block?"')
    return config


def start_error(prog: str, error: AnswerError) -> StartError:
    """What to tell the user of a client command, and how the command ends."""
    if isinstance(error, ApiError) and not error.status:
        way_out = "start one (slipstream serve), or name another by --url"
        return SetupError(f"{prog}: no server at {error}; {way_out}")
    if isinstance(error, ApiError) and error.status == 401:
        return SetupError(f"{prog}: {error}; give a key by --api-key or SLIPSTREAM_API_KEY")
    no_model = isinstance(error, ApiError) and error.code == ErrorCode.MODEL_NOT_FOUND
    return StartError(f"{prog}: {error}", ExitCode.MODEL if no_model else ExitCode.FAILED)


async def _answer(config: RunConfig, url: str, model: str, prompt: str) -> int:
    messages = [{"role": "user", "content": prompt}]
    if config.system:
        messages.insert(0, {"role": "system", "content": config.system})
    answer, screen = Answer(), None if config.json else Screen()
    async with Api(url, config.api_key) as api:
        name = (await api.model(model)).id
        try:
            await follow(api, name, messages, Sampling.of(config), answer, screen)
        finally:
            if screen is not None:
                screen.end()
    if screen is None:
        print(msgspec.json.encode(answer).decode(), flush=True)
    else:
        print(answer.numbers(), file=sys.stderr, flush=True)
    return ExitCode.OK
