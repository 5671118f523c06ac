"""`python -m kfac_scratch.conformance {run,judge,export,report,mutants,prove}`."""

import argparse
import sys
from pathlib import Path

from kfac_scratch.conformance import isolation, report
from kfac_scratch.conformance.families import CASES, family
from kfac_scratch.conformance.judge import Result
from kfac_scratch.conformance.selection import expected_failures, tasks


def run(args: argparse.Namespace) -> int:
    """Judge an adapter, print the table, write files."""
    place = isolation.Place(args.adapter, args.python, args.device, args.timeout)
    chosen, expected = tasks(args.k, args.tag), expected_failures(args.expected)
    isolated, results = isolation.Isolated(place), []
    capabilities = isolated.running().capabilities
    for result in isolated.run(chosen):
        results.append(result)
        if sys.stderr.isatty():
            print(f"\r{len(results)}/{len(chosen)} {result.case:60}", end="", file=sys.stderr)
    return finish(args, capabilities, results, {t: r for t, r in expected.items() if t in chosen})


def finish(
    args: argparse.Namespace,
    capabilities: dict[str, object],
    results: list[Result],
    expected: dict[tuple[str, str], str],
) -> int:
    """Print and write a report; 1 if anything is not as expected."""
    families = {name: family(case) for name, case in CASES.items()}
    made = report.Report(capabilities, results, families, expected, report.about())
    print(report.table(made))
    report.write(made, args.json, args.junit)
    return 1 if made.surprises() else 0


def show(args: argparse.Namespace) -> int:
    """Print the table of a stored result file."""
    print(report.table(report.from_json(args.results.read_text(encoding="utf-8"))))
    return 0


def prove(args: argparse.Namespace) -> int:
    """Prove findings of the audit: their cases fail, and pass with the patch."""
    from kfac_scratch.conformance.audit import prove as audit

    proofs = [
        (name, proof) for name in args.finding or audit.names() for proof in audit.prove(name)
    ]
    for name, proof in proofs:
        state = "proven" if proof.holds else "NOT PROVEN"
        before, after = proof.before, proof.after
        words = f"{before.verdict} -> {after.verdict}"
        print(f"{state} {name}: {before.case} [{before.flavour}] {words}. {before.words}")
    return 0 if all(proof.holds for _, proof in proofs) else 1


def explain(args: argparse.Namespace) -> int:
    """Say which finding explains which failure of a result file of the audit."""
    from kfac_scratch.conformance.audit import explain as audit

    for key, reasons in audit.store(args.results).items():
        print(f"{key}: {', '.join(reasons) or 'unexplained'}")
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    main = argparse.ArgumentParser(prog="python -m kfac_scratch.conformance", description=__doc__)
    commands = main.add_subparsers(required=True)
    files = argparse.ArgumentParser(add_help=False)
    files.add_argument("--json", type=Path, help="write the results here")
    files.add_argument("--junit", type=Path, help="write JUnit's XML here")

    command = commands.add_parser("run", parents=[files], help="judge an adapter")
    command.add_argument("--adapter", required=True, help="package.module:Class")
    command.add_argument("--python", default=sys.executable, help="its environment's interpreter")
    command.add_argument("--device", default="cpu")
    command.add_argument("--timeout", type=float, default=60.0, help="seconds for one case")
    command.add_argument("-k", default="", help="part of an identifier, or a pattern with *")
    command.add_argument("--tag", action="append", default=[], help="may be repeated")
    command.add_argument("--expected", type=Path, help="TOML file of expected failures")
    command.set_defaults(call=run)

    command = commands.add_parser("report", help="print the table of a result file")
    command.add_argument("results", type=Path)
    command.set_defaults(call=show)

    command = commands.add_parser("explain", help="which finding of the audit explains a failure")
    command.add_argument("results", type=Path)
    command.set_defaults(call=explain)

    command = commands.add_parser("prove", help="prove findings of the audit")
    command.add_argument("finding", nargs="*")
    command.add_argument("--store", action="store_true", help="write the proofs for the site")
    command.set_defaults(call=prove)
    return main


def main() -> int:
    """Run a command; its exit status."""
    args = parser().parse_args()
    try:
        status: int = args.call(args)
    except (ValueError, isolation.AdapterFailed, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return status


if __name__ == "__main__":
    sys.exit(main())
