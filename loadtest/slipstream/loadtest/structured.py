"""What a JSON schema costs of a decode: `python -m slipstream.loadtest.structured [engine|server]`.

Target: at most 10 % of the throughput of 8 streams. Steps or rounds with and without a schema take
turns; all answers have the same number of tokens, for the schema asks for more than that. `engine`:
steps of one runner in this process. `server`: streams of `slipstream serve`, which it starts (with
--url: of one that runs), by `response_format`. `--report` keeps both in a page.
"""

import argparse
import asyncio
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import msgspec
import uvloop
from llguidance import LLMatcher

from slipstream.client.api import Api
from slipstream.client.stream import AnswerError, Meter
from slipstream.core.job import blocks_for
from slipstream.core.machine import Admission, BatchPlan, Row
from slipstream.engine.model_config import ModelConfig
from slipstream.engine.runner import Runner, allocate_pool
from slipstream.loadtest.load.__main__ import launch
from slipstream.loadtest.quality import prepared
from slipstream.loadtest.versus.errors import PeerMissing
from slipstream.loadtest.versus.results import Machine, this_machine, today
from slipstream.loadtest.versus.server import running
from slipstream.types import SamplingParams

STREAMS = 8
SHARE_MIN = 0.9
"""Of the throughput without a schema."""
SCHEMA: dict[str, Any] = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 12, "maxLength": 60},
            "year": {"type": "integer", "minimum": 1500, "maximum": 2100},
            "kinds": {"type": "array", "items": {"type": "string"}, "minItems": 2},
        },
        "required": ["name", "year", "kinds"],
        "additionalProperties": False,
    },
    "minItems": 400,
}
QUESTION = "Name inventions, each with its year and kinds, as JSON."
PROMPT_TOKENS = 32
PROMPT = tuple(range(300, 300 + PROMPT_TOKENS))
TTFT_TARGET_S = 30.0

_HEAD = """# What a JSON schema costs

```sh
python -m slipstream.loadtest.structured engine --report docs/benchmarks/structured
python -m slipstream.loadtest.structured server --report docs/benchmarks/structured
```

Decode throughput of 8 streams, tokens/s, with and without a schema by turns. The schema: a list of
objects with strings, numbers and lists, longer than any answer here, so that all have the
same length. The demo model in bfloat16. `engine`: steps of one runner; `server`: streams of
`slipstream serve`, after their first token, by `response_format`. Wanted: a share of 0.9.

| | tokens of an answer | without | with | share: median (all) | |
|---|---|---|---|---|---|"""
_TAIL = """What it costs is llguidance's masks, and putting them into the logits. Why there:
[0024](../adr/0024-grammars-in-the-workers.md).
"""


class Rates(NamedTuple):
    """Tokens a second of all streams together, in one round."""

    free: float
    held: float


Measure: TypeAlias = Callable[[int], Awaitable[Rates]]


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens a second, of each round."""

    machine: Machine
    date: str
    load: float
    tokens: int
    """Of each answer."""
    free: tuple[float, ...]
    held: tuple[float, ...]

    @property
    def shares(self) -> list[float]:
        return [held / free for free, held in zip(self.free, self.held, strict=True)]

    @property
    def share(self) -> float:
        return statistics.median(self.shares)


async def rounds_of(rounds: int, tokens: int, measure: Measure) -> Found:
    rates: list[Rates] = []
    for number in range(-1, rounds):
        found = await measure(number)
        print(f"{found.free:.1f} tokens/s, with a schema {found.held:.1f}", flush=True)
        if number >= 0:  # the first one is to warm up
            rates.append(found)
    return Found(
        machine=this_machine(),
        date=today(),
        load=os.getloadavg()[0],
        tokens=tokens,
        free=tuple(each.free for each in rates),
        held=tuple(each.held for each in rates),
    )


# --- Steps of one runner --------------------------------------------------------------------------


class Steps:
    """Of two batches by turns, one without and one with the schema."""

    def __init__(self, folder: Path, tokens: int, packed_dir: Path) -> None:
        self._blocks = blocks_for(PROMPT_TOKENS + tokens)
        layout = ModelConfig.read(folder).kv_layout("bfloat16")
        pool = allocate_pool(layout, 2 * STREAMS * self._blocks)
        self._runner = Runner(folder, "bfloat16", pool, packed_dir=packed_dir)
        self._tokens = tokens

    async def measure(self, number: int) -> Rates:
        grammars = ("", LLMatcher.grammar_from_json_schema(SCHEMA))
        batches = [self._begin(f"{number}-{i}", i, each) for i, each in enumerate(grammars)]
        spent_s = [0.0, 0.0]
        for step in range(1, self._tokens):
            start = PROMPT_TOKENS + step - 1
            for index, batch in enumerate(batches):
                rows = [
                    Row(row.request_id, 1, (), start, row.block_ids, True, step, True)
                    for row in batch
                ]
                began_s = time.perf_counter()
                outputs = self._runner.run(BatchPlan(step, tuple(rows)))
                spent_s[index] += time.perf_counter() - began_s
                assert all(output.tokens for output in outputs), outputs
        dropped = tuple((row.request_id, 1) for batch in batches for row in batch)
        self._runner.run(BatchPlan(0, (), dropped=dropped))
        return Rates(*(STREAMS * (self._tokens - 1) / each for each in spent_s))

    def _begin(self, name: str, index: int, grammar: str) -> list[Row]:
        """The rows of a batch whose prompts have been computed."""
        rows, admitted = [], []
        for seed in range(STREAMS):
            first = (index * STREAMS + seed) * self._blocks
            table = tuple(range(first, first + self._blocks))
            rows.append(Row(f"{name}-{seed}", 1, PROMPT, 0, table, True))
            sampling = SamplingParams(
                max_tokens=self._tokens, seed=seed, ignore_eos=True, grammar=grammar
            )
            admitted.append(Admission(f"{name}-{seed}", 1, PROMPT, PROMPT_TOKENS, sampling))
        self._runner.run(BatchPlan(0, tuple(rows), tuple(admitted)))
        return rows


# --- Streams of a server --------------------------------------------------------------------------


class Streams:
    """That begin at the same time; what counts is their time after the first token."""

    def __init__(self, api: Api, model: str, tokens: int) -> None:
        self._api, self._model, self._tokens = api, model, tokens

    async def measure(self, number: int) -> Rates:
        rates = {}
        for held in (False, True) if number % 2 else (True, False):
            meters = await asyncio.gather(*(self._stream(seed, held) for seed in range(STREAMS)))
            rates[held] = STREAMS / statistics.mean(meter.tpot_s for meter in meters)
        return Rates(rates[False], rates[True])

    async def _stream(self, seed: int, held: bool) -> Meter:
        body: dict[str, Any] = {
            "model": self._model,
            "messages": [{"role": "user", "content": QUESTION}],
            "max_tokens": self._tokens,
            "temperature": 1.0,
            "seed": seed,
            "ignore_eos": True,
        }
        if held:
            schema = {"name": "inventions", "schema": SCHEMA}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        meter = Meter(time.perf_counter())
        async for _ in self._api.stream("/v1/chat/completions", body, meter):
            pass
        if meter.tokens != self._tokens:
            raise AnswerError(f"{meter.tokens} tokens, asked for {self._tokens}")
        return meter


async def of_server(url: str, rounds: int, tokens: int) -> Found:
    async with Api(url) as api:
        model = (await api.model()).id
        return await rounds_of(rounds, tokens, Streams(api, model, tokens).measure)


async def of_own_server(flags: list[str], rounds: int, tokens: int) -> Found:
    with tempfile.TemporaryDirectory() as folder:
        async with running(launch(TTFT_TARGET_S, flags), Path(folder) / "server.log") as server:
            return await of_server(server.url, rounds, tokens)


# --- The page -------------------------------------------------------------------------------------


def page(found: Mapping[str, Found]) -> str:
    lines = [_HEAD]
    for where, each in found.items():
        rates = [", ".join(f"{rate:.0f}" for rate in rates) for rates in (each.free, each.held)]
        met = "met" if each.share >= SHARE_MIN else "not met"
        lines.append(
            f"| {where} | {each.tokens} | {rates[0]} | {rates[1]} | {each.share:.3f} "
            f"({min(each.shares):.3f} to {max(each.shares):.3f}) | {met} |"
        )
    told = [
        f"`{where}`: {each.machine.cores} cores of an {each.machine.cpu}, {each.date}, "
        f"load {each.load:.1f} at the end."
        for where, each in found.items()
    ]
    lines += ["", "\n".join(told), "", _TAIL]
    return "\n".join(lines)


def keep(report: Path, where: str, found: Found) -> None:
    """Beside what `report` has of other places."""
    file = report.with_suffix(".json")
    kind = dict[str, Found]
    known = msgspec.json.decode(file.read_bytes(), type=kind) if file.is_file() else {}
    known[where] = found
    file.write_bytes(msgspec.json.format(msgspec.json.encode(known), indent=1) + b"\n")
    report.with_suffix(".md").write_text(page(dict(sorted(known.items()))), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("where", nargs="?", choices=["engine", "server"], default="server")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=200, help="of each answer")
    parser.add_argument("--url", default="", help="of a server that runs, without /v1")
    parser.add_argument("--serve", default="", help="flags for `slipstream serve`, in one word")
    parser.add_argument("--report", type=Path, help="a page and its numbers: name without ending")
    ours = parser.parse_args()
    try:
        if ours.where == "engine":
            with tempfile.TemporaryDirectory() as folder:
                steps = Steps(prepared("demo"), ours.tokens, Path(folder))
                found = uvloop.run(rounds_of(ours.rounds, ours.tokens, steps.measure))
        elif ours.url:
            found = uvloop.run(of_server(ours.url.rstrip("/"), ours.rounds, ours.tokens))
        else:
            found = uvloop.run(of_own_server(shlex.split(ours.serve), ours.rounds, ours.tokens))
    except (PeerMissing, AnswerError) as error:
        print(f"structured: {error}", file=sys.stderr)
        return 1
    print(f"{found.share:.3f} of the throughput without a schema (wanted: {SHARE_MIN:g})")
    if ours.report:
        keep(ours.report, ours.where, found)
    return int(found.share < SHARE_MIN)


if __name__ == "__main__":
    sys.exit(main())
