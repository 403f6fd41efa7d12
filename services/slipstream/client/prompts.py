"""Prompts of a wanted length that no two requests share."""

import random

TOKEN_IDS = range(1_000, 20_000)
"""Ids that are text in every vocabulary of some size: no special tokens, no single bytes."""
_WORDS = (
    *("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world"),
    *("school", "state", "family", "student", "group", "country", "problem", "hand", "part"),
    *("place", "case", "week", "company", "system", "program", "question", "work", "number"),
    *("night", "point", "home", "water", "room", "mother", "area", "money", "story", "fact"),
)


def token_prompt(seed: str, tokens: int) -> list[int]:
    """Exactly so many tokens; they depend on the seed alone."""
    draw = random.Random(seed)
    return [draw.choice(TOKEN_IDS) for _ in range(tokens)]


def word_prompt(seed: str, tokens: int) -> str:
    """About so many tokens in most vocabularies, for APIs that take text alone."""
    draw = random.Random(seed)
    return " ".join(draw.choice(_WORDS) for _ in range(tokens))
