"""What goes wrong with a peer; the text is one line for the report."""


class PeerMissing(Exception):
    """A peer cannot be installed or started."""
