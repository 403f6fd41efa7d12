"""The way to a first token, read from recordings."""

from pathlib import Path

import pytest

from slipstream.core.machine import Received, Started, TimerFired
from slipstream.loadtest.first_token import LAST_LEG, STATIONS, Passed, legs_ms, passed, table
from slipstream.messages import StreamAck
from slipstream.runtime.record import Recorder
from slipstream.types import NodeId, RequestId, Role


def request_at(start_s: float, without: str = "") -> list[Passed]:
    """A ms for each leg; other events in between."""
    events = []
    for number, station in enumerate(STATIONS, 1):
        if station.leg != without:
            at_s = start_s + number / 1e3
            events.append(Passed(at_s, station.role, station.event, station.message))
            events.append(Passed(at_s, Role.SCHEDULER, "TimerFired", ""))
    return sorted(events)


def test_each_leg_is_the_time_since_the_station_before() -> None:
    events = request_at(1.0) + request_at(2.0, without="scheduler to index")
    end_s = (len(STATIONS) + 1) / 1e3
    legs = legs_ms(events, [(1.0, 1.0 + end_s), (2.0, 2.0 + end_s)])
    assert list(legs) == [station.leg for station in STATIONS] + [LAST_LEG]
    for leg, values in legs.items():
        other = {"scheduler to index": [1.0], "Redis, index to scheduler": [1.0, 2.0]}
        wanted = other.get(leg, [1.0, 1.0])
        assert values == pytest.approx(wanted), leg
    assert "| scheduler to index | 1.00 | 1.00 |" in table(legs)


def test_what_comes_after_the_first_event_is_no_station_of_it() -> None:
    legs = legs_ms(request_at(1.0), [(1.0, 1.0015)])
    assert legs == {"HTTP, checks": pytest.approx([1.0]), LAST_LEG: pytest.approx([0.5])}


def test_recordings_of_all_processes_are_merged(tmp_path: Path) -> None:
    tokenizer, decode = Recorder(tmp_path, "tokenizer-0-1"), Recorder(tmp_path, "decode-0-1")
    decode.write(3.0, TimerFired("tick"), ())
    tokenizer.write(1.0, Started(), ())
    tokenizer.write(
        4.0, Received(NodeId("decode-0"), StreamAck(request_id=RequestId("a"), attempt=1)), ()
    )
    for recorder in (tokenizer, decode):
        recorder.close()
    assert passed(tmp_path) == [
        Passed(1.0, "tokenizer", "Started", ""),
        Passed(3.0, "decode", "TimerFired", ""),
        Passed(4.0, "tokenizer", "Received", "StreamAck"),
    ]
