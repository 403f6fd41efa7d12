"""`slipstream trace ID`: asks a frontend for the way of a request, and shows it."""

import http.client
import time
from pathlib import Path
from urllib.parse import quote, urlsplit

import msgspec

from slipstream.cli.client_config import TraceConfig, base_url
from slipstream.cli.timeline import Trace, as_mermaid, as_svg, as_text
from slipstream.config import SetupError
from slipstream.errors import ExitCode

ASK_TIMEOUT_S = 5.0
LATE_S = 0.5
"""Services tell of a request a moment after its end: who asks at once is asked to wait."""


class Traces(msgspec.Struct):
    """What a frontend's /trace/ID answers."""

    kept: int = 0
    traces: list[Trace] = []


class _Error(msgspec.Struct):
    message: str = ""


class _Refusal(msgspec.Struct):
    error: _Error = msgspec.field(default_factory=_Error)


def trace(config: TraceConfig) -> int:
    """Prints it; with --svg the picture is written too. StartError if there is no such trace, or
    nobody to ask."""
    print(_shown(config))
    return ExitCode.OK


def _shown(config: TraceConfig) -> str:
    body = _found(config)
    if config.json:
        return body.decode()
    try:
        traces = msgspec.json.decode(body, type=Traces).traces
    except msgspec.DecodeError:
        raise SetupError(f"slipstream trace: {config.url}: this is no slipstream") from None
    if config.svg:
        _write(config.svg, as_svg(traces))
    if config.mermaid:
        return as_mermaid(traces)
    text = as_text(traces)
    return f"{text}\n\nPicture: {config.svg}" if config.svg else text


def _found(config: TraceConfig) -> bytes:
    """The answer as soon as the request's own span has ended in it, or as it is a moment later."""
    status, body = _ask(config)
    if status == http.client.NOT_FOUND or (status == http.client.OK and _goes_on(body)):
        time.sleep(LATE_S)
        status, body = _ask(config)
    if status == http.client.OK:
        return body
    try:
        said = msgspec.json.decode(body, type=_Refusal).error.message
    except msgspec.DecodeError:
        said = ""
    raise SetupError(f"slipstream trace: {said or f'{config.url} answers HTTP {status}'}")


def _goes_on(body: bytes) -> bool:
    try:
        traces = msgspec.json.decode(body, type=Traces).traces
    except msgspec.DecodeError:
        return False
    return any(trace.lasts for trace in traces)


def _ask(config: TraceConfig) -> tuple[int, bytes]:
    parts = urlsplit(base_url(config.url))
    headers = {"Authorization": f"Bearer {config.api_key}"} if config.api_key else {}
    secure = parts.scheme == "https"
    kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
    try:
        connection = kind(parts.hostname or "", parts.port, timeout=ASK_TIMEOUT_S)
        try:
            path = f"{parts.path}/trace/{quote(config.id, safe='')}"
            connection.request("GET", path, headers=headers)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise SetupError(f"slipstream trace: {config.url}: {error}") from None


def _write(file: str, picture: str) -> None:
    try:
        Path(file).write_text(picture, encoding="utf-8")
    except OSError as error:
        raise SetupError(f"slipstream trace: --svg {file}: {error.strerror}") from None
