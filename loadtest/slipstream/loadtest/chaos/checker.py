"""Holds what clients and services have noted against what was promised. Pure."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from slipstream.loadtest.chaos.history import Choice, Entry, Facts, Found

LATE_S = 7.0
"""An end comes so long after its time budget at most: the frontend waits 5 s for its tokenizer."""
LOGPROB_GAP = 1e-3
SHOWN = 24
BROKEN = "broken"


def check(
    entries: Sequence[Entry],
    expected: Mapping[str, Entry],
    may: Iterable[str],
    facts: Facts,
    blow_s: float | None,
) -> Found:
    """`may`: codes of errors that are allowed here, and BROKEN for connections. `blow_s`: when the
    fault happened; None: at no single moment."""
    found = Found(requests=len(entries))
    allowed = frozenset(may)
    for entry in entries:
        problems = [f"{entry.ask} ({entry.answer_id}): {told}" for told in wrong(entry, expected)]
        found.wrong += bool(problems)
        problems += [
            f"{entry.ask} ({entry.answer_id}): {told}" for told in unfinished(entry, allowed)
        ]
        found.problems += problems
        found.failed += entry.failed
        found.refused += entry.refused
        pause_s = pause(entry, blow_s)
        if pause_s is not None:
            found.pauses_s.append(pause_s)
    if facts.stranded:
        found.problems.append(f"{facts.stranded} blocks stranded")
    found.problems += facts.unsettled + facts.leaked
    return found


def wrong(entry: Entry, expected: Mapping[str, Entry]) -> list[str]:
    """What it was told that is not so; what it got of an answer that failed must be right too."""
    right = expected[entry.ask]
    whole = entry.done and not entry.code and not entry.left
    problems = []
    for index, choice in sorted(entry.choices.items()):
        known = right.choices.get(index, Choice())
        ended = bool(choice.finish_reason)
        problems += [f"choice {index}: {told}" for told in _differs(choice, known, ended)]
    if whole and entry.choices.keys() != right.choices.keys():
        problems.append(f"{len(entry.choices)} of {len(right.choices)} choices")
    counts = entry.prompt_tokens, entry.completion_tokens
    known_counts = right.prompt_tokens, right.completion_tokens
    if whole and counts != known_counts:
        problems.append(f"usage says {counts} tokens, and it is {known_counts}")
    return problems


def _differs(choice: Choice, known: Choice, ended: bool) -> list[str]:
    same = choice.text == known.text if ended else known.text.startswith(choice.text)
    if not same:
        return [difference(choice.text, known.text)]
    if ended and choice.finish_reason != known.finish_reason:
        return [f"ended by {choice.finish_reason}, not {known.finish_reason}"]
    near = zip(choice.logprobs, known.logprobs, strict=False)
    if any(abs(one - other) > LOGPROB_GAP for one, other in near):
        return ["other log probabilities"]
    if ended and len(choice.logprobs) != len(known.logprobs):
        return [f"{len(choice.logprobs)} of {len(known.logprobs)} log probabilities"]
    return []


def difference(text: str, known: str) -> str:
    """Where two answers part, and whether something was lost or said twice there."""
    pairs = enumerate(zip(text, known, strict=False))
    at = next((i for i, (one, other) in pairs if one != other), min(len(text), len(known)))
    got = text[at : at + SHOWN]
    if got and known.find(got, at) > at:
        kind = "lost"
    elif got and known.rfind(got, 0, at + len(got) - 1) >= 0:
        kind = "said twice"
    else:
        kind = "wrong" if got else "cut off"
    return f"{kind} at character {at}: {got!r} instead of {known[at : at + SHOWN]!r}"


def unfinished(entry: Entry, allowed: frozenset[str]) -> list[str]:
    """Every request ends, once, in time, and by an error only where one is allowed."""
    if entry.left:
        return []
    problems = []
    if entry.code and entry.code not in allowed:
        problems.append(f"failed: {entry.code}")
    if entry.broken and BROKEN not in allowed:
        problems.append(f"broken: {entry.broken}")
    if not (entry.done or entry.code or entry.broken):
        problems.append("has no end")
    ended = entry.done and not entry.code
    if ended and not all(choice.finish_reason for choice in entry.choices.values()):
        problems.append("ended without a finish_reason")
    late_s = entry.end_s - entry.sent_s - entry.timeout_s
    if late_s > LATE_S:
        problems.append(f"ended {late_s:.1f} s after its time budget")
    return problems


def pause(entry: Entry, blow_s: float | None) -> float | None:
    """Longest silence within a stream from the blow on; None if it did not run then."""
    if len(entry.times_s) < 2:
        return None
    if blow_s is not None and not entry.times_s[0] <= blow_s <= entry.times_s[-1]:
        return None
    begin_s = entry.times_s[0] if blow_s is None else blow_s
    return max((b - a for a, b in pairwise(entry.times_s) if b >= begin_s), default=None)


def deliveries(story: Iterable[tuple[float, str, dict[str, Any]]]) -> list[str]:
    """Of what one frontend's machine handed to HTTP: no token of a choice is left out or handed
    over twice, and nothing follows its end."""
    next_position: dict[str, int] = {}
    ended: set[str] = set()
    problems = []
    for _, name, fields in story:
        item = fields.get("item")
        if name != "Deliver" or not isinstance(item, dict):
            continue
        request_id = fields["request_id"]
        if request_id in ended:
            problems.append(f"{request_id}: something after its end")
        if "code" in item:
            ended.add(request_id)
            continue
        position = next_position.setdefault(request_id, 0)
        if item.get("position", 0) != position:
            problems.append(f"{request_id}: position {item.get('position', 0)} after {position}")
        next_position[request_id] = item.get("position", 0) + len(item.get("tokens", b"")) // 4
        if item.get("finish_reason"):
            ended.add(request_id)
    return problems
