"""A run of the tests leaves the user's folders as they are: no figures, no models, no settings."""

import os
import subprocess
import sys
from pathlib import Path

import platformdirs

from headwise.base.files import cache_folder

_ROOT = Path(__file__).parents[1]
_RUN = "HEADWISE_TEST_RUN"


def test_what_is_written_goes_to_the_folder_of_the_run() -> None:
    import huggingface_hub.constants
    import matplotlib

    run = Path(os.environ[_RUN])
    for folder in (
        Path.home(),
        cache_folder("machine"),
        Path(platformdirs.user_cache_dir("headwise")),
        Path(huggingface_hub.constants.HF_HUB_CACHE),
        Path(matplotlib.get_cachedir()),
        Path(matplotlib.get_configdir()),
    ):
        assert folder.is_relative_to(run), folder


def test_a_run_leaves_the_users_folders_untouched(tmp_path: Path) -> None:
    """Of tests that measure the machine and of a doctest, started as a user starts them."""
    user, kept = tmp_path / "user", tmp_path / "kept"
    for folder in (user, kept):
        folder.mkdir()
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("XDG_", "HF_", "PYTEST_", "MPL", "TORCH_HOME", "TRITON_", _RUN))
    }
    ours = {"HOME": str(user), "HEADWISE_CACHE": str(kept), "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    tests = ["tests/cli/test_bench.py::test_machine_shows_and_writes_bandwidth_and_peaks"]
    tests += ["src/headwise/measure/figures_store.py"]
    done = subprocess.run(
        [*command, *tests], cwd=_ROOT, env=inherited | ours, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout
    assert [*user.rglob("*"), *kept.rglob("*")] == []
    # and the run took its own folder away
    assert not list(tmp_path.glob("headwise-tests-*"))
