"""The pages about the package, as Markdown: overview, public names, one page for each file and folder.

All of it is made from `package`. The one thing that is stated is which folders are shown together:
`extra.api` in mkdocs.yml maps the title of a group to its folders. A folder belongs to the first
group that names it, and one that no group names stops the build.
"""

import ast
import posixpath
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatch

from package import Module, files, folders, origin, tests

PUBLIC = "api/kfac_scratch.md"


class GroupError(Exception):
    """A folder without a group, or a group without a folder."""


def grouped(stated: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """The folders of each group, in reading order, from the patterns that mkdocs.yml states."""
    groups: dict[str, list[str]] = {title: [] for title in stated}
    for name in folders():
        place = name.replace(".", "/") or "."
        fitting = [t for t, patterns in stated.items() if any(fnmatch(place, p) for p in patterns)]
        if not fitting:
            raise GroupError(
                f"The folder kfac_scratch/{place} stands in no group of the API: add it to one "
                "in mkdocs.yml, extra.api."
            )
        groups[fitting[0]].append(name)
    for title, names in groups.items():
        if not names:
            raise GroupError(f"mkdocs.yml, extra.api: no folder fits {title}: {stated[title]}.")
    return groups


def uri(name: str) -> str:
    """The page of a file or folder."""
    return f"api/{name}.md" if name else PUBLIC


# ------------------------------------------------------------------ navigation
def nav(stated: Mapping[str, Sequence[str]]) -> list[dict]:
    """Entries of the navigation: the public names, then one section for each group."""
    sections = [{title: _section(names)} for title, names in grouped(stated).items()]
    return [{"Public names": PUBLIC}, *sections]


def _section(names: Sequence[str]) -> list[dict]:
    """The folder that holds all others directly, these as sections of their own."""
    top = posixpath.commonpath([f"/{name.replace('.', '/')}" for name in names])
    above = top.strip("/").replace("/", ".")
    entries: list[dict] = []
    for name in sorted(names, key=lambda n: n != above):  # stable: the others stay in order
        pages = [{"About this folder": uri(name)}] if name else []
        pages += [{m.name.removeprefix(f"{name}."): uri(m.name)} for m in folders()[name]]
        label = name.removeprefix(f"{above}.")
        entries += pages if name == above else [{label: pages}]
    return entries


# ------------------------------------------------------------------ pages
def pages() -> dict[str, str]:
    """Markdown of all pages below the overview."""
    return {uri(name): _folder(m) if m.is_folder else _module(m) for name, m in files().items()}


def _module(module: Module) -> str:
    tested = f"Tests: `{tests(module.name)}`\n{{ .tests }}\n\n" if tests(module.name) else ""
    return f"# {module.name}\n\n{tested}::: {module.full_name}\n"


def _folder(module: Module) -> str:
    """Its docstring, what it defines itself, its command line, its modules, its public names."""
    functions = (ast.FunctionDef, ast.ClassDef)
    own = [n.name for n in module.syntax.body if isinstance(n, functions) and n.name[0] != "_"]
    members = f"[{', '.join(own)}]" if own else "false"
    text = f"# {module.name or 'kfac_scratch'}\n\n::: {module.full_name}\n"
    text += f"    options:\n      members: {members}\n\n"
    command = module.path.with_name("__main__.py")
    if command.exists():
        text += f"## Command line\n\n{ast.get_docstring(ast.parse(command.read_text()))}\n\n"
    below = [files()[name] for name in folders() if name.rpartition(".")[0] == module.name]
    if module.name and (listed := [*folders()[module.name], *below]):
        text += f"## Modules\n\n{_modules(listed, '')}\n\n"
    elif module.name:
        entries = sorted(module.path.parent.glob("[!_]*.py"))
        text += f"## Entries\n\n{_modules(map(Module, entries), None)}\n\n"
    if module.exported:
        names = f'<div class="names" markdown="1">\n\n{_names(module)}\n\n</div>'
        text += f"## Public names\n\nWhat `from {module.full_name} import` offers.\n\n{names}\n"
    return text


def _names(module: Module) -> str:
    """A table of the public names, in the order of the modules that define them."""
    by_module: dict[str, list[str]] = {}
    for name in module.exported:
        by_module.setdefault(origin(module.name, name), []).append(name)
    rows = ["| Name | What it is | Defined in |", "| --- | --- | --- |"]
    for place in [place for place in files() if place in by_module]:
        source = files()[place]
        for name in by_module[place]:
            page = posixpath.relpath(uri(place), "api")
            anchor = f"#{source.full_name}.{name}" if name in source.defined else ""
            what = _cell(source.defined.get(name, ""))
            rows.append(f"| [`{name}`]({page}{anchor}) | {what} | [`{place}`]({page}) |")
    return "\n".join(rows)


def _modules(listed: Iterable[Module], folder: str | None) -> str:
    """A table of modules. `folder` is what links are prefixed with; None if there are no pages."""
    rows = ["| Module | What it is |", "| --- | --- |"]
    for module in listed:
        label = f"`{module.name}`"
        if folder is not None:
            label = f"[{label}]({folder}{module.name}.md)"
        rows.append(f"| {label} | {_cell(module.summary)} |")
    return "\n".join(rows)


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


def overview(stated: Mapping[str, Sequence[str]]) -> str:
    """Every folder with its docstring's first paragraph and its modules, by group."""
    parts = [f"[All public names]({PUBLIC}): what `from kfac_scratch import` offers."]
    for title, names in grouped(stated).items():
        parts.append(f"## {title}")
        for name in names:
            if name:
                parts.append(f"### [`{name}`]({uri(name)})\n\n{files()[name].summary}")
            if folders()[name]:
                parts.append(_modules(folders()[name], "api/"))
    return "\n\n".join(parts)
