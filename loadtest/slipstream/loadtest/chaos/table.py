"""What came of the rows: lines for the screen, Markdown and JSON."""

import statistics
from collections.abc import Iterable, Mapping

import msgspec

from slipstream.loadtest.chaos.history import Found
from slipstream.loadtest.chaos.promises import Promise
from slipstream.loadtest.chaos.row import Row

HEAD = (
    *("row", "phase", "fault", "a client sees", "requests", "failed", "wrong tokens"),
    *("pause p50/max, s", "stranded", "verdict", "where"),
)


class Result(msgspec.Struct, kw_only=True):
    """Of one row that has run."""

    id: str
    found: Found
    stranded: int = 0
    seconds: float = 0.0

    @property
    def good(self) -> bool:
        return not self.found.problems

    @property
    def verdict(self) -> str:
        return "ok" if self.good else "BAD"

    @property
    def pause(self) -> str:
        pauses_s = self.found.pauses_s
        if not pauses_s:
            return "none"
        return f"{statistics.median(pauses_s):.2f}/{max(pauses_s):.2f}"


def line(row: Row, result: Result) -> str:
    found = result.found
    told = (
        f"{found.requests:4} requests, {found.failed} failed, {found.wrong} wrong, "
        f"pause {result.pause} s, {result.stranded} stranded, {result.seconds:.0f} s"
    )
    return f"{result.verdict:3}  {row.id:5} {row.phase:10} {row.fault}: {told}"


def markdown(rows: Iterable[Row], results: Mapping[str, Result]) -> str:
    """One line for each row; of one that runs elsewhere the numbers are left out."""
    lines = [_cells(HEAD), _cells("---" for _ in HEAD)]
    for row in rows:
        result = results.get(row.id) or results.get(row.same)
        told: Iterable[object] = ("", "", "", "", "", "elsewhere")
        if result is not None:
            found = result.found
            numbers = (found.requests, found.failed, found.wrong, result.pause, result.stranded)
            told = (*numbers, result.verdict)
        elif row.scenario is not None:
            told = ("", "", "", "", "", "not run")
        lines.append(_cells((row.id, row.phase, row.fault, row.seen, *told, row.where)))
    return "\n".join(lines) + "\n"


def promises(said: Iterable[Promise]) -> str:
    """As a table."""
    lines = [_cells(("", "promise", "rows", "tests")), _cells(["---"] * 4)]
    for one in said:
        tests = ", ".join(f"`{test}`" for test in one.tests)
        lines.append(_cells((one.id, one.text, ", ".join(one.rows), tests)))
    return "\n".join(lines) + "\n"


def _cells(cells: Iterable[object]) -> str:
    return f"| {' | '.join(str(cell) for cell in cells)} |"
