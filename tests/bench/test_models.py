"""Benchmarks of a model: what is checked, and that every figure is of what it says."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig

import generation.models
from cli.checkpoints import HEAD_DIM, KV_HEADS, LAYERS, save_tiny, save_tiny_gguf
from headwise.bench import llamacpp_candidate, openvino_candidate
from headwise.bench import models as module
from headwise.bench.llamacpp_candidate import LlamaCppStepper, load_gguf
from headwise.bench.model_candidates import HEADWISE, PEERS, model_candidates
from headwise.bench.models import bench_model, open_model
from headwise.bench.peers import check_names
from headwise.errors import LoadError, OptionError, ShapeError
from headwise.generation.stepper import Stepper
from headwise.measure.memory import peak_memory
from loading.gguf_files import SIZES, make_stock, write_gguf

ROUNDS = 4
STOCK = ("stock-dynamic", "stock-static")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def model(tiny: Path):
    return open_model(str(tiny), dtype="float32", contexts=[29], rounds=ROUNDS)[1]


def test_every_candidate_is_timed_at_every_context(model) -> None:
    found = bench_model("tiny", model, contexts=[29, 7], peers=STOCK, rounds=ROUNDS)
    assert [way.name for way in found.timed] == ["headwise", "stock-dynamic", "stock-static"]
    assert found.left_out == ()
    assert found.headwise_wrong is False
    for way in found.timed:
        assert [at.context for at in way.contexts] == [7, 29]
        assert all(at.low <= at.seconds <= at.high for at in way.contexts)
        assert all(at.error <= 1e-4 for at in way.contexts)
        assert all((at.ratio is None) == (way.name == HEADWISE) for at in way.contexts)
        first, last = way.contexts
        assert way.slope == pytest.approx(1000 * (last.seconds - first.seconds) / 22)
        # the context, and each token that was checked, timed or read to warm up
        assert way.cache_bytes == 2 * LAYERS * KV_HEADS * HEAD_DIM * 4 * (29 + 4 + 2 + ROUNDS)
    dynamic, static = (way.how for way in found.timed[1:])
    # without a mask stock gives every query head its own row of keys, with one it packs them
    assert f"SDPA of query [1, 6, 1, {HEAD_DIM}] on key [1, 2, 33, {HEAD_DIM}]" in dynamic
    assert f"SDPA of query [1, 2, 3, {HEAD_DIM}] on key [1, 2, 39, {HEAD_DIM}]" in static
    assert found.weight_bytes == sum(each.nbytes for each in model.parameters())


def test_a_token_is_read_against_the_whole_context(model, monkeypatch) -> None:
    """Every candidate's cache holds what stock's would, token for token."""
    seen: dict[str, list[int]] = {}
    real = Stepper.read

    def read(self, ids):
        logits = real(self, ids)
        seen.setdefault(f"{id(self)}", []).append(int(self.cache.get_seq_length()))
        return logits

    monkeypatch.setattr(Stepper, "read", read)
    monkeypatch.setattr(module, "_warm_up", lambda *_: [])
    bench_model("tiny", model, contexts=[11], peers=STOCK, rounds=ROUNDS)
    assert len(seen) == 3
    assert set(map(tuple, seen.values())) == {tuple(range(11, 11 + 4 + 2 + ROUNDS + 1))}


def test_a_context_is_read_as_generate_reads_it(monkeypatch) -> None:
    """Every candidate's logits after a context in which the rotation depends on the length."""
    monkeypatch.setattr("headwise.generation.chunks.CHUNK", 16)
    model = generation.models.make("llama-dynamic")
    ids = torch.randint(3, 97, (1, 71), generator=torch.Generator().manual_seed(3))
    options = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **options, output_logits=True, return_dict_in_generate=True)
    with torch.no_grad():
        for candidate in model_candidates(model)[:3]:
            found = candidate.stepper(72).read(ids)
            difference = (found - expected.logits[0]).norm() / expected.logits[0].norm()
            assert difference <= 1e-4, candidate.name


def test_without_peers_stock_still_checks_headwise_and_is_not_shown(model) -> None:
    found = bench_model("tiny", model, contexts=[7], peers=[], rounds=ROUNDS)
    assert [way.name for way in found.timed] == ["headwise"]
    assert found.timed[0].slope is None


def test_wrong_logits_are_told_and_not_timed(model, monkeypatch) -> None:
    def wrong(stock, gguf, *, packed):
        ours, *rest = model_candidates(stock)
        broken = ours.stepper(1).model
        with torch.no_grad():
            # a module of its own, whose weights are shared: replace, do not write
            head = torch.nn.Parameter(broken.lm_head.weight * 1.001)
        broken.lm_head.weight = head
        return [ours, *rest]

    monkeypatch.setattr(module, "model_candidates", wrong)
    found = bench_model("tiny", model, contexts=[7, 11], peers=STOCK, rounds=ROUNDS)
    assert found.headwise_wrong is True
    assert [way.name for way in found.timed] == ["stock-dynamic", "stock-static"]
    assert found.timed[0].contexts[0].ratio is None
    assert "differ from stock's by 1.0e-03 at 7 tokens" in found.left_out[0].reason


def test_a_cache_that_the_model_cannot_have_is_absent(model, monkeypatch) -> None:
    def broken(**options) -> None:
        raise ValueError("no static cache for this one\nreally")

    monkeypatch.setattr("headwise.bench.model_candidates.StaticCache", broken)
    found = bench_model("tiny", model, contexts=[7], peers=STOCK, rounds=ROUNDS)
    assert [way.name for way in found.timed] == ["headwise", "stock-dynamic"]
    assert [(at.state, at.reason) for at in found.left_out] == [
        ("absent", "no static cache for this one")
    ]


def test_on_a_gguf_file_headwise_runs_its_blocks_and_stock_its_numbers(tmp_path: Path) -> None:
    config = LlamaConfig(**SIZES | {"hidden_size": 96, "intermediate_size": 160})
    file = write_gguf(tmp_path / "m.gguf", make_stock(config), "llama", quantized="Q8_0")
    name, model, gguf = open_model(str(file), dtype="float32", contexts=[9], rounds=ROUNDS)
    peers = ["stock-dynamic", "headwise-float"]
    found = bench_model(name, model, gguf, contexts=[9], peers=peers, rounds=ROUNDS)
    ours, floats, stock = found.timed
    assert [ours.name, floats.name, stock.name] == ["headwise", "headwise-float", "stock-dynamic"]
    assert ours.how.endswith("weights packed in Q8_0")
    # rows are rounded to 8 bits on the one side alone
    assert 1e-3 < ours.contexts[0].error < 0.1
    assert floats.contexts[0].error < 1e-4
    alone = bench_model(name, model, gguf, contexts=[9], peers=[], rounds=ROUNDS, packed=False)
    assert alone.timed[0].contexts[0].error < 1e-4


def test_openvino_reads_the_gguf_file_and_gives_its_logits() -> None:
    pytest.importorskip("openvino_genai", exc_type=ImportError)
    name, model, gguf = open_model(None, dtype="float32", contexts=[29], rounds=ROUNDS)
    assert gguf is not None
    before = set(gguf.parent.iterdir())
    found = bench_model(name, model, gguf, contexts=[7, 29], peers=["openvino"], rounds=ROUNDS)
    assert found.left_out == ()
    assert [way.name for way in found.timed] == ["headwise", "openvino"]
    # its weights and its cache are integers
    assert all(1e-3 < at.error < openvino_candidate.TOLERANCE for at in found.timed[1].contexts)
    assert set(gguf.parent.iterdir()) == before


def test_a_gguf_file_that_openvino_does_not_read_is_absent(model, tmp_path: Path) -> None:
    pytest.importorskip("openvino_genai", exc_type=ImportError)
    save_tiny_gguf(tmp_path / "tiny.gguf")
    found = bench_model(
        "tiny",
        model,
        tmp_path / "tiny.gguf",
        contexts=[7],
        peers=["openvino"],
        rounds=ROUNDS,
        packed=False,
    )
    assert [at.state for at in found.left_out] == ["absent"]
    assert found.left_out[0].reason.startswith("OpenVINO GenAI refuses: ")


def test_openvino_is_absent_with_the_reason(model, tmp_path: Path, monkeypatch) -> None:
    found = bench_model("tiny", model, contexts=[7], peers=["openvino"], rounds=ROUNDS)
    assert [(at.state, at.reason) for at in found.left_out] == [
        ("absent", "OpenVINO GenAI is timed on a .gguf file only")
    ]
    monkeypatch.setitem(sys.modules, "openvino_genai", None)
    gguf = tmp_path / "model.gguf"
    options = {"contexts": [7], "peers": ["openvino"], "rounds": ROUNDS, "packed": False}
    found = bench_model("tiny", model, gguf, **options)
    assert [(at.state, at.reason) for at in found.left_out] == [
        ("absent", "openvino-genai is not installed: pip install openvino-genai")
    ]


def test_llamacpp_reads_the_gguf_file_and_gives_its_logits() -> None:
    pytest.importorskip("xllamacpp", exc_type=ImportError)
    name, model, gguf = open_model(None, dtype="float32", contexts=[29], rounds=ROUNDS)
    found = bench_model(name, model, gguf, contexts=[7, 29], peers=["llama.cpp"], rounds=ROUNDS)
    assert found.left_out == ()
    assert [way.name for way in found.timed] == ["headwise", "llama.cpp"]
    # it multiplies with integers
    assert all(1e-3 < at.error < llamacpp_candidate.TOLERANCE for at in found.timed[1].contexts)
    # keys and values in float16, half of headwise's; and the positions
    ours, theirs = (way.cache_bytes for way in found.timed)
    assert ours / 2 < theirs < ours / 2 * 1.01


def test_llamacpp_reads_each_token_that_it_is_given(tmp_path: Path) -> None:
    """With weights in float32, whose logits one other token moves by a tenth."""
    pytest.importorskip("xllamacpp", exc_type=ImportError)
    file = tmp_path / "tiny.gguf"
    save_tiny_gguf(file)
    name, model, gguf = open_model(str(file), dtype="float32", contexts=[29], rounds=ROUNDS)
    found = bench_model(name, model, gguf, contexts=[7, 29], peers=["llama.cpp"], rounds=ROUNDS)
    assert [at.error <= 1e-2 for at in found.timed[1].contexts] == [True, True]
    # longer than a batch
    ids = torch.randint(97, (1, 2100), generator=torch.Generator().manual_seed(3))
    whole = LlamaCppStepper(load_gguf(file), 2100, 2).read(ids)
    stepper = LlamaCppStepper(load_gguf(file), 2100, 2)
    for tokens in ids.split([2097, 1, 1, 1], dim=1):
        last = stepper.read(tokens)
    assert last.shape == (1, 258)
    # a step sums what it attended to in float16
    assert (last - whole).norm() <= 3e-2 * whole.norm()
    with pytest.raises(RuntimeError, match="llama_decode gave"):
        stepper.read(ids)


def test_a_gguf_file_that_llamacpp_does_not_read_is_absent(model, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", exc_type=ImportError)
    file = tmp_path / "damaged.gguf"
    file.write_bytes(b"no model")
    options = {"contexts": [7], "peers": ["llama.cpp"], "rounds": ROUNDS, "packed": False}
    found = bench_model("tiny", model, file, **options)
    assert [at.state for at in found.left_out] == ["absent"]
    assert found.left_out[0].reason.startswith("llama.cpp refuses: gguf_init")


def test_llamacpp_is_absent_with_the_reason(model, tmp_path: Path, monkeypatch) -> None:
    def reason(gguf: Path | None) -> str:
        options = {"contexts": [7], "peers": ["llama.cpp"], "rounds": ROUNDS, "packed": False}
        found = bench_model("tiny", model, gguf, **options)
        assert [at.state for at in found.left_out] == ["absent"]
        return found.left_out[0].reason

    assert reason(None) == "llama.cpp is timed on a .gguf file only"
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    assert reason(tmp_path / "m.gguf") == "xllamacpp is not installed: pip install xllamacpp"
    # some other library in its place
    monkeypatch.setitem(sys.modules, "xllamacpp", SimpleNamespace(xllamacpp=torch._C))
    assert reason(tmp_path / "m.gguf") == "this build of xllamacpp does not export llama_log_set"


def test_damaged_weights_are_refused(model) -> None:
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    with pytest.raises(LoadError, match="logits are not numbers in float32"):
        bench_model("tiny", model, contexts=[7], rounds=ROUNDS)


def test_weights_are_shared_and_the_model_stays_on_stock(model) -> None:
    ours, stock = (at.stepper(1).model for at in model_candidates(model)[:2])
    assert stock is model
    assert (ours.config._attn_implementation, model.config._attn_implementation) == (
        "headwise",
        "sdpa",
    )
    assert all(a is b for a, b in zip(ours.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("contexts", "error", "message"),
    [
        ([0, 7], OptionError, "contexts has 0"),
        ([7, 202], ShapeError, "212 tokens, more than the model's 211"),
    ],
)
def test_contexts_that_do_not_fit_are_refused(tiny, contexts, error, message) -> None:
    with pytest.raises(error, match=message):
        open_model(str(tiny), dtype="float32", contexts=contexts, rounds=ROUNDS)


def test_what_is_no_model_or_no_peer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="is not a model folder"):
        open_model(str(tmp_path), dtype="float32", contexts=[7], rounds=ROUNDS)
    with pytest.raises(OptionError, match="peer 'fast' is unknown"):
        check_names(["fast"], PEERS)
    assert check_names(["none"], PEERS) == []


def test_peak_memory_is_what_the_work_took_even_if_it_gave_it_back() -> None:
    def work() -> int:
        return int(torch.ones(2**24).sum())

    result, peak = peak_memory(work)
    assert result == 2**24
    if peak is not None:
        assert 0.9 * 2**26 <= peak <= 1.3 * 2**26
        # of what was there before, nothing counts
        assert peak_memory(lambda: None)[1] < 2**23


def test_a_system_that_does_not_say_gives_no_peak(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr("headwise.measure.memory._PROCESS", tmp_path / "none")
    assert peak_memory(lambda: 5) == (5, None)
