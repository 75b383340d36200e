"""Linear attention in Transformers: modules that run their own forward with our operator."""

import copy
import functools
import io
import itertools
import pickle
import warnings

import pytest
import torch

import headwise
import sweep_families
from headwise.caches import CacheChoice
from headwise.hf import cache_nbytes, use_own_layers
from headwise.hf.hybrid_layers import HybridLayer
from headwise.hf.linear import KINDS, LinearModule, delta, ssd

pytest.importorskip("transformers.models.lara_mini")
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionAndFullAttentionLayer

DELTA, KIMI, SSD = KINDS
FAMILIES = {
    "qwen3_next": DELTA,
    "qwen3_5_text": DELTA,
    "qwen3_5_moe_text": DELTA,
    "qwen4_exp_text": DELTA,
    "olmo_hybrid": DELTA,
    "lara_mini": DELTA,
    "kimi_linear": KIMI,
    "bailing_hybrid": KIMI,
    "mamba2": SSD,
    "bamba": SSD,
    "falcon_h1": SSD,
    "granitemoehybrid": SSD,
    "nemotron_h": SSD,
    "zamba2": SSD,
}


def modules(model):
    return [at for at in model.modules() if isinstance(at.__dict__.get("forward"), LinearModule)]


# Every mode of one family of each kind, and one mode of the others; `make sweep` runs all.
OFTEN = {(family, "left-padded batch") for family in FAMILIES}
OFTEN |= {
    (family, mode)
    for family in ("qwen3_next", "kimi_linear", "bamba")
    for mode in sweep_families.MODES
}


@pytest.mark.parametrize(
    ("family", "mode"),
    [
        pytest.param(*each, marks=() if each in OFTEN else pytest.mark.sweep)
        for each in itertools.product(FAMILIES, sweep_families.MODES)
    ],
)
def test_tokens_are_stock_s_in_every_mode(family, mode):
    model = sweep_families.make(family)
    try:
        stock = sweep_families.generated(model, mode)
    except Exception as error:  # noqa: BLE001 - whatever stock does not have
        pytest.skip(f"stock refuses: {error}")
    report = headwise.attach(model)
    assert modules(model)
    assert all(at.__dict__["forward"].attention is FAMILIES[family] for at in modules(model))
    assert not any(layer.stock for layer in report.layers)
    ours = sweep_families.generated(model, mode)
    what, wrong = sweep_families.difference(stock, ours)
    assert not wrong or sweep_families.nearer(model, mode, stock, ours), what


@pytest.mark.parametrize(
    ("family", "adapter"), [("qwen3_next", delta), ("kimi_linear", delta), ("mamba2", ssd)]
)
def test_a_prompt_and_every_step_run_on_our_operator(family, adapter, monkeypatch):
    model, lengths = sweep_families.make(family), []
    run = adapter.change_state

    def counted(call):
        lengths.append(call.query.shape[2])
        return run(call)

    headwise.attach(model)
    monkeypatch.setattr(adapter, "change_state", counted)
    with torch.no_grad():
        model.generate(torch.arange(3, 22)[None], max_new_tokens=3, do_sample=False)
    each = len(modules(model))
    assert lengths == [19] * each + [1] * 2 * each


def test_the_report_names_the_layers_and_detach_leaves_nothing():
    model = sweep_families.make("qwen3_next")
    prompt = {"input_ids": torch.arange(3, 22)[None]}
    with torch.no_grad():
        expected = model(**prompt).logits
    said = str(headwise.attach(model))
    assert "linear attention" in said
    assert "gated delta rule; the state is kept in Transformers' cache" in said
    twin, buffer = copy.deepcopy(model), io.BytesIO()
    with torch.no_grad():
        ours = model(**prompt).logits
    pickle.dump(model, buffer)
    buffer.seek(0)
    for each in (model, twin, pickle.load(buffer)):
        assert len(modules(each)) == len(modules(model)) > 0 or each is model
        with torch.no_grad():
            assert torch.equal(each(**prompt).logits, ours)
    headwise.detach(model)
    assert not modules(model)
    with torch.no_grad():
        assert torch.equal(model(**prompt).logits, expected)


@pytest.mark.parametrize("family", ["qwen3_next", "kimi_linear", "bamba", "mamba2"])
def test_training_is_stock_s_own(family):
    model = sweep_families.make(family).train()
    ids = torch.arange(3, 22)[None]
    losses, gradients = [], []
    for attached in (False, True):
        if attached:
            headwise.attach(model)
        model.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append(
            {
                name: weight.grad.clone()
                for name, weight in model.named_parameters()
                if weight.grad is not None
            }
        )
    assert any("conv1d" in name for name in gradients[0])
    torch.testing.assert_close(*losses)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_a_file_whose_functions_do_something_else_keeps_its_modules(monkeypatch):
    from transformers.models.qwen3_next import modeling_qwen3_next as file

    own = file.torch_chunk_gated_delta_rule

    def doubled(*args, **kwargs):
        out, state = own(*args, **kwargs)
        return 2 * out, state

    monkeypatch.setattr(file, "torch_chunk_gated_delta_rule", doubled)
    model = sweep_families.make("qwen3_next")
    said = str(headwise.attach(model))
    assert not modules(model)
    assert "gated delta rule: torch_chunk_gated_delta_rule of its file gives something else" in said


def test_packed_sequences_are_refused_as_by_stock():
    model = sweep_families.make("qwen3_next")
    packed = {"cu_seq_lens_q": torch.tensor([0, 9, 19], dtype=torch.int32)}
    ids = torch.arange(3, 22)[None]
    with pytest.raises(ValueError, match="packed sequences") as stock, torch.no_grad():
        model(ids, **packed)
    headwise.attach(model)
    with pytest.raises(ValueError, match="packed sequences") as ours, torch.no_grad():
        model(ids, **packed)
    assert str(ours.value) == str(stock.value)


PROMPT = torch.arange(3, 22)[None]


def logits(model):
    with torch.no_grad():
        return model(PROMPT).logits


@pytest.mark.parametrize("when", ["after the first call", "before it"])
def test_functions_of_the_file_that_are_replaced_later_are_stock_s_business(when, monkeypatch):
    from transformers.models.qwen3_next import modeling_qwen3_next as file

    model = sweep_families.make("qwen3_next")
    stock = copy.deepcopy(model)
    headwise.attach(model)
    if when == "after the first call":
        logits(model)
    own = file.causal_conv1d_fn
    monkeypatch.setattr(file, "causal_conv1d_fn", lambda *args, **kw: own(*args, **kw) * 0.5)
    torch.testing.assert_close(logits(model), logits(stock), rtol=1e-4, atol=1e-4)


def test_a_replacement_that_wraps_the_file_s_function_is_seen(monkeypatch):
    from transformers.models.qwen3_next import modeling_qwen3_next as file

    own = file.torch_chunk_gated_delta_rule

    @functools.wraps(own)
    def halved(*args, **kwargs):
        out, state = own(*args, **kwargs)
        return out * 0.5, state

    monkeypatch.setattr(file, "torch_chunk_gated_delta_rule", halved)
    model = sweep_families.make("qwen3_next")
    headwise.attach(model)
    assert not modules(model)


def test_the_old_name_of_a_cache_reaches_it():
    model = sweep_families.make("qwen3_next")
    headwise.attach(model)
    layer = modules(model)[0]
    states, found = torch.randn(1, 9, model.config.hidden_size), []
    for name in ("cache", "cache_params"):
        cache = DynamicCache(config=model.config)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            layer(states[:, :8], **{name: cache})
            found.append(layer(states[:, 8:], **{name: cache}))
    torch.testing.assert_close(*found)


def test_a_module_with_hooks_inside_stays_and_the_report_says_so():
    model = sweep_families.make("qwen3_next")
    model.model.layers[0].linear_attn.conv1d.register_forward_hook(lambda *_: None)
    report = headwise.attach(model)
    assert [layer.name for layer in report.layers if layer.stock] == ["decoder.0"]
    assert "gated delta rule: it has hooks, or a part of it" in str(report)


BOTH = ("falcon_h1", "zamba2")


def own_layers(model, choice="contiguous"):
    """A fresh cache with ours in it, and those of its layers that attend and keep a state."""
    cache = use_own_layers(DynamicCache(config=model.config), CacheChoice.parse(choice))
    return cache, [layer for layer in cache.layers if isinstance(layer, HybridLayer)]


@pytest.mark.parametrize("choice", ["contiguous", "paged", "int8"])
@pytest.mark.parametrize("family", BOTH)
def test_layers_that_do_both_hold_their_tokens_in_our_caches(family, choice):
    model = sweep_families.make(family)
    ids = torch.arange(3, 22)[None].repeat(2, 1)
    stock = DynamicCache(config=model.config)
    with torch.no_grad():
        expected = [model(part, cache=stock).logits for part in ids.split([12, 1, 6], dim=1)]
    report = headwise.attach(model, cache=choice)
    assert not any(layer.stock for layer in report.layers)
    cache, both = own_layers(model, choice)
    kinds = [type(layer) for layer in stock.layers]
    assert len(both) == kinds.count(LinearAttentionAndFullAttentionLayer) > 0
    with torch.no_grad():
        found = [model(part, cache=cache).logits for part in ids.split([12, 1, 6], dim=1)]
    if choice == "int8":
        # the first such layer's keys, which nothing rounded comes before
        index = cache.layers.index(both[0])
        kept = stock.layers[index].keys
        assert (both[0].keys.dense() - kept).abs().max() <= kept.abs().max() / 100
    else:
        for ours, theirs in zip(found, expected):
            bound = sweep_families.TOLERANCE * float(theirs.abs().max())
            torch.testing.assert_close(ours, theirs, rtol=0, atol=bound)
    for layer in both:
        states = [*layer.conv_states.values(), *layer.recurrent_states.values()]
        assert cache_nbytes_of(layer) == layer.cache.nbytes + sum(each.nbytes for each in states)


def cache_nbytes_of(layer):
    cache = DynamicCache()
    cache.layers = [layer]
    return cache_nbytes(cache)


@pytest.mark.parametrize("family", BOTH)
def test_a_window_of_tokens_is_kept_where_that_is_asked_for(family):
    model = sweep_families.make(family)
    report = headwise.attach(model, cache="window:8,sinks=2")
    assert "none of ours" not in str(report)
    ids = torch.arange(3, 43).view(2, 20)
    with torch.no_grad():
        out = model.generate(ids, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    held = [layer for layer in out.past_key_values.layers if isinstance(layer, HybridLayer)]
    assert held
    assert all(layer.cache.held == 9 and layer.get_seq_length() == 24 for layer in held)


def test_an_attached_model_runs_without_memory():
    model = sweep_families.make("mamba2")
    headwise.attach(model)
    model.to("meta")
    with torch.no_grad():
        assert model(PROMPT.to("meta")).logits.shape == (1, 19, model.config.vocab_size)


@pytest.mark.parametrize("family", BOTH)
def test_sequences_of_such_layers_move_together(family):
    model = sweep_families.make(family)
    headwise.attach(model)
    ids = torch.arange(3, 43).view(2, 20)
    cache, both = own_layers(model)
    with torch.no_grad():
        model(ids, cache=cache)
        twin = copy.deepcopy(cache)
        aside = [copy.copy(layer) for layer in both]
        expected = model(ids[:, :1], cache=cache).logits
        for change in (
            lambda layer: layer.reorder_cache(torch.tensor([1, 0])),
            lambda layer: layer.batch_select_indices(torch.tensor([1, 0])),
        ):
            turned = copy.deepcopy(twin)
            for layer in turned.layers:
                if isinstance(layer, HybridLayer):
                    change(layer)
                else:  # Transformers has no selection of states alone
                    layer.reorder_cache(torch.tensor([1, 0]))
            found = model(ids[:, :1].flip(0), cache=turned).logits
            torch.testing.assert_close(found, expected.flip(0), rtol=0, atol=1e-5)
        doubled = aside[0]
        before = doubled.recurrent_states[0].clone()
        doubled.batch_repeat_interleave(2)
        assert torch.equal(doubled.recurrent_states[0], before.repeat_interleave(2, dim=0))
        assert doubled.cache.batch == 4
        # what a copy was told changes nothing in the layer that it was made of
        assert both[0].cache.batch == 2 == len(both[0].recurrent_states[0])
    with pytest.raises(RuntimeError, match="does not track past states"):
        both[0].crop(-1)
    both[0].reset()
    assert both[0].get_seq_length() == 0
    assert not both[0].recurrent_states[0].any()


@pytest.mark.parametrize("family", BOTH)
def test_under_gradients_such_a_layer_goes_on_as_stock_s(family):
    model = sweep_families.make(family)
    stock = copy.deepcopy(model)
    headwise.attach(model)
    ids = torch.arange(3, 22)[None]
    cache, both = own_layers(model)
    theirs = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, cache=cache)
        stock(ids, cache=theirs)
    found, expected = model(ids[:, :1], cache=cache).logits, stock(ids[:, :1], cache=theirs).logits
    assert all(type(layer) is LinearAttentionAndFullAttentionLayer for layer in both)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
