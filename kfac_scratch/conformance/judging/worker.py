"""A process for an adapter: `python -m (this module) pkg.mod:Adapter cpu`.

The parent (`isolation`) writes a line of JSON, `[case, flavour, token]`, and gets back a file
(`sending`) with the adapter's numbers, or with the reason why there are none. Nothing is judged
here, since an adapter can replace whatever runs in its process.

What an adapter prints goes to the error stream, and what it reads is empty, so that it cannot
disturb the conversation by accident.
"""

import json
import os
import sys
from dataclasses import asdict
from io import BufferedIOBase
from typing import TextIO

from kfac_scratch.conformance.audit.prove import adapter
from kfac_scratch.conformance.cases.families import CASES
from kfac_scratch.conformance.judging.harness import answered, complaint_of
from kfac_scratch.conformance.judging.sending import (
    answer_file,
    capabilities_file,
    complaint_file,
    send,
)
from kfac_scratch.conformance.protocol import Adapter, Capabilities


def channels() -> tuple[TextIO, BufferedIOBase]:
    """Streams from and to the parent, which nothing else reads or writes by their old numbers."""
    questions = os.fdopen(os.dup(sys.stdin.fileno()), encoding="utf-8")
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, sys.stdin.fileno())
    os.close(nothing)
    return questions, answers


def capabilities_as_json(implementation: Adapter) -> dict[str, object]:
    """An adapter's capabilities as JSON."""
    capabilities = implementation.capabilities()
    if not isinstance(capabilities, Capabilities):
        raise TypeError(f"capabilities() returned a {type(capabilities).__name__}.")
    return {
        key: sorted(value) if isinstance(value, frozenset) else value
        for key, value in asdict(capabilities).items()
    }


def reply(implementation: Adapter, line: str, device: str) -> bytes:
    """The answer to a question, or the reason why there is none, as a file."""
    case, flavour, token = json.loads(line)
    try:
        return answer_file(answered(implementation, CASES[case], flavour, device), token)
    except Exception as error:  # an adapter may raise anything, and the run goes on
        return complaint_file(*complaint_of(error), token)


def serve() -> None:
    """Answer until the parent closes the pipe."""
    path, device = sys.argv[1:3]
    questions, answers = channels()
    implementation = adapter(path)
    send(answers, capabilities_file(capabilities_as_json(implementation)))
    for line in questions:
        send(answers, reply(implementation, line, device))


if __name__ == "__main__":
    serve()
