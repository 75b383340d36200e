"""Random calls of the kernels: right at every level, in bounds, defined, and without races."""

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from headwise.ops.backend import cpu

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
# not optimised : that takes a quarter of the time to build, and hides nothing
FLAGS = ("-std=c++17", "-O0", "-g1", "-fno-math-errno", "-fno-trapping-math", "-pthread")
LEVELS = {"baseline": ()}
DEFINES: tuple[str, ...] = ()
if platform.machine().lower() in ("x86_64", "amd64"):
    LEVELS["avx2"] = ("-march=x86-64-v3",)
    LEVELS["avx512"] = ("-march=x86-64-v4",)
    LEVELS["avx512bf16"] = ("-march=x86-64-v4", "-mavx512bf16", "-mavx512vnni")
    LEVELS["amx"] = (*LEVELS["avx512bf16"], "-DHEADWISE_AMX")
    DEFINES = ("-DHEADWISE_X86",)
compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")


def run(*command: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=900
    )


def has(sanitizer: str, folder: Path) -> bool:
    """Whether a program of nothing builds and runs under it."""
    source = folder / "nothing.cpp"
    source.write_text("int main() { return 0; }\n")
    built = run(compiler, sanitizer, source, "-o", folder / "nothing")
    return built.returncode == 0 and run(folder / "nothing").returncode == 0


def best_level() -> int:
    """The highest level that this machine runs; the highest of all where the library is missing."""
    if cpu.available()[0]:
        return int(torch.ops.headwise.best_level())
    return len(LEVELS) - 1


# Races do not depend on the instruction set : one level is enough there.
CASES = {"address,undefined": (tuple(LEVELS), 10), "thread": (("baseline",), 15)}


@pytest.mark.skipif(not compiler, reason="no C++ compiler")
@pytest.mark.parametrize("seeds", [(1, 2), pytest.param((3, 4), marks=pytest.mark.sweep)])
@pytest.mark.parametrize("sanitizer", CASES)
def test_random_calls_are_clean_and_right(sanitizer, seeds, tmp_path):
    flag = f"-fsanitize={sanitizer}"
    if not has(flag, tmp_path):
        pytest.skip(f"{compiler} has no {flag}")
    levels, calls = CASES[sanitizer]
    plain = (*FLAGS, f"-I{CSRC}", *(DEFINES if len(levels) > 1 else ()))
    flags = (*plain, flag, "-fno-sanitize-recover=all")
    objects = []
    for index, name in enumerate(levels):
        objects.append(tmp_path / f"{name}.o")
        level = (*LEVELS[name], f"-DHEADWISE_ISA={name}", CSRC / "kernels_isa.cpp")
        # what this machine cannot run is only compiled
        own = flags if index <= best_level() else plain
        built = run(compiler, *own, *level, "-c", "-o", objects[-1])
        assert built.returncode == 0, built.stderr
    for name in ("fuzz_attend", "fuzz_linear", "fuzz_packed", "fuzz_sketch"):
        own = ("dispatch.cpp", "plan.cpp", "chosen.cpp", "select.cpp")
        sources = (HERE / f"{name}.cpp", *(CSRC / file for file in own))
        program = tmp_path / name
        built = run(compiler, *flags, *sources, *objects, "-o", program)
        assert built.returncode == 0, built.stderr
        for seed in seeds:
            ran = run(program, calls, seed)
            assert ran.returncode == 0, f"{name}, seed {seed}: {ran.stdout}{ran.stderr}"
            assert ran.stdout.endswith(" 0 failures\n")
