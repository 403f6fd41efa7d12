"""Settings of a load test: options of `locust` and of `python -m slipstream.loadtest.load`."""

import argparse
from typing import Annotated, Any, get_args

import msgspec
from msgspec import Meta


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """`tokens` of prompts are words, about one token each."""

    scenario: Annotated[str, Meta(description="One of those in docs/loadtesting.md.")] = "step"
    seed: Annotated[int, Meta(ge=0, description="Of prompts, mixes and arrivals.")] = 0
    phase_s: Annotated[float, Meta(gt=0, le=86_400, description="Length of each phase.")] = 15.0
    warm_up_s: Annotated[
        float, Meta(ge=0, le=3600, description="Load before the first phase, not judged by time.")
    ] = 3.0
    drain_s: Annotated[
        float, Meta(gt=0, le=3600, description="Longest wait for answers after the last phase.")
    ] = 60.0
    clients: Annotated[
        int,
        Meta(
            ge=1,
            le=4096,
            description="Users where a scenario is about users or capacity is measured: each asks "
            "anew when it has its answer.",
        ),
    ] = 16
    capacity_rps: Annotated[
        float, Meta(ge=0, description="Requests a second that the server can do; 0: measured.")
    ] = 0.0
    capacity_s: Annotated[
        float, Meta(gt=0, le=3600, description="Length of the measurement of --capacity-rps.")
    ] = 12.0
    base_load: Annotated[
        float, Meta(gt=0, le=100, description="Rate of ordinary phases, in capacities.")
    ] = 0.7
    step_load: Annotated[float, Meta(gt=0, le=100, description="Rate of the step.")] = 3.0
    spike_load: Annotated[float, Meta(gt=0, le=100, description="Rate of the spike.")] = 10.0
    spike_s: Annotated[float, Meta(gt=0, le=3600, description="Length of the spike.")] = 5.0

    prompt_tokens: Annotated[int, Meta(ge=1, le=1_000_000, description="Of a usual prompt.")] = 100
    output_tokens: Annotated[int, Meta(ge=1, le=100_000, description="Of every answer.")] = 32
    long_tokens: Annotated[int, Meta(ge=1, le=1_000_000, description="Of a long prompt.")] = 1000
    shared_tokens: Annotated[
        int, Meta(ge=1, le=1_000_000, description="Of the system prompt that all share.")
    ] = 500
    turns: Annotated[int, Meta(ge=1, le=100, description="Of a conversation.")] = 4
    repeat_share: Annotated[
        float, Meta(ge=0, le=1, description="Prompts that were asked before, to compare answers.")
    ] = 0.2
    long_share: Annotated[float, Meta(ge=0, le=1, description="Of long prompts.")] = 0.15
    cancel_share: Annotated[float, Meta(ge=0, le=1, description="Of answers that are left.")] = 0.3
    slow_share: Annotated[float, Meta(ge=0, le=1, description="Of readers that are slow.")] = 0.2

    retries: Annotated[
        int, Meta(ge=0, le=100, description="After a 429, each when Retry-After has passed.")
    ] = 2
    timeout_s: Annotated[float, Meta(gt=0, le=86_400, description="Longest time of an answer.")] = (
        120.0
    )
    max_in_flight: Annotated[
        int, Meta(ge=1, le=100_000, description="Requests at a time; one more is not sent.")
    ] = 1000

    ttft_target_s: Annotated[
        float, Meta(gt=0, description="99 % of accepted requests have their first token by then.")
    ] = 2.0
    goodput_share: Annotated[
        float,
        Meta(
            ge=0,
            le=10,
            description="Requests a second within the target in the step, at least, of those in "
            "the phase before it; 0: not judged.",
        ),
    ] = 0.0
    refusal_target_s: Annotated[
        float, Meta(ge=0, description="99 % of refusals have come by then; 0: not judged.")
    ] = 0.0

    model_name: Annotated[str, Meta(description="In the API; empty: the server's first.")] = ""
    api_key_file: Annotated[str, Meta(description="File that holds the bearer token.")] = ""
    report_dir: Annotated[
        str, Meta(description="Folder of the report; empty: one below build/load.")
    ] = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """To any parser; locust's among them."""
    group = parser.add_argument_group("load")
    for field in msgspec.structs.fields(Settings):
        kind, meta = get_args(field.type)
        told = f"{meta.description} Default: {field.default if field.default != '' else 'empty'}."
        flag = "--" + field.name.replace("_", "-")
        group.add_argument(flag, type=kind, default=field.default, help=told.replace("%", "%%"))


def settings_of(options: Any) -> Settings:
    """ValueError: one is out of range."""
    found = {name: getattr(options, name) for name in Settings.__struct_fields__}
    return msgspec.convert(found, Settings)
