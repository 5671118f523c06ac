"""Commands for who writes cases, adapters and findings: `skeleton`, `show`, `ties`, `stale`."""

import argparse
import json
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from textwrap import fill
from typing import Any

from kfac_scratch.conformance.audit.stale import all_stale, stale_vectors
from kfac_scratch.conformance.cases.case import Case
from kfac_scratch.conformance.cases.families import CASES, family
from kfac_scratch.conformance.cases.questions import case_digest
from kfac_scratch.conformance.cases.theorems import THEOREMS
from kfac_scratch.conformance.commands.skeletons import KINDS, write_skeleton
from kfac_scratch.conformance.commands.templates import SHAPES
from kfac_scratch.conformance.judging import truth
from kfac_scratch.conformance.judging.flags import MEANINGS, flags
from kfac_scratch.conformance.vectors.export import TIES, exported, known_ties, new_ties
from kfac_scratch.conformance.vocabulary import Flavour


def add_authoring_commands(commands: Any) -> None:
    """Put these commands on a command line, the subparsers of `argparse`."""
    command = commands.add_parser("skeleton", help="write a new file that runs as it stands")
    command.add_argument("kind", choices=KINDS)
    command.add_argument("name", help="of the module: letters, digits and _")
    command.add_argument("--folder", type=Path, help="where; default: where this package looks")
    words = "what an adapter's implementation shows; default: its factors"
    command.add_argument("--shape", choices=SHAPES, default="factors", help=words)
    command.set_defaults(call=skeleton_command)

    command = commands.add_parser(
        "show", help="what a case asks, why it is exact, and which mistakes it catches"
    )
    command.add_argument("case", nargs="+", help="an identifier, or a pattern with *")
    command.set_defaults(call=show_command)

    command = commands.add_parser("ties", help="numbers of new cases that vectors have to list")
    command.add_argument("case", nargs="*", help="by default those that the vectors lack")
    command.add_argument("--write", action="store_true", help="list them in ties.json")
    command.set_defaults(call=ties_command)

    command = commands.add_parser("stale", help="what is stored and older than the cases")
    command.set_defaults(call=stale_command)


def skeleton_command(args: argparse.Namespace) -> int:
    """Write a case family, an adapter or a finding that runs as it stands."""
    path, further = write_skeleton(args.kind, args.name, args.folder, args.shape)
    print(f"{path}\n\nIt runs as it stands. Change it, then:\n")
    print("\n".join(f"    {line}" for line in further))
    return 0


def show_command(args: argparse.Namespace) -> int:
    """Print what some cases ask."""
    print("\n\n".join(described_case(case) for case in chosen_cases(args.case)))
    return 0


def ties_command(args: argparse.Namespace) -> int:
    """Print which numbers of some cases must be listed; 1 if any are not, and nobody lists them."""
    cases = chosen_cases(args.case) if args.case else unexported()
    vectors, known = {case.id for case in exported()}, known_ties()
    wanted = new_ties([case for case in cases if case.id in vectors])
    missing = {name: ties for name, ties in wanted.items() if ties != known.get(name)}
    for name, tensors in missing.items():
        print(f"{name}: {', '.join(tensors)}")
    if args.write and missing:
        text = json.dumps({**known, **missing}, indent=0)
        TIES.write_text(text + "\n", encoding="utf-8")
    state = f"written to {TIES.name}" if args.write else "not listed"
    print(f"{len(cases)} cases looked at; {len(missing)} have ties that are {state}.")
    return 1 if missing and not args.write else 0


def unexported() -> list[Case]:
    """Cases that the shipped vectors lack, or have in another form."""
    state = stale_vectors()
    return [CASES[name] for name in (*state.added, *state.changed)]


def stale_command(args: argparse.Namespace) -> int:
    """Print what is older than the cases, and the command that makes it again; 1 if anything is."""
    found = all_stale()
    print("\n".join(map(str, found)) or "Nothing that is stored is older than the cases.")
    return 1 if found else 0


def chosen_cases(patterns: Sequence[str]) -> list[Case]:
    """Cases by identifier or pattern, in the catalogue's order.

    Raises:
        ValueError: Naming a pattern that no case matches.
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in CASES):
            near = [name for name in CASES if pattern.strip("*") in name][:3]
            hint = f" Did you mean {', '.join(near)}?" if near else ""
            raise ValueError(f"No case is called {pattern!r}.{hint}")
    return [c for name, c in CASES.items() if any(fnmatchcase(name, p) for p in patterns)]


def described_case(case: Case) -> str:
    """What a case asks, for people."""
    data = case.build()
    batches = f", in mini-batches of {', '.join(map(str, case.batches))}" if case.batches else ""
    asked = ", ".join(f"{flavour} {kind}" for flavour, kind in case.flavours.items())
    damping = case.damping and f"{case.damping[0]} inverse with damping {case.damping[1]:g}"
    sizes = truth.sizes(case, data)
    lines = [
        f"{case.id} (family {family(case)}, digest {case_digest(case)})",
        f"  expected  {asked}: {damping or case.part}, {case.fisher} Fisher, {case.dtype}",
        *_network(case),
        f"  loss      {_loss(case)}, inputs {list(data.X.shape)}{batches}",
        *[f"  sizes     {name}: {_letters(sizes[name])}" for name in case.judged],
        f"  tags      {', '.join(case.tags) or '-'}",
        f"  theorem   {case.theorem}:",
        _indented(THEOREMS[case.theorem]),
        "  flags     mistakes that it catches, and the change relative to the largest entry:",
        *[_flag(key, changes) for key, changes in flags(case).items()],
    ]
    return "\n".join(lines)


def _flag(key: str, changes: Mapping[Flavour, float]) -> str:
    """A flag with its meaning, and its effect on every flavour that catches it."""
    by_flavour = ", ".join(f"{flavour} {change:.2g}" for flavour, change in changes.items())
    return _indented(f"{key} ({by_flavour}): {MEANINGS[key]}")


def _network(case: Case) -> list[str]:
    """One line for each operation."""
    lines = []
    for i, op in enumerate(case.ops):
        settings = ", ".join(f"{key} {value}" for key, value in op.settings)
        source = f" of {', '.join(map(str, op.inputs))}" if op.inputs else ""
        lines.append(f"  {f'op {i}':8}  {op.kind} {op.name}{source} {settings}".rstrip())
    return lines


def _loss(case: Case) -> str:
    weight = f", weights {list(case.loss.weight)}" if case.loss.weight else ""
    operator = " of a differential operator" if case.operator else ""
    return f"{case.loss.kind}, {case.loss.reduction}{weight}{operator}"


def _letters(sizes: dict[str, int]) -> str:
    return ", ".join(f"{letter} = {size}" for letter, size in sizes.items())


def _indented(text: str) -> str:
    return fill(text, 92, initial_indent=" " * 12, subsequent_indent=" " * 12)
