"""What `serve` decides for its workers."""

from collections.abc import Callable
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


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    def there(count: int) -> None:
        monkeypatch.setattr("slipstream.cli.plan.count_gpus", lambda environ: count)

    return there


def cards_of(*node_ids: str, **given: object) -> list[tuple[str, str]]:
    """Device and share of each worker."""
    found = []
    for node_id in node_ids:
        flags = flags_of(node_id, **given)
        at = flags.index("--gpu-memory-share") + 1 if "--gpu-memory-share" in flags else None
        found.append((flags[flags.index("--device") + 1], flags[at] if at else ""))
    return found


def test_workers_take_the_cards_in_turn(cards: Callable[[int], None]) -> None:
    workers = ("prefill-0", "decode-0", "decode-1")
    cards(0)
    assert cards_of(*workers, decode=2) == [("auto", "")] * 3
    cards(1)
    assert cards_of(*workers, decode=2) == [("auto:0", "0.3")] * 3
    cards(2)
    shared, alone = ("auto:0", "0.45"), ("auto:1", "0.9")
    assert cards_of(*workers, decode=2) == [shared, alone, shared]
    cards(8)
    assert cards_of(*workers, decode=2) == [(f"auto:{i}", "0.9") for i in range(3)]


def test_what_is_said_of_cards_is_done(cards: Callable[[int], None]) -> None:
    cards(4)
    workers = ("prefill-0", "decode-0")
    assert cards_of(*workers, device="cpu") == [("cpu", "")] * 2
    assert cards_of(*workers, device="cuda:3") == [("cuda:3", "0.45")] * 2
    assert cards_of(*workers, device="cuda") == [("cuda:0", "0.9"), ("cuda:1", "0.9")]
    assert cards_of(*workers, device="cuda:1", gpu_memory_share=0.2) == [("cuda:1", "0.2")] * 2
    ranks = cards_of(*workers, tensor_parallel_size=2)
    assert ranks == [("auto:0", "0.9"), ("auto:2", "0.9")]
    cards(2)
    assert cards_of(*workers, tensor_parallel_size=2) == [("auto:0", "0.45")] * 2
