"""Predicted times to the first token follow what workers really take."""

from itertools import accumulate
from random import Random
from statistics import median

import pytest

from simulate.builders import a_cluster, a_run, request
from slipstream.simulate.cluster import Cluster

SLOW_AT_S, ADAPTED_S, END_S = 60.0, 30.0, 150.0
NEWS = "decode-1"


def errors(cluster: Cluster, worker: str, from_s: float, to_s: float) -> list[float]:
    """Relative errors of the predictions made in this time for this worker."""
    return [
        abs(decision.predicted_ttft_s - decision.actual_ttft_s) / decision.actual_ttft_s
        for decision, placed_s in cluster.scheduler.inner.dispatcher.decisions.latest()
        if from_s <= placed_s < to_s
        and (decision.prefill or decision.decode) == worker
        and decision.actual_ttft_s
    ]


@pytest.mark.parametrize("seed", range(3))
def test_a_worker_that_becomes_three_times_slower_is_known_within_thirty_seconds(seed: int) -> None:
    rng = Random(seed)
    requests = []
    for number, at_s in enumerate(accumulate(rng.expovariate(10.0) for _ in range(1500))):
        tokens = rng.randrange(200, 6000)
        chunks = range(20 * number, 20 * number + -(-tokens // 512))
        requests.append(request(at_s, tokens, rng.randrange(1, 80), *chunks))
    cluster = a_cluster(a_run(workers=2), requests)
    slow = cluster.world.processes[NEWS]
    cluster.world.at(SLOW_AT_S, setattr, slow, "slower", 3.0)
    cluster.run()
    before = errors(cluster, NEWS, 20.0, SLOW_AT_S)
    after = errors(cluster, NEWS, SLOW_AT_S + ADAPTED_S, END_S)
    assert len(before) > 20 and len(after) > 20
    assert median(before) <= 0.25
    assert median(after) <= 0.25
