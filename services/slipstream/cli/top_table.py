"""The table of `slipstream top` as lines of text."""

from collections.abc import Sequence

from slipstream.cli.top_sample import Pair, View, WorkerView

_HEADS = (
    *(("STATE", -9), ("RUN", 4), ("WAIT", 5), ("KV IN USE", 11), ("CACHED", 7)),
    *(("TOK/S", 6), ("PROMPT/S", 9), ("STEP ms", 8), ("IN/S", 5), ("HITS", 5)),
)
"""And their widths, 69 in all; negative: flush left."""
_NAME = 11
"""With a blank behind it, at least; more where there is room."""
_BAR = 5
_NOTHING = "-"


def table(view: View, url: str, width: int) -> list[str]:
    """At most `width` columns; 80 are enough for a few services, what is longer is cut."""
    lines = [
        f"{view.model or 'no model'} at {url}: {view.state}",
        _requests(view),
        _latencies(view),
        "",
        *_workers(view.workers, width),
        "",
        _services(view),
    ]
    return [line if len(line) <= width else line[: max(0, width - 1)] + "…" for line in lines]


def _requests(view: View) -> str:
    states = ", ".join(f"{count} {state}" for state, count in view.requests.items())
    return (
        f"requests  {states or 'none'}; {_number(view.requests_per_s)}/s, "
        f"429 {_number(view.refused_per_s)}/s, 5xx {_number(view.failed_per_s)}/s"
    )


def _latencies(view: View) -> str:
    return (
        f"tokens    {_number(view.tokens_per_s)}/s; "
        f"ms p50/p95: TTFT {_pair(view.ttft_ms)}, ITL {_pair(view.itl_ms)}"
    )


def _pair(pair: Pair) -> str:
    if pair.p50 is None:
        return _NOTHING
    return f"{_number(pair.p50)}/{_number(pair.p95)}"


def _workers(workers: Sequence[WorkerView], width: int) -> list[str]:
    longest = max((len(one.node_id) + 1 for one in workers), default=0)
    room = min(max(longest, _NAME), max(_NAME, width - sum(abs(each) for _, each in _HEADS)))
    heads = (("WORKER", -room), *_HEADS)
    lines = ["".join(_cell(text, width) for text, width in heads)]
    for one in workers:
        cells = (
            *(
                _name(one.node_id, room - 1),
                one.state,
                str(one.running),
                str(one.waiting),
                _bar(one.kv_used),
            ),
            *(_percent(one.kv_cached), _number(one.tokens_per_s)),
            *(_number(one.prompt_tokens_per_s), _number(one.step_ms)),
            *(_number(one.blocks_in_per_s), _percent(one.prefix_hits)),
        )
        widths = (width for _, width in heads)
        lines.append("".join(_cell(*cell) for cell in zip(cells, widths, strict=True)))
    return lines if workers else [*lines, "no worker yet"]


def _name(node_id: str, width: int) -> str:
    """Names of containers and pods begin alike, and end apart."""
    return node_id if len(node_id) <= width else f"{node_id[:3]}…{node_id[4 - width :]}"


def _cell(text: str, width: int) -> str:
    return text.ljust(-width) if width < 0 else text.rjust(width)


def _bar(share: float | None) -> str:
    if share is None:
        return _NOTHING
    full = min(_BAR, round(share * _BAR))
    return f"{'#' * full}{'.' * (_BAR - full)} {share:4.0%}"


def _percent(share: float | None) -> str:
    return _NOTHING if share is None else f"{share:.0%}"


def _number(value: float | None) -> str:
    """Three digits that mean something."""
    if value is None:
        return _NOTHING
    if value >= 10_000:
        return f"{value / 1e3:.0f}k"
    return f"{value:.0f}" if value >= 100 or value == 0 else f"{value:.1f}"


def _services(view: View) -> str:
    up = [name for name, state in view.services.items() if state == "up"]
    others = [f"{name} {state}" for name, state in view.services.items() if state != "up"]
    return "up        " + (", ".join(up) or "nobody") + "".join(f"; {one}" for one in others)
