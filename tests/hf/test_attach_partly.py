"""Models of which a part stays with Transformers, and families that bring their own forward."""

import copy
import pickle
from typing import Any

import pytest
import torch
import transformers as hf

import headwise
from families import OWN_FORWARD, VOCABULARY, make
from headwise.hf.module_hook import NAME
from rounding import half_precision_error, relative_error

PROMPT = torch.randint(3, VOCABULARY, (2, 23), generator=torch.Generator().manual_seed(6))
_SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def _sparse(layer_types: list[str]) -> Any:
    """MiniMax-M3: its sparse layers choose blocks of keys, here 2 of 4 tokens and the last one.

    Something is on its indexers, as accelerate leaves it: they stay with Transformers.
    """
    torch.manual_seed(3)
    config = hf.MiniMaxM3VLTextConfig(
        **_SMALL,
        layer_types=layer_types,
        mlp_layer_types=["dense"] * 3,
        dense_intermediate_size=64,
        rotary_dim=4,
        index_n_heads=2,
        index_head_dim=8,
        index_block_size=4,
        index_topk_blocks=2,
    )
    model = hf.MiniMaxM3VLForCausalLM(config).eval()
    for layer in model.model.layers:
        if layer.self_attn.indexer is not None:
            layer.self_attn.indexer.forward = layer.self_attn.indexer.forward
    return model


def _linear() -> Any:
    torch.manual_seed(3)
    config = hf.Qwen3NextConfig(
        **_SMALL,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        mlp_only_layers=[0, 1, 2],
        intermediate_size=64,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    )
    return _watched(hf.Qwen3NextForCausalLM(config).eval())


def _watched(model: Any) -> Any:
    """With hooks that do nothing on every convolution: what is watched stays."""
    for name, module in model.named_modules():
        if name.endswith("conv1d"):
            module.register_forward_hook(lambda *_: None)
    return model


def _convolutions() -> Any:
    torch.manual_seed(3)
    config = hf.Lfm2Config(
        **_SMALL, full_attn_idxs=[1], intermediate_size=64, block_auto_adjust_ff_dim=False
    )
    return hf.Lfm2ForCausalLM(config).eval()


def _mamba() -> Any:
    torch.manual_seed(3)
    sizes = {"mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 6, "n_groups": 2}
    config = hf.NemotronHConfig(
        **_SMALL | {"num_hidden_layers": None}, hybrid_override_pattern="M*-", **sizes
    )
    return _watched(hf.NemotronHForCausalLM(config).eval())


def _both() -> Any:
    torch.manual_seed(3)
    small = _SMALL | {"num_hidden_layers": 2, "intermediate_size": 64}
    sizes = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_state": 6, "mamba_n_groups": 2}
    return _watched(hf.FalconH1ForCausalLM(hf.FalconH1Config(**small, **sizes)).eval())


_MIXED = ["full_attention", "minimax_m3_sparse", "full_attention"]


def _tokens(model: Any) -> torch.Tensor:
    return model.generate(PROMPT, max_new_tokens=20, do_sample=False)


@pytest.mark.parametrize(
    "make_model", [lambda: _sparse(_MIXED), _linear, _convolutions, _mamba, _both]
)
def test_what_cannot_be_replaced_stays_and_the_rest_is_attached(make_model: Any) -> None:
    model = make_model()
    expected = _tokens(model)
    report = headwise.attach(model)
    assert torch.equal(_tokens(model), expected)
    assert model.config._attn_implementation == NAME
    assert not report.layers[0].stock
    assert sum(at.stock for at in report.layers) in (1, 2)
    headwise.detach(model)
    assert torch.equal(_tokens(model), expected)


def test_a_sparse_layer_keeps_its_config_until_detach() -> None:
    model = _sparse(_MIXED)
    headwise.attach(model)
    full, sparse = (model.model.layers[index].self_attn for index in (0, 1))
    assert full.config._attn_implementation == NAME
    assert sparse.config._attn_implementation == "sdpa"
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert torch.equal(_tokens(twin), _tokens(model))
    for each in (model, twin):
        headwise.detach(each)
        assert all(at.self_attn.config is each.config for at in each.model.layers)


def test_an_attention_set_after_attach_reaches_every_layer() -> None:
    model = _sparse(_MIXED)
    expected = _tokens(model)
    headwise.attach(model)
    model.set_attn_implementation("eager")
    names = {layer.self_attn.config._attn_implementation for layer in model.model.layers}
    assert names == {"eager"}
    assert torch.equal(_tokens(model), expected)


def test_the_report_says_which_layer_stays_and_why() -> None:
    text = str(headwise.attach(_sparse(_MIXED)))
    assert "model.layers.1.self_attn  stays with Transformers" in text
    assert "model.layers.1.self_attn: attends to the tokens that an indexer chooses" in text
    assert "(sparse attention): its indexer has hooks" in text
    assert "decoder.0,2: gated delta rule: it has hooks" in str(headwise.attach(_linear()))
    assert "decoder.0,2: a short convolution" in str(headwise.attach(_convolutions()))
    assert "decoder.0: state-space duality: it has hooks" in str(headwise.attach(_mamba()))


def test_the_report_says_whose_cache_it_is() -> None:
    assert headwise.attach(_linear()).cache == "contiguous, grown in place"
    report = headwise.attach(_both())
    assert (report.cache, report.layers[0].cache) == ("contiguous, grown in place", "contiguous")
    assert "decoder.0-1.recurrent: state-space duality: it has hooks" in str(report)


@pytest.mark.parametrize("make_model", [lambda: _sparse(_MIXED), _linear])
def test_strict_refuses_what_would_be_attached_in_part(make_model: Any) -> None:
    model = make_model()
    with pytest.raises(headwise.UnsupportedError, match=r"^strict=True, and [12] layers of"):
        headwise.attach(model, strict=True)
    assert model.config._attn_implementation == "sdpa"
    assert "_headwise" not in model.__dict__


@pytest.mark.parametrize("family", ["llama-gqa", "deepseek_v3", "falcon-40b", "bloom"])
def test_strict_attaches_what_is_attached_whole(family: str) -> None:
    assert not any(at.stock for at in headwise.attach(make(family), strict=True).layers)


def test_a_model_of_sparse_layers_only_is_refused() -> None:
    model = _sparse(["minimax_m3_sparse"] * 3)
    with pytest.raises(headwise.UnsupportedError, match="every layer of MiniMaxM3VLForCausalLM"):
        headwise.attach(model)


def test_a_falcon_module_with_hooks_stays() -> None:
    model = make("falcon-7b")
    expected = _tokens(model)
    module = model.transformer.h[1].self_attention
    module.forward = module.forward  # as accelerate leaves it
    report = headwise.attach(model)
    assert [at.stock for at in report.layers] == [False, False, True]
    assert "its forward is replaced already" in str(report)
    assert torch.equal(_tokens(model), expected)
    headwise.detach(model)
    assert "forward" in module.__dict__
    for layer in model.transformer.h:
        layer.self_attention.forward = layer.self_attention.forward
    with pytest.raises(headwise.UnsupportedError, match="no attention of FalconForCausalLM"):
        headwise.attach(model)


def test_falcon_40b_caches_its_true_kv_heads() -> None:
    model = make("falcon-40b")
    with torch.no_grad():
        stock = headwise.hf.cache_nbytes(model(PROMPT, use_cache=True).cache)
        report = headwise.attach(model)
        ours = headwise.hf.cache_nbytes(model(PROMPT, use_cache=True).cache)
    assert (stock, ours) == (6 * 2 * 8 * 4 * 23 * 2 * 3, 2 * 2 * 8 * 4 * 23 * 2 * 3)
    assert ours == headwise.ModelSpec.from_config(model.config).cache_bytes(23, 2, "float32")
    note = "the cache holds 2 kv heads, 128 bytes a token and layer, where Transformers holds 6"
    assert note in str(report)


@pytest.mark.parametrize("family", OWN_FORWARD)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_logits_are_within_the_dtypes_tolerance(family: str, dtype: torch.dtype) -> None:
    model = make(family)
    with torch.no_grad():
        exact = model(PROMPT).logits
        model.to(dtype)
        headwise.attach(model)
        ours = model(PROMPT).logits
    layers = model.config.num_hidden_layers
    assert relative_error(ours, exact) <= half_precision_error(dtype, layers)


@pytest.mark.parametrize("family", OWN_FORWARD)
def test_weights_are_given_where_they_are_asked_for(family: str) -> None:
    # where stock runs SDPA it forgets the mask when it is asked for Falcon's weights
    model = make(family, attn_implementation="eager")
    with torch.no_grad():
        expected = model(PROMPT, output_attentions=True).attentions
        headwise.attach(model)
        output = model(PROMPT, output_attentions=True)
        assert torch.equal(output.logits, model(PROMPT).logits)
    for index, weights in enumerate(output.attentions):
        assert weights.shape == (2, 6, 23, 23)
        if family == "falcon-rw":  # and where it runs eager it adds ALiBi twice
            torch.testing.assert_close(weights.sum(-1), torch.ones(2, 6, 23))
        else:
            torch.testing.assert_close(weights, expected[index], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", OWN_FORWARD)
def test_gradients_are_those_of_stock(family: str) -> None:
    model = make(family)

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(PROMPT, labels=PROMPT).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    expected = gradients()
    headwise.attach(model)
    for ours, stock in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(ours, stock, atol=1e-5 * float(stock.abs().max()) + 1e-7, rtol=0)


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("family", ["falcon-rw", "bloom"])
def test_dropout_in_training_is_stocks(family: str, weights: bool) -> None:
    model = make(family, attention_dropout=0.5).train()

    def run() -> Any:
        torch.manual_seed(0)
        return model(PROMPT, output_attentions=weights).logits

    expected = run()
    headwise.attach(model)
    torch.testing.assert_close(run(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", OWN_FORWARD)
def test_a_left_padded_loss_is_that_of_stock(family: str) -> None:
    model, mask, labels = make(family), torch.ones_like(PROMPT), PROMPT.clone()
    mask[0, :9] = 0
    labels[0, :9] = -100  # the last token of padding is to predict the first one of the text

    def loss() -> torch.Tensor:
        return model(PROMPT, attention_mask=mask, labels=labels).loss

    expected = loss()
    headwise.attach(model)
    torch.testing.assert_close(loss(), expected)
