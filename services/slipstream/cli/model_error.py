"""The one kind of failure that everything about model files raises."""


class ModelError(Exception):
    """A model that cannot be served: one line that names the file."""

    exit_code = 4
