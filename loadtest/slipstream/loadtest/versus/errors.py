"""What goes wrong with a peer; the text is one line for the report."""


class PeerMissing(Exception):
    """A peer cannot be installed or started."""


class AnswerError(Exception):
    """An answer that was refused, broken off, or not as long as wanted."""
