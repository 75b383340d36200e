"""The tests on the releases that headwise supports, each in a fresh environment: `make matrix`.

`python packaging/matrix.py [WORD ...]` builds the wheel, runs the rows whose line holds every word
(all rows without one), and writes their lines into the table of docs/versions.md. What cannot be
installed, and a Python that is not here, is a line with the reason. Fails where a test fails.
"""

import datetime
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "build" / "matrix"
TABLE = ROOT / "docs" / "versions.md"
HEAD = ["Python", "PyTorch", "Transformers", "tests", "passed", "skipped", "failed", "run on"]
NEEDS = ["pytest", "hypothesis", "onnx", "onnxruntime"]
# What each release of Transformers decides, and what a user's other packages hold back.
FREE = ("transformers", "huggingface_hub", "tokenizers", "torch")
NEW_TORCH = "2.14.1"


@dataclass(frozen=True)
class Row:
    """One environment; without a release of Transformers for the operators alone."""

    python: str
    torch: str
    transformers: str | None
    tests: str

    def cells(self) -> list[str]:
        """The first cells of its line, by which it is known."""
        return [self.python, self.torch, self.transformers or "none", self.tests]


def rows() -> list[Row]:
    """All rows: the newest Python goes with the newest PyTorch, and both with the oldest of ours.

    >>> len({tuple(row.cells()) for row in rows()}) == len(rows())
    True
    """
    pinned = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line
    )
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    releases = ("5.17.0", "5.20.2", "5.22.2", pinned["transformers"])
    others = [python for python in ("3.12", "3.13", "3.14") if python != here]
    return [
        *(Row(here, pinned["torch"], release, "tests/hf") for release in releases),
        Row(here, NEW_TORCH, None, "tests/ops"),
        *(Row(python, NEW_TORCH, pinned["transformers"], "tests/hf") for python in others),
    ]


def run(row: Row, wheel: Path) -> list[str]:
    """The last cells of a row's line."""
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    folder = BUILD / "-".join([row.python, row.torch, row.transformers or "none"])
    shutil.rmtree(folder, ignore_errors=True)
    try:
        reason = _install(row, folder, wheel)
        if reason is not None:
            return [f"not run: {reason}", "", "", today]
        print(f"  {row.tests}", flush=True)
        log = BUILD / f"{folder.name}.log"
        with log.open("w") as out:
            subprocess.run(
                [folder / "bin/python", "-m", "pytest", "-q", "-m", "not sweep", row.tests],
                cwd=ROOT,
                stdout=out,
                stderr=subprocess.STDOUT,
                check=False,
            )
        counts = counted(log.read_text())
        if counts is None:
            return [f"not run: see {log.relative_to(ROOT)}", "", "?", today]
        return [*map(str, counts), today]
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # some gigabytes


def counted(log: str) -> tuple[int, int, int] | None:
    r"""Passed, skipped and failed of what pytest printed; None where it has no summary.

    >>> counted("E 3 passed\n2 failed, 1349 passed, 3 skipped, 1 error in 61.02s (0:01:01)\n")
    (1349, 3, 3)
    >>> counted("ImportError") is None
    True
    """
    line = log.rstrip().rpartition("\n")[2]
    number = {word: int(count) for count, word in re.findall(r"(\d+) (\w+?)s?\b", line)}
    if not {"passed", "failed", "error"} & number.keys():
        return None
    failed = number.get("failed", 0) + number.get("error", 0)
    return number.get("passed", 0), number.get("skipped", 0), failed


def _install(row: Row, folder: Path, wheel: Path) -> str | None:
    """Make the environment; why that cannot be done, or None."""
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    python = sys.executable if row.python == here else f"python{row.python}"
    if _said([python, "-c", ""]) is not None:
        return f"no python{row.python} here"
    constraints = BUILD / "constraints.txt"
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    constraints.write_text("\n".join(line for line in lines if not line.startswith(FREE)))
    pip = [folder / "bin/python", "-m", "pip", "install", "--quiet"]
    pip += ["--disable-pip-version-check", "--constraint", constraints]
    extra = [] if row.transformers is None else [f"transformers=={row.transformers}", "peft"]
    what = f"{wheel}[hf]" if extra else str(wheel)
    print(f"  installing PyTorch {row.torch}", flush=True)
    # PyTorch first, so that nothing else asks for another
    for command in (
        [python, "-m", "venv", folder],
        [*pip, f"torch=={row.torch}"],
        [*pip, f"torch=={row.torch}", what, *extra, *NEEDS],
    ):
        fault = _said(command)
        if fault is not None:
            return fault
    return None


def _said(command: list[str | Path]) -> str | None:
    """The last line that a command printed where it failed, else None."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        return str(error)
    if done.returncode == 0:
        return None
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    return (errors or done.stderr.splitlines() or ["no word of why"])[0].replace("|", "/")


def _write(lines: dict[tuple[str, ...], list[str]]) -> None:
    """Put the lines into the table, in the order of `rows`; others stay while they are rows."""
    text = TABLE.read_text(encoding="utf-8")
    before, _, rest = text.partition("<!-- matrix -->\n")
    table, _, after = rest.partition("<!-- end -->")
    known = {}
    for line in table.splitlines()[2:]:
        cells = [cell.strip() for cell in line.strip("| ").split("|")]
        known[tuple(cells[:4])] = [*cells[4:], *[""] * (8 - len(cells))]
    known |= lines
    made = [HEAD, ["---"] * len(HEAD)]
    made += [[*key, *known[key]] for row in rows() if (key := tuple(row.cells())) in known]
    body = "".join("| " + " | ".join(cells) + " |\n" for cells in made)
    TABLE.write_text(f"{before}<!-- matrix -->\n{body}<!-- end -->{after}", encoding="utf-8")


def main(words: list[str]) -> int:
    """Run the rows; 1 where a test failed."""
    chosen = [row for row in rows() if all(word in row.cells() for word in words)]
    BUILD.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(BUILD / "wheel", ignore_errors=True)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run(
        [
            *(sys.executable, "-m", "build", "--wheel", "--no-isolation"),
            *("--outdir", BUILD / "wheel", f"--config-setting=build-dir={BUILD / 'cmake'}"),
        ],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        check=True,
    )
    (wheel,) = (BUILD / "wheel").glob("*.whl")
    lines: dict[tuple[str, ...], list[str]] = {}
    for row in chosen:
        print(" | ".join(row.cells()), flush=True)
        lines[tuple(row.cells())] = run(row, wheel)
        _write(lines)
        print("  " + " | ".join(lines[tuple(row.cells())]), flush=True)
    return any(line[2] not in ("", "0") for line in lines.values())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
