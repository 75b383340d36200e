"""The machine's figures, and what a call takes at best by them."""

import os

import pytest
import torch

from headwise.errors import OptionError
from headwise.measure import Figures, Peak, machine, measure_machine
from headwise.measure.machine import check_threads, gemm_peak, read_bandwidth


def test_a_call_is_bound_by_bytes_or_by_flops() -> None:
    figures = Figures(1, 2e9, 2**20, {"float32": Peak(10e9, 64)})
    assert figures.share(1e9, 1e9, "float32") == 0.5
    assert figures.share(0.1e9, 9e9, "float32") == 0.9


def test_a_dtype_that_the_machine_lacks_is_judged_by_float32() -> None:
    figures = Figures(1, 1e9, 64, {"float32": Peak(8e9, 64), "bfloat16": Peak(1e9, 64)})
    assert figures.share(0, 4e9, "bfloat16") == 0.5
    native = Figures(1, 1e9, 64, {"float32": Peak(8e9, 64), "bfloat16": Peak(16e9, 64)})
    assert native.share(0, 4e9, "bfloat16") == 0.25


def test_figures_are_of_the_asked_threads_and_dtypes() -> None:
    before = torch.get_num_threads()
    found = measure_machine(1, ["float32", "bfloat16"], read_bytes=2**20, gemm_size=32)
    assert (found.threads, list(found.peaks)) == (1, ["float32", "bfloat16"])
    assert torch.get_num_threads() == before


def test_the_best_of_two_measurements_is_kept() -> None:
    busy = Figures(1, 1e9, 2**20, {"float32": Peak(5e9, 64)})
    idle = Figures(1, 2e9, 2**20, {"float32": Peak(3e9, 64), "bfloat16": Peak(7e9, 64)})
    best = Figures(1, 2e9, 2**20, {"float32": Peak(5e9, 64), "bfloat16": Peak(7e9, 64)})
    assert busy.best_with(idle) == best
    assert idle.best_with(busy).peaks == best.peaks


def test_little_memory_is_read_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "available_bytes", lambda device: 9 * 2**20)
    assert read_bandwidth(2**24)[1] == 2**21


def test_a_slow_dtype_is_measured_on_smaller_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_LONGEST_PRODUCT", 0.0)
    assert gemm_peak(torch.float32, 1024).size == 512


def test_threads_beyond_the_machines_are_refused() -> None:
    assert check_threads(None) == torch.get_num_threads()
    for wrong in (0, os.cpu_count() + 1):
        with pytest.raises(OptionError, match=f"threads is {wrong}; expected 1 to"):
            check_threads(wrong)
