"""`slipstream simulate`: replays a trace in simulated time and says how it went."""

import itertools
import sys
from pathlib import Path
from typing import Any

import msgspec

from slipstream.config import SetupError
from slipstream.simulate.cluster import Run
from slipstream.simulate.config import SimulateConfig
from slipstream.simulate.driver import Limits
from slipstream.simulate.hardware import Hardware, load_hardware
from slipstream.simulate.plot import check_plot, write_plot
from slipstream.simulate.report import Summary, table
from slipstream.simulate.runs import Source, Task, perform_all, requests_of


def run(config: SimulateConfig) -> int:
    """Whatever cannot be used or written is found before the first run."""
    hardware = _hardware(config)
    if config.plot:
        check_plot(config.plot)
    for flag, name in (("--json", config.json), ("--plot", config.plot)):
        if name and not Path(name).absolute().parent.is_dir():
            raise SetupError(f"slipstream simulate: {flag}: {name}: its folder is not there")
    tasks = _tasks(config, hardware)
    requests = requests_of(tasks[0].source)
    if not requests:
        raise SetupError(
            f"slipstream simulate: --duration-s {config.duration_s:g} leaves no request of the "
            "trace; the first comes at 0 s"
        )
    tokens = sum(request.prompt_tokens for request in requests)
    print(f"{len(requests)} requests, {tokens} prompt tokens; {len(tasks)} runs", file=sys.stderr)
    summaries: list[Summary] = []
    for summary in perform_all(tasks, config.jobs):
        summaries.append(summary)
        print(
            f"{len(summaries)}/{len(tasks)}: {summary.policy}, {summary.disaggregation}, "
            f"rate scale {summary.rate_scale:g}: {summary.good_share:.1%} good",
            file=sys.stderr,
        )
    print(table(summaries))
    if config.json:
        _write_json(config.json, {"settings": _settings(config, hardware), "runs": summaries})
    if config.plot:
        write_plot(config.plot, summaries, config)
    return 0


def _hardware(config: SimulateConfig) -> Hardware:
    """As the file says, with what the command line says instead."""
    said = {
        name: value
        for name in ("kv_cache_tokens", "max_num_seqs", "prefill_budget_tokens")
        if (value := getattr(config, name))
    }
    return msgspec.structs.replace(load_hardware(config.step_model), **said)


def _tasks(config: SimulateConfig, hardware: Hardware) -> list[Task]:
    source = Source(
        trace=config.trace,
        synthetic=config.synthetic,
        requests=config.requests,
        duration_s=config.duration_s,
        stamped=config.arrivals == "stamped",
        seed=config.seed,
    )
    scales = config.rate_scales[:1] if config.find_rate else config.rate_scales
    choices = itertools.product(config.policies, config.disaggregations, scales)
    return [
        Task(
            source=source,
            run=Run(
                policy=policy,
                disaggregation=disaggregation,
                rate_scale=scale,
                workers=config.workers,
                prefill=config.prefill,
                hardware=hardware,
                host_cache_tokens=config.host_cache_tokens,
                offload_after_hits=config.offload_after_hits,
                limits=Limits(config.ttft_limit_s, config.itl_limit_s),
                timeout_s=config.timeout_s,
                max_requests=config.max_requests,
                bus_latency_s=config.bus_latency_s,
            ),
            good_share=config.good_share,
            find_rate=config.find_rate,
        )
        for policy, disaggregation, scale in choices
    ]


def _settings(config: SimulateConfig, hardware: Hardware) -> dict[str, Any]:
    """All that decided the numbers; of files the name, for their folders are nobody's business."""
    settings: dict[str, Any] = msgspec.to_builtins(config)
    del settings["json"], settings["plot"], settings["jobs"]
    for name in ("trace", "step_model"):
        settings[name] = Path(settings[name]).name
    return settings | {"hardware": msgspec.to_builtins(hardware)}


def _write_json(name: str, document: dict[str, Any]) -> None:
    try:
        Path(name).write_bytes(msgspec.json.format(msgspec.json.encode(document), indent=1) + b"\n")
    except OSError as error:
        raise SetupError(f"slipstream simulate: --json: {name}: {error.strerror}") from None
