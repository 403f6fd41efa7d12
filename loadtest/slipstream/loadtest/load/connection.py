"""One request over a connection of its own. Blocks; locust makes its sockets those of gevent."""

import http.client
import socket
import time
from urllib.parse import urlsplit

import msgspec

from slipstream.loadtest.load.asks import Ask
from slipstream.loadtest.load.stream import Stream, short

READ_BYTES = 65_536
SLOW_READ_BYTES, SLOW_PAUSE_S = 256, 0.1
SLOW_WINDOW_BYTES = 4096
"""A slow reader's receive buffer: what it has not read stays with the server."""


class Reply(msgspec.Struct, kw_only=True):
    """What became of a request. `status` 0: no answer at all, `problem` says why."""

    status: int = 0
    retry_after: str | None = None
    problem: str = ""
    """How the connection or a refusal ended; empty for streams that were read to their end."""
    left: bool = False
    """By us, on purpose."""


class Server:
    """`url` without /v1."""

    def __init__(self, url: str, api_key: str, timeout_s: float) -> None:
        parts = urlsplit(url)
        self._secure = parts.scheme == "https"
        self._host = parts.hostname or "127.0.0.1"
        self._port = parts.port or (443 if self._secure else 80)
        self._base = parts.path.rstrip("/")
        self._timeout_s = timeout_s
        self._headers = {"Content-Type": "application/json", "Connection": "close"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def model_name(self) -> str:
        """The first that the server names. OSError, ValueError: it does not."""
        connection = self._connection()
        try:
            connection.request("GET", f"{self._base}/v1/models", headers=self._headers)
            reply = connection.getresponse()
            body = reply.read(1 << 20)
            if reply.status != 200:
                raise ValueError(f"/v1/models: HTTP {reply.status}: {short(body)}")
            return str(msgspec.json.decode(body)["data"][0]["id"])
        except (http.client.HTTPException, LookupError, TypeError) as error:
            raise ValueError(f"/v1/models: {type(error).__name__}: {error}") from None
        finally:
            connection.close()

    def chat(self, body: bytes, ask: Ask, stream: Stream) -> Reply:
        """Feeds `stream`, with times of `time.monotonic`."""
        reply = Reply()
        connection = self._connection()
        try:
            connection.connect()
            if ask.kind == "slow":
                connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SLOW_WINDOW_BYTES)
            path = f"{self._base}/v1/chat/completions"
            connection.request("POST", path, body=body, headers=self._headers)
            response = connection.getresponse()
            reply.status = response.status
            reply.retry_after = response.getheader("Retry-After")
            if response.status != 200:
                reply.problem = short(response.read(2000))
            else:
                self._read(response, ask, stream, reply)
        except (OSError, http.client.HTTPException) as error:
            reply.problem = f"{type(error).__name__}: {error}"
        finally:
            connection.close()
            stream.close()
        return reply

    def _read(
        self, response: http.client.HTTPResponse, ask: Ask, stream: Stream, reply: Reply
    ) -> None:
        deadline_s = time.monotonic() + self._timeout_s
        slow = ask.kind == "slow"
        while data := response.read1(SLOW_READ_BYTES if slow else READ_BYTES):
            now_s = time.monotonic()
            stream.feed(data, now_s)
            if ask.leave_after and len(stream.times_s) >= ask.leave_after:
                reply.left = True
                return
            if stream.failed:
                return
            if now_s > deadline_s:
                reply.problem = f"no end after {self._timeout_s:g} s"
                return
            if slow:
                time.sleep(SLOW_PAUSE_S)

    def _connection(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        return kind(self._host, self._port, timeout=self._timeout_s)


def accepted_retry_after(text: str | None) -> int:
    """Seconds, as SDKs read them. ValueError: it does not say a whole number from 1 on."""
    if text is None:
        raise ValueError("no Retry-After")
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"Retry-After is {text!r}")
    return int(text)
