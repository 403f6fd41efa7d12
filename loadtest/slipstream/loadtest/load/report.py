"""What a run came to: numbers, and a verdict for each promise. Pure."""

from collections.abc import Sequence

import msgspec

from slipstream.loadtest.load.numbers import (
    Group,
    Percentiles,
    Series,
    group_of,
    groups_by_kind,
    groups_by_phase,
    series_of,
    ttfts_s,
)
from slipstream.loadtest.load.plan import Span
from slipstream.loadtest.load.sample import FAILURES, Sample
from slipstream.loadtest.load.scenarios import Scenario
from slipstream.loadtest.load.settings import Settings

FAILURES_SHOWN = 50


class Client(msgspec.Struct, frozen=True, kw_only=True):
    """How the client itself fared."""

    cpu_share: float
    """Of one core; near 1 it is the client that is measured."""
    not_sent: int
    crashes: int
    compared: int
    """Answers that were held against an earlier one."""
    interrupted: bool


class Check(msgspec.Struct, frozen=True):
    name: str
    ok: bool
    told: str


class Failure(msgspec.Struct, frozen=True):
    at_s: float
    phase: str
    prompt: str
    outcome: str
    problem: str


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Percentiles in seconds; `series` in bins from the beginning of the run."""

    date: str
    url: str
    model: str
    settings: Settings
    what: str
    capacity_rps: float
    elapsed_s: float
    checks: list[Check]
    phases: list[Group]
    kinds: list[Group]
    series: Series
    client: Client
    failures: list[Failure]
    """The first ones."""

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)


def checks_of(
    settings: Settings,
    scenario: Scenario,
    phases: Sequence[Group],
    judged: Sequence[Sample],
    samples: Sequence[Sample],
    client: Client,
) -> list[Check]:
    """`judged`: without warm-up and measurement."""
    # A long prompt takes its time; that of the others must not suffer from it.
    values_s = ttfts_s(sample for sample in judged if sample.kind != "long")
    ttft = Percentiles.of(values_s)
    target_s = settings.ttft_target_s
    late = sum(value_s > target_s for value_s in values_s)
    checks = [
        Check(
            "p99 TTFT",
            bool(ttft.count) and ttft.p99 <= target_s,
            f"{ttft.p99:.2f} s of {ttft.count} accepted requests, {late} of them later than "
            f"the target, {target_s:g} s",
        ),
        _refusals(scenario, phases, samples),
        *(_none(outcome, samples) for outcome in FAILURES),
        Check(
            "client",
            not (client.not_sent or client.crashes or client.interrupted),
            f"{client.not_sent} requests not sent, {client.crashes} errors of its own, "
            f"{client.cpu_share:.0%} of a core" + ", interrupted" * client.interrupted,
        ),
    ]
    if settings.refusal_target_s:
        refusal = group_of("", judged, target_s).refusal_s
        told = f"{refusal.p99:.3f} s of {refusal.count}, target {settings.refusal_target_s:g} s"
        checks.append(Check("p99 of refusals", refusal.p99 <= settings.refusal_target_s, told))
    if settings.goodput_share and scenario.overload:
        checks.append(_goodput(settings, scenario, phases))
    return checks


def _refusals(scenario: Scenario, phases: Sequence[Group], samples: Sequence[Sample]) -> Check:
    refused = sum(sample.outcome == "refused" for sample in samples)
    bad = sum(sample.problem.startswith("HTTP 429") for sample in samples)
    told = f"{refused} of {refused + bad} answers with 429 had a proper Retry-After"
    overload = [group for group in phases if group.name == scenario.overload]
    if overload and not overload[0].refused:
        return Check("429, Retry-After", False, f"{told}; none in {scenario.overload}")
    return Check("429, Retry-After", not bad, told)


def _none(outcome: str, samples: Sequence[Sample]) -> Check:
    found = [sample for sample in samples if sample.outcome == outcome]
    told = f"{len(found)} of {len(samples)} requests"
    if found:
        told += f"; the first, {found[0].prompt!r}: {found[0].problem}"
    return Check(outcome, not found, told)


def _goodput(settings: Settings, scenario: Scenario, phases: Sequence[Group]) -> Check:
    at = [group.name for group in phases].index(scenario.overload)
    before, then = phases[at - 1].goodput_per_s, phases[at].goodput_per_s
    wanted = settings.goodput_share * before
    told = f"{then:.2f} a second, {before:.2f} before it, {wanted:.2f} wanted"
    return Check(f"goodput in {scenario.overload}", then >= wanted, told)


def report_of(
    settings: Settings,
    scenario: Scenario,
    spans: Sequence[Span],
    samples: Sequence[Sample],
    client: Client,
    *,
    elapsed_s: float,
    capacity_rps: float,
    date: str,
    url: str,
    model: str,
) -> Report:
    judged_phases = {span.phase.name for span in spans if span.phase.judged}
    judged = [sample for sample in samples if sample.phase in judged_phases]
    phases = groups_by_phase(spans, samples, settings.ttft_target_s)
    failed = [sample for sample in samples if sample.outcome in FAILURES]
    return Report(
        date=date,
        url=url,
        model=model,
        settings=settings,
        what=scenario.what,
        capacity_rps=capacity_rps,
        elapsed_s=elapsed_s,
        checks=checks_of(settings, scenario, phases, judged, samples, client),
        phases=phases,
        kinds=groups_by_kind(judged, settings.ttft_target_s),
        series=series_of(samples, elapsed_s),
        client=client,
        failures=[
            Failure(sample.sent_s, sample.phase, sample.prompt, sample.outcome, sample.problem)
            for sample in failed[:FAILURES_SHOWN]
        ],
    )
