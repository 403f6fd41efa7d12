"""Which models there are, as this frontend knows them."""

from collections.abc import Iterable

import msgspec

from slipstream.messages import NodeInfo

KEPT_S = 300.0
"""Who asks for a model whose processes are all away is told to come again, for so long; then that
there is none."""
MODELS_MAX = 1024


class Known(msgspec.Struct, frozen=True, kw_only=True):
    """What is the same at all of a model's processes, or the least of them."""

    max_model_len: int = 0
    vocab_size: int = 0
    sampling: dict[str, float] = {}
    seen_s: float = 0.0


class Models:
    def __init__(self) -> None:
        self._known: dict[str, Known] = {}

    def look(self, nodes: Iterable[NodeInfo], now_s: float) -> dict[str, Known]:
        """By name; `nodes`: those that are there now."""
        by_model: dict[str, list[NodeInfo]] = {}
        for node in nodes:
            if node.model:
                by_model.setdefault(node.model, []).append(node)
        for name, group in by_model.items():
            self._known[name] = _known(group, self._known.get(name, Known()), now_s)
        names = sorted(n for n, known in self._known.items() if now_s - known.seen_s < KEPT_S)
        self._known = {name: self._known[name] for name in names[:MODELS_MAX]}
        return self._known

    def max_model_len(self, name: str) -> int:
        """0: nobody has said."""
        return self._known.get(name, Known()).max_model_len


def _known(nodes: Iterable[NodeInfo], before: Known, now_s: float) -> Known:
    """Without a worker, or without a tokenizer, what was known of theirs."""
    known = msgspec.structs.replace(before, seen_s=now_s)
    least = before
    for node in nodes:
        if (worker := node.worker) is not None:
            fits = least is before or worker.max_model_len < least.max_model_len
            if fits:
                least = Known(max_model_len=worker.max_model_len, vocab_size=worker.vocab_size)
        elif node.tokenizer is not None:
            known = msgspec.structs.replace(known, sampling=node.tokenizer.sampling)
    return msgspec.structs.replace(
        known, max_model_len=least.max_model_len, vocab_size=least.vocab_size
    )
