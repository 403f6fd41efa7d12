"""What `slipstream serve` shows: lines of the children, the phase it is in, the READY block."""

import re
import sys

from rich.console import Console
from rich.status import Status
from rich.text import Text

_COLOURS = {
    "frontend": "cyan",
    "tokenizer": "blue",
    "scheduler": "magenta",
    "prefill": "yellow",
    "decode": "green",
    "kvindex": "bright_blue",
    "redis": "red",
}


_WEIGHTS = re.compile(r" info weights: (\d+) of (\d+) layers$")
"""What `engine.runner` says of a model that takes long to load."""
_BAR = 30


def _bar(node_id: str, done: int, layers: int) -> str:
    full = _BAR * done // max(1, layers)
    return f"{node_id} loads weights {'━' * full}{'─' * (_BAR - full)} {done}/{layers}"


class Screen:
    """Child lines and phases go to stderr, the READY block to stdout."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self._status: Status | None = None
        self._phase = ""

    def child(self, node_id: str, line: str) -> None:
        """One line of a child, behind its name."""
        if not self.console.is_terminal:
            print(f"{node_id:<12} {line}", file=sys.stderr, flush=True)
            return
        if self._status is not None and (found := _WEIGHTS.search(line)):
            self._status.update(_bar(node_id, int(found[1]), int(found[2])))
            return
        colour = _COLOURS.get(node_id.rpartition("-")[0] or node_id, "white")
        text = Text(f"{node_id:<12} ", style=colour)
        text.append(Text.from_ansi(line, style="default"))
        self.console.print(text, soft_wrap=True)

    def phase(self, text: str) -> None:
        """What is being waited for: a spinner on a terminal, elsewhere a line when it changes."""
        if text == self._phase:
            return
        self._phase = text
        if not self.console.is_terminal:
            print(text, file=sys.stderr, flush=True)
        elif self._status is None:
            self._status = self.console.status(text)
            self._status.start()
        else:
            self._status.update(text)

    def settle(self) -> None:
        """Ends the spinner, so that the next line stays where it is."""
        if self._status is not None:
            self._status.stop()
            self._status = None
        self._phase = ""

    def block(self, lines: list[str]) -> None:
        self.settle()
        print("\n".join(lines), flush=True)
