"""`python -m kfac_scratch.conformance COMMAND`: judge, write cases, audit.

Exit status: 0 if everything is as it should be, 1 if something is not, 2 for a mistake in the
command or in a file, 130 if it was interrupted.
"""

import argparse
import sys

from kfac_scratch.conformance.commands.auditors import add_auditing_commands
from kfac_scratch.conformance.commands.authors import add_authoring_commands
from kfac_scratch.conformance.commands.implementers import add_judging_commands
from kfac_scratch.conformance.judging.isolation import AdapterFailed


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m kfac_scratch.conformance", description=__doc__)
    commands = made.add_subparsers(required=True)
    add_judging_commands(commands)
    add_authoring_commands(commands)
    add_auditing_commands(commands)
    return made


def main() -> int:
    """Run a command; its exit status."""
    args = parser().parse_args()
    try:
        status: int = args.call(args)
    except (ValueError, AdapterFailed, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing was written.", file=sys.stderr)
        return 130
    return status


if __name__ == "__main__":
    sys.exit(main())
