"""Text of others, such that every terminal, JSON file and XML file can hold it."""

import re

MOST = 2000  # characters of a reason
_BREAKS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def printable(text: str, most: int = MOST) -> str:
    """A text without characters that break what it is written into, and not too long.

    Control characters but for line breaks and tabs, halves of surrogate pairs, and what XML
    excludes become their escapes. What is longer than `most` characters is cut, and says so.
    """
    left_out = len(text) - most
    if left_out > 0:
        text = f"{text[:most]}… ({left_out} characters left out)"
    return _BREAKS.sub(lambda c: c[0].encode("unicode_escape").decode(), text)
