"""The numbers of a report, from the samples of a run. Pure."""

from collections.abc import Iterable, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from slipstream.loadtest.load.plan import Span
from slipstream.loadtest.load.sample import FAILURES, Sample

BINS = 90
BIN_MIN_S = 1.0


class Percentiles(msgspec.Struct, frozen=True):
    """Linear between ranks, as numpy's; zeros if there is nothing."""

    p50: float = 0.0
    p95: float = 0.0
    p99: float = 0.0
    count: int = 0

    @classmethod
    def of(cls, values: Iterable[float]) -> "Percentiles":
        found = list(values)
        if not found:
            return cls()
        p50, p95, p99 = np.percentile(np.asarray(found, dtype=np.float64), (50, 95, 99))
        return cls(float(p50), float(p95), float(p99), len(found))


class Group(msgspec.Struct, frozen=True, kw_only=True):
    """Numbers of some requests: those that were sent in a phase, or those of one kind."""

    name: str
    begin_s: float = 0.0
    end_s: float = 0.0
    requests: int
    """Without those that came again after a refusal."""
    attempts: int
    accepted: int
    left: int
    """Accepted, and left by the client on purpose."""
    refused: int
    refused_finally: int
    failed: int
    ttft_s: Percentiles
    """Of accepted requests, from sending to the first event with text."""
    itl_s: Percentiles
    """Between events with text; one may hold several tokens."""
    e2e_s: Percentiles
    """Of right answers."""
    refusal_s: Percentiles
    late_s: Percentiles
    """Of arrivals, how much later than planned the client has sent them."""
    in_time: int
    """Right or left by the client, with the first token within the target."""
    cached_share: float
    """Of prompt tokens, as the server counts them."""
    tokens_per_s: float = 0.0
    goodput_per_s: float = 0.0
    """Requests `in_time`, by the length of the phase."""


class Series(msgspec.Struct, frozen=True, kw_only=True):
    """One value for each bin; nan is nothing."""

    bin_s: float
    sent_per_s: list[float]
    accepted_per_s: list[float]
    refused_per_s: list[float]
    failed_per_s: list[float]
    tokens_per_s: list[float]
    in_flight: list[float]
    ttft_p50_s: list[float | None]
    ttft_p95_s: list[float | None]
    ttft_p99_s: list[float | None]
    itl_p95_s: list[float | None]


def groups_by_phase(
    spans: Sequence[Span], samples: Sequence[Sample], target_s: float
) -> list[Group]:
    found = []
    events_s, weights = token_events(samples)
    for span in spans:
        own = [sample for sample in samples if sample.phase == span.phase.name]
        inside = (events_s >= span.begin_s) & (events_s < span.end_s)
        length_s = max(span.end_s - span.begin_s, 1e-9)
        group = group_of(span.phase.name, own, target_s)
        found.append(
            msgspec.structs.replace(
                group,
                begin_s=span.begin_s,
                end_s=span.end_s,
                tokens_per_s=float(weights[inside].sum()) / length_s,
                goodput_per_s=group.in_time / length_s,
            )
        )
    return found


def groups_by_kind(samples: Sequence[Sample], target_s: float) -> list[Group]:
    kinds = sorted({sample.kind for sample in samples})
    return [group_of(k, [s for s in samples if s.kind == k], target_s) for k in kinds]


def group_of(name: str, samples: Sequence[Sample], target_s: float) -> Group:
    accepted = [sample for sample in samples if sample.accepted]
    refused = [sample for sample in samples if sample.outcome == "refused"]
    first = [sample for sample in samples if not sample.attempt]
    prompt_tokens = sum(sample.prompt_tokens for sample in accepted)
    return Group(
        name=name,
        requests=len(first),
        attempts=len(samples),
        accepted=len(accepted),
        left=sum(sample.outcome == "left" for sample in accepted),
        refused=len(refused),
        refused_finally=sum(sample.refused_finally for sample in refused),
        failed=sum(sample.outcome in FAILURES for sample in samples),
        ttft_s=Percentiles.of(ttfts_s(accepted)),
        itl_s=Percentiles.of(gap_s for sample in accepted for gap_s in sample.gaps_s),
        e2e_s=Percentiles.of(s.end_s - s.sent_s for s in accepted if s.outcome == "right"),
        refusal_s=Percentiles.of(sample.end_s - sample.sent_s for sample in refused),
        late_s=Percentiles.of(sample.sent_s - sample.planned_s for sample in first),
        in_time=sum(_in_time(sample, target_s) for sample in accepted),
        cached_share=sum(s.cached_tokens for s in accepted) / max(1, prompt_tokens),
    )


def ttfts_s(samples: Iterable[Sample]) -> list[float]:
    """Of accepted requests; one that never had a token waited until its end."""
    return [
        sample.end_s - sample.sent_s if sample.ttft_s is None else sample.ttft_s
        for sample in samples
        if sample.accepted
    ]


def _in_time(sample: Sample, target_s: float) -> bool:
    fine = sample.outcome in ("right", "left")
    return fine and sample.ttft_s is not None and sample.ttft_s <= target_s


def token_events(samples: Iterable[Sample]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """When text came, and how many tokens each time; tokens are shared out evenly."""
    times_s: list[float] = []
    weights: list[float] = []
    for sample in samples:
        if sample.times_s:
            times_s += sample.times_s
            each = max(sample.tokens, len(sample.times_s)) / len(sample.times_s)
            weights += [each] * len(sample.times_s)
    return np.asarray(times_s, dtype=np.float64), np.asarray(weights, dtype=np.float64)


def series_of(samples: Sequence[Sample], elapsed_s: float) -> Series:
    bin_s = max(BIN_MIN_S, elapsed_s / BINS)
    bins = max(1, int(np.ceil(elapsed_s / bin_s)))
    edges = np.arange(bins + 1) * bin_s

    def rate(times_s: Iterable[float], weights: NDArray[np.float64] | None = None) -> list[float]:
        counts, _ = np.histogram(np.fromiter(times_s, np.float64), bins=edges, weights=weights)
        return [float(count) / bin_s for count in counts]

    accepted = [sample for sample in samples if sample.accepted]
    refused = [sample for sample in samples if sample.outcome == "refused"]
    events_s, tokens = token_events(accepted)
    ttft = _binned(((s.sent_s, s.ttft_s) for s in accepted if s.ttft_s is not None), bin_s, bins)
    gaps = ((at, gap) for s in accepted for at, gap in zip(s.times_s[1:], s.gaps_s, strict=False))
    return Series(
        bin_s=bin_s,
        sent_per_s=rate(sample.sent_s for sample in samples),
        accepted_per_s=rate(sample.sent_s for sample in accepted),
        refused_per_s=rate(sample.sent_s for sample in refused),
        failed_per_s=rate(sample.end_s for sample in samples if sample.outcome in FAILURES),
        tokens_per_s=rate(events_s, tokens),
        in_flight=_in_flight(accepted, bin_s, bins),
        ttft_p50_s=_percentile(ttft, 50),
        ttft_p95_s=_percentile(ttft, 95),
        ttft_p99_s=_percentile(ttft, 99),
        itl_p95_s=_percentile(_binned(gaps, bin_s, bins), 95),
    )


def _in_flight(samples: Iterable[Sample], bin_s: float, bins: int) -> list[float]:
    """Mean number of accepted requests that were open."""
    busy_s = np.zeros(bins)
    for sample in samples:
        for index in range(int(sample.sent_s / bin_s), min(bins, int(sample.end_s / bin_s) + 1)):
            begin_s = max(sample.sent_s, index * bin_s)
            busy_s[index] += max(0.0, min(sample.end_s, (index + 1) * bin_s) - begin_s)
    return [float(value) / bin_s for value in busy_s]


def _binned(points: Iterable[tuple[float, float]], bin_s: float, bins: int) -> list[list[float]]:
    found: list[list[float]] = [[] for _ in range(bins)]
    for at_s, value in points:
        found[min(bins - 1, int(at_s / bin_s))].append(value)
    return found


def _percentile(binned: list[list[float]], rank: float) -> list[float | None]:
    return [float(np.percentile(values, rank)) if values else None for values in binned]
