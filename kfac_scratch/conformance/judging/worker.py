"""A process for an adapter: `python -m (this module) pkg.mod:Adapter cpu`.

The parent (`isolation`) writes a line of JSON, `[case, flavour]`, and gets back a line of JSON, the
verdict. What an adapter prints goes to the error stream, so that it cannot be taken for an answer.
"""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict

from kfac_scratch.conformance.audit.prove import adapter
from kfac_scratch.conformance.cases.families import CASES
from kfac_scratch.conformance.judging.harness import verdict
from kfac_scratch.conformance.protocol import Adapter, Capabilities


def answers() -> Callable[[object], None]:
    """A function that sends JSON to the parent, by a stream that nothing else can write to."""
    stream = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def send(value: object) -> None:
        stream.write(json.dumps(value) + "\n")
        stream.flush()

    return send


def capabilities_as_json(implementation: Adapter) -> dict[str, object]:
    """An adapter's capabilities as JSON."""
    capabilities = implementation.capabilities()
    if not isinstance(capabilities, Capabilities):
        raise TypeError(f"capabilities() returned a {type(capabilities).__name__}.")
    return {
        key: sorted(value) if isinstance(value, frozenset) else value
        for key, value in asdict(capabilities).items()
    }


def serve() -> None:
    """Answer until the parent closes the pipe."""
    path, device = sys.argv[1:3]
    send = answers()
    implementation = adapter(path)
    send(capabilities_as_json(implementation))
    for line in sys.stdin:
        case, flavour = json.loads(line)
        send(verdict(implementation, CASES[case], flavour, device).as_json())


if __name__ == "__main__":
    serve()
