"""Equal prompts have equal answers: what has been answered so far. Pure."""

from hashlib import blake2b

ANSWERS_MAX = 20_000
SHOWN = 40


class Answers:
    """The longest answer to each prompt; when it is full, new prompts are not held against it."""

    def __init__(self, limit: int = ANSWERS_MAX) -> None:
        self.compared = 0
        """Answers to a prompt that had one already."""
        self._limit = limit
        self._known: dict[bytes, tuple[str, bool]] = {}

    def differs(self, prompt: bytes, text: str, whole: bool) -> str:
        """How this answer, `whole` or its beginning, contradicts an earlier one; or empty."""
        name = blake2b(prompt, digest_size=16).digest()
        known, known_whole = self._known.get(name, ("", False))
        if name in self._known:
            self.compared += 1
        elif len(self._known) >= self._limit:
            return ""
        if not _agree(known, known_whole, text, whole):
            same = _same_characters(known, text)
            return (
                f"another answer than before, from character {same} on: "
                f"{text[same : same + SHOWN]!r}, earlier {known[same : same + SHOWN]!r}"
            )
        if len(text) >= len(known):
            self._known[name] = text, whole or known_whole
        return ""


def _agree(known: str, known_whole: bool, text: str, whole: bool) -> bool:
    if whole and known_whole:
        return known == text
    if known_whole:
        return known.startswith(text)
    if whole:
        return text.startswith(known)
    return known.startswith(text) or text.startswith(known)


def _same_characters(one: str, other: str) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(one), len(other)))
