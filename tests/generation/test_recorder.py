"""A generation gives the tokens of `model.generate`, however the model reads its prompt."""

from typing import Any

import pytest
import torch

import families
from generation.models import CUT, LIMIT, WHOLE, make, stock_tokens
from headwise.errors import CapacityError
from headwise.generation.answer import Answer
from headwise.generation.options import Sampling
from headwise.generation.recorder import generate

NEW = 7
# Stock has no sdpa for these.
EAGER = ("gemma2", "gpt_oss")
SEVERAL_CHUNKS, SHORT = 71, 11
# LongRoPE and dynamic NTK change over while the answer is written.
CROSSING = LIMIT - 3
CASES = [
    *((name, SEVERAL_CHUNKS) for name in (*WHOLE, *CUT)),
    *((name, CROSSING) for name in WHOLE[:4]),
    *((name, SHORT) for name in ("phi3-longrope", "qwen3_next", "jamba", "llama-gqa")),
]


def tokens(count: int) -> list[int]:
    draw = torch.Generator().manual_seed(3)
    return torch.randint(3, families.VOCABULARY, (count,), generator=draw).tolist()


def attentions(name: str) -> tuple[str, str]:
    return ("eager" if name in EAGER else "sdpa", "headwise")


def lengths_read(model: Any) -> list[int]:
    """How many tokens each forward pass from now on reads."""
    seen: list[int] = []
    model.register_forward_pre_hook(
        lambda _, args, given: seen.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    return seen


@pytest.mark.parametrize(("name", "length"), CASES)
@pytest.mark.usefixtures("short_chunks")
def test_tokens_are_those_of_generate(name: str, length: int) -> None:
    prompt = tokens(length)
    expected = stock_tokens(lambda: make(name), prompt, NEW)
    for attention in attentions(name):
        run = generate(
            make(name), prompt, attention=attention, sampling=Sampling(max_new_tokens=NEW)
        )
        assert run.tokens == expected, attention
        assert len(run.margins) == len(run.decode_seconds) == NEW
        assert run.prefill_tokens == len(prompt)
        assert run.prefill_seconds > 0
        if run.cache_bytes:
            assert run.cache_tokens == len(prompt) + NEW - 1


@pytest.mark.parametrize("name", ["llama-gqa", "phi3-longrope", "llama-dynamic", "jamba"])
@pytest.mark.usefixtures("short_chunks")
def test_sampled_tokens_are_those_of_generate_with_the_same_seed(name: str) -> None:
    prompt, sampling = (
        tokens(SEVERAL_CHUNKS),
        Sampling(max_new_tokens=NEW, temperature=1.3, top_p=0.9, seed=5),
    )
    options = {"do_sample": True, "temperature": 1.3, "top_p": 0.9, "top_k": 0}
    model = make(name)
    torch.manual_seed(5)
    expected = stock_tokens(lambda: model, prompt, NEW, **options)
    for attention in attentions(name):
        assert generate(make(name), prompt, attention=attention, sampling=sampling).tokens == (
            expected
        )


@pytest.mark.parametrize("name", ["llama-dynamic", "gemma3-dynamic", "phi3-longrope"])
def test_a_model_that_has_read_a_longer_text_gives_the_same(name: str) -> None:
    prompt, model, sampling = tokens(47), make(name), Sampling(max_new_tokens=NEW)
    expected = stock_tokens(lambda: make(name), prompt, NEW)
    for attention in attentions(name):
        generate(model, tokens(97), attention=attention, sampling=sampling)
        assert generate(model, prompt, attention=attention, sampling=sampling).tokens == expected


@pytest.mark.parametrize(
    ("name", "attention", "asked", "expected"),
    [
        ("llama-gqa", "sdpa", None, [600]),
        ("llama-gqa", "headwise", None, [512, 88]),
        ("llama-gqa", "sdpa", 250, [250, 250, 100]),
        ("llama-gqa", "headwise", 250, [250, 250, 100]),
        ("phi3-longrope", "headwise", None, [600]),
        ("lfm2", "headwise", None, [600]),
        ("lfm2", "headwise", 250, [250, 250, 100]),
    ],
)
def test_stock_reads_a_prompt_as_generate_does_and_headwise_in_chunks_where_that_is_exact(
    name: str, attention: str, asked: int | None, expected: list[int]
) -> None:
    model, told = make(name, max_position_embeddings=700), []
    model.generation_config.prefill_chunk_size = asked
    seen = lengths_read(model)
    generate(
        model,
        tokens(600),
        attention=attention,
        sampling=Sampling(max_new_tokens=3),
        on_prefill=lambda done, total: told.append((done, total)),
    )
    assert seen == [*expected, 1, 1]
    assert told == [(sum(expected[:count]), 600) for count in range(len(expected) + 1)]


@pytest.mark.usefixtures("short_chunks")
def test_a_fault_of_reading_in_chunks_cannot_be_in_stock_too(monkeypatch) -> None:
    monkeypatch.setattr("headwise.generation.chunks.reads_in_chunks", lambda model: True)
    prompt, sampling = tokens(SEVERAL_CHUNKS), Sampling(max_new_tokens=NEW)
    stock, ours = (
        generate(make("llama-dynamic"), prompt, attention=attention, sampling=sampling).tokens
        for attention in ("sdpa", "headwise")
    )
    assert stock == stock_tokens(lambda: make("llama-dynamic"), prompt, NEW) != ours


def interrupted_at(count: int) -> tuple[Answer, Any]:
    """A run that ends by Ctrl-C at so many tokens, read or written, and its model."""
    model = make("llama-gqa")

    def stop(done: int, total: int = 0) -> None:
        if done == count:
            raise KeyboardInterrupt

    written: list[int] = []

    def wrote(token: int) -> None:
        written.append(token)
        stop(len(written))

    sampling = Sampling(max_new_tokens=NEW)
    return generate(model, tokens(600), sampling=sampling, on_prefill=stop, on_token=wrote), model


def test_a_run_keeps_what_it_has_when_it_is_interrupted() -> None:
    run, model = interrupted_at(512)
    assert (run.interrupted, run.prefill_tokens, run.tokens) == (True, 512, [])
    assert run.cache_tokens == 512
    assert (
        run.cache_bytes == 512 * 3 * 2 * 2 * 8 * 4
    )  # layers, keys and values, heads, dim, float32
    assert not model._forward_hooks

    run, model = interrupted_at(3)
    expected = stock_tokens(lambda: make("llama-gqa"), tokens(600), 3)
    assert (run.interrupted, run.prefill_tokens, run.tokens) == (True, 600, expected)
    assert run.cache_tokens == 602
    assert not model._forward_hooks


def test_memory_that_runs_out_says_how_far_the_prompt_was(monkeypatch) -> None:
    model = make("llama-gqa")
    calls: list[int] = []

    def full(module: Any, args: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")

    model.model.layers[1].register_forward_pre_hook(full)
    with pytest.raises(CapacityError, match="after 512 of 600 prompt tokens and 0 new ones"):
        generate(model, tokens(600))
    assert not model._forward_hooks
