"""What one client may ask for in a minute and at a time."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.errors import ErrorCode
from slipstream.frontend.quota import Allowance, Bucket, MonthQuota, Quota, duration
from slipstream.frontend.usage import Used, month


def wait_s(quota: Quota, now_s: float) -> float:
    problem = quota.refusal("alice", now_s)
    if problem is None:
        return 0.0
    assert problem.code is ErrorCode.RATE_LIMIT and "'alice'" in problem.message
    assert problem.retry_after_s is not None and problem.retry_after_s > 0
    return problem.retry_after_s


def test_requests_of_a_minute() -> None:
    quota = Quota(Allowance(requests_per_minute=6), 0.0)
    for _ in range(6):
        assert not wait_s(quota, 0.0)
        quota.begin(0.0)
        quota.end()
    assert wait_s(quota, 0.0) == 10.0 and wait_s(quota, 4.0) == 6.0
    assert not wait_s(quota, 10.0)
    quota.begin(10.0)
    assert wait_s(quota, 10.0) == 10.0, "it is one in ten seconds from now on"
    assert not wait_s(quota, 1000.0)


def test_tokens_are_counted_as_they_come_and_waited_for_later() -> None:
    quota = Quota(Allowance(tokens_per_minute=60), 0.0)
    quota.spend(50, 0.0)
    assert not wait_s(quota, 0.0)
    quota.spend(100, 0.0)  # of an answer that was begun while there were some
    assert wait_s(quota, 0.0) == 91.0
    assert list(quota.limits(0.0)) == [("tokens", 60, 0, 150.0)]
    assert not wait_s(quota, 91.0)


def test_requests_at_a_time() -> None:
    quota = Quota(Allowance(max_concurrent=2), 0.0)
    quota.begin(0.0)
    quota.begin(0.0)
    assert wait_s(quota, 0.0) == 1.0 and wait_s(quota, 500.0) == 1.0
    quota.end()
    assert not wait_s(quota, 500.0) and not list(quota.limits(500.0))


def test_without_limits_there_are_none() -> None:
    quota = Quota(Allowance(), 0.0)
    for _ in range(10_000):
        quota.begin(0.0)
        quota.spend(10**6, 0.0)
    assert not wait_s(quota, 0.0) and not list(quota.limits(0.0))


def test_frontends_have_a_part_each() -> None:
    quota = Quota(Allowance(requests_per_minute=6), 0.0)
    for _ in range(6):
        quota.begin(0.0)
    quota.resize(Allowance(requests_per_minute=6), 0.0, 2)
    assert wait_s(quota, 0.0) == 20.0, "nothing is given back"
    quota.resize(Allowance(requests_per_minute=120), 20.0, 2)
    assert not wait_s(quota, 20.0), "more is there at once"
    whole = Quota(Allowance(0, 10, 3), 0.0, 2)
    for _ in range(2):
        assert not wait_s(whole, 0.0)
        whole.begin(0.0)
    assert wait_s(whole, 0.0) == 1.0, "of what runs at a time a part as well, rounded up"
    assert [(name, limit) for name, limit, *_ in whole.limits(0.0)] == [("tokens", 5)]


def test_what_others_leave_is_granted_here() -> None:
    """A client that stays at one of two frontends has its whole limit, as soon as they exchange."""
    quota, others, granted = Quota(Allowance(60), 0.0, 2), Quota(Allowance(60), 0.0, 2), 0
    for now_s in range(61):
        while not wait_s(quota, now_s):
            quota.begin(now_s)
            others.share(1, 0, now_s)
            granted += 1
        quota.share(0, 0, now_s)
    assert 116 <= granted <= 120
    assert [(name, limit, left) for name, limit, left, _ in others.limits(60)] == [
        ("requests", 60, quota_left(quota, 60))
    ]
    assert next(quota.limits(64))[1] == 30, "alone again: its part"


def quota_left(quota: Quota, now_s: float) -> int:
    return next(left for _, _, left, _ in quota.limits(now_s))


def test_of_one_for_all_each_may_have_it() -> None:
    quotas = [Quota(Allowance(1), 0.0, 4) for _ in range(4)]
    for quota in quotas:
        quota.share(0, 0, 0.0)
        assert not wait_s(quota, 0.0)
    quotas[0].begin(0.0)
    for quota in quotas[1:]:
        quota.share(1, 0, 1.0)
        assert 58 < wait_s(quota, 1.0) <= 60


def test_of_a_month() -> None:
    quota, period = MonthQuota(requests=10, tokens=0), month(1_795_000_000.0)
    assert quota.refusal("alice", Used(9, 10**9), period, period.start_s) is None
    problem = quota.refusal("alice", Used(10, 0), period, period.end_s - 90.0)
    assert problem is not None and problem.code is ErrorCode.QUOTA
    assert problem.retry_after_s == 90.0 and "2026-12-01T00:00Z" in problem.message
    assert list(quota.limits(Used(4, 5), period, period.end_s - 90.0)) == [
        ("requests-month", 10, 6, 90.0)
    ]


@given(
    st.lists(
        st.tuples(st.floats(0, 100), st.sampled_from(["take", "resize"]), st.integers(0, 500)),
        max_size=50,
    )
)
def test_never_more_than_the_limit_and_a_minute_of_it(steps: list[tuple[float, str, int]]) -> None:
    bucket, now_s, taken = Bucket(100, 0.0), 0.0, 0
    for after_s, what, amount in steps:
        now_s += after_s
        if what == "resize":
            bucket.resize(1 + amount % 100, now_s)
        elif not bucket.wait_s(amount % 20, now_s):
            bucket.take(amount % 20, now_s)
            taken += amount % 20
        assert 0 <= bucket.level(now_s) <= bucket.limit + 1e-9
        assert bucket.level(now_s + bucket.wait_s(1, now_s)) >= 1 - 1e-9
        now_s += bucket.wait_s(1, now_s)
    assert taken <= 100 * (1 + now_s / 60) + 99 * len(steps)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *((0, "0ms"), (0.0001, "1ms"), (0.12, "120ms"), (1, "1s"), (7.66, "7.66s")),
        *((60, "1m0s"), (90.5, "1m30.5s"), (360, "6m0s"), (7200, "120m0s")),
    ],
)
def test_durations_as_openai_writes_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text
