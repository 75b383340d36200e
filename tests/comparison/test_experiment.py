"""A whole comparison: repeatable, resumable, and its files say what was found."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import headwise
from headwise import CapacityError, OptionError
from headwise.comparison import Comparison, Configuration, Experiment, experiment
from headwise.comparison.models import build
from headwise.comparison.recall import RecallTask
from headwise.comparison.speed import check_contexts
from headwise.comparison.training import train
from headwise.measure.machine import use_threads

TINY: dict[str, Any] = {
    "steps": 3,
    "seeds": 2,
    "width": 24,
    "heads": 3,
    "pairs": 5,
    "vocabulary": 22,
    "batch": 40,
}
SPEED: dict[str, Any] = {"contexts": [17, 31], "rounds": 4}


def tiny(**changed: Any) -> Configuration:
    return Configuration(**TINY | {"mechanisms": ("mha", "mla")} | changed)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Comparison]:
    folder = tmp_path_factory.mktemp("compare") / "new" / "out"
    return folder, headwise.compare(["mha", "mla"], out=folder, **SPEED, **TINY)


def test_every_run_and_speed_is_there(finished: tuple[Path, Comparison]) -> None:
    found = finished[1]
    assert found.complete
    assert [(at.mechanism, at.seed) for at in found.runs] == [
        ("mha", 0),
        ("mla", 0),
        ("mha", 1),
        ("mla", 1),
    ]
    assert [len(at.decode) for at in found.speeds] == [2, 2]


def test_the_same_seed_gives_the_same_losses(finished: tuple[Path, Comparison]) -> None:
    with use_threads(1):
        again = train(tiny(), RecallTask(tiny()), "mla", 1)
    assert again in finished[1].runs
    assert len({run.loss for run in finished[1].runs}) == 4


def test_a_measured_cache_is_what_the_spec_says(finished: tuple[Path, Comparison]) -> None:
    asked = tiny()
    for speed in finished[1].speeds:
        specs = build(asked, speed.mechanism, seed=0).specs
        expected = sum(spec.cache_bytes(1, dtype="float32") for spec in specs)
        assert speed.cache_bytes_per_token == expected


def test_results_are_written_as_json_csv_and_a_figure(finished: tuple[Path, Comparison]) -> None:
    folder, found = finished
    held = json.loads((folder / "results.json").read_text())
    assert held["complete"] is True
    assert held["verdict"] == found.verdict()
    assert held["configuration"]["mechanisms"] == ["mha", "mla"]
    assert held["runs"][3]["loss"] == found.runs[3].loss
    with (folder / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["mechanism"] for row in rows] == ["mha", "mla"]
    assert float(rows[0]["accuracy"]) == found.qualities("accuracy")[0].mean
    assert float(rows[1]["decode_tokens_per_second_31"]) > 0
    assert "</svg>" in (folder / "figure.svg").read_text()


def test_a_finished_comparison_is_read_and_not_done_again(
    finished: tuple[Path, Comparison], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiment, "train", None)
    monkeypatch.setattr(experiment, "measure_speed", None)
    again = headwise.compare(["mha", "mla"], out=finished[0], **SPEED, **TINY)
    assert (again.runs, again.speeds) == (finished[1].runs, finished[1].speeds)


def test_an_interrupted_comparison_keeps_its_runs_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: tuple[Path, Comparison]
) -> None:
    stop = {"training 3 of 4: mha, seed 1"}

    def progress(stage: str, done: int, total: int) -> None:
        if stage in stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        headwise.compare(["mha", "mla"], out=tmp_path, progress=progress, **SPEED, **TINY)
    held = json.loads((tmp_path / "results.json").read_text())
    assert (held["complete"], len(held["runs"]), held["speeds"]) == (False, 2, [])
    stop.clear()
    stages: list[str] = []
    whole = headwise.compare(
        ["mha", "mla"],
        out=tmp_path,
        progress=lambda stage, done, total: stages.append(stage),
        **SPEED,
        **TINY,
    )
    assert stages[0] == "training 1 of 2: mha, seed 1"
    assert whole.runs == finished[1].runs


def test_a_folder_with_the_old_spelling_of_mechanisms_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = headwise.compare(["gqa:1", "mla:8"], out=tmp_path, **SPEED, **TINY)
    for path in tmp_path.glob("*.json"):
        path.write_text(path.read_text().replace("gqa:1", "gqa-1").replace("mla:8", "mla-8"))
    monkeypatch.setattr(experiment, "train", None)
    monkeypatch.setattr(experiment, "measure_speed", None)
    again = headwise.compare(["gqa-1", "mla-8"], out=tmp_path, **SPEED, **TINY)
    assert (again.runs, again.speeds) == (done.runs, done.speeds)
    assert [row["mechanism"] for row in again.rows()] == ["gqa:1", "mla:8"]


def test_states_and_a_hybrid_are_compared(tmp_path: Path) -> None:
    names = ["gated-delta", "kda", "ssd", "retention", "hybrid:1-1"]
    found = headwise.compare(names, out=tmp_path, **SPEED, **TINY)
    assert (found.complete, len(found.runs)) == (True, 10)
    rows = {row["mechanism"]: row for row in found.rows()}
    assert [rows[name]["cache_bytes_per_token"] for name in names] == [0, 0, 0, 0, 2 * 24 * 4]
    # 2 layers: 3 matrices of 8 x 8, and 4 inputs of 72 channels
    assert rows["gated-delta"]["cache_bytes_per_sequence"] == 2 * 4 * (3 * 64 + 4 * 72)
    assert rows["hybrid:1-1"]["attention"] == (
        "gated delta rule 3 heads, state 8 x 8; MHA 3 heads, D 8"
    )
    assert max(speed.error for speed in found.speeds) < 1e-4
    assert "</svg>" in (tmp_path / "figure.svg").read_text()


def test_top_k_is_mha_until_it_is_read(tmp_path: Path) -> None:
    found = headwise.compare(["mha", "topk:2", "topk:500"], out=tmp_path, **SPEED, **TINY)
    rows = {row["mechanism"]: row for row in found.rows()}
    assert rows["topk:2"]["attention"] == "MHA 3 heads, D 8, topk:2"
    sizes = {name: row["cache_bytes_per_token"] for name, row in rows.items()}
    assert sizes["topk:2"] == sizes["mha"]
    losses = {name: [r.loss for r in found.runs if r.mechanism == name] for name in rows}
    assert losses["topk:500"] == losses["mha"] != losses["topk:2"]
    assert max(speed.error for speed in found.speeds) < 1e-4


def test_a_folder_from_before_equal_bytes_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = headwise.compare(["mha"], out=tmp_path, **SPEED, **TINY)
    path = tmp_path / "configuration.json"
    stored = json.loads(path.read_text())
    assert stored.pop("equal") == "parameters"
    path.write_text(json.dumps(stored))
    monkeypatch.setattr(experiment, "train", None)
    monkeypatch.setattr(experiment, "measure_speed", None)
    assert headwise.compare(["mha"], out=tmp_path, **SPEED, **TINY).runs == done.runs
    with pytest.raises(OptionError, match="with equal parameters, not bytes"):
        headwise.compare(["mha"], out=tmp_path, equal="bytes", **SPEED, **TINY)


def test_progress_counts_the_steps_of_all_runs() -> None:
    told = []
    headwise.compare(["mha"], progress=lambda *at: told.append(at), **TINY, **SPEED)
    assert [at[1:] for at in told if "training " in at[0] and at[2]] == [
        (n, 6) for n in range(1, 7)
    ]


def test_speed_alone_is_measured_anew_at_other_contexts(
    finished: tuple[Path, Comparison], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiment, "train", None)
    other = headwise.compare(["mha", "mla"], out=finished[0], contexts=[23], rounds=4, **TINY)
    assert [at.context for at in other.speeds[0].decode] == [23]
    assert other.runs == finished[1].runs


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"steps": 4}, "holds a comparison with steps 3, not 4"),
        ({"mechanisms": ("mha", "mqa")}, "with mechanisms mha,mla, not mha,mqa"),
        ({"learning_rate": 0.1}, "with learning_rate 0.002, not 0.1"),
    ],
)
def test_a_folder_of_another_configuration_is_refused_and_left_alone(
    finished: tuple[Path, Comparison], changed: dict[str, Any], message: str
) -> None:
    folder = finished[0]
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(OptionError, match=message):
        Experiment(tiny(**changed), None, folder)
    assert before == {path: path.read_bytes() for path in folder.iterdir()}


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("all of it")
    with pytest.raises(
        OptionError, match=r"^[^:]* is not empty and holds no comparison; give a new folder$"
    ):
        Experiment(tiny(), None, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(OptionError, match="out: File exists; give another folder"):
        Experiment(tiny(), None, tmp_path / "out")


@pytest.mark.parametrize("content", ["{", "[]", '{"steps": 1'])
def test_a_broken_configuration_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "configuration.json").write_text(content)
    with pytest.raises(OptionError, match=r"configuration\.json .*give a new folder"):
        Experiment(tiny(), None, tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"loss": 1}'])
def test_a_broken_run_is_named(tmp_path: Path, content: str) -> None:
    work = Experiment(tiny(), None, tmp_path)
    (tmp_path / "run-mha-seed0.json").write_text(content)
    with pytest.raises(OptionError, match=r"run-mha-seed0\.json cannot be read .*delete it"):
        work.carry_out()


def test_another_text_is_another_comparison(tmp_path: Path) -> None:
    first, second, out = tmp_path / "1.txt", tmp_path / "2.txt", tmp_path / "out"
    first.write_bytes(b"some text " * 40)
    second.write_bytes(b"other text" * 40)
    settings = TINY | {"length": 7}
    found = headwise.compare(["mqa"], text=first, out=out, **SPEED, **settings)
    assert (found.metric, found.complete) == ("loss", True)
    with pytest.raises(OptionError, match="holds a comparison with text"):
        headwise.compare(["mqa"], text=second, out=out, **SPEED, **settings)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"steps": 0}, "steps is 0, expected an integer of at least 1"),
        ({"seeds": 0}, "seeds is 0, expected"),
        ({"seeds": True}, "seeds is True, expected"),
        ({"width": 30}, "width is 30, and 3 heads need a multiple of 12"),
        ({"mechanisms": ()}, "mechanisms is empty"),
        ({"mechanisms": ("mha", "gqa:3")}, "gqa:3 is the same as mha"),
        ({"vocabulary": 11}, "vocabulary is 11, and 5 pairs need at least 12"),
        ({"batch": 19}, "batch is 19 tokens, expected at least the 20 of a sequence"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0, expected between 0 and 1"),
        ({"task": "sum"}, "task is 'sum', expected recall, beyond or text"),
        ({"task": "text"}, "task is text without a text file"),
        ({"text": "a hash"}, "task is recall with a text file"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        tiny(**changed)
    assert message in str(caught.value)


def test_contexts_that_cannot_be_are_refused() -> None:
    with pytest.raises(OptionError, match="expected numbers of tokens from 1"):
        check_contexts(tiny(), [0])
    with pytest.raises(CapacityError, match="give smaller contexts"):
        check_contexts(tiny(), [10**12])
    assert check_contexts(tiny(), [9, 5, 9]) == (5, 9)


def test_training_learns_what_it_is_given() -> None:
    asked = tiny(steps=150, pairs=2, vocabulary=8, batch=256, learning_rate=0.01)
    with use_threads(1):
        found = train(asked, RecallTask(asked), "mha", 0)
    # any value of the sequence is right half of the time
    assert found.accuracy > 0.7
    assert found.curve[-1].steps == 150


def test_more_threads_than_processors_are_refused() -> None:
    with pytest.raises(OptionError, match="threads is 9999; expected 1 to"):
        Experiment(tiny(threads=9999), None, None)


def test_training_leaves_the_threads_as_they_were() -> None:
    before = torch.get_num_threads()
    headwise.compare(["mha"], **TINY, **SPEED)
    assert torch.get_num_threads() == before
