"""Command-line options of the oracle for pytest.

    pytest --pyargs kfac_scratch.conformance --kfac-adapter pkg.mod:Adapter

This module stands by itself because pytest loads it in every run of an environment that has
kfac_scratch, and importing the package would load PyTorch each time.
"""


def pytest_addoption(parser):
    """Say which implementation the oracle judges, and how."""
    group = parser.getgroup("kfac", "the oracle of kfac_scratch")
    group.addoption("--kfac-adapter", metavar="PKG.MOD:CLASS", help="the implementation to judge")
    group.addoption("--kfac-python", help="the interpreter of the environment that it runs in")
    group.addoption("--kfac-device", default="cpu", help="where its tensors are")
    group.addoption("--kfac-timeout", type=float, default=60.0, help="seconds for one case")
    group.addoption("--kfac-expected", metavar="FILE", help="TOML file of expected failures")
