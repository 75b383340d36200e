"""Settings for the whole test run: no network, repeatable numbers, no fight over cores."""

import os

# Before Transformers is imported anywhere: its libraries read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import pytest
import torch

_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
torch.set_num_threads(max(1, (os.cpu_count() or 1) // _workers))

# The first call of an operator can take seconds (lazy initialisation), hence no deadline.
hypothesis.settings.register_profile("headwise", deadline=None, print_blob=True)
hypothesis.settings.load_profile("headwise")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
