"""Instruction sets and numbers of threads, set for one test."""

from unittest import mock

import pytest
import torch

from headwise.ops.backend import cpu, cpu_library

assert cpu.available()[0], cpu.available()[1]
LEVELS = range(torch.ops.headwise.best_level() + 1)


@pytest.fixture(params=LEVELS, ids=[cpu_library.LEVELS[level] for level in LEVELS])
def level(request):
    """Each instruction set that this machine has, in turn."""
    with mock.patch.object(cpu_library, "_level", request.param):
        yield request.param


@pytest.fixture
def threads():
    """A function that sets the number of threads for this test only."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
