"""Lines over time as an SVG that needs nothing from elsewhere; colours are the page's. Pure."""

import math
from collections.abc import Callable, Iterator, Sequence
from html import escape

import msgspec

WIDTH, HEIGHT = 760, 210
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 30, 24
LETTER = 6
"""Width of one."""
TICKS = 4

Scale = Callable[[float], float]


class Line(msgspec.Struct, frozen=True):
    label: str
    values: Sequence[float | None]


class Span(msgspec.Struct, frozen=True):
    label: str
    begin_s: float
    end_s: float


def plot(
    title: str,
    lines: Sequence[Line],
    bin_s: float,
    spans: Sequence[Span],
    target: float | None = None,
) -> str:
    """`target`: a level that is drawn across."""
    bins = max((len(line.values) for line in lines), default=1)
    end_s = max(bins * bin_s, 1e-9)
    highest = max((v for line in lines for v in line.values if v is not None), default=0.0)
    step = tick_step(max(highest, target or 0.0))
    top = step * max(1, math.ceil(max(highest, target or 0.0) / step - 1e-9))

    def x(at_s: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * min(at_s, end_s) / end_s

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * value / top

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    parts.append(f'<text class="title" x="{LEFT}" y="12">{escape(title)}</text>')
    parts += _grid(top, step, end_s, x, y)
    for span in spans:
        at = x(span.begin_s)
        parts.append(f'<path class="phase" d="M{at:.1f} {TOP - 12}V{HEIGHT - BOTTOM}"/>')
        if x(span.end_s) - at > LETTER * len(span.label):
            parts.append(f'<text class="phase" x="{at + 3:.1f}" y="{TOP - 3}">')
            parts.append(f"{escape(span.label)}</text>")
    if target is not None:
        level = f"M{LEFT} {y(target):.1f}H{WIDTH - RIGHT}"
        parts.append(f'<path class="target" d="{level}"/>')
    for number, line in enumerate(lines):
        points = [
            None if value is None else (x((index + 0.5) * bin_s), y(value))
            for index, value in enumerate(line.values)
        ]
        parts += _drawn(points, number)
    parts += _legend(lines, target)
    return "".join([*parts, "</svg>"])


def tick_step(highest: float) -> float:
    """1, 2 or 5 times a power of ten, so that a few of it reach `highest`."""
    if highest <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(highest / TICKS))
    return next(n * power for n in (1, 2, 5, 10) if n * power * TICKS >= highest * (1 - 1e-9))


def _grid(top: float, step: float, end_s: float, x: Scale, y: Scale) -> Iterator[str]:
    for index in range(round(top / step) + 1):
        value = index * step
        yield f'<path class="grid" d="M{LEFT} {y(value):.1f}H{WIDTH - RIGHT}"/>'
        yield f'<text class="tick" text-anchor="end" x="{LEFT - 5}" y="{y(value) + 3:.1f}">'
        yield f"{value:.4g}</text>"
    seconds = tick_step(end_s * 0.5)
    for index in range(int(end_s / seconds) + 1):
        at_s = index * seconds
        yield f'<text class="tick" text-anchor="middle" x="{x(at_s):.1f}" y="{HEIGHT - 8}">'
        yield f"{at_s:.4g} s</text>"


def _drawn(points: Sequence[tuple[float, float] | None], number: int) -> Iterator[str]:
    """Gaps stay gaps; a value that stands alone is a dot."""
    runs: list[list[tuple[float, float]]] = [[]]
    for point in points:
        if point is not None:
            runs[-1].append(point)
        elif runs[-1]:
            runs.append([])
    for run in runs:
        if len(run) == 1:
            yield f'<circle class="c{number}" cx="{run[0][0]:.1f}" cy="{run[0][1]:.1f}" r="2.5"/>'
        elif run:
            path = "L".join(f"{px:.1f} {py:.1f}" for px, py in run)
            yield f'<path class="c{number}" d="M{path}"/>'


def _legend(lines: Sequence[Line], target: float | None) -> Iterator[str]:
    """In the upper right corner, from right to left."""
    entries = [(f"c{number}", line.label) for number, line in enumerate(lines)]
    if target is not None:
        entries.append(("target", f"target {target:g}"))
    at = WIDTH - RIGHT
    for name, label in reversed(entries):
        yield f'<text class="tick" text-anchor="end" x="{at}" y="12">{escape(label)}</text>'
        at -= LETTER * len(label) + 8
        yield f'<path class="{name}" d="M{at - 14} 8H{at}"/>'
        at -= 26
