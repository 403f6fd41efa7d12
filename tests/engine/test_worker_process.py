"""A worker as a process: what it takes at its start, and what is left after each kind of end."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from slipstream.core.prefix import block_hashes, namespace
from slipstream.kv.segment import HEADER_BYTES
from slipstream.kv.tier_files import TierFiles

Start = Callable[..., "Worker"]
Saved = Callable[[str], tuple[Path, object]]


class Worker:
    def __init__(self, folder: Path, model: Path, *flags: str):
        self.shm, self.run = folder / "shm", folder / "run"
        self.shm.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "slipstream.cli.main", "decode", "--model", str(model)]
        command += ["--run-dir", str(self.run), "--shm-dir", str(self.shm), "--node-id", "d"]
        command += ["--packed-weights-dir", str(folder / "weights")]
        self.process = subprocess.Popen(
            [*command, "--kv-cache-bytes", "1MiB", "--threads", "1", *flags],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            stderr=subprocess.PIPE,
            text=True,
        )

    def listening(self) -> str:
        """What it says until it is there."""
        assert self.process.stderr is not None
        said = ""
        for line in self.process.stderr:
            said += line
            if "listens at" in line:
                return said
        raise AssertionError(said)

    def end(self, number: signal.Signals | None = None) -> int:
        if number is not None:
            self.process.send_signal(number)
        return self.process.wait(60)

    @property
    def segments(self) -> list[str]:
        return sorted(path.name for path in self.shm.iterdir())


@pytest.fixture
def start(tmp_path: Path, saved: Callable[[str], tuple[Path, object]]) -> Iterator[Start]:
    workers = []

    def begin(*flags: str) -> Worker:
        workers.append(Worker(tmp_path, saved("llama")[0], *flags))
        return workers[-1]

    yield begin
    for worker in workers:
        worker.process.kill()
        worker.process.wait()
        assert worker.process.stderr is not None
        worker.process.stderr.close()


def test_it_says_what_it_is_and_leaves_nothing(start: Start) -> None:
    worker = start()
    said = worker.listening()
    assert "float32, context 512, 85 KV blocks of 12KiB" in said
    assert "transports shm,nixl,bus, 1 thread on" in said
    (segment,) = worker.segments
    assert segment.startswith("slipstream-run-d-")
    assert (worker.run / "d.kv.sock").exists()
    assert worker.end(signal.SIGTERM) == 0
    assert worker.segments == []
    assert not list(worker.run.glob("*.sock"))


def test_int8_is_said_and_its_kv_is_nobody_elses(start: Start, tmp_path: Path) -> None:
    """By index, tiers or transfer (`Transports` refuses peers of another layout)."""
    layouts = {}
    for kind in ("none", "int8"):
        worker = start("--quantization", kind)
        said = worker.listening()
        assert ("float32, int8 weights, context" in said) == (kind == "int8")
        header = (worker.shm / worker.segments[0]).read_bytes()[:HEADER_BYTES]
        (layouts[kind],) = re.findall(rb"[0-9a-f]{16}/float32/[\w./]+", header)
        assert worker.end(signal.SIGTERM) == 0
    assert layouts["int8"] == layouts["none"] + b"/int8"
    names = [layout.decode() for layout in layouts.values()]
    hashes = [set(block_hashes(range(48), namespace(name, ""))) for name in names]
    assert len(hashes[0] | hashes[1]) == 6
    folders = set()
    for name in names:
        tier = TierFiles(tmp_path, name, 4096)
        folders.add(tier.folder)
        tier.close()
    assert len(folders) == 2


def test_a_length_that_the_pool_does_not_hold_is_lowered_and_said(start: Start) -> None:
    worker = start("--kv-cache-bytes", "120KiB")
    said = worker.listening()
    assert "context 160 instead of the model's 512: the pool holds no more" in said
    assert "float32, context 160, 10 KV blocks of 12KiB" in said
    assert worker.end(signal.SIGTERM) == 0


def test_dummy_weights_need_no_files(start: Start, tmp_path: Path, saved: Saved) -> None:
    folder = tmp_path / "shape"
    folder.mkdir()
    shutil.copy(saved("llama")[0] / "config.json", folder)
    worker = start("--model", str(folder), "--load-format", "dummy")
    assert "float32, dummy weights, context 512" in worker.listening()
    assert worker.end(signal.SIGTERM) == 0


def test_the_next_self_cleans_up_after_a_kill(start: Start) -> None:
    first = start()
    first.listening()
    first.end(signal.SIGKILL)
    left = first.segments
    assert len(left) == 1
    second = start()
    second.listening()
    assert len(second.segments) == 1
    assert second.segments != left
    assert second.end(signal.SIGTERM) == 0
    assert second.segments == []


def test_a_second_process_of_that_name_is_refused_and_harms_nobody(start: Start) -> None:
    first = start()
    first.listening()
    before = first.segments
    second = start()
    assert second.end() == 5
    assert first.segments == before
    assert (first.run / "d.kv.sock").exists()
    assert first.end(signal.SIGTERM) == 0


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (("--kv-cache-bytes", "1KiB"), 6, "one request of 16 tokens needs 12KiB"),
        (("--max-model-len", "512", "--kv-cache-bytes", "99KiB"), 6, "needs 384KiB"),
        (("--max-model-len", "513"), 3, "the model has 512"),
        (
            ("--transports", "shm,pigeon"),
            2,
            "some of cuda_ipc, shm, nixl, bus with commas between them, got pigeon",
        ),
        (("--device", "cuda:3"), 3, "--device cuda:3: torch sees no GPUs; give cpu"),
        (("--device", "gpu"), 2, "--device"),
        (("--tensor-parallel-size", "3"), 4, "the model's num_heads is 4; give a number that"),
        (("--transports", "cuda_ipc,shm"), 3, "no cuda_ipc: the pool is in host memory"),
        (("--shm-dir", "/nowhere"), 3, "--shm-dir /nowhere"),
        (("--model", "/nowhere"), 4, "/nowhere/config.json: No such file"),
    ],
)
def test_what_cannot_start_says_why_in_one_line(
    start: Start, flags: tuple[str, ...], code: int, words: str
) -> None:
    worker = start(*flags)
    assert worker.end() == code
    assert worker.process.stderr is not None
    said = worker.process.stderr.read()
    assert words in said
    assert said.count("\n") == 1
    assert worker.segments == []
