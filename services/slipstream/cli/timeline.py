"""A trace as a timeline: as text, as a Mermaid gantt chart, as an SVG that needs nothing else."""

import re
from collections.abc import Iterator, Sequence
from html import escape
from typing import NamedTuple

import msgspec

from slipstream.spans import ROOT, Attributes

BAR_WIDTH = 40
DETAILS_CHARS_MAX = 160

_COLOURS = {
    "frontend": "#4e79a7",
    "tokenizer": "#76b7b2",
    "scheduler": "#b07aa1",
    "kvindex": "#9c755f",
    "prefill": "#f28e2b",
    "decode": "#59a14f",
}
_OTHER_COLOUR = "#888888"
_RIGHT, _ROW, _TOP, _WIDTH = 110, 20, 48, 1200
_CHAR, _INDENT = 7.3, 10
"""Of the font, and of a span below another."""


class Span(msgspec.Struct):
    node_id: str
    name: str
    begin_ms: float
    role: str = ""
    number: int = 0
    parent: int = 0
    duration_ms: float | None = None
    attributes: Attributes = {}


class Trace(msgspec.Struct):
    """As `GET /trace/ID` says it."""

    request_id: str
    trace_id: str = ""
    decision: Attributes = {}
    spans: list[Span] = []

    @property
    def lasts(self) -> bool:
        """Its frontend has not said that it has ended."""
        roots = [span for span in self.spans if span.name == ROOT]
        return not roots or any(span.duration_ms is None for span in roots)


class _Row(NamedTuple):
    span: Span
    depth: int
    begin_ms: float
    end_ms: float


class _Scale(NamedTuple):
    first_ms: float
    last_ms: float

    def share(self, at_ms: float) -> float:
        """Of the whole, from 0 to 1."""
        return (at_ms - self.first_ms) / ((self.last_ms - self.first_ms) or 1.0)


def _rows(trace: Trace) -> tuple[list[_Row], _Scale]:
    """In the order of their beginnings. What goes on lasts until the end of the picture."""
    spans = sorted(trace.spans, key=lambda span: (span.begin_ms, -(span.duration_ms or 1e12)))
    ends = [span.begin_ms + (span.duration_ms or 0.0) for span in spans]
    scale = _Scale(min((s.begin_ms for s in spans), default=0.0), max(ends, default=0.0))
    by_number = {(span.node_id, span.number): span for span in spans}
    rows = []
    for span in spans:
        length_ms = span.duration_ms
        end_ms = scale.last_ms if length_ms is None else span.begin_ms + length_ms
        rows.append(_Row(span, _depth(span, by_number), span.begin_ms, end_ms))
    return rows, scale


def _depth(span: Span, by_number: dict[tuple[str, int], Span]) -> int:
    depth = 0 if span.name == ROOT else 1
    seen = {span.number}
    while span.parent and span.parent not in seen:
        above = by_number.get((span.node_id, span.parent))
        if above is None:
            break
        depth += 1
        seen.add(span.parent)
        span = above
    return depth


def _details(span: Span) -> str:
    """What it says, without what every answer's usage says too."""
    said = {key: value for key, value in span.attributes.items() if not key.startswith("gen_ai.")}
    for key in ("gen_ai.usage.input_tokens", "gen_ai.usage.output_tokens"):
        if key in span.attributes:
            said[key.removeprefix("gen_ai.usage.")] = span.attributes[key]
    text = _words_of(said)
    if len(text) <= DETAILS_CHARS_MAX:
        return text
    return text[: DETAILS_CHARS_MAX - 1] + "…"


def _words_of(said: Attributes) -> str:
    shown = {k: f"{v:.4g}" if isinstance(v, float) else str(v) for k, v in said.items()}
    return " ".join(_printable(f"{key}={value}") for key, value in shown.items())


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else "�" for char in text)


def _length(span: Span) -> str:
    return "goes on" if span.duration_ms is None else f"{span.duration_ms:.1f}"


# --- Text -----------------------------------------------------------------------------------------


def as_text(traces: Sequence[Trace]) -> str:
    return "\n\n".join("\n".join(_text(trace)) for trace in traces)


def _text(trace: Trace) -> Iterator[str]:
    rows, scale = _rows(trace)
    nodes = {span.node_id for span in trace.spans}
    yield (
        f"{_printable(trace.request_id)}  trace {_printable(trace.trace_id) or 'unknown'}  "
        f"{len(rows)} spans of {len(nodes)} processes, {scale.last_ms - scale.first_ms:.1f} ms"
    )
    if trace.decision:
        said = {key: value for key, value in trace.decision.items() if key != "request_id"}
        yield f"decision: {_words_of(said)}"
    yield ""
    node_width = max([len(node) for node in nodes], default=0)
    name_width = max([2 * row.depth + len(row.span.name) for row in rows], default=0)
    yield (
        f"{'process':<{node_width}}  {'span':<{name_width}}  {'at ms':>9}  {'for ms':>9}  "
        f"{'|':<{BAR_WIDTH - 1}}|"
    )
    for row in rows:
        span = row.span
        name = "  " * row.depth + _printable(span.name)
        yield (
            f"{_printable(span.node_id):<{node_width}}  {name:<{name_width}}  "
            f"{span.begin_ms:>9.1f}  {_length(span):>9}  {_bar(row, scale)}  {_details(span)}"
        ).rstrip()


def _bar(row: _Row, scale: _Scale) -> str:
    """At least one cell, however short it is."""
    begin = min(int(scale.share(row.begin_ms) * BAR_WIDTH), BAR_WIDTH - 1)
    end = max(begin + 1, round(scale.share(row.end_ms) * BAR_WIDTH))
    cell = "█" if row.span.duration_ms else "▏" if row.span.duration_ms == 0 else "░"
    return (" " * begin + cell * (end - begin)).ljust(BAR_WIDTH)


# --- Mermaid --------------------------------------------------------------------------------------

_NOT_IN_A_TASK = re.compile(r"[^A-Za-z0-9 ._>-]")
"""Colons, commas and semicolons mean something there."""


def as_mermaid(traces: Sequence[Trace]) -> str:
    """One chart; times are in ms, and what is shorter than 1 is drawn as long."""
    lines = ["gantt", "    dateFormat x", "    axisFormat %S.%L"]
    for trace in traces:
        rows, scale = _rows(trace)
        for node_id in dict.fromkeys(row.span.node_id for row in rows):
            lines.append(f"    section {_plain(node_id)}")
            for row in rows:
                if row.span.node_id == node_id:
                    begin_ms = round(row.begin_ms - scale.first_ms)
                    length_ms = max(1, round(row.end_ms - row.begin_ms))
                    name = f"{_plain(row.span.name)} {_length(row.span)}"
                    lines.append(f"    {name} :{begin_ms}, {length_ms}ms")
    return "\n".join(lines)


def _plain(text: str) -> str:
    return _NOT_IN_A_TASK.sub("_", text)


# --- SVG ------------------------------------------------------------------------------------------


def as_svg(traces: Sequence[Trace]) -> str:
    """One picture below the other."""
    parts: list[str] = []
    top = 0
    for trace in traces:
        rows, scale = _rows(trace)
        parts += _picture(trace, rows, scale, top)
        top += _TOP + _ROW * len(rows) + _ROW
    style = "font-family:ui-monospace,monospace;font-size:12px"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{top}" '
        f'viewBox="0 0 {_WIDTH} {top}" style="{style}">\n'
        f'<rect width="{_WIDTH}" height="{top}" fill="#ffffff"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _picture(trace: Trace, rows: list[_Row], scale: _Scale, top: int) -> Iterator[str]:
    names = 24 + _CHAR * max([len(row.span.node_id) for row in rows], default=0)
    labels = [_INDENT * row.depth + _CHAR * len(row.span.name) for row in rows]
    left = min(names + 16 + max(labels, default=0.0), _WIDTH / 2)
    width = _WIDTH - left - _RIGHT
    title = f"{trace.request_id}  trace {trace.trace_id or 'unknown'}"
    yield _words(8, top + 16, title, bold=True)
    for part in range(5):
        x = left + width * part / 4
        at_ms = scale.first_ms + (scale.last_ms - scale.first_ms) * part / 4
        bottom = top + _TOP + _ROW * len(rows)
        yield f'<line x1="{x:.1f}" y1="{top + 38}" x2="{x:.1f}" y2="{bottom}" stroke="#dddddd"/>'
        yield _words(x + 2, top + 36, f"{at_ms:.1f} ms", colour="#777777")
    for index, row in enumerate(rows):
        span, y = row.span, top + _TOP + _ROW * index
        x = left + width * scale.share(row.begin_ms)
        length = max(1.5, width * (scale.share(row.end_ms) - scale.share(row.begin_ms)))
        colour = _COLOURS.get(span.role, _OTHER_COLOUR)
        opacity = 0.4 if span.duration_ms is None else 1.0 if row.depth < 2 else 0.75
        yield _words(8, y + 13, span.node_id, colour=colour)
        yield _words(names + _INDENT * row.depth, y + 13, span.name)
        yield (
            f'<rect x="{x:.1f}" y="{y + 3}" width="{length:.1f}" height="{_ROW - 6}" rx="2" '
            f'fill="{colour}" fill-opacity="{opacity}"><title>'
            f"{escape(_printable(f'{span.node_id} {span.name}: {_details(span)}'))}</title></rect>"
        )
        beside = f"{_length(span)} ms" if span.duration_ms is not None else "goes on"
        yield _words(min(x + length, left + width) + 4, y + 13, beside, colour="#555555")


def _words(x: float, y: float, text: str, *, colour: str = "#222222", bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:.1f}" y="{y}" fill="{colour}"{weight}>{escape(_printable(text))}</text>'
