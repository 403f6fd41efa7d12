"""Requests of a trace in Mooncake's form: JSONL, one request a line, in the order of arrival.

    {"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47, 2353]}

`timestamp` in ms; lengths in tokens; one hash id for each `CHUNK_TOKENS` of the prompt, the last of
them perhaps in part. Equal ids at the beginning are equal tokens.
"""

from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from random import Random
from typing import Annotated

import msgspec
from msgspec import Meta

from slipstream.config import SetupError
from slipstream.types import BLOCK_TOKENS

CHUNK_TOKENS = 512
CHUNK_BLOCKS = CHUNK_TOKENS // BLOCK_TOKENS
TOKENS_MAX = 1 << 24
CHUNK_ID_MAX = (1 << 32) - 1


class TraceRequest(msgspec.Struct, frozen=True):
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    chunks: tuple[int, ...]
    """Ids of the prompt's chunks of `CHUNK_TOKENS` tokens."""


_Tokens = Annotated[int, Meta(ge=1, le=TOKENS_MAX)]
_ChunkId = Annotated[int, Meta(ge=0, le=CHUNK_ID_MAX)]


class _Line(msgspec.Struct, frozen=True):
    timestamp: Annotated[float, Meta(ge=0)]
    input_length: _Tokens
    output_length: _Tokens
    hash_ids: tuple[_ChunkId, ...]


_decode = msgspec.json.Decoder(_Line).decode


def read_trace(path: Path) -> list[TraceRequest]:
    """All requests by arrival, beginning at 0 s. SetupError: which line is wrong, and why."""
    requests: list[TraceRequest] = []
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    requests.append(_parse(line, f"{path}:{number}"))
    except OSError as error:
        raise SetupError(f"{path}: {error.strerror}") from None
    if not requests:
        raise SetupError(f"{path} holds no request")
    requests.sort(key=lambda request: request.arrival_s)
    begin_s = requests[0].arrival_s
    return [_moved(request, request.arrival_s - begin_s) for request in requests]


def _parse(line: bytes, where: str) -> TraceRequest:
    try:
        found = _decode(line)
    except msgspec.ValidationError as error:
        raise SetupError(f"{where}: {_explained(str(error), line)}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise SetupError(f"{where}: not a JSON object: {error}") from None
    chunks = -(-found.input_length // CHUNK_TOKENS)
    if len(found.hash_ids) != chunks:
        raise SetupError(
            f"{where}: hash_ids: {len(found.hash_ids)} ids for input_length {found.input_length}; "
            f"one for each {CHUNK_TOKENS} tokens makes {chunks}"
        )
    return TraceRequest(
        found.timestamp / 1e3, found.input_length, found.output_length, found.hash_ids
    )


def _explained(message: str, line: bytes) -> str:
    """msgspec's words, led by the field and closed by the value."""
    what, _, place = message.partition(" - at `$")
    field = place.removeprefix(".").partition("[")[0].rstrip("`")
    what = what[0].lower() + what[1:]
    if not field:
        return what
    value = bytes(msgspec.json.decode(line, type=dict[str, msgspec.Raw])[field]).decode()
    return f"{field}: {what}, got {value if len(value) <= 40 else value[:40] + '…'}"


def _moved(request: TraceRequest, arrival_s: float) -> TraceRequest:
    return msgspec.structs.replace(request, arrival_s=arrival_s)


def spread(requests: Sequence[TraceRequest], seed: int) -> list[TraceRequest]:
    """Arrivals that share a time stamp, drawn evenly from it to the next one.

    Mooncake's time stamps stand 3 s apart, with ten requests each: the rounding of a log, and a
    burst only if one believes it.
    """
    rng = Random(seed)
    groups = [list(group) for _, group in groupby(requests, key=lambda r: r.arrival_s)]
    starts_s = [group[0].arrival_s for group in groups]
    gap_s = starts_s[-1] / (len(starts_s) - 1) if len(starts_s) > 1 else 0.0
    ends_s = [*starts_s[1:], starts_s[-1] + gap_s]
    drawn: list[TraceRequest] = []
    for group, start_s, end_s in zip(groups, starts_s, ends_s, strict=True):
        times_s = sorted(rng.uniform(start_s, end_s) for _ in group[1:])
        drawn += map(_moved, group, [start_s, *times_s])
    return drawn


def scaled(requests: Iterable[TraceRequest], rate_scale: float) -> list[TraceRequest]:
    """The same requests, `rate_scale` times as fast."""
    return [_moved(request, request.arrival_s / rate_scale) for request in requests]


def cut(
    requests: Sequence[TraceRequest], max_requests: int, duration_s: float
) -> list[TraceRequest]:
    """The first ones: at most so many, and those of the first `duration_s`; 0: no limit."""
    taken = requests[: max_requests or None]
    return [r for r in taken if not duration_s or r.arrival_s < duration_s]


def reusable_blocks(requests: Iterable[TraceRequest]) -> tuple[int, int]:
    """(blocks that an earlier prompt had, all full blocks): what one cache without end would hit.

    As in a worker, the last token of a prompt is computed in any case.
    """
    node_of: dict[tuple[int, int], int] = {}
    longest = [CHUNK_BLOCKS]
    """Of each chunk behind its predecessors: the most blocks of it that a prompt had."""
    hits = total = 0
    for request in requests:
        node = run = 0
        for index, chunk in enumerate(request.chunks):
            rest = (request.prompt_tokens - index * CHUNK_TOKENS) // BLOCK_TOKENS
            full = min(CHUNK_BLOCKS, rest)
            whole = run == index * CHUNK_BLOCKS
            node = node_of.setdefault((node, chunk), len(longest))
            if node == len(longest):
                longest.append(0)
            if whole:
                run += min(longest[node], full)
            longest[node] = max(longest[node], full)
        total += request.prompt_tokens // BLOCK_TOKENS
        hits += min(run, (request.prompt_tokens - 1) // BLOCK_TOKENS)
    return hits, total
