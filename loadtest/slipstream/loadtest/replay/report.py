"""What a replay came to, as numbers and as a table. Pure."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import msgspec

from slipstream.loadtest.load.numbers import Percentiles, ttfts_s
from slipstream.loadtest.load.sample import FAILURES, Sample
from slipstream.loadtest.replay.client import Request
from slipstream.loadtest.replay.prompts import reusable_tokens

FAILURES_SHOWN = 20


class Limits(msgspec.Struct, frozen=True):
    """Of a good request; `tpot_s` for the mean time of the tokens after the first."""

    ttft_s: float
    tpot_s: float


class ReplayReport(msgspec.Struct, frozen=True, kw_only=True):
    settings: dict[str, Any]
    elapsed_s: float
    requests: int
    outcomes: dict[str, int]
    ttft_s: Percentiles
    """Of accepted requests."""
    tpot_s: Percentiles
    e2e_s: Percentiles
    late_s: Percentiles
    """How much later than at its time the client has sent a request."""
    tokens: int
    prompt_tokens: int
    """Of accepted requests, as the server counts them; `cached_tokens` too."""
    cached_tokens: int
    cached_share: float
    reusable_share: float
    """Of the same prompts: what one cache without end would have had."""
    good: int
    good_share: float
    goodput_per_s: float
    failures: list[str]

    @property
    def ok(self) -> bool:
        return not any(self.outcomes.get(outcome) for outcome in FAILURES)


def tpot_s(sample: Sample) -> float:
    """Time per output token after the first; a piece of text may hold several."""
    if not sample.times_s:
        return 0.0
    return (sample.times_s[-1] - sample.times_s[0]) / max(1, sample.tokens - 1)


def report_of(
    requests: Sequence[Request],
    samples: Sequence[Sample],
    limits: Limits,
    settings: dict[str, Any],
) -> ReplayReport:
    right = [sample for sample in samples if sample.outcome == "right"]
    accepted = [sample for sample in samples if sample.accepted]
    elapsed_s = max((sample.end_s for sample in samples), default=0.0)
    pairs = zip(requests, samples, strict=True)
    prompts = [request.prompt for request, sample in pairs if sample.accepted]
    prompt_tokens = sum(sample.prompt_tokens for sample in accepted)
    cached_tokens = sum(sample.cached_tokens for sample in accepted)
    good = sum(
        sample.ttft_s is not None
        and sample.ttft_s <= limits.ttft_s
        and tpot_s(sample) <= limits.tpot_s
        for sample in right
    )
    failed = [sample for sample in samples if sample.outcome in FAILURES]
    return ReplayReport(
        settings=settings,
        elapsed_s=elapsed_s,
        requests=len(samples),
        outcomes=dict(Counter(sample.outcome for sample in samples)),
        ttft_s=Percentiles.of(ttfts_s(accepted)),
        tpot_s=Percentiles.of(tpot_s(sample) for sample in right),
        e2e_s=Percentiles.of(sample.end_s - sample.sent_s for sample in right),
        late_s=Percentiles.of(sample.sent_s - sample.planned_s for sample in samples),
        tokens=sum(sample.tokens for sample in right),
        prompt_tokens=prompt_tokens,
        cached_tokens=cached_tokens,
        cached_share=cached_tokens / max(1, prompt_tokens),
        reusable_share=reusable_tokens(prompts) / max(1, sum(map(len, prompts))),
        good=good,
        good_share=good / max(1, len(samples)),
        goodput_per_s=good / max(elapsed_s, 1e-9),
        failures=[f"{s.prompt}: {s.outcome}: {s.problem}" for s in failed[:FAILURES_SHOWN]],
    )


def table(report: ReplayReport) -> str:
    """Markdown."""
    rows = ["| | p50 | p95 | p99 |", "|---|---:|---:|---:|"]
    for name, values, factor in (
        ("TTFT, ms", report.ttft_s, 1e3),
        ("TPOT, ms", report.tpot_s, 1e3),
        ("E2E, s", report.e2e_s, 1),
        ("sent late, ms", report.late_s, 1e3),
    ):
        shown = (f"{value * factor:.1f}" for value in (values.p50, values.p95, values.p99))
        rows.append(f"| {name} | " + " | ".join(shown) + " |")
    told = ", ".join(f"{count} {outcome}" for outcome, count in report.outcomes.items())
    return "\n".join(
        [
            f"{report.requests} requests in {report.elapsed_s:.1f} s: {told}",
            "",
            *rows,
            "",
            f"{report.tokens / max(report.elapsed_s, 1e-9):.1f} tokens a second; "
            f"goodput {report.goodput_per_s:.2f} requests a second, {report.good_share:.0%} "
            "inside both limits",
            f"cached {report.cached_share:.1%} of prompt tokens; with one cache without end "
            f"{report.reusable_share:.1%}",
            *report.failures,
        ]
    )
