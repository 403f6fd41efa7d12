"""Paths of OpenAI's API and its neighbours that a model that generates text has no answer to."""

from slipstream.errors import ErrorCode
from slipstream.frontend.problems import ApiError, api_error

UNSERVED = {
    "/v1/embeddings": "embeddings",
    "/v1/audio": "speech and transcriptions",
    "/v1/realtime": "speech and transcriptions",
    "/v1/images": "images",
    "/v1/videos": "videos",
    "/v1/moderations": "moderation",
    "/rerank": "ranks",
    "/v1/rerank": "ranks",
    "/v2/rerank": "ranks",
    "/score": "scores",
    "/v1/score": "scores",
    "/pooling": "pooled states",
    "/classify": "classes",
    "/v2/embed": "embeddings",
    "/v1/files": "files",
    "/v1/uploads": "files",
    "/v1/containers": "files",
    "/v1/vector_stores": "search in files",
    "/v1/batches": "batches",
    "/v1/messages/batches": "batches",
    "/v1/fine_tuning": "fine-tuning",
    "/v1/evals": "evaluations",
    "/v1/assistants": "assistants",
    "/v1/threads": "assistants",
    "/v1/conversations": "conversations that a server keeps",
    "/v1/chat/completions/batch": "batches",
}
"""Path, with everything below it -> what it would give."""

_OF_TEXT = "This server generates text: POST /v1/chat/completions, /v1/completions, /v1/responses."


def unserved(path: str) -> ApiError | None:
    """None: nobody has heard of that path."""
    below = path
    while below:
        if what := UNSERVED.get(below):
            message = f"{below} is not served: there are no {what} here. {_OF_TEXT}"
            return api_error(ErrorCode.UNSUPPORTED_ENDPOINT, message)
        below = below.rpartition("/")[0]
    return None
