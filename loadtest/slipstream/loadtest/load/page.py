"""The report as one HTML file that loads nothing, and as lines for the terminal. Pure."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

import msgspec

from slipstream.loadtest.load.numbers import Group, Percentiles
from slipstream.loadtest.load.report import Report
from slipstream.loadtest.load.svg import Line, Span, plot

STYLE = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
PHASES = (
    "phase",
    "sent /s",
    "accepted",
    "429",
    "given up",
    "failed",
    "goodput /s",
    "tokens /s",
    "TTFT p50",
    "p95",
    "p99, s",
    "ITL p50",
    "p95",
    "p99, ms",
    "E2E p50",
    "p99, s",
    "429 p99, ms",
    "sent late p99, ms",
)
KINDS = (
    "kind",
    "requests",
    "accepted",
    "left",
    "failed",
    "TTFT p50",
    "p95",
    "p99, s",
    "ITL p50",
    "p95",
    "p99, ms",
    "E2E p50",
    "p99, s",
    "cached",
)


def lines(report: Report) -> list[str]:
    """Verdicts, for the terminal."""
    width = max(len(check.name) for check in report.checks)
    return [
        f"{'ok    ' if check.ok else 'FAILED'} {check.name:{width}}  {check.told}"
        for check in report.checks
    ]


def page(report: Report) -> str:
    settings = report.settings
    title = f"{settings.scenario}: {'all held' if report.ok else 'not all held'}"
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width">',
        f"<title>Load test, {escape(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>Load test, {escape(title)}</h1>",
        f"<p>{escape(report.what)}. {escape(report.date)}, {escape(report.url)}, ",
        f"{escape(report.model)}; {report.elapsed_s:.0f} s",
        f"; capacity {report.capacity_rps:.2f} requests a second" * bool(report.capacity_rps),
        ".</p>",
        _verdicts(report),
        "<h2>Phases</h2>",
        _table(PHASES, [_phase_row(group) for group in report.phases]),
        "<h2>Kinds of requests</h2>",
        _table(KINDS, [_kind_row(group) for group in report.kinds]),
        "<h2>Over time</h2>",
        *_plots(report),
        _failures(report),
        "<h2>Settings</h2>",
        f"<pre>{escape(_settings(report))}</pre></body></html>\n",
    ]
    return "".join(parts)


def _verdicts(report: Report) -> str:
    rows = [
        f'<tr class="{"ok" if check.ok else "failed"}"><td>{"✓ held" if check.ok else "✗ failed"}'
        f"</td><td>{escape(check.name)}</td><td>{escape(check.told)}</td></tr>"
        for check in report.checks
    ]
    return f'<table class="verdicts">{"".join(rows)}</table>'


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    parts = ["<div><table><tr>", *(f"<th>{escape(head)}</th>" for head in heads), "</tr>"]
    for row in rows:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in row)
        parts.append(f"<tr>{cells}</tr>")
    return "".join([*parts, "</table></div>"])


def _phase_row(group: Group) -> list[str]:
    length_s = max(group.end_s - group.begin_s, 1e-9)
    return [
        group.name,
        f"{group.attempts / length_s:.2f}",
        *(str(n) for n in (group.accepted, group.refused, group.refused_finally, group.failed)),
        f"{group.goodput_per_s:.2f}",
        f"{group.tokens_per_s:.0f}",
        *_times(group),
        *_shown(group.refusal_s, 1e3, "p99"),
        *_shown(group.late_s, 1e3, "p99"),
    ]


def _kind_row(group: Group) -> list[str]:
    return [
        group.name,
        *(str(number) for number in (group.requests, group.accepted, group.left, group.failed)),
        *_times(group),
        f"{group.cached_share:.0%}",
    ]


def _times(group: Group) -> list[str]:
    return [
        *_shown(group.ttft_s, 1, "p50", "p95", "p99"),
        *_shown(group.itl_s, 1e3, "p50", "p95", "p99"),
        *_shown(group.e2e_s, 1, "p50", "p99"),
    ]


def _shown(values: Percentiles, factor: float, *names: str) -> list[str]:
    if not values.count:
        return ["-"] * len(names)
    digits = 2 if factor == 1 else 0
    return [f"{getattr(values, name) * factor:.{digits}f}" for name in names]


def _plots(report: Report) -> list[str]:
    series, target_s = report.series, report.settings.ttft_target_s
    spans = [Span(group.name, group.begin_s, group.end_s) for group in report.phases]
    itl_ms = [None if value is None else value * 1e3 for value in series.itl_p95_s]
    ttft = [
        Line("p50", series.ttft_p50_s),
        Line("p95", series.ttft_p95_s),
        Line("p99", series.ttft_p99_s),
    ]
    requests = [
        Line("sent", series.sent_per_s),
        Line("accepted", series.accepted_per_s),
        Line("429", series.refused_per_s),
    ]
    return [
        f"<figure>{plot(title, drawn, series.bin_s, spans, target)}</figure>"
        for title, drawn, target in (
            ("Requests a second", requests, None),
            ("Accepted requests that are open", [Line("open", series.in_flight)], None),
            ("TTFT of accepted requests, s, by when they were sent", ttft, target_s),
            ("Tokens a second", [Line("tokens", series.tokens_per_s)], None),
            ("ITL, ms", [Line("p95", itl_ms)], None),
            ("Failures a second", [Line("failures", series.failed_per_s)], None),
        )
        if drawn[0].label != "failures" or report.failures
    ]


def _failures(report: Report) -> str:
    if not report.failures:
        return ""
    rows = [
        [f"{one.at_s:.1f}", one.phase, one.prompt, one.outcome, one.problem]
        for one in report.failures
    ]
    return "<h2>Failures</h2>" + _table(("at, s", "phase", "prompt", "what", "why"), rows)


def _settings(report: Report) -> str:
    fields = msgspec.to_builtins(report.settings)
    return "\n".join(f"--{name.replace('_', '-')} {value}" for name, value in fields.items())
