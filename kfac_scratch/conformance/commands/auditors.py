"""Commands for who audits: `prove`, `explain`, `mutants`."""

import argparse
from pathlib import Path
from typing import Any

from kfac_scratch.conformance.audit import explain, proofs, prove
from kfac_scratch.conformance.selftest.mutants import catalogue, run_mutants


def add_auditing_commands(commands: Any) -> None:
    """Put these commands on a command line, the subparsers of `argparse`."""
    command = commands.add_parser("prove", help="prove findings of the audit")
    command.add_argument("finding", nargs="*")
    command.add_argument("--store", action="store_true", help="write the proofs for the site")
    command.set_defaults(call=prove_command)

    command = commands.add_parser("explain", help="which finding of the audit explains a failure")
    command.add_argument("results", type=Path)
    command.set_defaults(call=explain_command)

    command = commands.add_parser("mutants", help="show that every mutant is rejected, and by what")
    command.add_argument("-k", default="", help="part of a mutant's name")
    command.set_defaults(call=mutants_command)


def prove_command(args: argparse.Namespace) -> int:
    """Prove findings of the audit: their cases fail, and pass with the patch.

    Raises:
        ValueError: If there is no finding of a name.
    """
    unknown = sorted({*args.finding} - {*prove.finding_names()})
    if unknown:
        raise ValueError(f"There is no finding {', '.join(unknown)}.")
    holding = True
    for name in args.finding or prove.finding_names():
        found = prove.prove(name)
        if args.store:
            proofs.store_proofs(name, found)
        for proof in found:
            print(f"{name}: {proof}")
            holding = holding and proof.holds
    return 0 if holding else 1


def explain_command(args: argparse.Namespace) -> int:
    """Say which finding explains which failure of a result file; one of the audit's is stored."""
    found, stored = explain.store_explanations(args.results)
    for key, reasons in found.items():
        print(f"{key}: {', '.join(reasons) or 'unexplained'}")
    print(f"stored in {stored}" if stored else "not stored: this is no result file of the audit")
    return 0


def mutants_command(args: argparse.Namespace) -> int:
    """Show that the oracle rejects every mutant, and which case does.

    Raises:
        ValueError: If no mutant is chosen.
    """
    chosen = [m for m in catalogue() if args.k in m.name]
    if not chosen:
        raise ValueError(f"No mutant matches {args.k!r}.")
    survivors = 0
    for rejection in run_mutants(chosen):
        print(rejection, flush=True)
        survivors += rejection.result is None
    print(f"{len(chosen) - survivors} of {len(chosen)} mutants rejected.")
    return 1 if survivors else 0
