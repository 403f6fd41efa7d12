"""What the frontend's machine is told at its start."""

import msgspec


class FrontendSettings(msgspec.Struct, frozen=True, kw_only=True):
    max_requests: int = 1024
    deadline_grace_s: float = 5.0
    """After a request's own time budget, which its tokenizer watches over."""
    max_codec_calls: int = 256
    codec_timeout_s: float = 30.0
    retry_after_s: float = 1.0
    recovery_wait_s: float = 30.0
    """How long requests are still taken, and wait, when a service that they need is away."""
    drain_timeout_s: float = 30.0
    """How long running requests may go on after `Drain`; then they are ended with an error."""
