"""What goes wrong with a peer; the text is one line for the report."""

from slipstream.client.stream import AnswerError

__all__ = ["AnswerError", "PeerMissing"]


class PeerMissing(Exception):
    """A peer cannot be installed or started."""
