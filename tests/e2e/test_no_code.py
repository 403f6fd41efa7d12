"""No process unpickles, and nothing that a client says is code, a file, a host or a command."""

import json
import os
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from e2e.stack import Stack

GUARDED = Path(__file__).parent / "guarded"
MARK = "zqmarkqz"
EVIL = f"__import__('os').system('{MARK}') {{{{ {MARK} }}}} $({MARK}) ../../{MARK}"
SERVICES = ("serve", "scheduler", "kvindex", "tokenizer", "frontend", "prefill", "decode")


class Guard:
    """What the processes with this environment have told."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "told"
        self.environ = {
            "PYTHONPATH": os.pathsep.join([str(GUARDED), *filter(None, sys.path)]),
            "E2E_MARK": MARK,
            "E2E_TOLD": str(self._file),
        }

    def told(self) -> list[str]:
        text = self._file.read_text(encoding="utf-8") if self._file.exists() else ""
        return [line.partition(" ")[2] for line in text.splitlines()]

    def complaints(self) -> list[str]:
        return [line for line in self.told() if not line.startswith("watched ")]


@pytest.fixture
def guard() -> Iterator[Guard]:
    with tempfile.TemporaryDirectory(prefix="e2e-guard-", dir="/tmp") as folder:
        yield Guard(Path(folder))


@pytest.mark.parametrize(
    "program",
    [
        "import pickle; pickle.loads(b'N.')",
        "import _pickle; _pickle.loads(b'cos\\nsystem\\n.')",
        "import pickle, io; pickle.Unpickler(io.BytesIO(b'N.'))",
        "import marshal; marshal.loads(b'N')",
        f"eval('\"{MARK}\"')",
        f"exec(compile('x = 1 # {MARK}', 'f', 'exec'))",
        f"open('/tmp/{MARK}')",
        f"import subprocess; subprocess.run(['true', '{MARK}'])",
        f"import socket; socket.getaddrinfo('{MARK}.invalid', 80)",
    ],
)
def test_the_guard_sees(program: str, guard: Guard, tmp_path: Path) -> None:
    hidden = program.replace(MARK, "@")
    text = f"exec({hidden!r}.replace('@', {MARK[:3]!r} + {MARK[3:]!r}))"
    script = tmp_path / "program.py"
    script.write_text(text if MARK in program else program)
    ended = subprocess.run([sys.executable, script], env=guard.environ, timeout=30, check=False)
    assert ended.returncode != 0 and len(guard.complaints()) == 1, guard.told()


def send(stack: Stack, path: str, body: object = None, **headers: str) -> int:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(
        stack.url + path, data=data, headers={"Content-Type": "application/json", **headers}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            reply.read()
            return int(reply.status)
    except urllib.error.HTTPError as error:
        return error.code


def chat(**members: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": EVIL, "name": MARK}]
    return {"messages": messages, "max_tokens": 4, **members}


def image(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


SCHEMA = {
    "type": "object",
    "title": EVIL,
    "properties": {MARK: {"type": "string", "pattern": f"{MARK}|a*", "description": EVIL}},
}
TOOL = {"type": "function", "function": {"name": MARK, "parameters": SCHEMA, "description": EVIL}}
CALL = {"id": MARK, "type": "function", "function": {"name": MARK, "arguments": EVIL}}
BODIES = [
    chat(stop=[EVIL], user=EVIL, metadata={MARK: EVIL}, bad_words=[MARK], cache_salt=MARK),
    chat(tools=[TOOL], tool_choice="required"),
    chat(response_format={"type": "json_schema", "json_schema": {"name": MARK, "schema": SCHEMA}}),
    chat(structured_outputs={"regex": f"({MARK})+"}),
    chat(structured_outputs={"grammar": f'start: "{MARK}"'}),
    chat(
        messages=[
            {"role": "user", "content": EVIL},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": MARK, "content": EVIL},
        ]
    ),
]
REFUSED = [
    chat(model=f"../{MARK}"),
    chat(chat_template=f"{{{{ {MARK} }}}}"),
    chat(chat_template_kwargs={MARK: EVIL}),
    chat(structured_outputs={"json": {"$ref": f"http://{MARK}.invalid/x"}}),
    chat(messages=[{"role": "user", "content": [image(f"file:///tmp/{MARK}")]}]),
    chat(messages=[{"role": "user", "content": [image(f"http://{MARK}.invalid/x.png")]}]),
]


def test_what_clients_say_stays_text(guard: Guard) -> None:
    stack = Stack(environ=guard.environ)
    try:
        with urllib.request.urlopen(f"{stack.url}/v1/models", timeout=5) as reply:
            model = json.load(reply)["data"][0]["id"]
        headers = {"X-Request-Id": MARK, "Authorization": f"Bearer {MARK}"}
        for body in BODIES:
            status = send(stack, "/v1/chat/completions", {"model": model, **body}, **headers)
            assert status == 200, (status, body)
        for body in REFUSED:
            status = send(stack, "/v1/chat/completions", {"model": model, **body}, **headers)
            assert 400 <= status < 500, (status, body)
        plain = {"model": model, "prompt": EVIL, "max_tokens": 4}
        assert send(stack, "/v1/completions", plain) == 200
        asked = {"model": model, "input": EVIL, "max_output_tokens": 16}
        assert send(stack, "/v1/responses", asked) == 200
        assert send(stack, "/v1/responses", {**asked, "previous_response_id": MARK}) == 404
        said = {"model": model, "messages": [{"role": "user", "content": EVIL}], "max_tokens": 4}
        assert send(stack, "/v1/messages", said) == 200
        assert send(stack, "/tokenize", {"prompt": EVIL}) == 200
        for path in (f"/playground/{MARK}", f"/trace/..%2f{MARK}", f"/v1/models/{MARK}"):
            assert send(stack, path) == 404
        watched = [line for line in guard.told() if line.startswith("watched ")]
        for name in SERVICES:
            assert any(f"slipstream.cli.main {name}" in line for line in watched), (name, watched)
        assert any("grammar_fork" in line for line in watched)
        assert guard.complaints() == [], stack.log
    finally:
        stack.kill()
