"""CONTRIBUTING.md is followed to the letter: every recipe, in a copy of the repository.

A recipe is a section of the page. A block with a file's name is that file, whole, or the changes
to it. The commands must pass, and the files that have changed afterwards are as many as the recipe
says.
"""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "CONTRIBUTING.md"
BLOCK = re.compile(r'^```(\w+)(?: title="(.+?)")?\n(.*?)^```$', re.DOTALL | re.MULTILINE)
LEFT_OUT = (
    ".git",
    "site",
    ".cache",
    ".venv",
    "*.egg-info",
    "__pycache__",
    ".pytest_cache",
    ".ruff_cache",  # but not the cache of mypy, which would take a minute to make anew
    "build",
    "dist",
)

MADE = {"site", ".cache", "__pycache__", ".pytest_cache", ".ruff_cache", ".mypy_cache"}


@dataclass(frozen=True)
class Recipe:
    """A section: its title, its blocks `(language, file, text)`, and how many files it touches."""

    title: str
    blocks: list[tuple[str, str, str]]
    files: int

    @property
    def commands(self):
        return [text for language, _, text in self.blocks if language == "sh"]


def recipes():
    _, _, text = PAGE.read_text(encoding="utf-8").partition("\n## Recipes\n")
    for section in re.split(r"^### ", text.partition("\n## ")[0], flags=re.MULTILINE)[1:]:
        title = section.partition("\n")[0]
        stated = re.search(r"^Files touched: (\d+)\.", section, re.MULTILINE)
        assert stated, f"the recipe {title!r} does not say how many files it touches"
        yield Recipe(title, BLOCK.findall(section), int(stated[1]))


RECIPES = list(recipes())


def changed(text, changes):
    """A text after the changes of a block: hunks of a diff, with empty lines between them."""
    for hunk in re.split(r"^$\n", changes, flags=re.MULTILINE):
        lines = hunk.splitlines(keepends=True)
        old = "".join(line[1:] for line in lines if line[0] in " -")
        new = "".join(line[1:] for line in lines if line[0] in " +")
        assert text.count(old) == 1, f"not once in the file:\n{old}"
        text = text.replace(old, new)
    return text


def digests(folder):
    return {
        path.relative_to(folder): sha256(path.read_bytes()).digest()
        for path in folder.rglob("*")
        if path.is_file() and not MADE & {*path.relative_to(folder).parts}
    }


def followed(recipe, folder):
    """Do what a recipe says."""
    for language, name, text in recipe.blocks:
        file = folder / name
        if language == "sh":
            run(text, folder)
        elif language == "diff":
            file.write_text(changed(file.read_text(encoding="utf-8"), text), encoding="utf-8")
        elif name:
            assert not file.exists(), f"{name} is there already"
            file.write_text(text, encoding="utf-8")


def run(commands, folder):
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": tools, "PYTHONPATH": str(folder)}
    environment.pop("PYTEST_ADDOPTS", None)
    finished = subprocess.run(
        ["bash", "-e", "-c", commands],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, (
        f"{commands}\n{finished.stdout[-3000:]}{finished.stderr[-3000:]}"
    )


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.title)
def test_a_recipe_works_as_written_and_touches_as_many_files_as_it_says(recipe, tmp_path):
    copy = tmp_path / "repository"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*LEFT_OUT))
    before = digests(copy)
    followed(recipe, copy)
    after = digests(copy)
    touched = {name for name in before | after if before.get(name) != after.get(name)}
    assert len(touched) == recipe.files, sorted(map(str, touched))


WANTED = ("paper", "layer", "loss", "case", "adapter", "finding", "chapter")


def test_there_is_a_recipe_for_what_people_add_and_each_ends_with_a_command():
    for word in WANTED:
        assert any(word in recipe.title for recipe in RECIPES), word
    for recipe in RECIPES:
        assert recipe.blocks[-1][0] == "sh", recipe.title
        assert "pytest" in "".join(recipe.commands), recipe.title


def test_the_number_of_the_recipes_chapter_is_free():
    (number,) = set(re.findall(r'title="tutorial/(\d+)_', PAGE.read_text(encoding="utf-8")))
    taken = [path.name.split("_")[0] for path in (ROOT / "tutorial").glob("[0-9]*.py")]
    assert number not in taken
    assert len(set(taken)) == len(taken)


def test_changes_are_hunks_of_a_diff():
    assert changed("a\nb\nc\n", " b\n+x\n") == "a\nb\nx\nc\n"
    assert changed("a\nb\nc\n", " a\n+x\n\n-c\n+y\n+z\n") == "a\nx\nb\ny\nz\n"
    for text, changes in (("a\na\n", " a\n+x\n"), ("a\n", " b\n+x\n")):
        with pytest.raises(AssertionError, match="not once"):
            changed(text, changes)
