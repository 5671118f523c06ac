"""Digests: what a case asks and its numbers as one short word, so that what is stored can age.

Result files, explanations and proofs keep the digest of every case that there was. Today's digests
then tell which cases are new, which have changed and which are gone. A case has the same digest
whether it is read from this package or from files of vectors: this module knows neither.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from torch import Tensor

LENGTH = 16  # hexadecimal digits: 64 bits


def content_digest(question: Mapping[str, Any], numbers: Mapping[str, Tensor]) -> str:
    """The digest of what is asked and of what it is asked with.

    Neither tags nor words count, and neither the order of keys nor the sign of a zero does.

    Args:
        question: What is asked, as JSON has it.
        numbers: Parameters, inputs and targets by name.
    """
    content = {name: [list(x.shape), (x + 0).tolist()] for name, x in numbers.items()}
    text = json.dumps([question, content], sort_keys=True)
    return sha256(text.encode()).hexdigest()[:LENGTH]


@dataclass(frozen=True)
class Staleness:
    """How cases differ from those that something stored was made with. False if they do not.

    Attributes:
        added: Cases that there were not.
        changed: Cases that asked something else.
        gone: Cases that there are no longer.
        unknown: Whether what is stored does not say which cases there were.
    """

    added: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    gone: tuple[str, ...] = ()
    unknown: bool = False

    def __bool__(self) -> bool:
        return bool(self.unknown or self.added or self.changed or self.gone)

    def __str__(self) -> str:
        if self.unknown:
            return "stale: it does not say which cases it was made with"
        kinds = {"added": self.added, "changed": self.changed, "gone": self.gone}
        said = [_in_words(kind, names) for kind, names in kinds.items() if names]
        return f"stale: {'; '.join(said)}" if said else "up to date"


def staleness(then: Mapping[str, str], today: Mapping[str, str]) -> Staleness:
    """Compare stored digests with today's, both by identifier. Use it for whatever is stored."""
    if not then:
        return Staleness(unknown=True)
    return Staleness(
        added=tuple(name for name in today if name not in then),
        changed=tuple(name for name in today if then.get(name, today[name]) != today[name]),
        gone=tuple(name for name in then if name not in today),
    )


def _in_words(kind: str, names: tuple[str, ...]) -> str:
    """How many, and the first five by name."""
    what = "case was" if len(names) == 1 else "cases were"
    change = {"added": "added since", "changed": "changed since", "gone": "removed since"}[kind]
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{len(names)} {what} {change}: {', '.join(names[:5])}{more}"
