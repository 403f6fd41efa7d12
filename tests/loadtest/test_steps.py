"""The profile of a step: every operation is in it, with what it reads and computes."""

from pathlib import Path

import pytest

from engine.tiny import save_model
from slipstream.kernels import cpu
from slipstream.loadtest.steps import Machine, Part, Shape, Steps, table


@pytest.mark.skipif(cpu.kernels() is None, reason="no compiled kernels here")
def test_each_part_has_its_time_and_its_floor(tmp_path: Path) -> None:
    save_model(tmp_path, "llama")
    steps = Steps(tmp_path, "float32", threads=2, quantization="none", tokens=256)
    config = steps.config
    parts = steps.run(Shape(rows=3, tokens=1, context=20), times=3)
    hidden, vocabulary = config.hidden_size, config.vocab_size
    assert parts["vocabulary"].bytes == 4 * hidden * vocabulary
    assert parts["vocabulary"].operations == 2 * 3 * hidden * vocabulary
    kv_bytes = 2 * 3 * 21 * config.num_kv_heads * config.head_dim * 4
    assert parts["attend"].bytes == config.num_layers * kv_bytes
    gated = parts["gate and up"]
    assert gated.bytes == config.num_layers * 4 * 2 * config.intermediate_size * hidden
    assert all(part.ms > 0.0 for part in parts.values())
    assert steps.program.clock_ns is None, "nothing is noted when nobody asks"


def test_the_floor_is_the_longer_of_both() -> None:
    machine = Machine(bytes_per_s=1e9, operations_per_s=1e9)
    assert Part(bytes=2e6, operations=1e6).floor_ms(machine) == pytest.approx(2.0)
    assert Part(bytes=2e6, operations=3e6).floor_ms(machine) == pytest.approx(3.0)
    shown = table("t", {"a": Part(3.0, 2e6, 1e6), "b": Part(1.0)}, machine).splitlines()
    assert shown[4:] == [
        "| a | 3.00 | 75 | 2.0 | 0.00 | 2.00 |",
        "| b | 1.00 | 25 | 0.0 | 0.00 | 0.00 |",
        "| all | 4.00 | 100 | 2.0 | 0.00 | 2.00 |",
    ]
