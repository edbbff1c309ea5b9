"""What all tests share. The fixtures `target` (a backend at an ISA level) and `seed` come from the conformance kit."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

pytest_plugins = ["polymoe.testing.plugin"]

# `pytest --hypothesis-profile sweep` searches longer. Examples start from new seeds in every run; a failing one is
# printed in full. The target of a test is the same for all its examples, so a fixture may give it.
_COMMON = {
    "deadline": None,
    "database": None,
    "print_blob": True,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}
settings.register_profile("ci", max_examples=20, **_COMMON)
settings.register_profile("sweep", max_examples=500, **_COMMON)
settings.load_profile("ci")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tiny models, where threads would only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Graphs and counts of recompilations that no other test left behind."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
