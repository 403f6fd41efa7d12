"""What statistics become for a scraper, and histograms that count in batches."""

import random
from typing import get_args

import pytest
from prometheus_client.parser import text_string_to_metric_families

from slipstream.kv.transport import Cause
from slipstream.runtime.metric_table import TRANSFER_CAUSES
from slipstream.runtime.metrics import UNDESCRIBED, Distribution, families, metrics, text


def samples(page: bytes) -> dict[tuple[str, ...], float]:
    """(name, label values by label name) -> value."""
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(page.decode())
        for sample in family.samples
    }


def test_what_stands_for_many_is_shown_under_its_own_name_and_with_labels() -> None:
    statistics = {
        "handover_digest_total": 2,
        "transfer_shm_peers": 1,
        "transfer_shm_failures_timeout_total": 3,
    }
    found = samples(metrics(statistics, "decode-0", "decode"))
    assert found["slipstream_handover_digest_total", "decode-0", "decode"] == 2
    assert found["slipstream_handovers_failed_total", "decode-0", "digest", "decode"] == 2
    name = "slipstream_transfer_failures_total"
    assert found[name, "decode-0", "timeout", "decode", "shm"] == 3
    assert found["slipstream_transfer_shm_failures_timeout_total", "decode-0", "decode"] == 3
    assert found["slipstream_transfer_peers", "decode-0", "decode", "shm"] == 1


def test_counters_are_there_before_they_have_counted() -> None:
    found = samples(metrics({"transfer_shm_peers": 0}, "decode-0", "decode"))
    assert found["slipstream_preemptions_total", "decode-0", "decode"] == 0
    assert found["slipstream_handovers_failed_total", "decode-0", "digest", "decode"] == 0
    reads = [key for key in found if key[0] == "slipstream_transfer_reads_total"]
    assert reads == [("slipstream_transfer_reads_total", "decode-0", "decode", "shm")]
    assert not any(key[0] == "slipstream_blocks_free" for key in found), "no gauge is made up"


def test_the_shell_is_on_its_own_port_alone() -> None:
    name = ("slipstream_events_total", "f", "frontend")
    assert samples(metrics({}, "f", "frontend"))[name] == 0
    assert name not in samples(metrics({}, "f", "frontend", shell=False))


def test_what_nobody_has_described_is_shown_all_the_same() -> None:
    page = metrics({"from_the_future": 7}, "n", "decode").decode()
    assert f"# HELP slipstream_from_the_future {UNDESCRIBED}" in page
    assert '\nslipstream_from_the_future{node_id="n",role="decode"} 7.0\n' in page


def test_each_process_is_a_sample_of_one_family() -> None:
    said = [({"node_id": name}, {"running": index}) for index, name in enumerate("ab")]
    (family,) = [one for one in families("x_", ("decode",), said) if one.name == "x_running"]
    assert [(s.labels["node_id"], s.value) for s in family.samples] == [("a", 0), ("b", 1)]


def test_every_cause_of_a_failed_read_is_shown() -> None:
    assert sorted(TRANSFER_CAUSES) == sorted(get_args(Cause))


@pytest.mark.parametrize("seed", range(5))
def test_a_batch_counts_like_one_after_another(seed: int) -> None:
    chance = random.Random(seed)
    edges = sorted(chance.random() for _ in range(chance.randrange(1, 9)))
    values = [chance.choice([chance.random(), chance.choice(edges), 2.0]) for _ in range(300)]
    single, batch = Distribution(edges), Distribution(edges)
    for value in values:
        single.observe(value)
    batch.observe_all(values[:100])
    batch.observe_all([])
    batch.observe_all(values[100:])
    pages = [samples(text([one.family("x", "X.", {})])) for one in (single, batch)]
    assert pages[0].keys() == pages[1].keys()
    assert pages[1] == pytest.approx(pages[0])


def test_a_bucket_holds_what_is_not_above_its_bound() -> None:
    distribution = Distribution((0.001, 1.0))
    distribution.observe_all([1.0, 0.0005, 3.0, 0.001, 0.5])
    found = samples(text([distribution.family("x", "X.", {"model_name": "m"})]))
    assert found == {
        ("x_bucket", "0.001", "m"): 2,
        ("x_bucket", "1.0", "m"): 4,
        ("x_bucket", "+Inf", "m"): 5,
        ("x_count", "m"): 5,
        ("x_sum", "m"): pytest.approx(4.5015),
    }
