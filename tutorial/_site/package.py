"""The package as its files describe it: modules, folders, and which module uses which.

Every list of modules is made from this: the API pages, the reading map, the head of a chapter and
README's table. Files are parsed and never imported, so the standard library is enough. The first
paragraph of a docstring is what a list says of a module; that of `__init__.py` speaks for a folder.

    python tutorial/_site/package.py  # writes README's table anew
"""

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "kfac_scratch"
README = ROOT / "README.md"
CATALOGUES = {"consumers", "findings", "mutations"}  # many entries of one kind: no page each
START, END = "<!-- modules: python tutorial/_site/package.py -->", "<!-- end of modules -->"


@dataclass(frozen=True)
class Module:
    """A file of the package. That of a folder is its `__init__.py`."""

    path: Path

    @property
    def name(self) -> str:
        """Dotted, below the package, whose own name is empty."""
        place = self.path.parent if self.is_folder else self.path.with_suffix("")
        return ".".join(place.relative_to(PACKAGE).parts)

    @property
    def full_name(self) -> str:
        """What one imports."""
        return f"{PACKAGE.name}.{self.name}".rstrip(".")

    @property
    def is_folder(self) -> bool:
        """Whether other files lie in it."""
        return self.path.name == "__init__.py"

    @property
    def folder(self) -> str:
        """Name of the folder that it lies in; a folder lies in itself."""
        return self.name if self.is_folder else self.name.rpartition(".")[0]

    @cached_property
    def syntax(self) -> ast.Module:
        """The parsed file."""
        return ast.parse(self.path.read_text(encoding="utf-8"))

    @cached_property
    def used(self) -> list[str]:
        """Modules of the package that it imports from."""
        return list(used(self.syntax))

    @property
    def summary(self) -> str:
        """First paragraph of its docstring, on one line."""
        return _first_paragraph(ast.get_docstring(self.syntax))

    @property
    def defined(self) -> dict[str, str]:
        """Public functions, classes and values with a docstring, and its first paragraph."""
        result = {}
        for node, after in zip(self.syntax.body, [*self.syntax.body[1:], None], strict=True):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                result[node.name] = ast.get_docstring(node)
            elif isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(after, ast.Expr):
                target = node.targets[0] if isinstance(node, ast.Assign) else node.target
                text = getattr(after.value, "value", None)
                result[getattr(target, "id", "_")] = text if isinstance(text, str) else None
        return {n: _first_paragraph(d) for n, d in result.items() if d and not n.startswith("_")}

    @property
    def exported(self) -> list[str]:
        """Names in `__all__`."""
        for node in self.syntax.body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
                return ast.literal_eval(node.value)
        return []


def _first_paragraph(text: str | None) -> str:
    return " ".join((text or "").partition("\n\n")[0].split())


@cache
def files() -> dict[str, Module]:
    """Every module and folder that has a page, by name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        module = Module(path)
        entry = CATALOGUES & {*path.relative_to(PACKAGE).parts} and not module.is_folder
        if not entry and (module.is_folder or not path.stem.startswith(("_", "test_"))):
            found[module.name] = module
    return found


def origin(base: str, name: str) -> str:
    """The module that defines what `from kfac_scratch.<base> import <name>` gives."""
    below = f"{base}.{name}".lstrip(".")
    if below in files():
        return below
    if base in files() and files()[base].is_folder:
        for node in ast.walk(files()[base].syntax):
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if name == (alias.asname or alias.name):
                        return origin(_below(node.module), alias.name)
    while base not in files():  # an entry of a catalogue
        base = base.rpartition(".")[0]
    return base


def _below(module: str | None) -> str:
    return (module or "").removeprefix(PACKAGE.name).lstrip(".")


def used(syntax: ast.AST) -> Iterator[str]:
    """Modules of the package that a file imports from, wherever it gets their names."""
    for node in ast.walk(syntax):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE.name:
            yield from (origin(_below(node.module), alias.name) for alias in node.names)
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == PACKAGE.name:
                    yield origin("", _below(alias.name))


def room(name: str) -> str:
    """The file or folder right below the package that a module belongs to."""
    return name.partition(".")[0]


def _floors(nodes: Iterable[tuple[str, str]]) -> dict[str, int]:
    """Each node's floor, one above the highest that it imports, from pairs (node, module)."""
    edges: dict[str, set[str]] = {}
    label = {module: node for node, module in nodes}
    for module, node in label.items():
        others = {label[name] for name in files()[module].used if name in label}
        edges[node] = (edges.get(node, set()) | others) - {node}
    floors: dict[str, int] = {}
    for node in TopologicalSorter(edges).static_order():
        floors[node] = 1 + max((floors[other] for other in edges[node]), default=-1)
    return floors


@cache
def modules() -> list[Module]:
    """All files but folders, every one after those that it imports."""
    named = [name for name, module in files().items() if not module.is_folder]
    rooms, floors = _floors((room(n), n) for n in named), _floors((n, n) for n in named)
    return [
        files()[n] for n in sorted(named, key=lambda n: (rooms[room(n)], room(n), floors[n], n))
    ]


@cache
def folders() -> dict[str, list[Module]]:
    """Modules by the folder in which they lie, in reading order; the package's own name is empty."""
    inside = {name: [] for name, module in files().items() if module.is_folder}
    for module in modules():
        inside[module.folder].append(module)
    first = {name: place for place, name in enumerate(dict.fromkeys(m.folder for m in modules()))}
    return {name: inside[name] for name in sorted(inside, key=lambda n: (first.get(n, 999), n))}


def forget() -> None:
    """Read the files again at the next call."""
    for function in (files, modules, folders):
        function.cache_clear()


def tests(name: str) -> str:
    """Where a module is tested: the mirrored file, or else that of the nearest folder, or ''."""
    *above, stem = name.split(".")
    mirrored = Path("tests", *above, f"test_{stem}.py")
    if (ROOT / mirrored).exists():
        return mirrored.as_posix()
    for depth in range(len(above) + 1, 0, -1):
        folder = Path("tests", *[*above, stem][:depth])
        if (ROOT / folder).is_dir():
            return f"{folder.as_posix()}/"
        file = folder.with_name(f"test_{folder.name}.py")
        if (ROOT / file).exists():
            return file.as_posix()
    return ""


# ------------------------------------------------------------------ README
def table() -> str:
    """What is here: a row for every file and folder of the package, in reading order."""
    rows = ["| In `kfac_scratch/` | What it is | Its modules |", "|---|---|---|"]
    for name in dict.fromkeys(room(module.name) for module in modules()):
        module = files()[name]
        shown = [f"`{m.name.rpartition('.')[2]}`" for m in folders().get(name, [])]
        below = [f.rpartition(".")[2] for f in folders() if f.rpartition(".")[0] == name]
        shown += [f"`{folder}/`" for folder in sorted(below)]
        mark = "/" if module.is_folder else ""
        rows.append(f"| `{name}{mark}` | {module.summary} | {', '.join(shown)} |")
    return "\n".join(rows)


def with_table(text: str) -> str:
    """A text whose table between the marks is up to date."""
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n\n{table()}\n\n{END}{after}"


if __name__ == "__main__":
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
