"""What `slipstream serve` and long work show on a terminal, and not elsewhere."""

import io

import pytest
from rich.console import Console

from slipstream.cli.progress import progress
from slipstream.cli.screen import Screen

LINE = "12:00:01.250 info weights: 15 of 30 layers"


def console(terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=80)


def shown(on: Console) -> str:
    assert isinstance(on.file, io.StringIO)
    return on.file.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_is_for_terminals_alone(terminal: bool) -> None:
    on = console(terminal)
    with progress(on, "tensors") as advance:
        advance(0, 7)
        advance(7, 7)
    assert ("tensors" in shown(on), "7/7" in shown(on)) == (terminal, terminal)
    assert terminal or not shown(on)


def test_weights_are_a_bar_in_the_spinner_s_place() -> None:
    screen = Screen()
    screen.console = console(terminal=True)
    screen.child("decode-0", LINE)
    assert "decode-0" in shown(screen.console) and "━" not in shown(screen.console)
    screen.phase("waiting for decode-0")
    screen.child("decode-0", LINE)
    screen.settle()
    said = shown(screen.console)
    assert "decode-0 loads weights" in said and "━" * 15 + "─" * 15 in said and "15/30" in said
    assert said.count("info weights") == 1


def test_elsewhere_they_are_lines(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen()
    screen.console = console(terminal=False)
    screen.phase("waiting for decode-0")
    screen.child("decode-0", LINE)
    assert capsys.readouterr().err.splitlines()[-1] == f"decode-0     {LINE}"
