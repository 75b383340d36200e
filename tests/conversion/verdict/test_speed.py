"""Decode speed before and after: what is timed, and what is said where nothing can be."""

from pathlib import Path

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from cli.checkpoints import HEAD_DIM, KV_HEADS, LAYERS, save_tiny
from headwise import attach, convert
from headwise.conversion.checkpoint.checkpoint import Checkpoint
from headwise.conversion.verdict import speed
from headwise.conversion.verdict.speed import compare_speed

ROUNDS, WARMUP = 5, 3


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(save_tiny(tmp_path_factory.mktemp("tiny")))


def test_both_models_are_timed_at_each_context_that_they_reach(tiny: Checkpoint) -> None:
    speeds = compare_speed(tiny, tiny, contexts=[97, 31, 1009], rounds=ROUNDS)
    assert [decode.context for decode in speeds.contexts] == [31, 97]
    for decode in speeds.contexts:
        assert min(decode.original, decode.converted) > 0
        assert decode.ratio.low <= decode.ratio.median <= decode.ratio.high
    assert speeds.original.startswith(f"3 x GQA 6/{KV_HEADS} heads, D {HEAD_DIM} on ")
    assert speeds.note == ""


def test_what_the_conversion_did_not_touch_is_in_memory_once(
    tiny: Checkpoint, tmp_path: Path, monkeypatch
) -> None:
    convert(tiny.folder, "mla", out=tmp_path / "latent")
    monkeypatch.setattr(speed, "_measure", lambda models, *_: list(models.values()))
    models = compare_speed(tiny, Checkpoint(tmp_path / "latent"), contexts=[31], rounds=ROUNDS)
    original, converted = (each.state_dict(keep_vars=True) for each in models)
    own = {name: tensor for name, tensor in converted.items() if tensor is not original.get(name)}
    assert {name for name in converted if ".self_attn." in name} == set(own)
    weights = sum(tensor.nbytes for tensor in (*original.values(), *own.values()))
    cache = 31 * LAYERS * 2 * KV_HEADS * HEAD_DIM * 4
    monkeypatch.setattr(speed, "available_bytes", lambda device: 0)
    monkeypatch.setattr(speed, "gib", str)
    refused = compare_speed(tiny, Checkpoint(tmp_path / "latent"), contexts=[31], rounds=ROUNDS)
    assert f"both models and their caches need {weights + 2 * (cache + cache)}, and" in refused.note


def test_the_last_tokens_of_a_context_are_timed_on_headwise(tiny: Checkpoint, monkeypatch) -> None:
    timed: list[tuple[str, int]] = []
    real = speed._steps

    def noted(decoder, ids):
        step = real(decoder, ids)

        def run():
            step()
            lengths = {layer.keys.shape[2] for layer in decoder.cache.layers}
            assert lengths == {decoder.cache.get_seq_length()}
            timed.append((decoder.model.config._attn_implementation, *lengths))

        return run

    monkeypatch.setattr(speed, "_steps", noted)
    monkeypatch.setattr(speed, "_START", 13)
    compare_speed(tiny, tiny, contexts=[31, 97], rounds=ROUNDS)
    for context in (31, 97):
        for length in range(context - ROUNDS - WARMUP + 1, context + 1):
            assert timed.count(("headwise", length)) == 2
    assert len(timed) == 2 * 2 * (ROUNDS + WARMUP)


def test_layers_that_keep_a_window_hold_the_context_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        sliding_window=8,
    )
    model = MistralForCausalLM(config).eval()
    attach(model)
    with torch.no_grad():
        decoder = speed._filled(model, torch.randint(97, (1, 13)), 70, 75)
    assert decoder.cache.layers[0].keys.shape[2] < 13  # fewer rows than tokens were read
    assert [layer.get_seq_length() for layer in decoder.cache.layers] == [70, 70]


def test_the_ratio_is_how_many_times_as_fast_the_converted_model_is(
    tiny: Checkpoint, tmp_path: Path, monkeypatch
) -> None:
    clock = iter(range(10_000))
    monkeypatch.setattr("headwise.measure.timing.time.perf_counter", lambda: slow[0] + next(clock))
    slow = [0]
    real = speed._steps

    def steps(decoder, ids):
        step = real(decoder, ids)
        costs = 5 if not steps.made else 1
        steps.made.append(step)

        def run():
            step()
            slow[0] += costs

        return run

    steps.made = []
    monkeypatch.setattr(speed, "_steps", steps)
    (decode,) = compare_speed(tiny, tiny, contexts=[31], rounds=ROUNDS).contexts
    # a look at the clock takes 1
    assert (decode.original, decode.converted, decode.ratio.median) == (6, 2, 3)


def test_models_whose_positions_are_too_few_are_not_timed(tiny: Checkpoint) -> None:
    speeds = compare_speed(tiny, tiny)
    assert speeds.contexts == ()
    assert speeds.note == (
        "decode speed was not measured: the shortest context is 512 tokens and the models take 211"
    )


def test_two_models_that_do_not_fit_in_memory_are_not_loaded(tiny: Checkpoint, monkeypatch) -> None:
    monkeypatch.setattr(speed, "available_bytes", lambda device: 1000)
    monkeypatch.setattr(Checkpoint, "load", None)
    speeds = compare_speed(tiny, tiny, contexts=[31], rounds=ROUNDS)
    assert speeds.contexts == ()
    assert speeds.note.startswith(
        "decode speed was not measured: both models and their caches need"
    )
    assert speeds.note.endswith("and 1000 bytes of memory is free")


def test_logits_that_attaching_changes_are_not_timed(tiny: Checkpoint, monkeypatch) -> None:
    real = speed.select_attention

    def breaks(model, attention):
        groups = real(model, attention)
        with torch.no_grad():
            model.lm_head.weight.mul_(1.001)
        return groups

    monkeypatch.setattr(speed, "select_attention", breaks)
    speeds = compare_speed(tiny, tiny, contexts=[31], rounds=ROUNDS)
    assert speeds.contexts == ()
    assert "the original model's logits with headwise differ from those without by" in speeds.note
