"""Kept figures of the machine: dated, of real sizes, and never a traceback."""

import json
import os
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from headwise.measure import Figures, Peak, figures_store, machine, measure_machine
from headwise.measure.figures_store import (
    described,
    keep_figures,
    kept_figures,
    machine_figures,
)
from headwise.measure.machine import Moment
from headwise.planning.devices import find_device

QUIET = Moment("2026-01-31T07:00+00:00", others=0.0, spread=1.02)
GOOD = Figures(3, 7e9, 2**30, {"float32": Peak(5e10, 4096, QUIET)}, QUIET)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HEADWISE_CACHE", str(tmp_path))
    monkeypatch.setattr(figures_store, "last_level_cache", lambda: 2**25)
    monkeypatch.setattr(figures_store, "measure_machine", lambda *args, **kwargs: GOOD)
    return tmp_path


def write(folder: Path, content: str) -> Path:
    """Put `content` where the figures are kept."""
    assert keep_figures(GOOD) == ""
    (file,) = (folder / "machine").iterdir()
    file.write_text(content)
    return file


def test_figures_are_kept_with_their_moments() -> None:
    assert keep_figures(GOOD) == ""
    assert kept_figures(3, ["float32"]) == GOOD
    assert kept_figures(3, ["bfloat16"]) is None
    assert kept_figures(2, ["float32"]) is None


def test_each_dtype_keeps_the_moment_of_its_own() -> None:
    later = replace(QUIET, taken="2026-03-01T00:00+00:00", others=0.9)
    keep_figures(GOOD)
    keep_figures(Figures(3, 6e9, 2**30, {"bfloat16": Peak(9e10, 2048, later)}, later))
    found = kept_figures(3, ["float32", "bfloat16"])
    assert found is not None
    assert (found.bytes_per_second, found.moment) == (6e9, later)
    assert found.peaks == GOOD.peaks | {"bfloat16": Peak(9e10, 2048, later)}


@pytest.mark.parametrize(
    ("toy", "why"),
    [
        (replace(GOOD, read_bytes=2**20), "1,048,576 bytes, which caches hold"),
        (replace(GOOD, read_bytes=2**26 - 1), "which caches hold"),
        (replace(GOOD, peaks={"float32": Peak(1e9, 64)}), "float32 matrices of 64 x 64"),
    ],
)
def test_toy_sizes_are_neither_kept_nor_read(toy: Figures, why: str, cache: Path) -> None:
    assert why in keep_figures(toy)
    assert list(cache.iterdir()) == []
    # as an older version wrote them
    dated = replace(toy, peaks={name: replace(at, moment=QUIET) for name, at in toy.peaks.items()})
    write(cache, json.dumps(asdict(dated)))
    assert kept_figures(3, []) is None
    said: list[str] = []
    found, instead = machine_figures(3, ["float32"], lambda stage, *rest: said.append(stage))
    assert found == GOOD and why in instead
    assert any(why in stage for stage in said)


def test_a_measurement_of_a_toy_run_leaves_nothing(cache: Path) -> None:
    keep_figures(measure_machine(1, ["float32"], read_bytes=2**20, gemm_size=32))
    assert list(cache.iterdir()) == []


def test_a_file_without_moments_is_not_used_and_the_plan_says_so(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.get_num_threads", lambda: 3)
    old = {"threads": 3, "bytes_per_second": 1.11e11, "read_bytes": 2**30}
    write(cache, json.dumps(old | {"peaks": {"float32": {"flops_per_second": 4e10, "size": 4096}}}))
    device = find_device(None, "float32")
    assert device.bytes_per_second == 7e9
    assert device.source.endswith("the kept figures do not say when they were taken, so not used")
    assert "not used" not in find_device(None, "float32").source


_KEPT = asdict(GOOD)


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[1]", "7", "null", "[" * 10**5, "\x00\xff"),
        *(json.dumps({**_KEPT, "bytes_per_second": rate}) for rate in (0, -1, None, "7", True)),
        json.dumps({**_KEPT, "bytes_per_second": float("nan")}),
        '{"moment": 1, "bytes_per_second": ' + "9" * 5000 + "}",
        json.dumps({**_KEPT, "bytes_per_second": 10**400}),
        *(json.dumps({**_KEPT, "read_bytes": size}) for size in (1.5, "x", [])),
        *(json.dumps({**_KEPT, "peaks": peaks}) for peaks in (None, [], {"float32": 7})),
        json.dumps({**_KEPT, "peaks": {"float32": {"flops_per_second": 1e9}}}),
        *(
            json.dumps({**_KEPT, "moment": moment})
            for moment in (
                None,
                7,
                {"taken": 7, "others": 0, "spread": 1},
                {"taken": "yesterday", "others": 0, "spread": 1},
                {"taken": "2026-01-31", "others": 0, "spread": 1},
                {"taken": QUIET.taken, "others": "much", "spread": 1},
                {"taken": QUIET.taken, "others": 0, "spread": float("inf")},
                {"taken": QUIET.taken},
            )
        ),
    ],
    ids=lambda content: f"{len(content)}-{content[-12:]!r}",
)
def test_a_damaged_file_is_measured_anew(content: str, cache: Path) -> None:
    write(cache, content)
    found, instead = machine_figures(3, ["float32"])
    assert found == GOOD
    assert instead in (
        "the kept figures are damaged",
        "the kept figures do not say when they were taken",
    )
    assert kept_figures(3, ["float32"]) == GOOD


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_what_is_no_file_is_not_waited_for(cache: Path) -> None:
    file = write(cache, "{")
    file.unlink()
    os.mkfifo(file)
    assert kept_figures(3, []) is None
    file.unlink()
    file.mkdir()
    assert machine_figures(3, ["float32"])[0] == GOOD


def test_it_says_how_old_and_how_busy() -> None:
    old = datetime.now(UTC) - timedelta(days=3, hours=1)
    moment = Moment(old.isoformat(timespec="minutes"), others=0.0, spread=1.0)
    peaks = {"float32": Peak(5e10, 2048, moment)}

    def said(moment: Moment | None) -> str:
        return described(replace(GOOD, peaks=peaks, moment=moment), "float32")

    assert said(moment).startswith(f"measured {old:%Y-%m-%d} (3 days ago) with 3 threads: sums")
    assert said(moment).endswith("products of 2,048 x 2,048")
    assert said(replace(moment, others=0.5)).endswith("; the machine was busy")
    assert said(replace(moment, spread=1.6)).endswith("; the machine was busy")
    assert said(replace(moment, spread=None)).endswith("busy is not known")


def test_what_ran_before_and_the_spread_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    times: Any = iter(range(10**6))
    # repetitions of 0.5, 1.5 and 2.5 seconds
    monkeypatch.setattr(machine.time, "perf_counter", lambda: (at := next(times)) * (at + 1) / 4)
    assert machine._best(lambda: None, 3) == (0.5, 3.0)
    monkeypatch.undo()
    monkeypatch.setattr(machine.psutil, "cpu_percent", lambda interval: 37.5)
    found = measure_machine(1, ["float32"], read_bytes=2**20, gemm_size=32)
    for moment in (found.moment, found.peaks["float32"].moment):
        assert moment is not None
        assert (moment.others, moment.busy) == (0.375, True)
        assert moment.spread is not None and moment.spread >= 1
        age = datetime.now(UTC) - datetime.fromisoformat(moment.taken)
        assert age < timedelta(hours=1)
