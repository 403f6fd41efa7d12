"""The one kind of failure that everything about model files raises."""

from slipstream.config import StartError
from slipstream.errors import ExitCode


class ModelError(StartError):
    """A model that cannot be served: one line that names the file."""

    def __init__(self, message: str) -> None:
        super().__init__(message, ExitCode.MODEL)
