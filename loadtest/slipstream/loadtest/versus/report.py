"""The page: targets, then one table for each number, values beside their ratios to vLLM's."""

import statistics
from pathlib import Path

import msgspec

from slipstream.loadtest.versus.loads import PREFIX
from slipstream.loadtest.versus.peers import BASELINE, PEERS
from slipstream.loadtest.versus.results import START, Results

NOTHING = "-"
HEAD = Path(__file__).with_name("head.md").read_text(encoding="utf-8")


class Target(msgspec.Struct, frozen=True):
    name: str
    what: str
    peer: str
    against: str
    """A peer, or empty: the number itself."""
    load: str
    number: str
    at_least: float = 0.0
    at_most: float = 0.0

    def wanted(self) -> str:
        return f"≥ {self.at_least:g}" if self.at_least else f"≤ {self.at_most:g}"

    def met(self, value: float) -> bool:
        return value >= self.at_least if self.at_least else value <= self.at_most


def _targets() -> list[Target]:
    found = []
    for load in ("256/64 x8", "256/64 x32"):
        speed = ("output_tok_s", "output tok/s")
        for peer, wanted in (("slipstream", 1.2), ("slipstream-int8", 1.8)):
            found.append(Target("P1", speed[1], peer, "vllm", load, speed[0], at_least=wanted))
        apart = ("slipstream-apart", "vllm-apart", load)
        found.append(Target("P1d", speed[1], *apart, speed[0], at_least=3.0))
        found.append(Target("P1d", "TTFT", *apart, "ttft_ms", at_most=0.3))
        found.append(Target("P3", "TTFT", "slipstream", "vllm", load, "ttft_ms", at_most=0.5))
    one = ("256/64 x1", "tpot_ms")
    found.append(Target("P2", "TPOT", "slipstream", "vllm", *one, at_most=0.6))
    found.append(Target("P2", "TPOT", "slipstream-int8", "llama.cpp", *one, at_most=1.0))
    later = "TTFT of later prompts with the prefix, of the first's"
    found.append(Target("P4", later, "slipstream", "", PREFIX, "later_of_first", at_most=0.15))
    found.append(Target("P5", "start, s", "slipstream", "", START, "start_s", at_most=15.0))
    return sorted(found, key=lambda target: target.name)


TARGETS = _targets()
TABLES = (
    ("Output tokens/s", "output_tok_s", 1),
    ("TTFT, median, ms", "ttft_ms", 0),
    ("TTFT, 99th percentile, ms", "ttft_p99_ms", 0),
    ("TPOT, median, ms", "tpot_ms", 1),
)


def ratio(results: Results, peer: str, against: str, load: str, number: str) -> float | None:
    """Median over the rounds that have both; with nobody to hold it against, of the number."""
    found = []
    for round_ in results.rounds:
        value = results.value(round_, peer, load, number)
        other = results.value(round_, against, load, number) if against else 1.0
        if value is not None and other:
            found.append(value / other)
    return statistics.median(found) if found else None


def median(results: Results, peer: str, load: str, number: str) -> float | None:
    return ratio(results, peer, "", load, number)


def page(results: Results) -> str:
    """Markdown."""
    peers = [name for name in PEERS if name in results.missing or _measured(results, name)]
    parts = [HEAD, _circumstances(results), "## Targets\n", _target_table(results)]
    loads = _loads(results)
    for title, number, digits in TABLES:
        parts += [f"## {title}\n", _table(results, peers, [(n, n, number, digits) for n in loads])]
    others = [
        (START, "start, s", "start_s", 1),
        (PREFIX, "TTFT, new prefix, ms", "first_ttft_ms", 0),
        (PREFIX, "the same again, ms", "later_ttft_ms", 0),
    ]
    parts += ["## Start, shared prefix, memory\n", _table(results, peers, others, memory=True)]
    parts += _drafts(results) + _quality(results) + _failures(results)
    parts += ["## Versions and commands\n", _commands(results, peers)]
    return "\n".join(parts)


def _measured(results: Results, peer: str) -> bool:
    return any(one.peer == peer for one in results.measurements)


def _loads(results: Results) -> list[str]:
    """Closed loops, in the order in which they were run."""
    names = [one.load for one in results.measurements if one.load not in (START, PREFIX)]
    return list(dict.fromkeys(names))


def _circumstances(results: Results) -> str:
    machine = results.machine
    return (
        f"{results.date}, {len(results.rounds)} rounds, seed {results.seed}: `{results.command}`, "
        f"on {machine.cores} cores of an {machine.cpu} ({', '.join(machine.flags)}), "
        f"{machine.memory_bytes / 2**30:.0f} GiB.\n"
    )


def _target_table(results: Results) -> str:
    rows = ["| | load | number | server | against | wanted | measured | |", "|---" * 8 + "|"]
    for target in TARGETS:
        against = target.against or "itself"
        value = ratio(results, target.peer, target.against, target.load, target.number)
        measured = NOTHING if value is None else f"{value:.2f}"
        verdict = "not measured" if value is None else "met" if target.met(value) else "**missed**"
        rows.append(
            f"| {target.name} | {target.load} | {target.what} | {target.peer} | {against} "
            f"| {target.wanted()} | {measured} | {verdict} |"
        )
    return "\n".join(rows) + "\n"


Column = tuple[str, str, str, int]
"""Load, heading, number, digits after the point."""


def _table(results: Results, peers: list[str], columns: list[Column], memory: bool = False) -> str:
    heads = [heading for _, heading, _, _ in columns] + ["peak memory, MiB"] * memory
    rows = ["| | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]
    for peer in peers:
        if peer in results.missing and not _measured(results, peer):
            cells = [f"missing: {results.missing[peer]}", *[""] * (len(heads) - 1)]
        else:
            cells = [_cell(results, peer, *column) for column in columns]
            cells += [_memory_cell(results, peer)] * memory
        rows.append(f"| {peer} | " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


def _cell(results: Results, peer: str, load: str, heading: str, number: str, digits: int) -> str:
    value = median(results, peer, load, number)
    if value is None:
        tried = any((one.peer, one.load) == (peer, load) for one in results.measurements)
        return "failed" if tried else NOTHING
    return f"{value:.{digits}f}{_bracket(ratio(results, peer, BASELINE, load, number))}"


def _memory_cell(results: Results, peer: str) -> str:
    peaks = {name: _peak(results, name) for name in (peer, BASELINE)}
    own, other = peaks[peer], peaks[BASELINE]
    if not own:
        return NOTHING
    return f"{own / 2**20:.0f}{_bracket(own / other if other else None)}"


def _peak(results: Results, peer: str) -> float:
    """Bytes, over all rounds and loads."""
    found = [one.numbers.get("peak_bytes", 0) for one in results.measurements if one.peer == peer]
    return max(found, default=0)


def _bracket(value: float | None) -> str:
    return "" if value is None else f" ({value:.2f})"


def _drafts(results: Results) -> list[str]:
    """Drafts beside the same server without them."""
    rows = ["| | drafts that were right | output tok/s, of `slipstream`'s |", "|---|---:|---:|"]
    for load in _loads(results):
        right = median(results, "slipstream-ngram", load, "draft_acceptance")
        faster = ratio(results, "slipstream-ngram", "slipstream", load, "output_tok_s")
        if right is not None and faster is not None:
            rows.append(f"| {load} | {right:.0%} | {faster:.2f} |")
    return ["## n-gram drafts\n", "\n".join(rows) + "\n"] if len(rows) > 2 else []


def _quality(results: Results) -> list[str]:
    if not results.quality:
        return []
    perplexity, agreement = (results.quality[n] for n in ("perplexity_ratio", "agreement"))
    return [
        "## Quality of int8 weights\n",
        f"Beside the bfloat16 ones, on the text of `python -m slipstream.loadtest.quality`: "
        f"perplexity {perplexity:.4f} times (wanted: at most 1.02), the same likeliest token at "
        f"{agreement:.1%} of the positions (wanted: 95 %).\n",
    ]


def _failures(results: Results) -> list[str]:
    lines = [f"- {peer}: {reason}" for peer, reason in results.missing.items()]
    lines += [
        f"- {one.peer}, {one.load}, round {one.round}: {one.failure}"
        for one in results.measurements
        if one.failure
    ]
    return ["## Missing and failed\n", "\n".join(lines) + "\n"] if lines else []


def _commands(results: Results, peers: list[str]) -> str:
    parts = []
    for peer in peers:
        version = results.versions.get(peer, "not installed")
        lines = "\n".join(results.commands.get(peer, []))
        code = f"\n```sh\n{lines}\n```\n" if lines else ""
        parts.append(f"**{peer}**: {PEERS[peer].what}; {version}.\n{code}")
    return "\n".join(parts)
