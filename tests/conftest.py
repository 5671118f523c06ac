"""Every test runs with the annotated shapes checked, on every device there is."""

import gc
from collections import defaultdict
from contextlib import nullcontext

import jaxtyping
import pytest
import torch

from tests import annotations, second_device

torch.backends.cudnn.allow_tf32 = False  # float32 tests mean float32
torch.set_num_threads(1)  # faster than many for matrices of this size
MISSING = second_device.why_missing()
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
QUICK = 3  # so many cases of a test with parameters are in the quick tier
DEVICES += [] if MISSING else [second_device.NAME]

for accelerator in (torch.cuda, torch.xpu, torch.mtia):
    if not accelerator.is_available():  # it would keep the stack of every call of manual_seed
        accelerator.manual_seed_all = lambda seed: None


def pytest_configure(config):
    """Check every annotation of the package, except in the quick tier: half of its time."""
    if not _quick(config):
        annotations.install("kfac_scratch")


def pytest_ignore_collect(collection_path, config):
    """The oracle's own tests are long: the quick tier need not even read them."""
    return True if _quick(config) and collection_path.name == "conformance" else None


def _quick(config):
    return config.option.markexpr == "quick"


def pytest_report_header():
    return f"devices: {', '.join(DEVICES)}" + (f" ({MISSING})" if MISSING else "")


@pytest.hookimpl(tryfirst=True)  # before -m looks at the marks
def pytest_collection_modifyitems(items):
    """Which tests are slow, long and quick, where they do not say so themselves.

    On the second device tests are slow but for those marked `everywhere`. The oracle's own tests
    are long. The quick tier is what is neither slow nor long: of a test with many parameters
    `QUICK` of them, the first and the last and some in between.
    """
    quick = defaultdict(list)
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        there = parameters.get("device") == second_device.NAME
        if there and not item.get_closest_marker("everywhere"):
            item.add_marker("slow")
        if item.path.parent.name == "conformance":
            item.add_marker("long")
        if not (item.get_closest_marker("slow") or item.get_closest_marker("long")):
            quick[item.path, item.originalname].append(item)
    for cases in quick.values():
        step = (len(cases) - 1) / max(1, min(QUICK, len(cases)) - 1)
        for index in {round(i * step) for i in range(min(QUICK, len(cases)))}:
            cases[index].add_marker("quick")


def pytest_collection_finish():
    """Let the garbage collector pass over what stays until the end: a million objects."""
    gc.collect()
    gc.freeze()


@pytest.fixture(params=DEVICES)
def device(request):
    with second_device.in_use() if request.param == second_device.NAME else nullcontext():
        yield torch.device(request.param)


@pytest.fixture
def as_users_run_it():
    """Without the checks of annotations that this suite adds."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True)
def _defaults():
    """Float64 and a fixed seed in every test; float32 where a test asks for it."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
