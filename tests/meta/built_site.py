"""The site, built once for all tests that look at it."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

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


@contextmanager
def chromium() -> Iterator[Any]:
    """A running browser without a network; skips, or fails in CI, where there is none."""
    missing("playwright", "axe_playwright_python")
    if not CHROMIUM:
        unavailable("no Chromium: install it or set CHROMIUM to the executable")
    from playwright.sync_api import sync_playwright

    options = ["--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND"]
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield running
        running.close()


def watched(page: Any) -> Any:
    """The page, with a list of its `problems`: errors, and requests that leave the machine."""
    page.problems = []
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("console", lambda m: m.type == "error" and page.problems.append(m.text))
    page.on("request", lambda r: r.url.startswith("http") and page.problems.append(r.url))
    return page


def mkdocs_build(source: Path, target: Path) -> subprocess.CompletedProcess[str]:
    """`mkdocs build --strict` of the repository in `source`."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(target)]
    return subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)


@cache
def _shared() -> Path:
    """A folder that the processes of one test run have in common."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
    folder = Path(tempfile.gettempdir()) / f"kfac-site-{run}"
    folder.mkdir(exist_ok=True)
    return folder


def once(name: str, compute: Callable[[], Any]) -> Any:
    """A value as JSON, computed by the first process of a run that asks; others wait for it."""
    from filelock import FileLock

    file = _shared() / f"{name}.json"
    with FileLock(file.with_suffix(".lock")):
        if not file.exists():
            file.write_text(json.dumps(compute()), encoding="utf-8")
    return json.loads(file.read_text(encoding="utf-8"))


def _built() -> list[object]:
    made = mkdocs_build(ROOT, _shared() / "site")
    return [made.returncode, made.stderr[-3000:]]


def built_site() -> Path:
    """The folder of the built site: the one that `KFAC_SITE` names, or one that is built now."""
    missing("mkdocs", "material", "mkdocstrings", "nbclient", "nbconvert", "jupytext", "ipykernel")
    if already := os.environ.get("KFAC_SITE"):
        return Path(already)
    returncode, words = once("build", _built)
    assert returncode == 0, words
    return _shared() / "site"


def pages() -> list[Path]:
    """All pages of the site, except the one for dead links, which only works when published."""
    return [page for page in sorted(built_site().rglob("*.html")) if page.name != "404.html"]
