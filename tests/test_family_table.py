"""docs/models.md is what its script makes."""

import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent


def test_the_table_of_models_is_up_to_date() -> None:
    script = TESTS / "make_family_table.py"
    made = subprocess.run(
        [sys.executable, str(script)], check=True, capture_output=True, text=True, cwd=TESTS
    )
    assert made.stdout == (TESTS.parent / "docs" / "models.md").read_text(), f"run {script}"
