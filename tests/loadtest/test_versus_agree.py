"""vLLM's client beside ours: what is read of its result, with a program in its place."""

import sys
from itertools import pairwise
from pathlib import Path

import pytest

from slipstream.loadtest.versus.agree import bench_serve, theirs
from slipstream.loadtest.versus.loads import Load

FAKE = """
import json, pathlib, sys
words = ("--result-dir", "--result-filename")
folder, name = (sys.argv[sys.argv.index(word) + 1] for word in words)
numbers = {"output_throughput": 200.5, "median_ttft_ms": 150.0, "median_tpot_ms": 9.5, "other": 1}
pathlib.Path(folder, name).write_text(json.dumps(numbers))
"""


def test_its_numbers_bear_our_names() -> None:
    found = theirs([sys.executable, "-c", FAKE])
    assert found == {"output_tok_s": 200.5, "ttft_ms": 150.0, "tpot_ms": 9.5}


def test_what_it_says_when_it_fails_is_passed_on() -> None:
    with pytest.raises(SystemExit, match="no such model"):
        theirs([sys.executable, "-c", "raise SystemExit('no such model')"])


def test_it_is_asked_for_the_same_load() -> None:
    command = bench_serve(Path("py"), "http://x", "name", Path("/m"), Load(256, 64, 8, 24), 3)
    words = dict(pairwise(command))
    wanted = {
        "--random-input-len": "256",
        "--random-output-len": "64",
        "--max-concurrency": "8",
        "--num-prompts": "24",
        "--model": "name",
        "--tokenizer": "/m",
    }
    assert wanted.items() <= words.items() and "--ignore-eos" in command
