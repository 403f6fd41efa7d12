"""Timers, recordings, log lines, epochs, metrics: the parts that need no second process."""

import json
import logging
import sys
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.peer import EchoConfig
from slipstream.core.machine import (
    BatchDone,
    BatchPlan,
    PullBlocks,
    PullDone,
    Received,
    Row,
    RowOutput,
    RunBatch,
    Send,
)
from slipstream.messages import KvReady, Release
from slipstream.runtime.identity import host_identity, new_epoch
from slipstream.runtime.log import set_up
from slipstream.runtime.metrics import metrics
from slipstream.runtime.record import Recorder, read
from slipstream.runtime.timers import Timers

KEYS = st.sampled_from("abc")
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("set"), KEYS, st.integers(0, 20)),
        st.tuples(st.just("cancel"), KEYS, st.just(0)),
        st.tuples(st.just("due"), st.just(""), st.integers(0, 20)),
    ),
    max_size=300,
)


@given(STEPS)
def test_timers_do_what_a_table_does(steps: list[tuple[str, str, int]]) -> None:
    timers, table = Timers(), dict[str, float]()
    for step, key, at_s in steps:
        if step == "set":
            timers.set(key, at_s)
            table[key] = at_s
        elif step == "cancel":
            timers.cancel(key)
            table.pop(key, None)
        else:
            due = sorted((at, key) for key, at in table.items() if at <= at_s)
            assert list(timers.due(at_s)) == [key for _, key in due]
            for _, key in due:
                del table[key]
        assert timers.next_s() == min(table.values(), default=float("inf"))
        assert len(timers) == len(table)


def test_a_timer_may_cancel_the_next() -> None:
    timers = Timers()
    timers.set("a", 1.0)
    timers.set("b", 1.0)
    fired = []
    for key in timers.due(2.0):
        fired.append(key)
        timers.cancel("b")
    assert fired == ["a"]


def test_a_timer_that_is_set_again_and_again_costs_no_memory() -> None:
    timers = Timers()
    for number in range(10_000):
        timers.set("tick", float(number))
    assert len(timers._heap) < 200


def story() -> list[tuple[float, object, list[object]]]:
    ready = KvReady(
        request_id="r", attempt=1, lease_id="l", epoch=2**62, first_block=0, block_ids=[3],
        digests=b"\xff" * 16, num_tokens=16,
    )  # fmt: skip
    pull = PullBlocks("p", "prefill-0", 7, (3,), (4,), 1.5)
    row = Row("r", 1, (5, 6), 0, (4,), True)
    done = BatchDone(1, (RowOutput("r", 1, (9,)),), {4: b"\x00" * 16})
    return [
        (1.25, Received("prefill-0", ready), [pull]),
        (1.5, PullDone("p", (b"\xff" * 16,)), [Send("prefill-0", Release(lease_id="l", epoch=7))]),
        (2.5, done, [RunBatch(BatchPlan(1, (row,)))]),
    ]


def test_a_recording_tells_what_happened_and_when(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "records", "decode-0-1")
    for now_s, event, effects in story():
        recorder.write(now_s, event, effects)
    found = list(read(recorder.path))
    assert [(now_s, name) for now_s, name, _ in found] == [
        (1.25, "Received"), (1.25, "PullBlocks"), (1.5, "PullDone"), (1.5, "Send"),
        (2.5, "BatchDone"), (2.5, "RunBatch"),
    ]  # fmt: skip
    assert found[0][2]["message"]["type"] == "KvReady"
    assert found[0][2]["message"]["digests"] == b"\xff" * 16
    assert found[1][2]["local_blocks"] == [4]
    assert found[4][2]["digests"] == {4: b"\x00" * 16}
    assert found[5][2]["plan"]["rows"][0]["tokens"] == [5, 6]
    assert recorder.path.stat().st_mode & 0o777 == 0o600
    recorder.close()


def test_what_a_killed_process_wrote_in_part_is_left_out(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, "x")
    for now_s, event, effects in story():
        recorder.write(now_s, event, effects)
    whole, data = list(read(recorder.path)), recorder.path.read_bytes()
    for length in range(len(data)):
        recorder.path.write_bytes(data[:length])
        part = list(read(recorder.path))
        assert part == whole[: len(part)]
        assert len(part) < len(whole)


def test_a_full_recording_ends_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Recorder(tmp_path, "x", bytes_max=500)
    for _ in range(50):
        recorder.write(0.0, PullDone("p"), [])
    assert 0 < recorder.path.stat().st_size <= 500
    assert list(read(recorder.path))
    assert [record.levelname for record in caplog.records] == ["ERROR"]


def test_an_epoch_is_above_the_last_one_whatever_the_clock_says(tmp_path: Path) -> None:
    config = EchoConfig(node_id="decode-0", run_dir=str(tmp_path))
    future = 2**62
    (tmp_path / "decode-0.epoch").write_text(str(future))
    assert new_epoch(config) == future + 1
    assert new_epoch(config) == future + 2
    (tmp_path / "decode-0.epoch").write_text("garbage")
    assert 0 < new_epoch(config) < future
    assert host_identity() == host_identity() != ""


def test_metrics_are_what_a_scraper_reads() -> None:
    text = metrics({"done_total": 3, "free": 1.5, "pull failed/cause": 1}, "n", "decode").decode()
    assert '\nslipstream_done_total{node_id="n",role="decode"} 3.0\n' in text
    assert '\nslipstream_free{node_id="n",role="decode"} 1.5\n' in text
    assert '\nslipstream_pull_failed_cause{node_id="n",role="decode"} 1.0\n' in text


@pytest.fixture
def root_logger():
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.mark.parametrize("as_json", [False, True])
def test_a_record_is_one_line(
    capfd: pytest.CaptureFixture[str], root_logger: None, as_json: bool
) -> None:
    set_up("info", "decode-0", as_json)
    log = logging.getLogger("slipstream.test")
    log.debug("not shown")
    log.info("two\nlines %d", 7)
    try:
        raise ValueError("planted")
    except ValueError:
        log.exception("failed")
    sys.stderr.flush()
    lines = capfd.readouterr().err.splitlines()
    if as_json:
        first, second = [msgspec.json.decode(line) for line in lines]
        assert first["message"] == "two\nlines 7"
        assert second["level"] == "error"
        assert "planted" in second["traceback"]
        assert json.loads(lines[0])["node_id"] == "decode-0"
    else:
        assert lines[0].endswith(" info two\\nlines 7")
        assert lines[1].endswith(" error failed")
        assert lines[-1] == "ValueError: planted"
