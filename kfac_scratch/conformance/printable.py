"""Text of others, such that every terminal, JSON file and XML file can hold it."""

MOST = 2000  # characters of a reason


def printable(text: str, most: int = MOST) -> str:
    """A text without characters that break what it is written into, and not too long.

    Control characters but for line breaks and tabs, halves of surrogate pairs, and what XML
    excludes become their escapes. What is longer than `most` characters is cut, and says so.
    """
    left_out = len(text) - most
    if left_out > 0:
        text = f"{text[:most]}… ({left_out} characters left out)"
    return "".join(c if _is_printable(c) else c.encode("unicode_escape").decode() for c in text)


def _is_printable(c: str) -> bool:
    return c in "\n\t" or not (
        c < " " or "\x7f" <= c <= "\x9f" or "\ud800" <= c <= "\udfff" or c in "\ufffe\uffff"
    )
