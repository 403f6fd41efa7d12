"""Every fault and every promise has a place where it is tried, and that place is there."""

import ast
from functools import cache
from pathlib import Path

import pytest

from sim.faults import KINDS
from slipstream.loadtest.chaos.__main__ import parse, stacks
from slipstream.loadtest.chaos.catalogue import ROWS, SHORT
from slipstream.loadtest.chaos.field import settings_of
from slipstream.loadtest.chaos.promises import PROMISES
from slipstream.loadtest.chaos.row import Row
from slipstream.loadtest.chaos.table import promises

TESTS = Path(__file__).parents[1]
FAULTS = {f"F{number:02}" for number in range(1, 61)}
BY_ID = {row.id: row for row in ROWS}


@cache
def functions(file: str) -> frozenset[str]:
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    known = (ast.FunctionDef, ast.AsyncFunctionDef)
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, known))


def check_tests(tests: tuple[str, ...]) -> None:
    for test in tests:
        file, _, name = test.partition("::")
        assert name in functions(file), test


def test_the_catalogue_is_whole_and_each_row_is_there_once() -> None:
    assert len(BY_ID) == len(ROWS)
    assert BY_ID.keys() >= FAULTS
    assert {row[:3] for row in BY_ID} == FAULTS


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_each_fault_is_tried_somewhere(row: Row) -> None:
    assert row.scenario or row.same or row.sim or row.tests or row.why
    assert set(row.sim) <= set(KINDS)
    check_tests(row.tests)
    assert settings_of(row.stack)
    assert not row.same or BY_ID[row.same].scenario
    assert not (row.may and row.scenario is None)


def test_each_promise_names_what_would_break() -> None:
    assert [promise.id for promise in PROMISES] == [f"R{n}" for n in range(1, 15)]
    for promise in PROMISES:
        assert promise.tests
        check_tests(promise.tests)
        assert set(promise.rows) <= {"all"} | {i for i, row in BY_ID.items() if row.scenario}


def test_the_page_is_of_these_rows_and_promises() -> None:
    page = (TESTS.parent / "docs" / "reliability.md").read_text(encoding="utf-8")
    assert promises(PROMISES) in page
    said = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| F")]
    fixed = [(*cells[:4], cells[-1]) for cells in said]
    assert fixed == [(row.id, row.phase, row.fault, row.seen, row.where) for row in ROWS]
    ran = [cells for cells, row in zip(said, ROWS, strict=True) if row.scenario]
    assert all(cells[-2] == "ok" for cells in ran), "paste the table of a run"


def test_rows_are_chosen_by_name() -> None:
    chosen = stacks(parse(["--rows", "F09,F22"]).wanted)
    assert [(name, [row.id for row in rows]) for name, rows in chosen] == [
        ("small", ["F22"]),
        ("twins", ["F09"]),
    ]
    ((_, short),) = stacks(parse(["--short"]).wanted)
    assert {row.id for row in short} == set(SHORT)
    with pytest.raises(SystemExit):
        parse(["--rows", "F99"])
