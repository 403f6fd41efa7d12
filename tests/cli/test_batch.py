"""`slipstream batch`: whole files, files that go on, and what goes wrong in them."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from cli.fake_server import FakeServer, running
from cli.terminal import Terminal
from slipstream.cli.batch_file import Answers
from slipstream.cli.main import main
from slipstream.errors import ExitCode

Capture = pytest.CaptureFixture[str]


class Whole(FakeServer):
    """Answers whole; `bad` ids get 400, `busy` ones 429 so many times, first."""

    def __init__(self) -> None:
        super().__init__()
        self.bad: set[str] = set()
        self.busy: dict[str, int] = {}
        self.order: list[str] = []

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        name = body["prompt"]
        self.order.append(name)
        if self.busy.get(name, 0):
            self.busy[name] -= 1
            return web.json_response({}, status=429, headers={"Retry-After": "0"})
        if name in self.bad:
            return web.json_response({"error": {"message": "no"}}, status=400)
        if self.pause_s:
            await asyncio.sleep(self.pause_s)
        return web.json_response({"text": name}, headers={"x-request-id": f"id-{name}"})


@pytest.fixture
def whole() -> Iterator[Whole]:
    with running(Whole()) as server:
        yield server


def line(name: str, **changes: Any) -> str:
    asked = {"custom_id": name, "method": "POST", "url": "/v1/completions"}
    return json.dumps({**asked, "body": {"model": "m", "prompt": name}, **changes}) + "\n"


def batch(folder: Path, url: str, *flags: str) -> int:
    files = [str(folder / "in.jsonl"), str(folder / "out.jsonl")]
    return main(["batch", *files, "--url", url, *flags])


def answers(folder: Path) -> dict[str, dict[str, Any]]:
    lines = (folder / "out.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(each) for each in lines]
    assert len({each["custom_id"] for each in found}) == len(found)
    return {each["custom_id"]: each for each in found}


def write(folder: Path, *lines: str) -> None:
    (folder / "in.jsonl").write_text("".join(lines), encoding="utf-8")


def test_each_request_has_one_answer(whole: Whole, tmp_path: Path, capsys: Capture) -> None:
    names = [f"r{n}" for n in range(50)]
    write(tmp_path, *map(line, names))
    whole.busy = {"r3": 2, "r9": 1}
    assert batch(tmp_path, whole.url, "--concurrency", "7") == ExitCode.OK
    found = answers(tmp_path)
    assert found.keys() == set(names)
    for name, each in found.items():
        response = each["response"]
        assert (response["status_code"], response["request_id"]) == (200, f"id-{name}")
        assert response["body"] == {"text": name} and each["error"] is None
        assert each["id"].startswith("batch_req_")
    assert "50 of 50 requests answered, 0 failed" in capsys.readouterr().err


def test_what_is_answered_is_not_asked_again(whole: Whole, tmp_path: Path, capsys: Capture) -> None:
    write(tmp_path, *map(line, "abcd"))
    assert batch(tmp_path, whole.url) == ExitCode.OK
    before = (tmp_path / "out.jsonl").read_bytes()
    torn = before[: before.rindex(b'"custom_id"') + 9]  # killed while it wrote the last one
    (tmp_path / "out.jsonl").write_bytes(torn)
    whole.order.clear()
    assert batch(tmp_path, whole.url) == ExitCode.OK
    assert len(whole.order) == 1 and answers(tmp_path).keys() == set("abcd")
    assert "3 are answered already" in capsys.readouterr().err
    whole.order.clear()
    assert batch(tmp_path, whole.url) == ExitCode.OK
    assert not whole.order


def test_a_bad_request_is_answered_too_and_the_exit_code_says_so(
    whole: Whole, tmp_path: Path
) -> None:
    write(tmp_path, *map(line, "ab"))
    whole.bad, whole.busy = {"a"}, {"b": 99}
    assert batch(tmp_path, whole.url, "--retry-s", "0.05") == ExitCode.FAILED
    found = answers(tmp_path)
    assert found["a"]["response"]["status_code"] == 400
    assert found["a"]["response"]["body"]["error"]["message"] == "no"
    assert found["b"]["response"]["status_code"] == 429


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ((line("a"), line("b"), line("a")), "in.jsonl:3: custom_id 'a' stands on line 1 too"),
        ((line("a"), "{"), "in.jsonl:2: "),
        ((line("a", url="/v1/embeddings"),), "in.jsonl:1: POST /v1/embeddings: expected POST and"),
        ((line("a", body={"stream": True}),), "in.jsonl:1: stream is true"),
        ((line(""),), "in.jsonl:1: custom_id is empty"),
        (("\n",), "there is no request in it"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_before_anything_is_asked(
    whole: Whole, tmp_path: Path, capsys: Capture, lines: tuple[str, ...], told: str
) -> None:
    write(tmp_path, *lines)
    assert batch(tmp_path, whole.url) == ExitCode.SETUP
    assert told in capsys.readouterr().err.splitlines()[-1] and not whole.order
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    "held",
    ["my diary\n", "my diary", '{"model": "m"}', '{"id":"x', line("a"), line("b") + line("a")[:-1]],
)
def test_a_file_of_somebody_else_is_not_touched(
    whole: Whole, tmp_path: Path, capsys: Capture, held: str
) -> None:
    write(tmp_path, line("a"))
    (tmp_path / "out.jsonl").write_text(held, encoding="utf-8")
    assert batch(tmp_path, whole.url) == ExitCode.SETUP
    told = capsys.readouterr().err.splitlines()[-1]
    assert "not an answer of a batch" in told and "name another file" in told
    assert (tmp_path / "out.jsonl").read_text(encoding="utf-8") == held and not whole.order


def test_requests_are_not_written_over(whole: Whole, tmp_path: Path, capsys: Capture) -> None:
    held = line("a") + line("b").rstrip()
    write(tmp_path, held)
    (tmp_path / "out.jsonl").symlink_to(tmp_path / "in.jsonl")
    assert batch(tmp_path, whole.url) == ExitCode.SETUP
    assert "the requests are in it" in capsys.readouterr().err.splitlines()[-1]
    assert (tmp_path / "in.jsonl").read_text(encoding="utf-8") == held and not whole.order


@pytest.mark.parametrize("cut", [1, 8, len('{"id":"batch_req_'), 60])
def test_a_torn_line_goes_wherever_it_was_torn(whole: Whole, tmp_path: Path, cut: int) -> None:
    write(tmp_path, *map(line, "ab"))
    assert batch(tmp_path, whole.url) == ExitCode.OK
    first, second = (tmp_path / "out.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "out.jsonl").write_bytes(first + second[:cut])
    assert batch(tmp_path, whole.url) == ExitCode.OK
    assert answers(tmp_path).keys() == set("ab") and len(whole.order) == 3


def test_no_server(tmp_path: Path, capsys: Capture) -> None:
    write(tmp_path, line("a"))
    assert batch(tmp_path, "http://127.0.0.1:9") == ExitCode.SETUP
    assert "slipstream batch: no server at http://127.0.0.1:9" in capsys.readouterr().err


def test_ctrl_c_keeps_what_there_is(whole: Whole, tmp_path: Path) -> None:
    write(tmp_path, *(line(f"r{n}") for n in range(500)))
    whole.pause_s = 0.05
    files = [str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl")]
    terminal = Terminal("batch", *files, "--url", whole.url, "--concurrency", "2")
    try:
        terminal.until("/500")
        while len(whole.order) < 20:
            terminal.until("/500")
        terminal.type("\x03")
        terminal.until("the same command goes on")
        assert terminal.wait() == ExitCode.INTERRUPTED
    finally:
        terminal.close()
    assert 10 < len(answers(tmp_path)) < 500


def test_what_nobody_answered_is_asked_again_and_has_one_line(
    whole: Whole, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "in.jsonl").write_text(line("a") + line("b"))
    error = {"code": "no_answer", "message": "x"}
    failed = {"id": "x", "custom_id": "a", "response": None, "error": error}
    (tmp_path / "out.jsonl").write_text(json.dumps(failed) + "\n")
    assert batch(tmp_path, whole.url) == ExitCode.OK
    found = (tmp_path / "out.jsonl").read_text().splitlines()
    assert len(found) == 2 and not any(json.loads(each)["error"] for each in found)
    assert sorted(whole.order) == ["a", "b"]
    assert batch(tmp_path, whole.url) == ExitCode.OK and len(whole.order) == 2


def test_an_output_that_is_a_link_stays_one(whole: Whole, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "elsewhere").mkdir()
    there = tmp_path / "elsewhere" / "answers"
    error = {"code": "no_answer", "message": "x"}
    failed = {"id": "x", "custom_id": "a", "response": None, "error": error}
    there.write_text(json.dumps(failed) + "\n")
    there.chmod(0o604)
    (tmp_path / "out.jsonl").symlink_to(there)
    (tmp_path / "in.jsonl").write_text(line("a"))
    assert batch(tmp_path, whole.url) == ExitCode.OK
    assert (tmp_path / "out.jsonl").is_symlink() and there.stat().st_mode & 0o777 == 0o604
    assert [json.loads(each)["error"] for each in there.read_text().splitlines()] == [None]


def test_what_was_refused_for_the_moment_is_asked_again_by_the_next_run(
    whole: Whole, tmp_path: Path, capsys: Capture
) -> None:
    write(tmp_path, *map(line, "abc"))
    whole.bad, whole.busy = {"a"}, {"b": 99}
    assert batch(tmp_path, whole.url, "--retry-s", "0") == ExitCode.FAILED
    assert answers(tmp_path)["b"]["response"]["status_code"] == 429
    whole.busy = {}
    whole.order.clear()
    assert batch(tmp_path, whole.url) == ExitCode.OK
    assert whole.order == ["b"] and "2 are answered already" in capsys.readouterr().err
    found = {name: each["response"]["status_code"] for name, each in answers(tmp_path).items()}
    assert found == {"a": 400, "b": 200, "c": 200}


def test_two_batches_do_not_write_to_one_file(
    whole: Whole, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "in.jsonl").write_text(line("a"))
    first = Answers(str(tmp_path / "out.jsonl"))
    assert batch(tmp_path, whole.url) != ExitCode.OK
    assert "another batch writes to it" in capsys.readouterr().err.splitlines()[-1]
    first.close()
    assert batch(tmp_path, whole.url) == ExitCode.OK
