"""The ingress's configuration in a real nginx: what it says itself is an error as any other, and
what frontends say goes through it unchanged."""

import getpass
import grp
import http.client
import json
import os
import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from containers.test_files import FOLDER
from e2e.stack import free_port, until
from slipstream.errors import ERRORS, ErrorCode
from slipstream.frontend.anthropic_errors import TYPES
from slipstream.frontend.validate import Limits

NGINX = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")
BODY_MAX = Limits().max_body_bytes
PATHS = ("/v1/chat/completions", "/v1/messages")
Answer = tuple[int, http.client.HTTPMessage, bytes]
Ingress = Callable[[int], AbstractContextManager[int]]


class Frontend(BaseHTTPRequestHandler):
    """Answers as the path says: `/502`."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/hangs-up":
            self.close_connection = True
            return
        self.send_response(int(self.path[1:]))
        body = b"a frontend's own"
        self.send_header("Content-Length", str(len(body)))
        self.send_header("x-should-retry", "false")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture(scope="module")
def frontend() -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Frontend)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def ingress(tmp_path: Path) -> Ingress:
    if NGINX is None:
        pytest.skip("no nginx here; it is Debian's package nginx-light")

    @contextmanager
    def started(upstream: int) -> Iterator[int]:
        port = free_port()
        text = (FOLDER / "nginx.conf").read_text(encoding="utf-8")
        for ours, here in (
            ("/tmp/", f"{tmp_path}/"),
            ("listen 8000;", f"listen 127.0.0.1:{port};"),
            ("set $frontends frontend;", "set $frontends 127.0.0.1;"),
            ("proxy_pass http://$frontends:8000;", f"proxy_pass http://$frontends:{upstream};"),
        ):
            assert text.count(ours), ours
            text = text.replace(ours, here)
        (tmp_path / "nginx.conf").write_text(text, encoding="utf-8")
        words = [str(NGINX), "-e", "stderr", "-c", str(tmp_path / "nginx.conf")]
        user = f"{getpass.getuser()} {grp.getgrgid(os.getgid()).gr_name}"
        process = subprocess.Popen([*words, "-g", f"daemon off; user {user};"])
        try:
            until(lambda: listens(port), "nginx")
            yield port
        finally:
            process.terminate()
            process.wait(20)

    return started


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def post(port: int, path: str, length: int = 2) -> Answer:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("POST", path, b"x" * length, {"Content-Type": "application/json"})
        reply = connection.getresponse()
        return reply.status, reply.headers, reply.read()
    finally:
        connection.close()


def is_told(answer: Answer, path: str, code: ErrorCode) -> None:
    status, headers, body = answer
    said, spec = json.loads(body), ERRORS[code]
    assert status == spec.status and headers["Content-Type"] == "application/json"
    assert (headers["Retry-After"], headers["retry-after-ms"]) == (
        ("1", "1000") if status == 503 else (None, None)
    )
    if path == "/v1/messages":
        assert said.keys() == {"type", "error", "request_id"} and said["type"] == "error"
        assert said["error"]["type"] == TYPES.get(status, "invalid_request_error")
        assert re.fullmatch("[0-9a-f]{32}", said["request_id"])
    else:
        assert said.keys() == {"error"}
        assert said["error"] | {"message": ""} == {
            **{"message": "", "type": spec.type, "param": None, "code": code.value}
        }
    assert said["error"]["message"].endswith(".")


@pytest.mark.parametrize("path", PATHS)
def test_without_a_frontend_clients_are_told_to_try_again(ingress: Ingress, path: str) -> None:
    with ingress(free_port()) as port:
        is_told(post(port, path), path, ErrorCode.NOT_READY)
        is_told(post(port, path, 10 * 2**20), path, ErrorCode.TOO_LARGE)


def test_a_frontend_that_dies_over_a_request(ingress: Ingress, frontend: int) -> None:
    with ingress(frontend) as port:
        is_told(post(port, "/hangs-up"), "", ErrorCode.NOT_READY)


@pytest.mark.parametrize("status", [400, 413, 500, 502, 503, 504])
def test_what_a_frontend_says_goes_through(ingress: Ingress, frontend: int, status: int) -> None:
    with ingress(frontend) as port:
        told, headers, body = post(port, f"/{status}")
        assert (told, body) == (status, b"a frontend's own")
        assert headers["x-should-retry"] == "false" and headers["Retry-After"] is None


def test_a_body_that_a_frontend_refuses_comes_to_it(ingress: Ingress, frontend: int) -> None:
    with ingress(frontend) as port:
        assert post(port, "/413", BODY_MAX + 1)[2] == b"a frontend's own"


@pytest.mark.parametrize(
    "text",
    [
        b"GET / HTTP/1.1\r\nHost: a b",
        b"GET / HTTP/1.1\r\nx: " + b"y" * 9000,
        b"GARBAGE",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET x HTTP/1.1\r\nHost: a",
        b"GET /%zz HTTP/1.1\r\nHost: a",
        b"GET /" + b"u" * 9000 + b" HTTP/1.1\r\nHost: a",
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip",
    ],
    ids=["host", "header", "garbage", "tls", "no path", "escape", "uri", "coding"],
)
def test_what_is_not_even_http(ingress: Ingress, frontend: int, text: bytes) -> None:
    with ingress(frontend) as port, socket.create_connection(("127.0.0.1", port), 10) as client:
        client.sendall(text + b"\r\n\r\n")
        with client.makefile("rb") as file:
            reply = file.read()
    head, _, body = reply.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert json.loads(body)["error"]["code"] == ErrorCode.INVALID_VALUE
