"""Settings for every test and doctest: no network, repeatable numbers, nothing of the user touched.

What we and our dependencies write to is pointed at one folder of the run before anything is
imported; workers and the processes that tests start inherit it, so that what is expensive (the
conversion of the demo model) is made once a run.
"""

import atexit
import functools
import os
import shutil
import tempfile
from pathlib import Path

_RUN = "HEADWISE_TEST_RUN"
if _RUN not in os.environ:  # the first process of the run: it alone takes the folder away
    os.environ[_RUN] = tempfile.mkdtemp(prefix="headwise-tests-")
    atexit.register(shutil.rmtree, os.environ[_RUN], ignore_errors=True)
_FOLDERS = {
    "HOME": "home",
    "USERPROFILE": "home",
    "XDG_CACHE_HOME": "home/.cache",
    "XDG_CONFIG_HOME": "home/.config",
    "XDG_DATA_HOME": "home/.local/share",
    "XDG_STATE_HOME": "home/.local/state",
    "HEADWISE_CACHE": "headwise",
    "HF_HOME": "huggingface",
    "MPLCONFIGDIR": "matplotlib",
    "TORCH_HOME": "torch",
    "TRITON_CACHE_DIR": "triton",
}
for _name, _folder in _FOLDERS.items():
    _path = Path(os.environ[_RUN], _folder)
    _path.mkdir(parents=True, exist_ok=True)
    os.environ[_name] = str(_path)
# These would hold against HF_HOME.
for _name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE", "HF_TOKEN"):
    os.environ.pop(_name, None)
# Before Transformers is imported anywhere: its libraries read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import pytest
import torch

_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
_threads = os.environ.get("HEADWISE_TEST_THREADS")  # `make nightly` tries several
torch.set_num_threads(int(_threads) if _threads else max(1, (os.cpu_count() or 1) // _workers))

# The first call of an operator can take seconds (lazy initialisation), hence no deadline.
hypothesis.settings.register_profile("headwise", deadline=None, print_blob=True)
hypothesis.settings.load_profile("headwise")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _examples_write_elsewhere(request: pytest.FixtureRequest) -> None:
    """What a doctest writes to the folder that it runs in is no file of the project."""
    if isinstance(request.node, pytest.DoctestItem):
        folder = request.getfixturevalue("tmp_path")
        request.getfixturevalue("monkeypatch").chdir(folder)


@pytest.fixture
def small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured of this machine takes no time."""
    from headwise.bench import suites
    from headwise.measure import figures_store, measure_machine

    small = functools.partial(measure_machine, read_bytes=2**20, gemm_size=32)
    for module in (suites, figures_store):
        monkeypatch.setattr(module, "measure_machine", small)
    monkeypatch.setattr("headwise.measure.inputs.last_level_cache", lambda: 2**10)
