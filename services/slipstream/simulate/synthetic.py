"""A drawn trace of the same form: chats of several turns that share system prompts."""

from itertools import count
from random import Random

from slipstream.simulate.trace import CHUNK_TOKENS, TraceRequest

SYSTEM_PROMPTS = 8
SYSTEM_CHUNKS_MAX = 4
TURNS_MEAN = 4
THINK_MEAN_S = 20.0
CHATS_PER_S = 1.0
MESSAGE_TOKENS_MEDIAN = 800
OUTPUT_TOKENS_MEDIAN = 200
PROMPT_TOKENS_MAX = 100_000
OUTPUT_TOKENS_MAX = 2000


def synthetic_trace(num_requests: int, seed: int) -> list[TraceRequest]:
    """The same for equal seeds. A chat's next prompt is its last one, the answer and a new message;
    as in Mooncake's trace, full chunks keep their ids and a partial one gets a new id."""
    rng = Random(seed)
    fresh = count()
    systems = [
        [next(fresh) for _ in range(rng.randint(1, SYSTEM_CHUNKS_MAX))]
        for _ in range(SYSTEM_PROMPTS)
    ]
    requests: list[TraceRequest] = []
    begin_s = 0.0
    while len(requests) < 2 * num_requests:  # late turns of early chats come after early turns
        begin_s += rng.expovariate(CHATS_PER_S)
        arrival_s, chunks = begin_s, list(rng.choice(systems))
        prompt_tokens = len(chunks) * CHUNK_TOKENS
        while True:
            prompt_tokens += _drawn(rng, MESSAGE_TOKENS_MEDIAN, PROMPT_TOKENS_MAX)
            if prompt_tokens > PROMPT_TOKENS_MAX:
                break
            output_tokens = _drawn(rng, OUTPUT_TOKENS_MEDIAN, OUTPUT_TOKENS_MAX)
            chunks += [next(fresh) for _ in range(-(-prompt_tokens // CHUNK_TOKENS) - len(chunks))]
            requests.append(TraceRequest(arrival_s, prompt_tokens, output_tokens, tuple(chunks)))
            if rng.random() < 1 / TURNS_MEAN:
                break
            chunks = chunks[: prompt_tokens // CHUNK_TOKENS]
            prompt_tokens += output_tokens
            arrival_s += rng.expovariate(1 / THINK_MEAN_S)
    return sorted(requests, key=lambda request: request.arrival_s)[:num_requests]


def _drawn(rng: Random, median: float, most: int) -> int:
    """Log-normal: most are small, some are very large."""
    return max(1, min(most, round(rng.lognormvariate(0.0, 1.0) * median)))
