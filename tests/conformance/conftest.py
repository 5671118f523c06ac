"""What several tests of the oracle need."""

import jaxtyping
import pytest


@pytest.fixture
def as_users_run():
    """Without the checks of annotations that this suite adds."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
