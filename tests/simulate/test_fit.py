"""Prices are found again in the recordings of a worker that has them."""

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest

from simulate.builders import HARDWARE, a_cluster, a_run
from slipstream.cli.main import main
from slipstream.core.machine import Effect, Event, Machine
from slipstream.runtime.record import Recorder
from slipstream.simulate.fit import fit, positive_fit, recorded
from slipstream.simulate.hardware import load_hardware
from slipstream.simulate.synthetic import synthetic_trace


class Recorded:
    """A machine with the shell's recorder at its door."""

    def __init__(self, machine: Machine, recorder: Recorder):
        self.inner, self.recorder = machine, recorder

    def handle(self, event: Event, now_s: float) -> Sequence[Effect]:
        effects = self.inner.handle(event, now_s)
        self.recorder.write(now_s, event, effects)
        return effects

    def statistics(self) -> dict[str, float]:
        return self.inner.statistics()

    def check(self) -> None:
        self.inner.check()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two workers with a hand-over between them; READs seldom wait for one another."""
    folder = tmp_path_factory.mktemp("recordings")
    run = a_run(prefill=1, disaggregation="always", rate_scale=0.5)
    cluster = a_cluster(run, synthetic_trace(60, 1))
    for process in cluster.processes:
        recorder = Recorder(folder, process.node_id, 1 << 30)
        process.machine = Recorded(process.machine, recorder)
    cluster.run()
    return folder


def test_prices_come_back(folder: Path) -> None:
    found, error = fit(recorded(folder))
    assert error < 1e-6
    for name in HARDWARE.step.__struct_fields__:
        assert getattr(found.step, name) == pytest.approx(getattr(HARDWARE.step, name), rel=1e-3)
    assert found.read_latency_s == pytest.approx(HARDWARE.read_latency_s, rel=1e-3)
    assert found.read_bytes_per_s == pytest.approx(HARDWARE.read_bytes_per_s, rel=1e-3)
    rest = ("read_latency_s", "read_bytes_per_s", "step")
    for name in set(HARDWARE.__struct_fields__) - set(rest):
        assert getattr(found, name) == getattr(HARDWARE, name)


def test_the_command_prints_a_file_for_step_model(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", "fit", str(folder)]) == 0
    path = tmp_path / "mine.toml"
    path.write_text(capsys.readouterr().out)
    found, _ = fit(recorded(folder))
    written = load_hardware(str(path))
    assert msgspec.structs.astuple(written.step) == pytest.approx(
        msgspec.structs.astuple(found.step), rel=1e-3
    )
    assert written.kv_cache_tokens == found.kv_cache_tokens


def test_no_price_is_negative_and_what_was_disturbed_counts_little() -> None:
    rng = np.random.default_rng(1)
    work = np.column_stack([np.ones(400), rng.uniform(0, 100, 400), rng.uniform(0, 100, 400)])
    right = np.array([3.0, 0.5, 0.0])
    elapsed_s = work @ right - 0.01 * work[:, 2]  # would be best told by a negative price
    elapsed_s[::40] *= 20
    found = positive_fit(work, elapsed_s)
    assert (found >= 0).all()
    assert found[:2] == pytest.approx(right[:2], rel=0.2) and found[2] == 0


def test_too_little_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "fit", str(tmp_path)]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert "0 steps of workers are recorded; at least 50 are needed" in line
    assert main(["simulate", "fit"]) == 2
    assert "FOLDER is required" in capsys.readouterr().err
