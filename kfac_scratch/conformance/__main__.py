"""`python -m kfac_scratch.conformance {run,judge,export,report,mutants,prove,explain}`."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from kfac_scratch.conformance.cases.families import CASES, family
from kfac_scratch.conformance.cases.selection import expected_failures, tasks
from kfac_scratch.conformance.judging import isolation, report
from kfac_scratch.conformance.judging.judge import Result


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
    families = {name: family(case) for name, case in CASES.items()}
    expected = {task: reason for task, reason in expected.items() if task in chosen}
    return finish(args, capabilities, results, families, expected)


def finish(
    args: argparse.Namespace,
    capabilities: Mapping[str, object],
    results: Sequence[Result],
    families: Mapping[str, str],
    expected: Mapping[tuple[str, str], str] | None = None,
) -> int:
    """Print and write a report; 1 if anything is not as expected."""
    made = report.Report(capabilities, results, families, expected or {}, report.about())
    report.write(made, args.json, args.junit)
    print(report.table(made))
    return 1 if made.surprises() else 0


def show(args: argparse.Namespace) -> int:
    """Print the table of a stored result file."""
    print(report.table(report.from_json(args.results.read_text(encoding="utf-8"))))
    return 0


def export(args: argparse.Namespace) -> int:
    """Write the reference vectors, computed by this package's truth."""
    from kfac_scratch.conformance.vectors.export import export as write

    write(args.directory)
    print(f"{len(list(args.directory.glob('*.safetensors')))} cases in {args.directory}")
    return 0


def judge(args: argparse.Namespace) -> int:
    """Judge what a port wrote, knowing nothing but files."""
    from kfac_scratch.conformance.vectors import files as vectors

    references = vectors.read(args.vectors or vectors.SHIPPED)
    claims = vectors.about(args.results)
    chosen = [reference for name, reference in references.items() if args.k in name]
    results = vectors.judge_all(args.results, chosen)
    families = {name: str(r.entry["family"]) for name, r in references.items()}
    capabilities = {"name": claims.name or args.results.name, "version": claims.version}
    return finish(args, capabilities, results, families)


def prove(args: argparse.Namespace) -> int:
    """Prove findings of the audit: their cases fail, and pass with the patch."""
    from kfac_scratch.conformance.audit import proofs as stored
    from kfac_scratch.conformance.audit import prove as audit

    holding = True
    for name in args.finding or audit.names():
        proofs = audit.prove(name)
        if args.store:
            stored.store(name, proofs)
        for proof in proofs:
            print(f"{name}: {proof}")
            holding = holding and proof.holds
    return 0 if holding else 1


def mutants(args: argparse.Namespace) -> int:
    """Show that the oracle rejects every mutant, and which case does."""
    from kfac_scratch.conformance.selftest.mutants import catalogue, run_mutants

    chosen = [m for m in catalogue() if args.k in m.name]
    survivors = 0
    for rejection in run_mutants(chosen):
        print(rejection, flush=True)
        survivors += rejection.result is None
    print(f"{len(chosen) - survivors} of {len(chosen)} mutants rejected.")
    return 1 if survivors else 0


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

    command = commands.add_parser("export", help="write the reference vectors")
    command.add_argument("directory", type=Path)
    command.set_defaults(call=export)

    command = commands.add_parser("judge", parents=[files], help="judge the results of a port")
    command.add_argument("results", type=Path, help="folder with a safetensors file per case")
    command.add_argument("--vectors", type=Path, help="what the port read; default: as shipped")
    command.add_argument("-k", default="", help="part of an identifier")
    command.set_defaults(call=judge)

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

    command = commands.add_parser("mutants", help="show that every mutant is rejected, and by what")
    command.add_argument("-k", default="", help="part of a mutant's name")
    command.set_defaults(call=mutants)
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
