"""The stack of the tests: what it does by its recordings, and whether it is at rest."""

import os
import time
from collections.abc import Mapping
from typing import Any

from redis import Redis

from slipstream.core.prefix import HASH_BYTES
from slipstream.loadtest.chaos import stack
from slipstream.loadtest.chaos.stack import PATIENCE_S, free_port, ports_in_a_row, until
from slipstream.types import unpack_tokens

__all__ = ["PATIENCE_S", "Stack", "free_port", "ports_in_a_row", "until"]

REPORTS_S = 2.5
"""Workers report twice a second, the scheduler tells the frontends once."""


class Stack(stack.Stack):
    def __init__(
        self,
        wait: bool = True,
        locate_timeout_s: float = 0.05,
        environ: Mapping[str, str] | None = None,
        injected: bool = False,
        **settings: Any,
    ) -> None:
        """`wait`: for READY; if not, `until_ready` is the test's to call. `environ`: what is added
        to ours; settings that `serve` has no flag for."""
        self._answers: dict[str, list[dict[str, Any]]] = {}
        super().__init__(
            {"SLIPSTREAM_LOCATE_TIMEOUT_S": str(locate_timeout_s), **(environ or {})},
            {k: v for k, v in os.environ.items() if not k.startswith("SLIPSTREAM_")},
            injected,
            **settings,
        )
        if wait:
            try:
                self.until_ready()
            except BaseException:
                self.kill()
                raise

    def indexed(self, node_id: str) -> int:
        """Blocks of this worker that the index in the private Redis knows."""
        with Redis(unix_socket_path=str(self.run_dir / "redis.sock")) as redis:
            keys = list(redis.scan_iter(f"kvw:*:{node_id}"))
            return sum(len(name) == HASH_BYTES for key in keys for name in redis.hkeys(key))

    def until_whole(self) -> None:
        """Every process lives, the cluster says that it is ready, and all blocks are free."""
        until(lambda: self.pids().keys() == self.expected, "all processes")
        until(self.serves, "ready")
        self.until_settled()

    def worker(self, name: str) -> dict[str, float]:
        """Node id -> what each worker says of itself under this name."""
        wanted = f"worker_{name}"
        return {node: value for (node, name), value in self.gauges().items() if name == wanted}

    def until_settled(self) -> None:
        """Nothing runs and nothing is held, by numbers that are newer than this call."""
        since_s = time.monotonic()
        deadline_s = since_s + PATIENCE_S
        while time.monotonic() < since_s + REPORTS_S or not self._reported(since_s + 1.0):
            found = self._unsettled()
            if found:
                since_s = time.monotonic()
                assert since_s < deadline_s, f"{found}\n{self.log}"
            time.sleep(0.1)

    def _unsettled(self) -> list[str]:
        try:
            return self.unsettled(self.gauges())
        except OSError as error:
            return [str(error)]

    def _reported(self, since_s: float) -> bool:
        """Whether the scheduler has told its numbers since; the clock is the recordings'."""
        return any(
            now_s >= since_s and name == "Received" and fields["message"]["type"] == "ClusterLoad"
            for now_s, name, fields in self.story("frontend-0")
        )

    def answer_tokens(self, answer_id: str) -> list[int]:
        """Token ids of an answer that has ended, as the frontend's machine handed them to HTTP."""
        packed = [delta.get("tokens", b"") for delta in self._deltas(answer_id)]
        return unpack_tokens(b"".join(packed))

    def path(self, answer_id: str) -> str:
        """Workers of an answer that has ended: `prefill-0>decode-0`."""
        return str(self._deltas(answer_id)[-1]["path"])

    def _deltas(self, answer_id: str) -> list[dict[str, Any]]:
        if answer_id not in self._answers:
            told: dict[str, list[dict[str, Any]]] = {}
            for _, name, fields in self.story("frontend-0"):
                if name == "Deliver" and isinstance(fields["item"], dict):
                    told.setdefault(fields["request_id"].removesuffix("-0"), []).append(
                        fields["item"]
                    )
            self._answers = {key: all for key, all in told.items() if "finish_reason" in all[-1]}
        return self._answers[answer_id]
