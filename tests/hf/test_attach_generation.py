"""Attached models against stock ones: the same logits and the same tokens, in every mode."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import headwise
from families import DECODERS, ENCODERS, GENERATORS, KIN, LINEAR, MLA, VOCABULARY, make
from headwise.hf import attend
from headwise.hf.cache_layers import OwnLayer
from older_stock import needs
from rounding import half_precision_error, relative_error

NEW_TOKENS = 24
# float32 rounding of about 1e-7, through 3 layers whose activations grow to about 10
LOGIT_TOLERANCE = 1e-4

_generator = torch.Generator().manual_seed(3)
PROMPT = torch.randint(3, VOCABULARY, (1, 19), generator=_generator)
BATCH = torch.randint(3, VOCABULARY, (3, 19), generator=_generator)
ATTENTION_MASK = torch.ones_like(BATCH)
ATTENTION_MASK[0, :5] = 0
ATTENTION_MASK[1, :11] = 0
BATCH[ATTENTION_MASK == 0] = 0
REPEATING = torch.tensor([[5, 6, 7, 8, 9, 10, 5, 6, 7, 8, 9, 10, 5, 6, 7]])


def _generate(ids: torch.Tensor, **options: Any) -> Callable[[Any], torch.Tensor]:
    return lambda model: model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, **options)


MODES = {
    "one sequence": _generate(PROMPT),
    "left-padded batch": _generate(BATCH, attention_mask=ATTENTION_MASK),
    "three beams": _generate(BATCH, attention_mask=ATTENTION_MASK, num_beams=3),
    "prompt lookup": _generate(REPEATING, prompt_lookup_num_tokens=4),
    "static cache": _generate(PROMPT, cache_implementation="static"),
    "static cache, padded": _generate(
        BATCH, attention_mask=ATTENTION_MASK, cache_implementation="static"
    ),
    "chunked prefill": _generate(PROMPT, prefill_chunk_size=5),
    "no cache": _generate(PROMPT, use_cache=False),
}
# Where stock itself refuses or warns, there is nothing to compare.
_MODES_OF = {
    "t5": {"chunked prefill"},
    "falcon-rw": {"static cache", "static cache, padded"},
    # a state cannot be cropped
    **{family: {"prompt lookup"} for family in LINEAR},
}


_BLOOM = needs("5.22", "Bloom's ALiBi has no static cache")
# Of families that are nearly another one.
_SWEPT = ("static cache", "static cache, padded", "no cache")


def modes_without(mode: str) -> list[str]:
    """The families that are not tested in a mode."""
    return [family for family, modes in _MODES_OF.items() if mode in modes]


def _cases() -> list[Any]:
    return [
        pytest.param(
            family,
            mode,
            id=f"{family}-{mode}",
            marks=[
                *([pytest.mark.sweep] if family in KIN and mode in _SWEPT else []),
                *([_BLOOM] if family == "bloom" and "static" in mode else []),
            ],
        )
        for family in GENERATORS
        for mode in MODES
        if mode not in _MODES_OF.get(family, set())
    ]


@pytest.mark.parametrize(("family", "mode"), _cases())
def test_generates_the_tokens_of_stock(family: str, mode: str) -> None:
    model = make(family)
    expected = MODES[mode](model)
    headwise.attach(model)
    tokens = MODES[mode](model)
    assert torch.equal(tokens, expected)
    assert len(set(expected.flatten().tolist())) > 5, "a constant output would prove nothing"


def _forward(model: Any, **inputs: torch.Tensor) -> torch.Tensor:
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"][:, -6:]
    output = model(**inputs)
    return output.logits if "logits" in output else output.last_hidden_state


@pytest.mark.parametrize("family", [*GENERATORS, *ENCODERS])
def test_forward_gives_the_logits_of_stock(family: str) -> None:
    model = make(family)
    plain = {"input_ids": PROMPT}
    padded = {"input_ids": BATCH, "attention_mask": ATTENTION_MASK}
    # rows of padding are not compared: eager averages them, SDPA zeroes them
    kept = ATTENTION_MASK[:, -6:].bool() if family == "t5" else ATTENTION_MASK.bool()
    with torch.no_grad():
        expected = _forward(model, **plain), _forward(model, **padded)[kept]
        headwise.attach(model)
        given = _forward(model, **plain), _forward(model, **padded)[kept]
    for ours, stock in zip(given, expected, strict=True):
        scale = stock.abs().max().item()
        torch.testing.assert_close(ours, stock, atol=LOGIT_TOLERANCE * scale, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama-gqa", "gemma2", "gpt_oss", "gpt2", "t5", "bert"])
def test_half_precision_is_as_close_to_float32_as_its_roundings_allow(
    family: str, dtype: torch.dtype
) -> None:
    # T5 does not scale its scores: with the usual weights of these tests they are hundreds, whose
    # rounding is all that half precision leaves
    changes = {"initializer_factor": 1.0} if family == "t5" else {}
    exact = make(family, **changes)
    model = make(family, **changes).to(dtype)
    with torch.no_grad():
        truth = _forward(exact, input_ids=PROMPT)
        headwise.attach(model)
        ours = _forward(model, input_ids=PROMPT)
    layers = model.config.num_hidden_layers
    assert relative_error(ours, truth) <= half_precision_error(dtype, layers)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_absorbed_decoding_in_half_precision_is_as_close_as_its_roundings_allow(
    dtype: torch.dtype,
) -> None:
    # one dense layer: in half precision the routing of experts flips, whoever attends
    changes = {"num_hidden_layers": 2, "first_k_dense_replace": 2}
    exact, model = make("deepseek_v3", **changes), make("deepseek_v3", **changes).to(dtype)

    def decoded(at: Any) -> torch.Tensor:
        with torch.no_grad():
            cache = at(PROMPT[:, :-1], use_cache=True).cache
            return at(PROMPT[:, -1:], cache=cache).logits.float()

    truth = decoded(exact)
    headwise.attach(model)
    assert relative_error(decoded(model), truth) <= half_precision_error(dtype, 2)


@pytest.mark.parametrize("family", GENERATORS)
def test_attached_models_run_our_attention(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(family)
    layers = model.config.num_hidden_layers if family != "t5" else 3 + 3 + 3
    layers -= family in LINEAR
    calls = []
    ours = {"run_call": attend.run_call, "absorb": attend.absorb}

    def spy(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            out = ours[name](*args, **kwargs)
            if out is not None:
                calls.append(name)
            return out

        return call

    headwise.attach(model)  # which tries layers, and attends for it
    for name in ours:
        monkeypatch.setattr(attend, name, spy(name))
    with torch.no_grad():
        _forward(model, input_ids=PROMPT)
    assert len(calls) == layers


@pytest.mark.parametrize("family", MLA)
def test_decoding_absorbs_and_never_expands_the_context(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(family)
    headwise.attach(model)
    with torch.no_grad():
        cache = model(PROMPT, use_cache=True).cache
    monkeypatch.setattr(attend, "expand", lambda *_: pytest.fail("expanded the context"))
    with torch.no_grad():
        model(PROMPT[:, :1], cache=cache)


@pytest.mark.parametrize("family", MLA)
def test_the_latent_cache_holds_rank_plus_rope_elements_a_token(family: str) -> None:
    model = make(family)
    headwise.attach(model)
    with torch.no_grad():
        cache = model(PROMPT, use_cache=True).cache
    held = [layer for layer in cache.layers if isinstance(layer, OwnLayer)]
    layers = {"headwise_mla": 3, **dict.fromkeys(MLA[:5], 3), **dict.fromkeys(LINEAR, 1)}
    assert len(held) == layers.get(family, 2)
    elements = (20 + 8) * PROMPT.shape[1]  # R + P, tokens
    assert sum(layer.cache.nbytes for layer in held) == len(held) * elements * 4


@pytest.mark.parametrize("family", [name for name in DECODERS if name not in ("gemma3", "gpt_oss")])
def test_the_cache_takes_what_the_spec_says(family: str) -> None:
    model = make(family)
    headwise.attach(model)
    with torch.no_grad():
        cache = model(PROMPT, use_cache=True).cache
    spec = headwise.ModelSpec.from_config(model.config)
    assert headwise.hf.cache_nbytes(cache) == spec.cache_bytes(PROMPT.shape[1], dtype="float32")


def test_sampling_with_the_same_seed_gives_the_tokens_of_stock() -> None:
    model = make("llama-gqa")

    def sampled() -> torch.Tensor:
        torch.manual_seed(5)
        return model.generate(PROMPT, max_new_tokens=40, do_sample=True, temperature=0.8, top_p=0.9)

    expected = sampled()
    headwise.attach(model)
    assert torch.equal(sampled(), expected)


@pytest.mark.parametrize("family", ["llama-gqa", "deepseek_v3"])
def test_an_assistant_model_gives_the_tokens_of_stock(family: str) -> None:
    model, assistant = make(family), make("llama-gqa", num_hidden_layers=1)
    expected = model.generate(PROMPT, max_new_tokens=32, do_sample=False)
    headwise.attach(model)
    headwise.attach(assistant)
    given = model.generate(PROMPT, max_new_tokens=32, do_sample=False, assistant_model=assistant)
    assert torch.equal(given, expected)


@pytest.mark.parametrize("family", ["llama-gqa", "mistral", "gemma2", "gpt_oss", "t5", *MLA[:2]])
def test_a_window_or_prompt_longer_than_a_block_decodes_as_stock(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from headwise.ops.attend import blocks

    monkeypatch.setattr(blocks, "_BLOCK_ROWS", 5)
    monkeypatch.setattr(blocks, "_BLOCK_SCORES", 6 * 40 * 3)
    model = make(family)
    ids = PROMPT.repeat(1, 3)
    expected = model.generate(ids, max_new_tokens=16, do_sample=False, prefill_chunk_size=None)
    headwise.attach(model)
    assert torch.equal(model.generate(ids, max_new_tokens=16, do_sample=False), expected)
