"""A trace against a server: `python -m slipstream.loadtest.replay FILE.jsonl --url URL`.

Prompts are token ids that depend on the trace's hash ids alone, so that what was shared there is
shared here. Ends with code 1 if an answer was lost or wrong.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import uvloop

from slipstream.config import SetupError
from slipstream.loadtest.replay.client import Replayer, Request
from slipstream.loadtest.replay.prompts import Size, token_ids
from slipstream.loadtest.replay.report import Limits, ReplayReport, report_of, table
from slipstream.loadtest.versus.client import model_name
from slipstream.loadtest.versus.errors import AnswerError
from slipstream.simulate.trace import CHUNK_TOKENS, cut, read_trace, scaled, spread

NOT_SHOWN = {"json", "trace", "url", "api_key_file"}


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="replay", description=__doc__)
    add = parser.add_argument
    add("trace", type=Path, metavar="FILE", help="JSONL, one request a line")
    add("--url", required=True, help="of the server, without /v1")
    add("--speed", type=_number(1e-6), default=1.0, help="how many times as fast as in the trace")
    add("--limit", type=_whole, default=0, help="the first so many requests; 0: all")
    add("--duration-s", type=_number(0), default=0.0, help="those of the first seconds; 0: all")
    add(
        "--arrivals",
        choices=["spread", "stamped"],
        default="spread",
        help="requests with one time stamp: drawn between it and the next, or all at once",
    )
    add("--seed", type=int, default=0, help="of what is drawn")
    chunk = f"stands for the {CHUNK_TOKENS} tokens of a hash id, so that all prompts shrink"
    add("--chunk-tokens", type=_whole, default=CHUNK_TOKENS, help=chunk)
    add("--max-prompt-tokens", type=_whole, default=0, help="longer ones lose their end; 0: none")
    add("--max-output-tokens", type=_whole, default=0, help="longer ones end earlier; 0: none")
    add("--ttft-limit-s", type=_number(0), default=5.0, help="of a good request")
    add("--tpot-limit-s", type=_number(0), default=0.05, help="of a good request")
    add("--timeout-s", type=_number(1e-3), default=600.0, help="longest time of an answer")
    add("--model-name", default="", help="in the API; empty: the server's first")
    add("--api-key-file", type=Path, help="file that holds the bearer token")
    add("--json", type=Path, help="file for all numbers")
    return parser.parse_args(words)


def _whole(word: str) -> int:
    if not word.isdecimal():
        raise argparse.ArgumentTypeError(f"{word}: expected a whole number")
    return int(word)


def _number(least: float) -> Callable[[str], float]:
    def parse_number(word: str) -> float:
        try:
            found = float(word)
        except ValueError:
            found = float("nan")
        if not least <= found < float("inf"):
            raise argparse.ArgumentTypeError(f"{word}: expected a number from {least:g} on")
        return found

    return parse_number


def requests_of(arguments: argparse.Namespace) -> list[Request]:
    """SetupError: the trace cannot be used."""
    trace = read_trace(arguments.trace)
    if arguments.arrivals == "spread":
        trace = spread(trace, arguments.seed)
    trace = scaled(cut(trace, arguments.limit, arguments.duration_s), arguments.speed)
    size = Size(
        chunk_tokens=max(1, arguments.chunk_tokens),
        max_prompt_tokens=arguments.max_prompt_tokens,
        max_output_tokens=arguments.max_output_tokens,
    )
    return [Request(r.arrival_s, token_ids(r, size), size.output_tokens(r)) for r in trace]


async def replay(arguments: argparse.Namespace) -> ReplayReport:
    """SetupError, AnswerError: it cannot begin."""
    requests = requests_of(arguments)
    headers = {}
    if arguments.api_key_file:
        try:
            key = arguments.api_key_file.read_text(encoding="utf-8").strip()
        except OSError as error:
            raise SetupError(f"--api-key-file: {error.strerror}") from None
        headers["Authorization"] = f"Bearer {key}"
    url = arguments.url.rstrip("/")
    async with aiohttp.ClientSession(
        headers=headers,
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=None),
    ) as session:
        model = arguments.model_name or await model_name(session, url)
        samples = await Replayer(session, url, model, arguments.timeout_s).run(requests)
    settings: dict[str, Any] = {k: v for k, v in vars(arguments).items() if k not in NOT_SHOWN}
    settings |= {"trace": arguments.trace.name, "model_name": model}
    limits = Limits(arguments.ttft_limit_s, arguments.tpot_limit_s)
    return report_of(requests, samples, limits, settings)


def main() -> int:
    arguments = parse(sys.argv[1:])
    try:
        report = uvloop.run(replay(arguments))
        if arguments.json:
            numbers = msgspec.json.format(msgspec.json.encode(report), indent=1)
            arguments.json.write_bytes(numbers + b"\n")
    except (SetupError, AnswerError, OSError) as error:
        print(f"replay: {error}", file=sys.stderr)
        return 2
    print(table(report))
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
