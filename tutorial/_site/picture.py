"""README's picture: the first figure of chapter 0, in a light and in a dark version.

    python tutorial/_site/picture.py

writes both below `tutorial/assets`. The chapter is executed, unless nothing has changed since.
"""

from notebook import render, run
from package import PACKAGE, ROOT

CHAPTER = "00_thirty_minutes"
TARGETS = {"figure-1.svg": "exact-and-kfac.svg", "figure-1-dark.svg": "exact-and-kfac-dark.svg"}


def pictures() -> dict[str, bytes]:
    """The files of `tutorial/assets` by name, as the chapter draws them now."""
    path = ROOT / "tutorial" / f"{CHAPTER}.py"
    _, files = render(run(path, PACKAGE, ROOT / ".cache" / "chapters"), CHAPTER)
    return {name: files[f"{CHAPTER}_files/{figure}"] for figure, name in TARGETS.items()}


if __name__ == "__main__":
    for name, content in pictures().items():
        (ROOT / "tutorial" / "assets" / name).write_bytes(content)
