"""Every test runs with the annotated shapes checked, on every device there is."""

import pytest
import torch
from jaxtyping import install_import_hook

install_import_hook("kfac_scratch", "beartype.beartype")

torch.backends.cudnn.allow_tf32 = False  # float32 tests mean float32
torch.set_num_threads(1)  # faster than many for matrices of this size
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


def pytest_collection_modifyitems(items):
    """The quick tier is what is neither slow nor long."""
    for item in items:
        if not (item.get_closest_marker("slow") or item.get_closest_marker("long")):
            item.add_marker(pytest.mark.quick)


@pytest.fixture(params=DEVICES)
def device(request):
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _defaults():
    """Float64 and a fixed seed in every test; float32 where a test asks for it."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
