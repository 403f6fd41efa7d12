"""`slipstream bench`: puts load on a server, and says how it did."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
from rich.console import Console

from slipstream.cli.bench_load import REFUSED, Load, Measured
from slipstream.cli.client_config import BenchConfig, base_url
from slipstream.cli.progress import progress
from slipstream.cli.run import start_error
from slipstream.client.api import Api
from slipstream.client.stream import AnswerError
from slipstream.errors import ExitCode

PROG = "slipstream bench"
QUANTILES = {"p50": 0.50, "p90": 0.90, "p99": 0.99}


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Rates are over the whole time; latencies in ms, of whole answers."""

    url: str
    model: str
    load: BenchConfig
    elapsed_s: float
    ended: int
    """Of the requests; the others were stopped by Ctrl-C."""
    answers: int
    refused: int
    """429s: no errors, where more is asked for than there is room."""
    retry_after_s: float | None
    """The longest that one of them named; None: there were none, or one did not say."""
    errors: Mapping[str, int]
    requests_per_s: float
    output_tokens_per_s: float
    prompt_tokens_per_s: float
    output_tokens: int
    prompt_tokens: int
    cached_tokens: int
    latencies_ms: Mapping[str, Mapping[str, float]]


def bench(config: BenchConfig) -> int:
    """FAILED: an answer failed, or there was none. INTERRUPTED: what there was by then is shown."""
    try:
        report = asyncio.run(_measured(config))
    except AnswerError as error:
        raise start_error(PROG, error) from None
    print(msgspec.json.encode(report).decode() if config.json else screen(report), flush=True)
    if report.ended < config.requests:
        return ExitCode.INTERRUPTED
    return ExitCode.FAILED if report.errors or not report.answers else ExitCode.OK


async def _measured(config: BenchConfig) -> Report:
    console = Console(stderr=True)
    async with Api(base_url(config.url), config.api_key) as api:
        model = (await api.model(config.model)).id
        if config.warm_up:
            with progress(console, "warm-up") as advance:
                warm_up = Load(api, model, config, f"{config.seed} warm-up")
                await warm_up.run(config.warm_up, advance)
        load = Load(api, model, config, str(config.seed))
        with progress(console, "requests") as advance, contextlib.suppress(asyncio.CancelledError):
            await load.run(config.requests, advance)  # Ctrl-C: what there is is shown
        return report_of(api.url, model, config, load.measured)


def report_of(url: str, model: str, config: BenchConfig, measured: Measured) -> Report:
    answers, elapsed_s = measured.answers, max(measured.elapsed_s, 1e-9)
    refused = [one for one in measured.failures if one.status == REFUSED]
    waits = [one.retry_after_s for one in refused if one.retry_after_s is not None]
    prompt_tokens = sum(one.prompt_tokens for one in answers)
    output_tokens = sum(one.output_tokens for one in answers)
    times_s = {
        "ttft": [one.ttft_s for one in answers],
        "tpot": [one.tpot_s for one in answers if one.tpot_s],
        "itl": [gap_s for one in answers for gap_s in one.gaps_s],
        "e2e": [one.e2e_s for one in answers],
    }
    return Report(
        url=url,
        model=model,
        load=msgspec.structs.replace(config, api_key=""),
        elapsed_s=measured.elapsed_s,
        ended=measured.done,
        answers=len(answers),
        refused=len(refused),
        retry_after_s=max(waits) if waits and len(waits) == len(refused) else None,
        errors=Counter(one.kind for one in measured.failures if one.status != REFUSED),
        requests_per_s=len(answers) / elapsed_s,
        output_tokens_per_s=output_tokens / elapsed_s,
        prompt_tokens_per_s=prompt_tokens / elapsed_s,
        output_tokens=output_tokens,
        prompt_tokens=prompt_tokens,
        cached_tokens=sum(one.cached_tokens for one in answers),
        latencies_ms={name: _quantiles(values) for name, values in times_s.items() if values},
    )


def _quantiles(values_s: Sequence[float]) -> dict[str, float]:
    found: Any = np.quantile(values_s, list(QUANTILES.values())) * 1e3
    return dict(zip(QUANTILES, map(float, found), strict=True))


def screen(report: Report) -> str:
    load = report.load
    if load.rate:
        how = f"{load.rate:g} requests/s, drawn"
    else:
        how = f"{load.concurrency} at a time"
    unit = "token ids" if load.api == "completions" else "words"
    cached = f", {report.cached_tokens} of them cached" if report.cached_tokens else ""
    lines = [
        f"{report.model} at {report.url}",
        f"{load.requests} requests, {how}; {load.prompt_tokens} {unit} in, "
        f"{load.output_tokens} tokens out",
        *([f"stopped after {report.ended} of them"] if report.ended < load.requests else []),
        "",
        f"answers    {report.answers} in {report.elapsed_s:.1f} s = {report.requests_per_s:.2f}/s",
        f"output     {report.output_tokens} tokens = {report.output_tokens_per_s:.1f}/s",
        f"prompts    {report.prompt_tokens} tokens = {report.prompt_tokens_per_s:.1f}/s{cached}",
        f"refused    {report.refused} with 429{_retry(report)}",
        f"errors     {sum(report.errors.values())}",
        *(f"           {count} x {kind}" for kind, count in sorted(report.errors.items())),
    ]
    if report.latencies_ms:
        lines += ["", "ms         " + "".join(f"{name:>10}" for name in QUANTILES)]
    for name, values in report.latencies_ms.items():
        lines.append(f"{name.upper():<11}" + "".join(f"{value:10.1f}" for value in values.values()))
    return "\n".join(lines)


def _retry(report: Report) -> str:
    if not report.refused:
        return ""
    if report.retry_after_s is None:
        return ", without Retry-After"
    return f", Retry-After up to {report.retry_after_s:g} s"
