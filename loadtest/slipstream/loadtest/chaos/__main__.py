"""Faults in a real stack: `python -m slipstream.loadtest.chaos [--rows F09,F15] [--short] …`.

Starts `slipstream serve` with the demo model, learns the right answers, and then has one fault of
the catalogue after another happen under load. Leaves a table; the exit code is 1 if any row is bad.
"""

import argparse
import asyncio
import itertools
import sys
from pathlib import Path

from slipstream.loadtest.chaos.catalogue import ROWS, SHORT
from slipstream.loadtest.chaos.row import Row
from slipstream.loadtest.chaos.run import run
from slipstream.loadtest.chaos.soak import soak


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="chaos", description=__doc__)
    parser.add_argument("--rows", default="", help="ids, with commas; empty: all")
    parser.add_argument("--short", action="store_true", help=f"{', '.join(SHORT)} alone")
    parser.add_argument("--seed", type=int, default=0, help="of prompts and answers")
    parser.add_argument(
        *("--soak-s",), type=float, default=0.0, help="in place of rows: kills for so long"
    )
    parser.add_argument("--output", type=Path, default=Path("build/chaos"), help="folder")
    arguments = parser.parse_args(words)
    wanted = set(SHORT) if arguments.short else set(filter(None, arguments.rows.split(",")))
    unknown = wanted - {row.id for row in ROWS}
    if unknown:
        parser.error(f"--rows: there is no {', '.join(sorted(unknown))}")
    arguments.wanted = wanted
    return arguments


def stacks(wanted: set[str]) -> list[tuple[str, list[Row]]]:
    """What each stack is to go through, one stack after another."""
    rows = [row for row in ROWS if not wanted or row.id in wanted]
    runnable = [row for row in rows if row.scenario is not None]
    return [(name, list(of)) for name, of in itertools.groupby(runnable, lambda row: row.stack)]


def main() -> int:
    arguments = parse(sys.argv[1:])
    arguments.output.mkdir(parents=True, exist_ok=True)
    if arguments.soak_s:
        return asyncio.run(soak(arguments.soak_s, arguments.seed, arguments.output))
    return asyncio.run(run(stacks(arguments.wanted), arguments.seed, arguments.output))


if __name__ == "__main__":
    sys.exit(main())
