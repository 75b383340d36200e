"""The small decoder: cached generation, training, and what it refuses."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import headwise
from headwise import AttentionSpec, ModelSpec
from headwise.caches import ContiguousCache, PagedCache, StateCache
from headwise.nn import Attention, Decoder
from headwise.spec import LayerSpec, SparseChoice, StateSpec

GQA = AttentionSpec(heads=4, kv_heads=2, head_dim=8, value_dim=8)
MLA = AttentionSpec(heads=4, kv_heads=4, head_dim=12, value_dim=8, latent_rank=16, rope_dim=4)
DELTA = StateSpec(conv_channels=64, conv_width=4, heads=4, key_heads=2, key_dim=8, value_dim=8)
GLA = StateSpec(heads=4, key_dim=8, value_dim=8, delta=False, decay="dim")
STATES = {
    "gated delta": DELTA,
    "KDA": replace(DELTA, decay="dim"),
    "SSD": replace(DELTA, delta=False),
    "GLA": GLA,
    "retention": replace(GLA, decay="fixed"),
}
SPECS = {
    "MHA": replace(GQA, kv_heads=4),
    "GQA": GQA,
    "MQA": replace(GQA, kv_heads=1),
    "ALiBi": replace(GQA, alibi=True),
    "window": replace(GQA, window=6),
    "top 5": replace(GQA, sparse=SparseChoice(5, 5, sinks=1, recent=2, dense=0)),
    "MLA": MLA,
    "MLA, compressed queries": replace(MLA, query_rank=12),
    **STATES,
}
MIXED = ModelSpec.from_config(
    {
        "model_type": "gpt_oss",
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 5,
    }
)

HYBRID = ModelSpec(
    family="hybrid",
    layers=tuple(
        LayerSpec(index, mixer)
        for index, mixer in enumerate((DELTA, GQA, STATES["retention"], MLA))
    ),
    max_context=None,
)


def build(spec: Any, **options: Any) -> Decoder:
    torch.manual_seed(0)
    layers = {} if isinstance(spec, ModelSpec) else {"layers": 2}
    model = Decoder(spec, vocabulary=50, **layers, **options)
    with torch.no_grad():  # so that tokens differ
        model.embedding.weight.mul_(3)
    return model


@pytest.mark.parametrize(
    "spec", [*SPECS.values(), MIXED, HYBRID], ids=[*SPECS, "gpt-oss", "hybrid"]
)
def test_cached_generation_equals_uncached(spec: Any) -> None:
    model = build(spec)
    prompt = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(2))
    cached = model.generate(prompt, max_new_tokens=20)
    assert cached.shape == (2, 29)
    assert torch.equal(cached[:, :9], prompt)
    assert torch.equal(cached, model.generate(prompt, max_new_tokens=20, use_cache=False))
    assert cached.unique().numel() > 5, "a constant output would prove nothing"
    sampled = [
        model.generate(
            prompt,
            max_new_tokens=20,
            temperature=9.0,
            generator=torch.Generator().manual_seed(1),
            use_cache=use_cache,
        )
        for use_cache in (True, False)
    ]
    assert torch.equal(*sampled)
    assert not torch.equal(sampled[0], cached)


@torch.no_grad()
def test_a_layer_that_may_choose_every_key_is_dense_and_one_that_may_not_differs() -> None:
    tokens = torch.randint(50, (2, 30), generator=torch.Generator().manual_seed(0))
    logits = []
    for most in (30, 29, 6, None):
        choice = None if most is None else SparseChoice(most, 1, sinks=1, recent=2, dense=0)
        torch.manual_seed(0)
        spec = replace(GQA, sparse=choice)
        logits.append(Decoder(spec, layers=2, vocabulary=50).eval()(tokens))
    torch.testing.assert_close(logits[0], logits[3], rtol=1e-4, atol=1e-4)
    assert torch.equal(logits[1][:, :29], logits[0][:, :29])
    assert (logits[2] - logits[3]).abs().max() > 0.01


@torch.no_grad()
def test_sequences_of_different_lengths_see_all_keys() -> None:
    spec = replace(GQA, sparse=SparseChoice(12, 12, sinks=2, recent=6, dense=0))
    torch.manual_seed(0)
    layer, hidden = Attention(spec, 32), torch.randn(2, 31, 32)
    cache, alone = PagedCache(16), PagedCache(16)
    layer(hidden[:, :30], cache=cache)
    cache.share(0, 20, [1])
    dense = Attention(GQA, 32)
    dense.load_state_dict(layer.state_dict())
    dense(hidden[:1, :20], cache=alone)
    given = layer(hidden[:, 30:], cache=cache)[1:]
    torch.testing.assert_close(given, dense(hidden[1:, 30:], cache=alone), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SPECS)
def test_learns_a_few_texts_by_heart(name: str) -> None:
    model = build(SPECS[name])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = torch.randint(50, (8, 12), generator=torch.Generator().manual_seed(3))
    for _ in range(60):
        logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.7, "guessing gives 3.9"
    # the first token of a text does not say which one it is
    texts = model.generate(tokens[:, :4], max_new_tokens=8)
    assert (texts == tokens).float().mean() > 0.9


def test_a_temperature_near_zero_is_greedy() -> None:
    model, prompt = build(GQA), torch.randint(50, (1, 5))
    cold = model.generate(prompt, max_new_tokens=8, temperature=1e-39)
    assert torch.equal(cold, model.generate(prompt, max_new_tokens=8))


def test_checkpointing_gives_the_same_gradients() -> None:
    tokens, grads = torch.randint(50, (2, 9)), []
    for checkpointing in (False, True):
        model = build(GQA, checkpointing=checkpointing)
        model(tokens).logsumexp(-1).sum().backward()
        grads.append([at.grad for at in model.parameters()])
    for plain, again in zip(*grads, strict=True):
        torch.testing.assert_close(again, plain)


def test_the_caches_hold_what_the_spec_says() -> None:
    model = build(MIXED)
    caches = model.new_caches()
    with torch.no_grad():
        model(torch.randint(50, (3, 7)), caches=caches)
    held = sum(cache.nbytes for cache in caches)
    # two of the four layers have a window of 5
    assert held == sum(spec.cache_bytes(7, 3, "float32") for spec in model.specs)
    assert held < MIXED.cache_bytes_per_token("float32") * 7 * 3


def test_a_hybrid_has_the_cache_of_each_layer() -> None:
    model = build(HYBRID)
    caches = model.new_caches()
    assert list(map(type, caches)) == [StateCache, ContiguousCache] * 2
    tokens = torch.randint(50, (3, 9))
    with torch.no_grad():
        whole = model(tokens)
        parts = [model(part, caches=caches) for part in tokens.split([5, 1, 3], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-4, rtol=1e-4)
    for spec, cache in zip(model.specs, caches):
        assert cache.nbytes == spec.cache_bytes(9, 3, "float32")


def test_a_hybrid_of_transformers_is_built_by_its_config() -> None:
    config = {
        "model_type": "qwen3_next",
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    }
    model = build(ModelSpec.from_config(config), hidden_size=32)
    assert [isinstance(spec, StateSpec) for spec in model.specs] == [True, True, True, False]
    prompt = torch.randint(50, (1, 5))
    assert torch.equal(
        model.generate(prompt, max_new_tokens=4),
        model.generate(prompt, max_new_tokens=4, use_cache=False),
    )


@pytest.mark.parametrize(
    ("run", "error", "message"),
    [
        (lambda: Decoder(GQA, vocabulary=9), headwise.OptionError, "layers is None"),
        (lambda: Decoder(None, vocabulary=9), headwise.OptionError, "spec is a NoneType"),
        (lambda: Decoder(GQA, vocabulary=0, layers=1), headwise.SpecError, "vocabulary=0"),
        (lambda: Decoder(GQA, vocabulary=9, layers=True), headwise.OptionError, "layers is True"),
        (
            lambda: build(GQA).generate([1, 2], max_new_tokens=1),
            headwise.ShapeError,
            "tokens is a list",
        ),
        (lambda: Decoder(MIXED, vocabulary=9, layers=2), headwise.OptionError, "says it already"),
        (
            lambda: Decoder(replace(GQA, causal=False), vocabulary=9, layers=1),
            headwise.UnsupportedError,
            "a decoder attends to itself",
        ),
        (
            lambda: Decoder(ModelSpec.from_config({"model_type": "bert"}), vocabulary=9),
            headwise.UnsupportedError,
            "no decoder layers",
        ),
        (
            lambda: Decoder(ModelSpec.from_config({"model_type": "t5"}), vocabulary=9),
            headwise.UnsupportedError,
            "layer 0 of t5",
        ),
        (
            lambda: build(HYBRID)(torch.ones(1, 2).long(), mask=torch.ones(1, 1, 2, 2).bool()),
            headwise.UnsupportedError,
            "mask is given, and gated delta rule .* has no keys to hide",
        ),
        (lambda: Decoder(DELTA, vocabulary=9), headwise.OptionError, "1 with a StateSpec"),
        (
            lambda: Decoder(StateSpec(conv_channels=8, conv_width=3), vocabulary=9, layers=1),
            headwise.UnsupportedError,
            "has no state",
        ),
        (
            lambda: build(GQA)(torch.ones(1, 2, dtype=torch.int64), caches=[]),
            headwise.ShapeError,
            "0 caches, expected 2",
        ),
        (
            lambda: build(GQA).generate(torch.ones(1, 0, dtype=torch.int64), max_new_tokens=1),
            headwise.ShapeError,
            "S from 1",
        ),
        (
            lambda: build(GQA).generate(torch.ones(1, 1).long(), max_new_tokens=-1),
            headwise.OptionError,
            "max_new_tokens is -1",
        ),
        (
            lambda: build(GQA).generate(torch.ones(1, 1).long(), max_new_tokens=1, temperature=0),
            headwise.OptionError,
            "temperature is 0",
        ),
    ],
)
def test_what_does_not_fit_is_refused(run: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        run()


def test_caches_are_looked_at_before_any_is_changed() -> None:
    full = AttentionSpec(heads=4, kv_heads=4, head_dim=8, value_dim=8)
    layers = (LayerSpec(0, DELTA), LayerSpec(1, full))
    model = Decoder(ModelSpec(family="hybrid", layers=layers, max_context=None), vocabulary=50)
    tokens = torch.randint(50, (1, 5))
    caches = [StateCache(), StateCache()]
    with (
        torch.no_grad(),
        pytest.raises(headwise.ShapeError, match="cache of block 1 is a StateCac"),
    ):
        model(tokens, caches=caches)
    assert caches[0].length == 0
    twice = Decoder(DELTA, layers=2, vocabulary=50)
    with torch.no_grad(), pytest.raises(headwise.ShapeError, match="a cache is given twice"):
        twice(tokens, caches=[caches[0]] * 2)
    assert caches[0].length == 0
