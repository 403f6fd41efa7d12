"""Text that UTF-8 can carry."""


def well_formed(text: str) -> str:
    """JSON and Python can name halves of a surrogate pair, which no encoding has: two that belong
    together are joined, others replaced."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
