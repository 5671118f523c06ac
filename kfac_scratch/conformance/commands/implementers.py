"""Commands for who is judged: `run`, `judge`, `report`, `export`."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from kfac_scratch.conformance.audit.stale import stale_run
from kfac_scratch.conformance.cases.families import CASES, family
from kfac_scratch.conformance.cases.questions import digests
from kfac_scratch.conformance.cases.selection import expected_failures, tasks
from kfac_scratch.conformance.judging import isolation, report
from kfac_scratch.conformance.judging.judge import Result
from kfac_scratch.conformance.judging.narrowing import narrowed
from kfac_scratch.conformance.vectors import files
from kfac_scratch.conformance.vectors.conventions import VECTORS_FORMAT
from kfac_scratch.conformance.vectors.export import export
from kfac_scratch.conformance.vocabulary import Task

MOST_SECONDS = 1e6  # that a case may be waited for


def add_judging_commands(commands: Any) -> None:
    """Put these commands on a command line, the subparsers of `argparse`."""
    written = argparse.ArgumentParser(add_help=False)
    written.add_argument("--json", type=Path, help="write the results here")
    written.add_argument("--junit", type=Path, help="write JUnit's XML here")
    _add_run(commands.add_parser("run", parents=[written], help="judge an adapter"))

    command = commands.add_parser("judge", parents=[written], help="judge the results of a port")
    command.add_argument("results", type=Path, help="folder with a safetensors file per case")
    command.add_argument("--vectors", type=Path, help="what the port read; default: as shipped")
    command.add_argument("-k", default="", help="part of an identifier")
    command.set_defaults(call=judge_command)

    command = commands.add_parser("report", help="print the table of a result file")
    command.add_argument("results", type=Path)
    command.set_defaults(call=report_command)

    command = commands.add_parser("export", help="write the reference vectors")
    command.add_argument("directory", type=Path)
    command.set_defaults(call=export_command)


def _add_run(command: argparse.ArgumentParser) -> None:
    command.add_argument("--adapter", required=True, help="package.module:Class")
    command.add_argument("--python", default=sys.executable, help="its environment's interpreter")
    command.add_argument("--device", default="cpu")
    command.add_argument("--timeout", type=float, default=60.0, help="seconds for one case")
    command.add_argument("-k", default="", help="part of an identifier, or a pattern with *")
    command.add_argument("--tag", action="append", default=[], help="may be repeated")
    command.add_argument("--expected", type=Path, help="TOML file of expected failures")
    command.set_defaults(call=run_command)


def run_command(args: argparse.Namespace) -> int:
    """Judge an adapter, print the table, write files.

    Raises:
        ValueError: If an option or a file makes no sense.
    """
    if not 0 < args.timeout <= MOST_SECONDS:
        raise ValueError(f"--timeout {args.timeout:g}: expected seconds, up to {MOST_SECONDS:g}.")
    report.check_writable(args.json, args.junit)
    torch.set_num_threads(1)  # the judge's; the adapter's process has the other core
    place = isolation.Place(args.adapter, args.python, args.device, args.timeout)
    chosen, expected = tasks(args.k, args.tag), expected_failures(args.expected)
    isolated, results = isolation.Isolated(place), []
    try:
        capabilities = isolated.running().capabilities
        for result in isolated.run(chosen):
            results.append(result)
            if sys.stderr.isatty():
                print(f"\r{len(results)}/{len(chosen)} {result.case:60}", end="", file=sys.stderr)
    finally:
        isolated.stop()
    results = narrowed(results, CASES)
    families = {name: family(case) for name, case in CASES.items()}
    wanted: Mapping[Task, str] = {t: reason for t, reason in expected.items() if t in chosen}
    about = report.environment() | {"adapter": args.adapter}
    made = report.Report(capabilities, results, families, wanted, about, digests(CASES))
    return finish(args, made)


def finish(args: argparse.Namespace, made: report.Report) -> int:
    """Print and write a report; 1 if anything is not as expected."""
    print(report.table(made))
    report.write(made, args.json, args.junit)
    return 1 if made.surprises() else 0


def report_command(args: argparse.Namespace) -> int:
    """Print the table of a stored result file, and by which cases it is older than today's."""
    stored = report.read_report(args.results)
    print(report.table(stored))
    state = stale_run(stored)
    if state:
        print(f"\n{args.results.name} is {state}.")
    return 0


def export_command(args: argparse.Namespace) -> int:
    """Write the reference vectors, computed by this package's truth."""
    export(args.directory)
    print(f"{len(list(args.directory.glob('*.safetensors')))} cases in {args.directory}")
    return 0


def judge_command(args: argparse.Namespace) -> int:
    """Judge what a port wrote, knowing nothing but files.

    Raises:
        ValueError: If a file is malformed, or no case is chosen.
    """
    report.check_writable(args.json, args.junit)
    references = files.read(args.vectors or files.SHIPPED)
    claims = files.claims_of(args.results)
    chosen = [reference for name, reference in references.items() if args.k in name]
    if not chosen:
        raise ValueError(f"No case of the vectors matches {args.k!r}.")
    results: Sequence[Result] = files.judge_all(args.results, chosen)
    families = {name: str(r.entry["family"]) for name, r in references.items()}
    capabilities = {"name": claims.name or args.results.name, "version": claims.version}
    about = report.environment() | {"vectors": VECTORS_FORMAT}
    cases = {name: reference.digest for name, reference in references.items()}
    return finish(args, report.Report(capabilities, results, families, {}, about, cases))
