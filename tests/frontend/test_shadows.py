"""Copies of requests: for whom, how many, and that nobody waits for them."""

from collections.abc import Callable

import pytest
from prometheus_client.core import Metric

from slipstream.errors import ErrorCode, Problem
from slipstream.frontend.gateway import ClusterStatus, StreamItem
from slipstream.frontend.shadows import LAST, SHADOWS_MAX, Shadows
from slipstream.messages import Prompt, TextDelta, TextPrompt, Tokenize, TokenPrompt
from slipstream.types import FinishReason, SamplingParams

READY = ClusterStatus(ready=True, model="next", adapter="calm@1")
END = TextDelta(request_id="r", attempt=1, position=0, finish_reason=FinishReason.STOP)


class Cluster:
    def __init__(self) -> None:
        self.opened: list[tuple[Tokenize, Callable[[StreamItem], None]]] = []
        self.closed = 0

    def open(self, submission: Tokenize, put: Callable[[StreamItem], None]) -> Callable[[], None]:
        self.opened.append((submission, put))

        def close() -> None:
            self.closed += 1

        return close


def asked(name: str = "r", prompt: Prompt | None = None, **sampling: object) -> Tokenize:
    params = SamplingParams(max_tokens=5, seed=1, **sampling)  # type: ignore[arg-type]
    return Tokenize(
        request_id=name,
        prompt=prompt or TextPrompt(text="Hi"),
        sampling=params,
        timeout_s=9.0,
        model="old",
        adapter="wild@2",
        tenant="alice",
        weight=3,
    )


def count(shadows: Shadows, outcome: str) -> int:
    return shadows.counts["next", outcome]


def test_a_copy_is_on_nobodys_account_and_ends_by_itself() -> None:
    shadows, cluster = Shadows(), Cluster()
    shadows.copy(asked(), "next", READY, cluster.open)
    ((copy, put),) = cluster.opened
    assert (copy.model, copy.adapter, copy.request_id) == ("next", "calm@1", "shadow-r")
    assert (copy.tenant, copy.weight, copy.priority, copy.clamp_max_tokens) == ("", 1, LAST, True)
    put(3)
    put(TextDelta(request_id="r", attempt=1, position=0, text="x"))
    assert not cluster.closed
    put(END)
    assert cluster.closed == 1 == count(shadows, "finished") and not shadows.running


def test_a_failure_is_counted() -> None:
    shadows, cluster = Shadows(), Cluster()
    shadows.copy(asked(), "next", READY, cluster.open)
    cluster.opened[0][1](Problem(code=ErrorCode.DEADLINE, message="late"))
    assert cluster.closed == 1 == count(shadows, "failed")


@pytest.mark.parametrize(
    ("submission", "status"),
    [
        (asked(prompt=TokenPrompt(tokens=bytes(4))), READY),
        (asked(logit_bias=((1, 2.0),)), READY),
        (asked(allowed_token_ids=(1,)), READY),
        (asked(stop_token_ids=(1,)), READY),
        (asked(), ClusterStatus(ready=True)),
        (asked(), ClusterStatus(ready=False, model="next")),
        (asked(), ClusterStatus(ready=True, model="next", draining=True)),
    ],
)
def test_what_is_skipped(submission: Tokenize, status: ClusterStatus) -> None:
    shadows, cluster = Shadows(), Cluster()
    shadows.copy(submission, "next", status, cluster.open)
    assert not cluster.opened and count(shadows, "skipped") == 1


def test_they_are_few_and_go_when_they_are_told() -> None:
    shadows, cluster = Shadows(), Cluster()
    for number in range(SHADOWS_MAX + 2):
        shadows.copy(asked(f"r{number}"), "next", READY, cluster.open)
    assert len(cluster.opened) == SHADOWS_MAX and count(shadows, "skipped") == 2
    shadows.close()
    assert cluster.closed == SHADOWS_MAX and not shadows.running
    (family,) = shadows.families()
    assert isinstance(family, Metric) and family.samples[0].value == 2
