"""Settings of the commands that ask a server: run, chat, batch, top, trace, bench."""

from typing import Annotated, ClassVar, Literal
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

ApiKey = Annotated[
    str,
    Meta(
        description="Sent as `Authorization: Bearer …`; better as a variable than as a flag.",
        extra={"secret": True},
    ),
]
System = Annotated[str, Meta(description="System prompt; empty: none is sent.")]
MaxTokens = Annotated[
    int, Meta(ge=0, description="Longest answer, in tokens; 0: what the context has room for.")
]
Temperature = Annotated[
    float, Meta(ge=-1, le=2, description="0: the likeliest token always; -1: as the model says.")
]
Seed = Annotated[int, Meta(ge=-1, le=2**63 - 1, description="Of the sampling; -1: drawn.")]
Url = Annotated[
    str, Meta(description="Server to ask, http://host:port; empty: one is started for this alone.")
]
HereUrl = Annotated[str, Meta(description="Server to ask, http://host:port.")]
HERE = "http://127.0.0.1:8000"


def _check_url(url: str) -> None:
    parts = urlsplit(url)
    try:
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # no number behind the colon, or one above 65535
        sound = False
    if not sound:
        raise ValueError(f"--url: expected http://host:port or https://host, got {url!r}")


def base_url(url: str) -> str:
    """Without what OpenAI's clients want behind it."""
    return url.rstrip("/").removesuffix("/v1")


class _Asking(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    model: Annotated[
        str,
        Meta(
            description="As for `slipstream serve`; with --url a name that the server knows. "
            "Empty: demo, or the server's first.",
            extra={"positional": "MODEL"},
        ),
    ] = ""
    url: Url = ""
    api_key: ApiKey = ""
    system: System = ""
    max_tokens: MaxTokens = 0
    temperature: Temperature = -1.0
    seed: Seed = -1

    def __post_init__(self) -> None:
        if self.url:
            _check_url(self.url)


class RunConfig(_Asking, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Prints one answer. Starts a server for it and ends it again, unless --url names one. MODEL
    may be left out."""

    headings: ClassVar[dict[str, str]] = {"model": "Server", "system": "Request", "json": "Output"}

    text: Annotated[
        str, Meta(description="What to ask; -: standard input.", extra={"positional": "PROMPT"})
    ] = ""
    json: Annotated[bool, Meta(description="Print the answer and its numbers as JSON.")] = False


class ChatConfig(_Asking, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A conversation in the terminal, /help in it lists its commands; line by line where standard
    input is no terminal. Starts a server for it and ends it again, unless --url names one."""

    headings: ClassVar[dict[str, str]] = {"model": "Server", "system": "Request"}


class BatchConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Answers a file of requests in the format of OpenAI's Batch API, line by line into another
    file. What stands there already is not asked again: after a break the same command goes on.
    Starts a server for it and ends it again, unless --url names one."""

    headings: ClassVar[dict[str, str]] = {"input": "Files", "model": "Server"}

    input: Annotated[
        str, Meta(min_length=1, description="The requests.", extra={"positional": "IN"})
    ]
    output: Annotated[
        str, Meta(min_length=1, description="The answers.", extra={"positional": "OUT"})
    ]
    model: Annotated[
        str,
        Meta(description="As for `slipstream serve`, where --url names no server; empty: demo."),
    ] = ""
    url: Url = ""
    api_key: ApiKey = ""
    concurrency: Annotated[int, Meta(ge=1, le=4096, description="Requests at a time.")] = 32
    timeout_s: Annotated[
        float, Meta(gt=0, le=86_400, description="Longest wait for one answer.")
    ] = 3600.0
    retry_s: Annotated[
        float,
        Meta(
            ge=0,
            le=86_400,
            description="How long a request is asked again that was refused for now (429, 5xx, no "
            "connection), before that is its answer.",
        ),
    ] = 600.0

    def __post_init__(self) -> None:
        if self.url:
            _check_url(self.url)


class TopConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a running cluster does: its services, queue, KV memory, rates and latencies. Ends with q
    or Ctrl-C."""

    url: HereUrl = HERE
    api_key: ApiKey = ""
    interval_s: Annotated[
        float, Meta(ge=0.2, le=3600, description="Time from one look to the next.")
    ] = 1.0
    once: Annotated[bool, Meta(description="Look twice, print one table, end.")] = False
    json: Annotated[bool, Meta(description="Print each table as one line of JSON.")] = False

    def __post_init__(self) -> None:
        _check_url(self.url)


class BenchConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Puts load on a server of OpenAI's API and prints rates and latencies."""

    headings: ClassVar[dict[str, str]] = {
        "model": "Server",
        "requests": "Load",
        "api": "Requests",
        "json": "Output",
    }

    model: Annotated[
        str,
        Meta(
            description="Name that the server knows; empty: its first.",
            extra={"positional": "MODEL"},
        ),
    ] = ""
    url: HereUrl = HERE
    api_key: ApiKey = ""

    requests: Annotated[int, Meta(ge=1, le=1_000_000, description="Requests in all.")] = 64
    concurrency: Annotated[
        int,
        Meta(ge=1, le=65_536, description="Requests at a time; each is followed by the next one."),
    ] = 8
    rate: Annotated[
        float,
        Meta(
            ge=0,
            le=100_000,
            description="Requests a second on the average, drawn (Poisson), however many are "
            "running; 0: as --concurrency says.",
        ),
    ] = 0.0
    warm_up: Annotated[
        int, Meta(ge=0, le=65_536, description="Requests beforehand that do not count.")
    ] = 2

    api: Annotated[
        Literal["completions", "chat"],
        Meta(
            description="completions: prompts of exactly so many token ids; chat: of about so "
            "many words."
        ),
    ] = "completions"
    prompt_tokens: Annotated[int, Meta(ge=1, le=10_000_000, description="Tokens of a prompt.")] = (
        128
    )
    output_tokens: Annotated[int, Meta(ge=1, le=1_000_000, description="Tokens of an answer.")] = 64
    ignore_eos: Annotated[
        bool,
        Meta(description="Ask for whole answers; OpenAI's own servers do not know that."),
    ] = True
    seed: Annotated[int, Meta(ge=0, description="Of prompts and arrivals.")] = 0

    json: Annotated[bool, Meta(description="Print JSON instead of a table.")] = False

    def __post_init__(self) -> None:
        _check_url(self.url)


class TraceConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Shows the way of one request through all services, with times."""

    id: Annotated[
        str,
        Meta(
            min_length=1,
            description="The answer's id, or its x-request-id header.",
            extra={"positional": "ID"},
        ),
    ]
    url: HereUrl = HERE
    api_key: ApiKey = ""
    json: Annotated[bool, Meta(description="Print JSON instead of a timeline.")] = False
    mermaid: Annotated[bool, Meta(description="Print a Mermaid gantt chart instead.")] = False
    svg: Annotated[str, Meta(description="Also draw it into this file; empty: do not.")] = ""

    def __post_init__(self) -> None:
        _check_url(self.url)
        if self.json and (self.mermaid or self.svg):
            raise ValueError("--json goes with neither --mermaid nor --svg")
