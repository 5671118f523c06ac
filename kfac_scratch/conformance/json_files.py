"""Read and write JSON objects; what is malformed is refused in one line that names the file."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: Naming the file that is missing, not JSON, or not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    except RecursionError:
        raise ValueError(f"{path}: nested too deeply.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected an object, got a {type(content).__name__}.")
    return content


def entry(content: Mapping[str, Any], key: str, kind: type, where: object) -> Any:
    """A field of an object that was read.

    Raises:
        ValueError: Naming the file and the field, if it is missing or of another kind.
    """
    if key not in content:
        raise ValueError(f"{where}: there is no {key!r}.")
    if not isinstance(content[key], kind):
        got, wanted = type(content[key]).__name__, kind.__name__
        raise ValueError(f"{where}: {key!r} is a {got}, expected a {wanted}.")
    return content[key]


def _refuse(constant: str) -> NoReturn:
    """Python reads NaN and infinities; JSON has none."""
    raise ValueError(f"{constant} is not JSON.")


def is_number(value: object) -> bool:
    """Whether a value of a file is a number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def write_object(path: Path, content: Mapping[str, Any]) -> None:
    """Write an object as a JSON file, in a folder that is made if there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=1, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
