"""The site, built once for all tests that look at it."""

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")


def missing(*modules: str) -> None:
    """Skip for want of a package, but fail in CI, where nothing may be missing."""
    lacking = [name for name in modules if importlib.util.find_spec(name) is None]
    if lacking:
        unavailable(f'{", ".join(lacking)} not installed: pip install -e ".[dev]"')


def unavailable(reason: str) -> None:
    """Skip, or fail in CI."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def mkdocs_build(source: Path, target: Path) -> subprocess.CompletedProcess[str]:
    """`mkdocs build --strict` of the repository in `source`."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(target)]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=source, env=env, capture_output=True, text=True, check=False)


@cache
def _build() -> tuple[Path, subprocess.CompletedProcess[str]]:
    target = Path(tempfile.mkdtemp(prefix="kfac-site-"))
    return target, mkdocs_build(ROOT, target)


def built_site() -> Path:
    """The folder of the built site."""
    missing("mkdocs", "material", "mkdocstrings", "nbclient", "nbconvert", "jupytext", "ipykernel")
    target, built = _build()
    assert built.returncode == 0, built.stderr[-3000:]
    return target


def pages() -> list[Path]:
    """All pages of the site, except the one for dead links, which only works when published."""
    return [page for page in sorted(built_site().rglob("*.html")) if page.name != "404.html"]
