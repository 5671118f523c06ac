"""Skeletons: a new case family, adapter or finding, as a file that runs as it stands.

What is written passes before anything is changed, so that whatever fails later is a change's fault.
"""

import re
from collections.abc import Callable
from pathlib import Path

from kfac_scratch.conformance import adapters
from kfac_scratch.conformance.audit import findings
from kfac_scratch.conformance.audit.stale import AUDIT, COMMAND
from kfac_scratch.conformance.cases import families
from kfac_scratch.conformance.commands.templates import FAMILY, FINDING, SHAPES

FOLDERS: dict[str, Path] = {
    "case": Path(families.__file__).parent,
    "adapter": Path(adapters.__file__).parent,
    "finding": Path(findings.__file__).parent,
}
TEMPLATES = {"case": FAMILY, "finding": FINDING}
KINDS = tuple(FOLDERS)


def write_skeleton(
    kind: str, name: str, folder: Path | None = None, shape: str = "factors"
) -> tuple[Path, list[str]]:
    """Write a file that runs as it stands; its path, and the commands that come next.

    Args:
        kind: One of `KINDS`.
        name: Of the module. A finding's begins with its library's, `library_slug`.
        folder: Where; by default the folder in which this package finds it without being told.
        shape: What an adapter's implementation shows, one of `SHAPES`.

    Raises:
        ValueError: If the name is no module's, the file exists, or what is no adapter has a shape.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(f"{name!r} is no name: lower-case letters, digits and _, a letter first.")
    if kind == "finding" and "_" not in name:
        raise ValueError(f"{name!r}: a finding is called library_slug, for instance toy_half.")
    path = (folder or FOLDERS[kind]) / f"{name}.py"
    if path.exists():
        raise ValueError(f"{path} exists already.")
    module = FURTHER_MODULE[kind](name) if folder is None else name
    words = {"name": name, "dashed": name.replace("_", "-"), "library": name.split("_")[0]}
    if kind != "adapter" and shape != "factors":
        raise ValueError(f"A {kind} has no shape: leave out --shape {shape}, which adapters have.")
    template = SHAPES[shape] if kind == "adapter" else TEMPLATES[kind]
    text = template.substitute(words | {"module": module})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    elsewhere = kind == "adapter" and folder is not None
    return path, _after_adapter_elsewhere(module) if elsewhere else FURTHER[kind](name, module)


def _after_adapter_elsewhere(module: str) -> list[str]:
    """What to do next with an adapter outside of the package."""
    return [
        f"{COMMAND} run --adapter {module}:Adapter",
        f"{COMMAND} run --adapter {module}:Adapter --json {module}.json",
        f"pytest --pyargs kfac_scratch.conformance --kfac-adapter {module}:Adapter",
    ]


def _after_case(name: str, module: str) -> list[str]:
    dashed = name.replace("_", "-")
    return [
        f"{COMMAND} show '{dashed}-*'",
        f"{COMMAND} run --adapter kfac_scratch.conformance.adapters.ours:Adapter --tag {dashed}",
        "pytest tests/conformance",
        f"{COMMAND} stale",
    ]


def _after_adapter(name: str, module: str) -> list[str]:
    return [
        f"{COMMAND} run --adapter {module}:Adapter",
        f"{COMMAND} run --adapter {module}:Adapter --json {AUDIT}/results/{name}.json",
        "pytest tests/conformance",
    ]


def _after_finding(name: str, module: str) -> list[str]:
    return [
        f"{COMMAND} prove {name}",
        f"{COMMAND} prove --store {name}",
        "pytest tests/conformance",
    ]


FURTHER: dict[str, Callable[[str, str], list[str]]] = {
    "case": _after_case,
    "adapter": _after_adapter,
    "finding": _after_finding,
}
FURTHER_MODULE: dict[str, Callable[[str], str]] = {
    "case": lambda name: f"{families.__name__}.{name}",
    "adapter": lambda name: f"{adapters.__name__}.{name}",
    "finding": lambda name: f"{findings.__name__}.{name}",
}
