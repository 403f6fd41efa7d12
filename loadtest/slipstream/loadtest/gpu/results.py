"""What was measured on a card: rows with their floors, saved after each, and what they come to."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec

State = Literal["done", "late", "failed"]


class Row(msgspec.Struct, frozen=True):
    """One number."""

    name: str
    value: float
    unit: str
    floor: float = 0.0
    """In the same unit: what the card has just shown to be possible, or another has; 0: none."""
    share: float = 0.0
    """How near the floor that is: 1 is there. 0: there is no floor."""
    wanted: float = 0.0
    """The least share that was promised; 0: nothing was."""
    note: str = ""

    @property
    def verdict(self) -> str:
        if not self.wanted:
            return ""
        return "met" if self.share >= self.wanted else f"missed: {self.wanted:.0%} wanted"


def time_row(name: str, ms: float, floor_ms: float, wanted: float = 0.0, note: str = "") -> Row:
    """Of a time: half as fast as the floor is a share of 0.5."""
    return Row(name, ms, "ms", floor_ms, floor_ms / ms if floor_ms else 0.0, wanted, note)


def rate_row(
    name: str, rate: float, unit: str, floor: float, wanted: float = 0.0, note: str = ""
) -> Row:
    return Row(name, rate, unit, floor, rate / floor if floor else 0.0, wanted, note)


class Phase(msgspec.Struct):
    name: str
    what: str
    state: State = "late"
    seconds: float = 0.0
    note: str = ""
    rows: list[Row] = []


class Results(msgspec.Struct):
    machine: dict[str, str]
    phases: list[Phase] = []

    def save(self, stem: Path) -> None:
        """`stem`.json and `stem`.md."""
        stem.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(msgspec.to_builtins(self), indent=1)
        stem.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
        stem.with_suffix(".md").write_text(self.page(), encoding="utf-8")

    def page(self) -> str:
        lines = ["# What a GPU does", "", *(f"- {k}: {v}" for k, v in self.machine.items()), ""]
        lines += [*self._verdicts(), ""]
        for phase in self.phases:
            state = "" if phase.state == "done" else f" ({phase.state})"
            lines += [f"## {phase.what}{state}", "", f"{phase.seconds:.0f} s. {phase.note}".strip()]
            lines += ["", *_table(phase.rows), ""] if phase.rows else [""]
        return "\n".join(lines)

    def _verdicts(self) -> list[str]:
        judged = [row for phase in self.phases for row in phase.rows if row.wanted]
        missed = [row for row in judged if row.share < row.wanted]
        lines = [f"{len(judged) - len(missed)} of {len(judged)} promises met."]
        lines += [f"- {row.name}: {row.share:.0%}, {row.verdict}" for row in missed]
        for phase in self.phases:
            if phase.state != "done":
                lines.append(f"- {phase.what}: {phase.state}. {phase.note}".rstrip())
        return lines


def _table(rows: Sequence[Row]) -> list[str]:
    lines = ["| | measured | floor | share | |", "|---|---:|---:|---:|---|"]
    for row in rows:
        floor = f"{row.floor:.4g}" if row.floor else ""
        share = f"{row.share:.0%}" if row.floor else ""
        told = "; ".join(filter(None, (row.verdict, row.note)))
        lines.append(f"| {row.name} | {row.value:.4g} {row.unit} | {floor} | {share} | {told} |")
    return lines
