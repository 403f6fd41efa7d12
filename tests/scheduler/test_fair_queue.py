"""Of equal priority each tenant has its turn, whoever came first with how many."""

import random
from collections import Counter

import pytest

from scheduler.rig import submit
from slipstream.scheduler.fair_queue import FairQueue
from slipstream.scheduler.request import Request, State


def request(request_id: str, tenant: str = "", migrations: int = 0, **fields: object) -> Request:
    message = submit(request_id, tenant=tenant, **fields)  # type: ignore[arg-type]
    made = Request(message, "tokenizer-0", 100.0, 1, State.QUEUED)
    made.migrations = migrations
    return made


def filled(*requests: Request) -> FairQueue:
    queue = FairQueue()
    for one in requests:
        queue.join(one)
        queue.check()
    return queue


def many(name: str, count: int, tenant: str = "", **fields: object) -> list[Request]:
    """Of the tenant of that name, unless it is another one."""
    return [request(f"{name}-{number}", tenant or name, **fields) for number in range(count)]


def served(queue: FairQueue, count: int) -> list[str]:
    """The tenants of those whose turn comes, in order."""
    names = []
    for _ in range(count):
        names.append(queue.head.submit.tenant)
        queue.take(queue.head)
        queue.check()
    return names


def test_one_of_a_small_tenant_waits_for_one_of_a_large_one() -> None:
    queue = filled(*many("large", 500))
    assert queue.join(request("r", "small")) == 1
    assert served(queue, 3) == ["large", "small", "large"]


def test_one_tenant_alone_is_served_in_the_order_of_arrival() -> None:
    sizes = random.Random(1)
    requests = [request(str(n), "a", prompt=sizes.randint(1, 500)) for n in range(50)]
    assert list(filled(*requests)) == requests


def test_turns_are_as_long_as_prompts() -> None:
    queue = filled(*many("long", 20, prompt=320), *many("short", 200, prompt=32))
    assert Counter(served(queue, 110)) == {"long": 10, "short": 100}


def test_what_is_cached_costs_nothing() -> None:
    cached = many("cached", 50, prompt=320)
    for one in cached:
        one.hints = {"decode-0": 18}
    assert Counter(served(filled(*many("cold", 50, prompt=320), *cached), 22))["cached"] == 20


def test_weights_are_shares() -> None:
    queue = filled(*many("one", 100), *many("three", 100, weight=3))
    assert Counter(served(queue, 80)) == {"one": 20, "three": 60}


def test_who_was_away_has_saved_nothing_up() -> None:
    queue = filled(*many("busy", 100))
    served(queue, 50)
    for one in many("back", 50):
        queue.join(one)
    assert Counter(served(queue, 40)) == {"busy": 20, "back": 20}


@pytest.mark.parametrize("order", ["first come", "last come", "drawn"])
def test_who_left_the_queue_has_cost_nothing(order: str) -> None:
    queue = filled(*many("busy", 100))
    burst = many("burst", 50)
    for one in burst:
        queue.join(one)
    served(queue, 10)
    left = [one for one in burst if one.request_id in {waiting.request_id for waiting in queue}]
    if order == "drawn":
        random.Random(3).shuffle(left)
    for one in left[:: -1 if order == "last come" else 1]:
        queue.remove(one)
        queue.check()
    for one in many("again", 1, tenant="burst"):
        assert queue.join(one) <= 1
    assert "burst" in served(queue, 2)


def test_who_gives_up_and_comes_again_does_not_fall_back() -> None:
    queue = filled(*many("busy", 100))
    older, newer = many("patient", 2)
    queue.join(older)
    queue.join(newer)
    for number in range(100):
        queue.remove(older)
        queue.check()
        older, newer = newer, request(f"again-{number}", "patient")
        queue.join(newer)
    assert served(queue, 4).count("patient") == 2


def test_what_has_gone_is_paid_for_whoever_left_behind_it() -> None:
    queue = filled(*many("a", 2), *many("b", 40))
    assert served(queue, 1) == ["a"]
    queue.remove(next(one for one in queue if one.submit.tenant == "a"))
    for one in many("more", 20, tenant="a"):
        queue.join(one)
    assert Counter(served(queue, 20)) == {"a": 9, "b": 11}


def test_priority_and_what_has_begun_come_before_turns() -> None:
    queue = filled(
        *many("a", 2),
        request("later", "b", priority=1),
        request("urgent", "a", priority=-1),
        request("begun", "a", migrations=1, priority=9),
        request("begun again", "b", accepted=3),
    )
    order = ["begun again", "begun", "urgent", "a-0", "a-1", "later"]
    assert [one.request_id for one in queue] == order


def test_the_account_holds_whatever_happens() -> None:
    rng = random.Random(7)
    queue = FairQueue()
    for number in range(3000):
        if rng.random() < 0.5 or not queue:
            tokens, priority = rng.randint(1, 90), rng.choice((0, 0, 5))
            queue.join(request(str(number), f"t{number}", prompt=tokens, priority=priority))
        elif rng.random() < 0.7:
            queue.take(queue.head)
        else:
            queue.remove(rng.choice(list(queue)))
        queue.check()
        for lane in queue._lanes.values():
            assert len(lane.ends) < 500, "whose turn is past is forgotten"
    queue.remove(request("never there"))
    served(queue, len(queue))
    assert queue.num_tokens == 0 and not queue._lanes
