"""What a user may do with model(...) itself: caches, masks, weights, packed sequences."""

from typing import Any

import pytest
import torch
import transformers as hf
from transformers.cache_utils import DynamicCache, DynamicLayer

import headwise
from families import DECODERS, GENERATORS, VOCABULARY, make
from headwise.hf import ContiguousLayer
from headwise.spec import ModelSpec

PROMPT = torch.randint(3, VOCABULARY, (2, 17), generator=torch.Generator().manual_seed(4))


def _close(ours: torch.Tensor, stock: torch.Tensor) -> None:
    torch.testing.assert_close(ours, stock, atol=1e-4 * stock.abs().max().item(), rtol=0)


@pytest.mark.parametrize("family", ["llama-gqa", "gemma2", "gpt_oss", "deepseek_v3", "gpt2", "t5"])
def test_output_attentions_gives_the_true_weights(family: str) -> None:
    # T5's scores are in the hundreds at the range that its other tests need
    changes = {"initializer_factor": 1.0} if family == "t5" else {}
    model = make(family, attn_implementation="eager", **changes)
    inputs = {"input_ids": PROMPT}
    if family == "t5":
        inputs["decoder_input_ids"] = PROMPT[:, :5]
    name = "decoder_attentions" if family == "t5" else "attentions"
    with torch.no_grad():
        expected = model(**inputs, output_attentions=True)[name]
        headwise.attach(model)
        given = model(**inputs, output_attentions=True)[name]
    assert len(given) == len(expected) == 3
    for ours, stock in zip(given, expected, strict=True):
        _close(ours, stock)


def test_a_float_mask_of_the_user_is_added() -> None:
    model = make("llama-gqa")
    bias = torch.randn(2, 1, 17, 17).triu(1).mul(-3.0)
    with torch.no_grad():
        expected = model(PROMPT, attention_mask=bias).logits
        headwise.attach(model)
        _close(model(PROMPT, attention_mask=bias).logits, expected)


@pytest.mark.parametrize("family", ["llama-gqa", "deepseek_v3"])
def test_a_boolean_mask_of_the_user_is_the_whole_mask(family: str) -> None:
    model = make(family)
    mask = torch.rand(2, 1, 17, 17, generator=torch.Generator().manual_seed(0)) < 0.5
    mask |= torch.eye(17, dtype=torch.bool)
    with torch.no_grad():
        expected = model(PROMPT, attention_mask=mask).logits
        headwise.attach(model)
        _close(model(PROMPT, attention_mask=mask).logits, expected)


@pytest.mark.parametrize("family", ["llama-gqa", "mistral", "deepseek_v3"])
def test_packed_sequences_do_not_see_one_another(family: str) -> None:
    model = make(family)
    positions = torch.cat([torch.arange(9), torch.arange(8)])[None].expand(2, -1)
    with torch.no_grad():
        expected = model(PROMPT, position_ids=positions, use_cache=False).logits
        headwise.attach(model)
        _close(model(PROMPT, position_ids=positions, use_cache=False).logits, expected)


@pytest.mark.parametrize("family", GENERATORS)
def test_a_model_makes_our_cache_where_none_is_passed(family: str) -> None:
    model = make(family)
    headwise.attach(model)
    inputs = {"decoder_input_ids": PROMPT[:, :5]} if family == "t5" else {}
    with torch.no_grad():
        cache = model(PROMPT, use_cache=True, **inputs).cache
        assert model(PROMPT, use_cache=False, **inputs).get("cache") is None
    layers = cache.self_attention_cache.layers if family == "t5" else cache.layers
    kinds = {type(layer).__name__ for layer in layers}
    # one that reads the keys of another holds none, or before 5.23 is not there
    others = {"DummyLayer", "LinearAttentionLayer"}
    assert kinds - others <= {"ContiguousLayer", "WindowLayer"}
    own = [layer for layer in layers if type(layer).__name__ not in others]
    spec = ModelSpec.from_config(model.config)
    assert len(own) == sum(layer.cached is not None for layer in spec.layers)


def test_a_cache_of_the_caller_is_left_as_it_is() -> None:
    model = make("llama-gqa")
    headwise.attach(model)
    forward, generate = DynamicCache(config=model.config), DynamicCache(config=model.config)
    with torch.no_grad():
        model(PROMPT, cache=forward)
        model.generate(PROMPT, cache=generate, max_new_tokens=3)
    for cache in (forward, generate):
        assert {type(layer) for layer in cache.layers} == {DynamicLayer}


def test_no_cache_of_ours_while_gradients_are_enabled() -> None:
    model = make("llama-gqa")
    headwise.attach(model)
    assert {type(layer) for layer in model(PROMPT, use_cache=True).cache.layers} == {DynamicLayer}


def test_a_base_model_without_a_head_gets_our_cache() -> None:
    model = hf.LlamaModel(make("llama-gqa").config).eval()
    headwise.attach(model)
    with torch.no_grad():
        assert isinstance(model(PROMPT).cache.layers[0], ContiguousLayer)


@pytest.mark.parametrize("family", DECODERS)
def test_decoding_token_by_token_equals_one_forward(family: str) -> None:
    model = make(family)
    headwise.attach(model)
    with torch.no_grad():
        whole = model(PROMPT, use_cache=False).logits
        cache, steps = None, []
        for token in PROMPT.split([5, 1, 3, 1, 1, 6], dim=1):
            output = model(token, cache=cache, use_cache=True)
            cache = output.cache
            steps.append(output.logits)
    _close(torch.cat(steps, dim=1), whole)


def test_prefill_in_inference_mode_goes_on_outside_it() -> None:
    model = make("llama-gqa")
    headwise.attach(model)
    with torch.inference_mode():
        cache = model(PROMPT, use_cache=True).cache
    with torch.no_grad():
        given = model(PROMPT[:, :1], cache=cache).logits
    assert given.isfinite().all()


def test_a_copied_cache_continues_on_its_own() -> None:
    import copy

    model = make("llama-gqa")
    headwise.attach(model)
    with torch.no_grad():
        shared = model(PROMPT, use_cache=True).cache
        expected = model(PROMPT[:, :3], cache=copy.deepcopy(shared)).logits
        model(PROMPT[:, 5:9], cache=copy.deepcopy(shared))
        assert torch.equal(model(PROMPT[:, :3], cache=copy.deepcopy(shared)).logits, expected)
    assert shared.get_seq_length() == 17


class _Doubled(torch.nn.Module):
    """Stands for an adapter or quantiser that wraps a projection."""

    def __init__(self, inner: torch.nn.Linear) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return 2 * self.inner(states)


@pytest.mark.parametrize("wrapped", ["before attach", "after attach"])
def test_a_wrapped_up_projection_keeps_its_own_expansion(wrapped: str) -> None:
    def wrap(model: Any) -> None:
        for layer in model.model.layers:
            layer.self_attn.kv_b_proj = _Doubled(layer.self_attn.kv_b_proj)

    stock, model = make("deepseek_v3"), make("deepseek_v3")
    wrap(stock)
    if wrapped == "before attach":
        wrap(model)
        report = headwise.attach(model)
        assert "._Doubled, with its own way to multiply" in str(report)
    else:
        headwise.attach(model)
        wrap(model)
    options = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(PROMPT, **options), stock.generate(PROMPT, **options))


def test_blocks_of_a_size_that_nobody_says_are_refused_not_ignored() -> None:
    from headwise.hf.interface import headwise_attention_forward

    states, blocks = torch.randn(1, 2, 3, 4), torch.zeros(1, 2, 3, 2)
    with pytest.raises(headwise.UnsupportedError, match="sparse attention"):
        headwise_attention_forward(
            torch.nn.Identity(), states, states, states, None, block_indices=blocks
        )


def test_what_a_module_passes_on_besides_may_have_any_name() -> None:
    from headwise.hf.interface import headwise_attention_forward

    states, module = torch.randn(1, 2, 3, 4), torch.nn.Identity()
    expected, _ = headwise_attention_forward(module, states, states, states, None)
    out, _ = headwise_attention_forward(
        module, states, states, states, None, mask=None, module_name="x", position_ids=None
    )
    assert torch.equal(out, expected)


def test_a_cache_prefilled_without_gradients_goes_on_with_them() -> None:
    def gradient(model: Any) -> torch.Tensor:
        with torch.no_grad():
            cache = model(PROMPT, use_cache=True).cache
        model.zero_grad()
        # two steps: the second one's gradient runs through the first one's keys
        first = model(PROMPT[:, :3], cache=cache).logits
        (first.mean() + model(PROMPT[:, 3:5], cache=cache).logits.square().mean()).backward()
        return model.model.layers[1].self_attn.k_proj.weight.grad.clone()

    model = make("llama-gqa")
    expected = gradient(model)
    headwise.attach(model)
    _close(gradient(model), expected)


def test_keys_that_a_user_assigns_are_used() -> None:
    def cut(model: Any) -> torch.Tensor:
        with torch.no_grad():
            cache = model(PROMPT, use_cache=True).cache
            for layer in cache.layers:
                layer.keys, layer.values = layer.keys[:, :, :5], layer.values[:, :, :5]
            return model(PROMPT[:, 5:], cache=cache).logits

    model = make("llama-gqa")
    expected = cut(model)
    headwise.attach(model)
    _close(cut(model), expected)


@pytest.mark.parametrize("indices", [[0, 1, 1], torch.tensor([-1]), torch.tensor([True, False])])
def test_a_batch_is_selected_by_whatever_indexes_a_tensor(indices: Any) -> None:
    def selected(model: Any) -> torch.Tensor:
        with torch.no_grad():
            cache = model(PROMPT, use_cache=True).cache
            cache.batch_select_indices(indices)
            size = cache.layers[0].keys.shape[0]
            return model(PROMPT[:1, :4].repeat(size, 1), cache=cache).logits

    model = make("llama-gqa")
    expected = selected(model)
    headwise.attach(model)
    _close(selected(model), expected)


def test_chunked_attention_is_masked_across_its_chunks() -> None:
    torch.manual_seed(7)
    config = hf.Llama4TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=64,
        intermediate_size_mlp=64,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        attention_chunk_size=8,
        num_local_experts=2,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    model = hf.Llama4ForCausalLM(config).eval()
    options = {"max_new_tokens": 14, "do_sample": False}
    expected = model.generate(PROMPT[:, :9], **options)
    headwise.attach(model)
    assert torch.equal(model.generate(PROMPT[:, :9], **options), expected)


@pytest.mark.parametrize("family", ["llama-gqa", "gpt_oss", "deepseek_v3", "gpt2"])
def test_autocast_runs_as_in_stock(family: str) -> None:
    def run(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            output = model(PROMPT, use_cache=True)
            return output.logits, model(PROMPT[:, :1], cache=output.cache).logits

    changes = {"first_k_dense_replace": 3} if family == "deepseek_v3" else {}
    model = make(family, **changes)
    with torch.no_grad():
        exact = model(PROMPT).logits
    expected = run(model)
    headwise.attach(model)
    given = run(model)
    for ours, stock in zip(given, expected, strict=True):
        assert ours.dtype == stock.dtype
    stock_error = (expected[0].float() - exact).pow(2).mean().sqrt()
    assert (given[0].float() - exact).pow(2).mean().sqrt() <= 1.5 * stock_error


def test_a_replaced_up_projection_keeps_its_own_forward() -> None:
    def replace(model: Any) -> None:
        for layer in model.model.layers:
            projection = layer.self_attn.kv_b_proj
            projection.forward = lambda x, old=projection.forward: 1.5 * old(x)

    stock, model = make("deepseek_v3"), make("deepseek_v3")
    headwise.attach(model)
    replace(stock)
    replace(model)
    options = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(PROMPT, **options), stock.generate(PROMPT, **options))


class _Logits(torch.nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.model(ids, attention_mask=mask).logits


# tracing warns of everything that it takes for constant, and of its own deprecation
@pytest.mark.filterwarnings("ignore")
def test_a_traced_model_still_sees_padding() -> None:
    mask = torch.ones_like(PROMPT)
    padded = mask.clone()
    padded[0, :5] = 0
    model = make("llama-gqa", use_cache=False)
    with torch.no_grad():
        expected = model(PROMPT, attention_mask=padded).logits
        headwise.attach(model)
        traced = torch.jit.trace(_Logits(model), (PROMPT, mask))
        given = traced(PROMPT, padded)
    _close(given[padded.bool()], expected[padded.bool()])


def test_a_decoder_with_cross_attention_makes_its_own_cache() -> None:
    model = make("bert")
    config = model.config
    config.is_decoder = config.add_cross_attention = True
    torch.manual_seed(1)
    model = hf.BertLMHeadModel(config).eval()
    states = torch.randn(2, 7, 48)
    with torch.no_grad():
        expected = model(PROMPT, encoder_hidden_states=states, use_cache=True).logits
        headwise.attach(model)
        _close(model(PROMPT, encoder_hidden_states=states, use_cache=True).logits, expected)


def test_a_query_alone_may_need_gradients() -> None:
    model = make("llama-gqa").requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.requires_grad_(True)

    def gradient(at: Any) -> torch.Tensor:
        with torch.no_grad():
            cache = at(PROMPT, use_cache=True).cache
        at.zero_grad()
        loss = at(PROMPT[:, :2], cache=cache).logits.mean()
        (loss + at(PROMPT[:, 2:4], cache=cache).logits.square().mean()).backward()
        return at.model.layers[2].self_attn.q_proj.weight.grad.clone()

    expected = gradient(model)
    headwise.attach(model)
    _close(gradient(model), expected)


@pytest.mark.parametrize("family", ["llama-gqa", "gemma2"])
def test_weights_are_given_while_dropout_is_on(family: str) -> None:
    model = make(family, attention_dropout=0.3).train()
    headwise.attach(model)
    attentions = model(PROMPT, output_attentions=True, use_cache=False).attentions
    assert [tuple(at.shape) for at in attentions] == [(2, 6, 17, 17)] * 3
