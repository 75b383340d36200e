"""A tenth of `tests/sweep_families.py`, another one per commit; `make sweep` runs all of it."""

import hashlib
import subprocess
import sys
from pathlib import Path

import transformers

import headwise

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "models.md"


def _tenth() -> list[str]:
    """Every tenth type from one that the commit chooses; in no checkout of git, the version."""
    command = ["git", "-C", str(TESTS), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        commit = headwise.__version__
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    first = hashlib.sha256(commit.encode()).digest()[0] % 10
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)[first::10]


def test_a_tenth_of_the_types_is_as_the_page_of_models_says() -> None:
    names = _tenth()
    script = str(TESTS / "sweep_families.py")
    made = subprocess.run([sys.executable, script, *names], capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr
    text = PAGE.read_text(encoding="utf-8")
    lines = [line for line in made.stdout.splitlines() if line.startswith("| ")]
    assert len(lines) == len(names)
    if f"with Transformers {transformers.__version__}." in text:
        missing = [line for line in lines if line not in text.splitlines()]
        assert not missing, f"run {script}: not in docs/models.md: {missing}"
