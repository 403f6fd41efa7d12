"""The audit log: a line for each request, whole, without a word of it; a disk that fails harms
nobody."""

import errno
import logging
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from frontend.fakes import MODEL, FakeGateway, Pause, Server, answer, chat_body, serving, until
from frontend.test_callers import CHAT, ask, bearer, entry, get, say
from slipstream.cli.main import main
from slipstream.errors import ErrorCode, Problem
from slipstream.frontend import audit, watched
from slipstream.frontend.app import AppSettings, Books
from slipstream.frontend.audit import LINES_MAX, TEXT_CHARS_MAX, Audit, Line

SECRET = "the harbour at dawn"
FILE = entry("alice", "key-a") + entry("few", "key-few", requests_per_minute=1)


def written(path: Path) -> bytes:
    return path.read_bytes()


def read(path: Path) -> list[dict[str, Any]]:
    return [msgspec.json.decode(line) for line in written(path).splitlines()]


def waited(condition: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "audit.jsonl"


@pytest.fixture
def log(path: Path) -> Iterator[Audit]:
    made = Audit(str(path), "frontend-0")
    yield made
    made.close()


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    found = tmp_path / "keys.toml"
    found.write_text(FILE)
    return found


@pytest.fixture
async def server(log: Audit, keys: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Server]:
    monkeypatch.setattr(watched, "RELOAD_S", 0.02)
    settings = AppSettings(api_keys_file=str(keys))
    async with serving(FakeGateway(), settings, Books(audit=log)) as running:
        yield running


async def lines(path: Path, count: int) -> list[dict[str, Any]]:
    """Of requests, once there are so many."""
    found: list[dict[str, Any]] = []

    def there() -> bool:
        found[:] = [line for line in read(path) if line["act"] == "request"]
        return len(found) >= count

    await until(there)
    assert len(found) == count
    return found


async def test_what_a_line_says(server: Server, path: Path) -> None:
    messages = [{"role": "user", "content": SECRET}]
    reply = await ask(server, "key-a", messages=messages, n=2, **{"user": SECRET})
    assert reply.status == 200
    (line,) = await lines(path, 1)
    said = await reply.json()
    assert line.pop("time").endswith("Z") and line.pop("duration_ms") >= line.pop("ttft_ms") >= 0
    assert line == {
        "node": "frontend-0",
        "act": "request",
        "request_id": reply.headers["x-request-id"],
        "answer_id": said["id"],
        "key": "alice",
        "client": "127.0.0.1",
        "method": "POST",
        "path": CHAT,
        "model": MODEL,
        "status": 200,
        "finish_reasons": ["stop", "stop"],
        "prompt_tokens": said["usage"]["prompt_tokens"],
        "cached_tokens": said["usage"]["prompt_tokens_details"]["cached_tokens"],
        "completion_tokens": said["usage"]["completion_tokens"],
        "workers": "prefill-0>decode-0",
    }
    text = written(path)
    assert not any(word in text for word in (SECRET.encode(), b"Hello", b"key-a"))


async def test_what_was_refused_or_failed(server: Server, path: Path) -> None:
    await ask(server, "key-few", max_tokens=0)
    await ask(server, "key-few")
    await ask(server, "nobodys")
    assert (await get(server, "/metrics", **bearer("key-a")))[0] == 403
    assert (await get(server, "/v1/models", **bearer("key-a")))[0] == 200
    server.gateway.refuse(Problem(code=ErrorCode.DEADLINE, message=SECRET))
    await ask(server, "key-a")
    server.gateway.script = lambda s: [
        *answer(s, ["a", "b"])[:2], Problem(code=ErrorCode.STALLED, message=SECRET)
    ]  # fmt: skip
    await ask(server, "key-a", stream=True)
    server.gateway.script = lambda s: [*answer(s, ["a", "b"])[:2], Pause(30.0)]
    url, headers = server.url + CHAT, bearer("key-a")
    async with server.client.post(url, json=chat_body(stream=True), headers=headers) as response:
        await response.content.readuntil(b'"a"')
    found = await lines(path, 7)
    short = [
        (line["status"], line.get("error"), line.get("key"), line.get("model")) for line in found
    ]
    assert short == [
        (400, "integer_below_min_value", "few", None),
        (429, "rate_limit_exceeded", "few", None),
        (401, "invalid_api_key", None, None),
        (403, "permission_denied", "alice", None),
        (504, "deadline_exceeded", "alice", MODEL),
        (504, "stream_stalled", "alice", MODEL),
        (499, None, "alice", MODEL),
    ]
    assert [line.get("completion_tokens") for line in found[-2:]] == [1, 1]
    assert SECRET.encode() not in written(path)


async def test_what_clients_write_forges_nothing(server: Server, path: Path) -> None:
    wicked = '/v1/%0a{"act":"x"}%1b[2J%e2%80%ae%ff' + "y" * 500
    async with server.client.post(server.url + wicked, headers=bearer("key-a")) as reply:
        assert reply.status == 404
    await server.post(CHAT, chat_body(model="m\n\x1b[31m"), **bearer("key-a"))
    found = await lines(path, 2)
    assert len(found[0]["path"]) < 3 * TEXT_CHARS_MAX and "model" not in found[1]
    assert written(path).isascii() and b"\x1b" not in written(path)


async def test_changes_of_the_keys_are_acts(server: Server, path: Path, keys: Path) -> None:
    say(keys, FILE + entry("zoe", "key-z"))
    await until(lambda: any(line["act"] == "keys_read" for line in read(path)))
    say(keys, "[[key")
    await until(lambda: any(line["act"] == "keys_unusable" for line in read(path)))
    acts = {line["act"]: line.get("text") for line in read(path)}
    assert acts["keys_read"] == "alice, few, zoe" and acts["started"] is None


# --- The file -------------------------------------------------------------------------------------


def said(log: Audit, count: int, text: str = "x") -> None:
    for _ in range(count):
        log.note(Line(act="request", text=text))


def test_a_file_that_is_renamed_is_followed_by_a_new_one(log: Audit, path: Path) -> None:
    said(log, 1, "before")
    waited(lambda: len(read(path)) == 2)
    path.rename(path.with_suffix(".1"))
    said(log, 1, "after")
    waited(lambda: path.exists() and path.stat().st_size)
    assert [line["text"] for line in read(path)] == ["after"]
    assert path.stat().st_mode & 0o777 == 0o600
    os.truncate(path, 0)  # logrotate's copytruncate
    said(log, 1, "again")
    waited(lambda: path.stat().st_size)
    assert [line["text"] for line in read(path)] == ["again"]


def test_several_frontends_have_one_file(path: Path) -> None:
    logs = [Audit(str(path), f"frontend-{n}") for n in range(3)]
    writers = [threading.Thread(target=said, args=(log, 1000, "x" * 150)) for log in logs]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    for log in logs:
        log.close()
    found = [line["node"] for line in read(path) if line["act"] == "request"]
    assert {node: found.count(node) for node in set(found)} == {
        f"frontend-{n}": 1000 for n in range(3)
    }


def test_a_full_disk_costs_lines_and_nothing_else(
    log: Audit, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(audit, "RETRY_S", 0.01)
    waited(lambda: read(path))
    room, write = [40], os.write

    def full(file: int, data: bytes) -> int:
        """Takes what there is room for, then nothing."""
        if not room[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done = write(file, data[: room[0]])
        room[0] -= done
        return done

    monkeypatch.setattr(audit.os, "write", full)
    said(log, 5)
    waited(lambda: log.statistics()["audit_dropped_total"] == 5)
    room[0] = 1 << 20
    said(log, 2)
    waited(lambda: b"lines_dropped" in path.read_bytes())
    monkeypatch.undo()
    broken = [line for line in path.read_bytes().splitlines() if not line.endswith(b"}")]
    assert len(broken) == 1, "what was cut stands alone"
    path.write_bytes(path.read_bytes().replace(broken[0] + b"\n", b""))
    dropped = [line["text"] for line in read(path) if line["act"] == "lines_dropped"]
    assert sum(map(int, dropped)) == 5
    assert log.statistics()["audit_lines_total"] == len(read(path))
    assert caplog.text.count("lines are dropped") == 1 and "written again" in caplog.text


def test_a_disk_that_hangs_holds_up_nobody(
    log: Audit, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited(lambda: read(path))
    gate, write = threading.Event(), os.write
    monkeypatch.setattr(audit.os, "write", lambda *words: gate.wait(30) and write(*words))
    began_s = time.monotonic()
    said(log, LINES_MAX + 1000)
    assert time.monotonic() - began_s < 5
    dropped = log.statistics()["audit_dropped_total"]
    assert 1000 - audit.BATCH <= dropped <= 1000
    gate.set()
    waited(lambda: b"lines_dropped" in path.read_bytes())


async def test_a_folder_that_is_gone_is_no_failure(
    server: Server, log: Audit, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit, "RETRY_S", 0.01)
    gone = path.parent.with_name("gone")
    path.parent.rename(gone)
    assert (await ask(server, "key-a")).status == 200
    await until(lambda: log.statistics()["audit_dropped_total"] > 0)
    gone.rename(path.parent)
    assert (await ask(server, "key-a")).status == 200
    await until(lambda: b'"request"' in path.read_bytes())


def test_what_cannot_be_written_to_starts_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("frontend", "serve"):
        words = [command, "--audit-log", str(tmp_path / "no" / "file"), "--port", "18999"]
        assert main(words) == 3
        last = capsys.readouterr().err.splitlines()[-1]
        assert last == f"slipstream: --audit-log {tmp_path}/no/file: No such file or directory"
    assert main(["frontend", "--audit-log", str(tmp_path), "--port", "0"]) == 3
    os.mkfifo(tmp_path / "pipe")
    assert main(["frontend", "--audit-log", str(tmp_path / "pipe"), "--port", "0"]) == 3
