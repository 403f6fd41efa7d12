"""What the tokenizer's machine is told at its start."""

import msgspec


class TokenizerSettings(msgspec.Struct, frozen=True, kw_only=True):
    max_model_len: int = 0
    """Longest prompt plus answer; 0: the least of the workers'."""
    eos_token_ids: frozenset[int] = frozenset()
    max_streams: int = 4096
    """Less than a session may hold unread, for all of them speak when a scheduler comes back."""
    max_codec_calls: int = 256
    max_codec_tokens: int = 1 << 18
    ended_keep_s: float = 10.0
    orphan_grace_s: float = 10.0
    """How long streams outlive the session with their frontend."""
    resend_after_s: float = 1.0
