"""What tests of benchmarks share."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def one_thread():
    """Threads that wait for each other where the machine is busy take longer than work this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
