"""`slipstream trace ID`: what a person sees of a request's way."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from slipstream.cli import trace as command
from slipstream.cli.main import main
from slipstream.cli.timeline import BAR_WIDTH, Span, Trace, as_mermaid, as_svg, as_text


def span(node_id: str, name: str, begin_ms: float, duration_ms: float | None, **more: Any) -> Any:
    role = node_id.partition("-")[0]
    fields = {"number": 1, "parent": 0, "attributes": {}, "begin_unix_ns": "0", **more}
    times = {"begin_ms": begin_ms, "duration_ms": duration_ms}
    return {"node_id": node_id, "role": role, "name": name, **times, **fields}


def body(*spans: Any, request_id: str = "cmpl-x-0") -> dict[str, Any]:
    decision = {"policy": "cost", "predicted_ttft_s": 0.5}
    one = {"request_id": request_id, "trace_id": "a" * 32, "parent_id": "", "decision": decision}
    return {"kept": 3, "traces": [{**one, "spans": list(spans)}]}


SPANS = (
    span("frontend-0", "request", 0.0, 100.0),
    span("frontend-0", "stream", 50.0, 50.0, number=2),
    span("decode-0", "decode", 10.0, 85.0, attributes={"attempt": 1}),
    span("decode-0", "hand-over", 25.0, 25.0, number=2, parent=1, attributes={"bytes": 42}),
    span("decode-0", "read", 30.0, 0.5, number=3, parent=2),
)


class Frontend:
    """Answers one after another, the last one for ever."""

    def __init__(self, *answers: tuple[int, bytes]) -> None:
        self.answers, self.paths = list(answers), list[str]()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.paths.append(self.path)
                several = len(outer.answers) > 1
                status, data = outer.answers.pop(0) if several else outer.answers[0]
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "LATE_S", 0.0)


@pytest.fixture
def frontend() -> Iterator[Frontend]:
    running = Frontend((200, json.dumps(body(*SPANS)).encode()))
    yield running
    running.server.shutdown()


def test_a_timeline(frontend: Frontend, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", "my/id", "--url", frontend.url]) == 0
    assert frontend.paths == ["/trace/my%2Fid"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"cmpl-x-0  trace {'a' * 32}  5 spans of 2 processes, 100.0 ms"
    assert lines[1] == "decision: policy=cost predicted_ttft_s=0.5"
    rows = lines[4:]
    shown = [row.replace("█", "").split()[:4] for row in rows]
    assert shown == [
        ["frontend-0", "request", "0.0", "100.0"],
        ["decode-0", "decode", "10.0", "85.0"],
        ["decode-0", "hand-over", "25.0", "25.0"],
        ["decode-0", "read", "30.0", "0.5"],
        ["frontend-0", "stream", "50.0", "50.0"],
    ]
    assert [row.count("█") for row in rows] == [BAR_WIDTH, 34, 10, 1, 20]
    offsets = [row.index("█") - rows[0].index("█") for row in rows]
    assert offsets == [0, 4, 10, 12, 20]
    depths = [row[12:].index(row.split()[1]) for row in rows]
    assert depths == [0, 2, 4, 6, 2]
    assert rows[2].endswith("bytes=42")


def test_json_as_it_came(frontend: Frontend, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", "x", "--url", frontend.url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == body(*SPANS)


def test_pictures(frontend: Frontend, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "trace.svg"
    assert main(["trace", "x", "--url", frontend.url, "--mermaid", "--svg", str(file)]) == 0
    chart = capsys.readouterr().out
    assert chart.startswith("gantt\n    dateFormat x\n")
    assert "    section decode-0\n    decode 85.0 :10, 85ms\n" in chart
    picture = ElementTree.fromstring(file.read_text())
    bars = [rect for rect in picture.iter("{http://www.w3.org/2000/svg}rect")][1:]
    widths = [float(bar.attrib["width"]) for bar in bars]
    assert widths[0] == pytest.approx(2 * widths[4], rel=0.01) and len(bars) == 5


def test_what_a_span_says_is_text(tmp_path: Path) -> None:
    """A model's name or a client's id must be nothing else, wherever it is shown."""
    bad = "<script>alert(1)</script>\x1b[31m&\"':;,\n"
    trace = Trace(bad, bad, {}, [Span(bad, bad, 0.0, attributes={bad: bad}, duration_ms=1.0)])
    picture = as_svg([trace])
    assert "<script" not in picture and "\x1b" not in picture
    ElementTree.fromstring(picture)
    text = as_text([trace])
    assert "\x1b" not in text and len(text.splitlines()) == 4
    chart = as_mermaid([trace]).splitlines()
    assert len(chart) == 5 and chart[4].count(":") == 1 and "<" not in chart[4]


def test_what_goes_on() -> None:
    lasts = Span("decode-0", "decode", 5.0, duration_ms=None, number=1)
    root = Span("frontend-0", "request", 0.0, duration_ms=20.0, number=1)
    row = as_text([Trace("r", spans=[root, lasts])]).splitlines()[-1]
    assert "goes on" in row and "░" * 30 in row
    assert "goes on" in as_svg([Trace("r", spans=[root, lasts])])


def test_nothing_in_it() -> None:
    """The scheduler was restarted, and has heard of the request's end alone."""
    for show in (as_text, as_mermaid, as_svg):
        assert show([Trace("r")])


def test_who_asks_too_early_gets_the_whole(capsys: pytest.CaptureFixture[str]) -> None:
    error = json.dumps({"error": {"message": "No trace"}}).encode()
    for first in ((404, error), (200, json.dumps(body(SPANS[2])).encode())):
        frontend = Frontend(first, (200, json.dumps(body(*SPANS)).encode()))
        assert main(["trace", "x", "--url", frontend.url]) == 0
        assert "5 spans" in capsys.readouterr().out and len(frontend.paths) == 2


def test_an_id_that_nobody_knows(capsys: pytest.CaptureFixture[str]) -> None:
    message = "No trace of x; those of the last 7 requests are kept."
    frontend = Frontend((404, json.dumps({"error": {"message": message}}).encode()))
    assert main(["trace", "x", "--url", frontend.url]) == 3
    assert capsys.readouterr().err == f"slipstream trace: {message}\n"


@pytest.mark.parametrize("answer", [(200, b"<html>"), (500, b"<html>"), (404, b"[]")])
def test_who_is_no_frontend(answer: tuple[int, bytes], capsys: pytest.CaptureFixture[str]) -> None:
    frontend = Frontend(answer)
    assert main(["trace", "x", "--url", frontend.url]) == 3
    assert capsys.readouterr().err.startswith(f"slipstream trace: {frontend.url}")


@pytest.mark.parametrize(
    ("url", "code"), [("http://127.0.0.1:9", 3), ("127.0.0.1:8000", 2), ("http://h:port", 2)]
)
def test_nobody_there(url: str, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", "x", "--url", url]) == code
    error = capsys.readouterr().err
    assert url in error and error.count("\n") == 1


def test_a_picture_that_cannot_be_written(
    frontend: Frontend, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["trace", "x", "--url", frontend.url, "--svg", "/no/such/folder/x.svg"]) == 3
    assert "--svg /no/such/folder/x.svg" in capsys.readouterr().err


def test_no_id(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace"]) == 2
    assert "ID is required" in capsys.readouterr().err
