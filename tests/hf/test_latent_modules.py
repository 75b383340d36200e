"""MLA found by what its modules do: absorbed, expanded with a reason, or refused; never wrong."""

import gc
import inspect
import pickle
import textwrap
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn
from transformers.cache_utils import DynamicCache
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as stock

import headwise
from families import VOCABULARY, make
from headwise.hf.latent import LatentPassthrough
from headwise.hf.latent_modules import latent_modules

PROMPT = torch.randint(3, VOCABULARY, (2, 13), generator=torch.Generator().manual_seed(6))
Attention: Any = stock.DeepseekV3Attention


class Interleaved(Attention):
    """Values first in each head, as another checkpoint may lay them out."""

    def expand_kv(self, latent: Any, key_rope: Any) -> Any:
        size = [self.v_head_dim, self.qk_nope_head_dim]
        rows = self.kv_b_proj(latent).unflatten(-1, (self.num_heads, -1)).squeeze(1)
        value, key = rows.transpose(1, 2).split(size, dim=-1)
        return torch.cat([key, key_rope.expand(-1, self.num_heads, -1, -1)], dim=-1), value


class Scaled(Attention):
    def expand_kv(self, latent: Any, key_rope: Any) -> Any:
        return super().expand_kv(latent * 1.01, key_rope)


class Softened(Attention):
    """Not linear in the latent."""

    def expand_kv(self, latent: Any, key_rope: Any) -> Any:
        key, value = super().expand_kv(latent, key_rope)
        return key, 9 * torch.tanh(value / 9)


class Turned(Attention):
    def expand_kv(self, latent: Any, key_rope: Any) -> Any:
        return super().expand_kv(latent, key_rope.flip(-1))


class Wider(Attention):
    """With a weight of its own, which nothing can be told of from kv_b_proj."""

    def expand_kv(self, latent: Any, key_rope: Any) -> Any:
        key, value = super().expand_kv(latent, key_rope)
        return key, value * self.kv_a_layernorm.weight.float()[:1]


class Grouped(Attention):
    """Half of the heads, each twice."""

    def expand_kv(self, latent: Any, key_rope: Any) -> Any:
        key, value = super().expand_kv(latent, key_rope)
        half = self.num_heads // 2
        return key[:, :half].repeat(1, 2, 1, 1), value[:, :half].repeat(1, 2, 1, 1)


class Named(Attention):
    """The same arithmetic, written in another way."""

    def expand_kv(self, latent: Any, key_rope: Any) -> Any:
        w_uk, w_uv = self.kv_b_proj.weight.unflatten(0, (self.num_heads, -1)).split(
            [self.qk_nope_head_dim, self.v_head_dim], dim=1
        )
        key = torch.einsum("bxlr,hnr->bhln", latent, w_uk)
        value = torch.einsum("bxlr,hvr->bhlv", latent, w_uv)
        return torch.cat([key, key_rope.expand(-1, self.num_heads, -1, -1)], dim=-1), value


def _with_change() -> Any:
    """Stock's forward, but for `self.change` between expand_kv and the attention function."""
    source = textwrap.dedent(inspect.getsource(Attention.forward))
    called = "self.expand_kv(kv_nope, k_rot)"
    assert source.count(called) == 1
    space = dict(vars(stock))
    exec(source.replace(called, f"self.change(*{called})"), space)
    return space["forward"]


class Changing(Attention):
    """Does more with what expand_kv returned: no look at expand_kv can tell."""

    forward = _with_change()
    change = staticmethod(lambda key, value: (key, value))


def _model(kind: Any, **changes: Any) -> Any:
    model = make("deepseek_v3", **changes)
    for layer in model.model.layers:
        layer.self_attn.__class__ = kind
    return model


def _tokens(model: Any, count: int = 6) -> torch.Tensor:
    return model.generate(PROMPT, max_new_tokens=count, do_sample=False)


@pytest.mark.parametrize("kind", [Interleaved, Scaled, Softened, Turned, Wider, Grouped])
def test_a_module_that_expands_in_another_way_keeps_its_expansion(kind: Any) -> None:
    model = _model(kind)
    expected = _tokens(model)
    report = headwise.attach(model)
    assert torch.equal(_tokens(model), expected)
    assert not any("expand_kv" in module.__dict__ for module in model.modules())
    for layer in report.layers:
        assert layer.note.startswith("the latents are expanded at every step: its expand_kv ")
        assert "\n" not in layer.note


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_it_computes_counts_and_not_how_it_is_written(dtype: torch.dtype) -> None:
    model = _model(Named).to(dtype)
    report = headwise.attach(model)
    assert {layer.note for layer in report.layers} == {
        "absorbed: a step attends to the latents as they are cached"
    }
    expansions = [layer.self_attn.expand_kv for layer in model.model.layers]
    assert all(isinstance(each, LatentPassthrough) for each in expansions)


def test_weights_that_say_nothing_do_not_hide_the_layout() -> None:
    for kind, found in ((Attention, True), (Interleaved, False)):
        model = _model(kind)
        for layer in model.model.layers:
            nn.init.zeros_(layer.self_attn.kv_b_proj.weight)
        assert [reason is None for reason in latent_modules(model, ()).values()] == [found] * 3


def test_looking_runs_no_hook_and_draws_no_random_number() -> None:
    model, called = make("deepseek_v3"), []
    hook = nn.modules.module.register_module_forward_hook(lambda *_: called.append(1))
    state = torch.get_rng_state()
    try:
        headwise.attach(model)
    finally:
        hook.remove()
    assert not called
    assert torch.equal(torch.get_rng_state(), state)


CHANGES: dict[str, Callable[[Any, Any], Any]] = {
    "keys are scaled": lambda key, value: (key * 2, value),
    "keys are normed": lambda key, value: (nn.functional.rms_norm(key, key.shape[-1:]), value),
    "values are scaled": lambda key, value: (key, value * 2),
    "both are copied": lambda key, value: (key.clone(), value.clone()),
    "one is viewed": lambda key, value: (key, value.view_as(value)),
    "both change places": lambda key, value: (value, key),
    "keys are written to": lambda key, value: (key.mul_(2), value),
}


CASES = [(name, "contiguous") for name in CHANGES] + [("keys are scaled", "int8")]


@pytest.mark.parametrize(("change", "cache"), CASES)
def test_a_module_that_attends_to_something_else_is_refused(
    change: str, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _model(Changing)
    expected = _tokens(model, 2)
    headwise.attach(model, cache=cache)
    if cache == "contiguous":
        assert torch.equal(_tokens(model, 2), expected)
    with monkeypatch.context() as patch:
        patch.setattr(Changing, "change", staticmethod(CHANGES[change]))
        with pytest.raises(headwise.UnsupportedError) as caught:
            _tokens(model, 2)
    message = str(caught.value)
    assert message.startswith("Changing ")
    assert "headwise.detach(model)" in message
    assert "\n" not in message
    headwise.detach(model)
    assert torch.equal(_tokens(model, 2), expected)


def test_a_compiled_module_that_attends_to_something_else_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = _model(Changing)
    headwise.attach(model)
    monkeypatch.setattr(Changing, "change", staticmethod(CHANGES["keys are scaled"]))
    module, hidden = model.model.layers[0].self_attn, torch.randn(1, 5, 48)
    rotary = model.model.rotary_emb(hidden, position_ids=torch.arange(5)[None])
    torch._dynamo.reset()
    with torch.no_grad(), pytest.raises(headwise.UnsupportedError, match="Changing"):
        torch.compile(module, backend="eager")(hidden, rotary, None)


def test_the_latents_of_another_module_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, kept = _model(Changing), []
    headwise.attach(model)

    def change(*rows: Any) -> Any:
        kept.append(rows)
        return kept[0]

    monkeypatch.setattr(Changing, "change", staticmethod(change))
    with pytest.raises(headwise.UnsupportedError, match="Changing"):
        model(PROMPT)
    assert len(kept) == 2  # of the first layer, and not of the second


def test_an_expansion_that_a_user_wraps_is_the_modules_own() -> None:
    model = make("deepseek_v3")
    headwise.attach(model)
    expected = _tokens(model)
    for layer in model.model.layers:
        given = layer.self_attn.expand_kv
        layer.self_attn.expand_kv = lambda *rows, given=given: given(*rows)
    assert torch.equal(_tokens(model), expected)


def test_nothing_stays_alive_after_a_call() -> None:
    """What goes through is marked for a call; a cache that a user made stays as stock left it."""
    model = make("deepseek_v3")
    headwise.attach(model)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(PROMPT, cache=cache)
    held = [getattr(layer, name) for layer in cache.layers for name in ("keys", "values")]
    assert [vars(rows) for rows in held] == [{}] * 6
    alive = [weakref.ref(rows.untyped_storage()) for rows in held]
    size = len(pickle.dumps(cache))
    assert size < 3 * sum(rows.nbytes for rows in held)  # and not the model with it
    del cache, held
    gc.collect()
    assert not any(storage() for storage in alive)


def test_threads_share_a_module() -> None:
    model = make("deepseek_v3")
    prompts = [PROMPT, PROMPT.flip(1)]
    expected = [_tokens_of(model, prompt) for prompt in prompts]
    headwise.attach(model)
    with ThreadPoolExecutor(2) as pool:
        given = list(pool.map(lambda prompt: _tokens_of(model, prompt), prompts * 2))
    for index, tokens in enumerate(given):
        assert torch.equal(tokens, expected[index % 2])


def _tokens_of(model: Any, prompt: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        cache = None
        for _ in range(4):
            output = model(prompt, cache=cache, use_cache=True)
            cache, prompt = output.cache, output.logits[:, -1:].argmax(-1)
    return prompt


def test_a_hook_on_all_modules_keeps_the_expansion() -> None:
    model = make("deepseek_v3")
    ids = torch.tensor([[5, 7, 11, 13]])
    headwise.attach(model)
    double = nn.modules.module.register_module_forward_hook(
        lambda module, _, out: out * 2 if isinstance(module, nn.Linear) else None
    )
    with torch.no_grad():
        try:
            given = model(ids, use_cache=False).logits
            headwise.detach(model)
            expected = model(ids, use_cache=False).logits
        finally:
            double.remove()
    torch.testing.assert_close(given, expected, atol=1e-4 * float(expected.abs().max()), rtol=0)
