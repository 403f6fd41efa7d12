"""What `serve` decides for its workers."""

from pathlib import Path

import pytest

from slipstream.cli.config import ServeConfig
from slipstream.cli.plan import Layout, plan


def flags_of(node_id: str, **given: object) -> tuple[str, ...]:
    layout = Layout(
        config=ServeConfig(**given),  # type: ignore[arg-type]
        given=list(given),
        config_file="",
        model=Path("/m"),
        model_name="m",
        run_dir=Path("/r"),
        environ={},
    )
    (child,) = [child for child in plan(layout) if child.node_id == node_id]
    return child.flags


@pytest.mark.parametrize("disaggregation", ["auto", "never"])
def test_where_one_worker_computes_none_stands_back(disaggregation: str) -> None:
    for node_id in ("prefill-0", "decode-0"):
        assert "--nice" not in flags_of(node_id, disaggregation=disaggregation)


def test_streams_stand_back_for_prompts_on_the_same_cores() -> None:
    flags = flags_of("decode-0", disaggregation="always")
    assert flags[flags.index("--nice") + 1] == "5"
    assert "--nice" not in flags_of("prefill-0", disaggregation="always")
    flags = flags_of("decode-0", disaggregation="always", decode_nice=9)
    assert flags[flags.index("--nice") + 1] == "9"


def test_workers_with_cores_of_their_own_do_not() -> None:
    assert "--nice" not in flags_of("decode-0", disaggregation="always", threads=1)
