"""Settings of `slipstream simulate`."""

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal, TypeVar, get_args

import msgspec
from msgspec import Meta

from slipstream.config import MaxRequests, OffloadAfterHits
from slipstream.scheduler.policy import Disaggregation, Policy

POLICIES: tuple[Policy, ...] = get_args(Policy)
DISAGGREGATIONS: tuple[Disaggregation, ...] = get_args(Disaggregation)
W = TypeVar("W", bound=str)


class SimulateConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Replays a trace against a cluster in simulated time, with the real machines of scheduler,
    index and workers."""

    headings: ClassVar[dict[str, str]] = {
        "trace": "Requests",
        "workers": "Cluster",
        "policy": "What is compared",
        "ttft_limit_s": "Limits",
        "json": "Output",
    }

    trace: Annotated[
        str, Meta(description="Trace in Mooncake's form: JSONL, one request a line.")
    ] = ""
    synthetic: Annotated[
        int, Meta(ge=0, le=10_000_000, description="Draw a trace of so many requests instead.")
    ] = 0
    requests: Annotated[int, Meta(ge=0, description="Take the first ones only; 0: all.")] = 0
    duration_s: Annotated[
        float, Meta(ge=0, description="Take those of the trace's first seconds only; 0: all.")
    ] = 0.0
    arrivals: Annotated[
        Literal["spread", "stamped"],
        Meta(
            description="Requests with one time stamp: drawn between it and the next, "
            "or all at once."
        ),
    ] = "spread"
    seed: Annotated[
        int, Meta(ge=0, description="Of all that is drawn; equal seeds give equal runs.")
    ] = 0

    workers: Annotated[int, Meta(ge=1, le=1024, description="Prefill and decode workers.")] = 16
    prefill: Annotated[
        int,
        Meta(ge=0, le=1024, description="Workers among them that only prefill; 0: all do both."),
    ] = 0
    step_model: Annotated[
        str, Meta(description="What a worker is: a TOML or JSON file, or a preset.")
    ] = "h200-8b"
    kv_cache_tokens: Annotated[
        int, Meta(ge=0, description="KV memory of each worker; 0: as --step-model says.")
    ] = 0
    host_cache_tokens: Annotated[
        int, Meta(ge=0, description="Host memory of each worker for what is evicted; 0: none.")
    ] = 0
    offload_after_hits: OffloadAfterHits = 1
    max_num_seqs: Annotated[
        int, Meta(ge=0, le=65_536, description="Requests in a step; 0: as --step-model says.")
    ] = 0
    prefill_budget_tokens: Annotated[
        int, Meta(ge=0, description="Prompt tokens in a step; 0: as --step-model says.")
    ] = 0
    bus_latency_s: Annotated[
        float, Meta(ge=0, le=1, description="From one machine to another, each message.")
    ] = 2e-4

    policy: Annotated[
        str, Meta(description=f"One or more, with commas; of {', '.join(POLICIES)}.")
    ] = POLICIES[0]
    disaggregation: Annotated[
        str,
        Meta(
            description=f"One or more, with commas; of {', '.join(DISAGGREGATIONS)}. "
            "Empty: never without --prefill, else auto."
        ),
    ] = ""
    rate_scale: Annotated[
        str, Meta(description="One or more: how many times as fast as in the trace.")
    ] = "1"
    find_rate: Annotated[
        bool, Meta(description="Find the highest rate scale that keeps --good-share.")
    ] = False
    good_share: Annotated[
        float, Meta(gt=0, le=1, description="Share of requests inside the limits; --find-rate.")
    ] = 0.9

    ttft_limit_s: Annotated[
        float, Meta(gt=0, description="Longest time to first token of a good request.")
    ] = 5.0
    itl_limit_s: Annotated[
        float, Meta(gt=0, description="Longest mean time between tokens of a good request.")
    ] = 0.05
    timeout_s: Annotated[float, Meta(gt=0, le=86_400, description="Time budget of a request.")] = (
        600.0
    )
    max_requests: MaxRequests = 4096

    json: Annotated[str, Meta(description="File for everything that was measured.")] = ""
    plot: Annotated[str, Meta(description="File for a plot: .png, .svg or .pdf.")] = ""
    jobs: Annotated[
        int, Meta(ge=0, le=1024, description="Runs at a time, a process each; 0: one per core.")
    ] = 0

    def __post_init__(self) -> None:
        if bool(self.trace) == bool(self.synthetic):
            raise ValueError("either --trace FILE or --synthetic N is needed")
        if self.prefill >= self.workers:
            raise ValueError(
                f"--prefill {self.prefill} of --workers {self.workers} leaves nobody to decode"
            )
        _ = self.policies, self.rate_scales
        if not self.prefill and "always" in self.disaggregations:
            raise ValueError("--disaggregation always needs --prefill 1 or more")

    @property
    def policies(self) -> list[Policy]:
        return _chosen("--policy", self.policy, POLICIES)

    @property
    def disaggregations(self) -> list[Disaggregation]:
        text = self.disaggregation or ("auto" if self.prefill else "never")
        return _chosen("--disaggregation", text, DISAGGREGATIONS)

    @property
    def rate_scales(self) -> list[float]:
        """In rising order."""
        try:
            scales = sorted({float(word) for word in _words(self.rate_scale)})
        except ValueError:
            scales = []
        if not scales or not 0 < scales[0] <= scales[-1] <= 1e6:
            raise ValueError(
                f"--rate-scale: expected numbers > 0 and <= 1e6 with commas between them, "
                f"got {self.rate_scale!r}"
            )
        return scales


def _words(text: str) -> list[str]:
    return list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def _chosen(flag: str, text: str, choices: Sequence[W]) -> list[W]:
    """In the order given."""
    words = _words(text)
    wrong = [word for word in words if word not in choices]
    if wrong or not words:
        got = wrong[0] if wrong else "nothing"
        raise ValueError(f"{flag}: expected some of {', '.join(choices)}, got {got}")
    return [choice for word in words for choice in choices if choice == word]
