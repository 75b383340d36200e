"""Norms and gated MLPs of an attached model whose layers are not described as a whole."""

import copy
import pickle
from unittest import mock

import pytest
import torch
from torch import nn

import headwise
import sweep_families
from families import VOCABULARY
from headwise.hf import module_hook
from headwise.hf.step.gated import GatedForward, replaced_gated
from headwise.hf.step.norms import NormForward, replaced_norms

PROMPT = torch.randint(3, VOCABULARY, (1, 9), generator=torch.Generator().manual_seed(4))
# RMSNorm by weight, by 1 + weight, in floats to the end, without a weight's bias; LayerNorm
TYPES = ("deepseek_v3", "qwen3_next", "flex_olmo", "cohere2_moe", "exaone4", "gemma4_text")


def made(name):
    """A small model whose norms and MLPs are not neutral."""
    model = sweep_families.make(name)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def calls(name, run):
    """How often `run` calls a kernel."""
    operator = getattr(torch.ops.headwise, name)
    with mock.patch.object(operator, "default", side_effect=operator.default) as watched:
        run()
    return watched.call_count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", TYPES)
@torch.no_grad()
def test_they_run_and_say_the_same(name, dtype):
    model = made(name).to(dtype)
    stock = copy.deepcopy(model)
    report = headwise.attach(model)
    ours = [module for module in model.modules() if isinstance(forward(module), NormForward)]
    assert ours
    assert any(line.startswith(f"norms: {len(ours)} of ") for line in report.step)
    few, many = PROMPT, PROMPT.repeat(1, 3)
    assert calls("norm", lambda: model(many)) >= len(ours)
    gated = [module for module in model.modules() if isinstance(forward(module), GatedForward)]
    if gated:
        assert calls("mlp", lambda: model(few)) >= len(gated)
        assert calls("mlp", lambda: model(many)) == 0
    if dtype == torch.float32:
        options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
        assert torch.equal(model.generate(PROMPT, **options), stock.generate(PROMPT, **options))
    for module, own in zip(model.modules(), stock.modules(), strict=True):
        if isinstance(forward(module), NormForward):
            x = torch.randn(2, 3, module.weight.shape[0]).to(dtype)
            bound = 3 * torch.finfo(dtype).eps
            torch.testing.assert_close(module(x), own(x), atol=bound, rtol=bound)
    again = pickle.loads(pickle.dumps(model))
    assert calls("norm", lambda: again(few)) == calls("norm", lambda: model(few)) > 0
    headwise.detach(model)
    assert calls("norm", lambda: model(few)) == calls("mlp", lambda: model(few)) == 0
    assert torch.equal(model(few).logits, stock(few).logits)


def forward(module):
    return module.__dict__.get("forward")


def scaled(model):
    model.model.norm.weight.data *= 2


def of_another_eps(model):
    model.model.norm.variance_epsilon = 0.5


def with_a_bias(model):
    model.model.norm.bias = nn.Parameter(torch.ones(model.model.norm.weight.shape))


def by_a_buffer(model):
    weight = 2 * model.model.norm.weight.detach()
    del model.model.norm.weight
    model.model.norm.register_buffer("weight", weight)


def of_another_class(model):
    kind = type(model.model.norm)

    class Doubled(kind):
        def forward(self, x):
            return 2 * super().forward(x)

    model.model.norm.__class__ = Doubled


def doubled_down(model):
    model.model.layers[0].mlp.down_proj.weight.data *= 2


def another_activation(model):
    model.model.layers[0].mlp.act_fn = nn.Tanh()


def another_function(model):
    model.model.layers[0].mlp.act_fn.forward = torch.tanh


def hooked(model):
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda module, args, out: 2 * out)


def trained(model):
    mlp = model.model.layers[0].mlp
    mlp.down_proj = nn.Sequential(mlp.down_proj, nn.Dropout(0.0))


def parametrized(model):
    torch.nn.utils.parametrizations.weight_norm(model.model.layers[0].mlp.up_proj)


@pytest.mark.parametrize(
    "change",
    [
        *(scaled, of_another_eps, with_a_bias, by_a_buffer, of_another_class, doubled_down),
        *(another_activation, another_function, hooked, trained, parametrized),
    ],
)
@torch.no_grad()
def test_what_is_changed_after_attach_is_what_runs(change):
    model = made("deepseek_v3")
    headwise.attach(model)
    model(PROMPT)
    stock = copy.deepcopy(model)
    headwise.detach(stock)
    before = stock(PROMPT).logits
    for each in (model, stock):
        change(each)
    expected = stock(PROMPT).logits
    torch.testing.assert_close(model(PROMPT).logits, expected, atol=3e-4, rtol=3e-4)
    if change not in (with_a_bias, trained, parametrized):
        assert not torch.allclose(before, expected, atol=1e-3)


def test_gradients_training_and_patched_classes_see_stock():
    model = made("deepseek_v3")
    headwise.attach(model)
    norm = type(model.model.norm)
    assert calls("norm", lambda: model(PROMPT, labels=PROMPT).loss.backward()) == 0
    with torch.no_grad():
        with mock.patch.object(norm, "forward", lambda self, x: 0 * x):
            assert calls("norm", lambda: model(PROMPT)) == 0
            assert not model(PROMPT).logits.any()
        model.train()
        assert calls("mlp", lambda: model(PROMPT)) == 0
        model.eval()
        assert calls("mlp", lambda: model(PROMPT)) > 0


def test_what_a_trial_finds_is_reported():
    model = made("deepseek_v3")
    model.model.layers[0].mlp.act_fn = nn.Tanh()
    said = next(line for line in headwise.attach(model).step if line.startswith("gated"))
    assert "stays with Transformers: no kernel has the activation Tanh" in said
    model = made("deepseek_v3")
    norm = model.model.norm
    norm.register_forward_hook(lambda module, args, out: out)
    assert replaced_norms(model).reasons["model.norm"] is None
    norm.forward = lambda x: x
    assert replaced_norms(model).reasons["model.norm"] == "its forward is replaced already"
    model.to("meta")
    assert set(replaced_norms(model).reasons.values()) == {
        "its forward is replaced already",
        "its weights are on meta",
    }
    assert headwise.attach(made("deepseek_v3"), step="attention").step == ()


@torch.no_grad()
def test_norms_that_a_gate_enters_and_pytorchs_own_are_not_looked_at():
    model = sweep_families.make("qwen3_next")
    names = replaced_norms(model).reasons
    assert names and not any("linear_attn" in name for name in names)
    assert not replaced_norms(sweep_families.make("gpt2")).reasons


@pytest.mark.parametrize("name", ["gemma3n_text", "deepseek_v4", "falcon_h1"])
def test_mlps_that_read_more_than_their_modules_are_not_looked_at(name):
    # a sparsity or a limit of each layer, or a multiplier, which may change
    if name not in sweep_families.TYPES:
        pytest.skip("not in this release of Transformers")
    model = sweep_families.make(name)
    assert not replaced_gated(model).reasons


@pytest.mark.parametrize("name", ["cohere", "gemma", "falcon_h1"])
@torch.no_grad()
def test_weights_that_are_zeros_at_attach_say_nothing(name):
    loaded = made(name)
    model = copy.deepcopy(loaded)
    for parameter in model.parameters():
        parameter.zero_()
    headwise.attach(model)
    model.load_state_dict(loaded.state_dict())
    torch.testing.assert_close(model(PROMPT).logits, loaded(PROMPT).logits, atol=2e-4, rtol=2e-4)
    model = copy.deepcopy(loaded)
    model.model.layers[0].input_layernorm.weight.zero_()
    expected = model(PROMPT).logits
    headwise.attach(model)
    torch.testing.assert_close(model(PROMPT).logits, expected, atol=2e-4, rtol=2e-4)


@torch.no_grad()
def test_a_helper_that_is_patched_is_run():
    model = made("gemma4_text")
    stock = copy.deepcopy(model)
    headwise.attach(model)
    kind = type(model.model.norm)
    own = kind._norm
    with mock.patch.object(kind, "_norm", lambda self, x: 2 * own(self, x)):
        assert calls("norm", lambda: model(PROMPT)) == 0
        torch.testing.assert_close(model(PROMPT).logits, stock(PROMPT).logits, atol=2e-4, rtol=2e-4)
    for each in (model, stock):
        each.model.norm._norm = lambda x, norm=each.model.norm: 3 * own(norm, x)
    torch.testing.assert_close(model(PROMPT).logits, stock(PROMPT).logits, atol=2e-4, rtol=2e-4)


@torch.no_grad()
def test_a_class_that_is_patched_before_a_model_is_unpickled_is_run():
    model = made("deepseek_v3")
    headwise.attach(model)
    written = pickle.dumps(model)
    kind = type(model.model.norm)
    with mock.patch.dict(module_hook._FIRST), mock.patch.object(kind, "forward", zeros):
        module_hook._FIRST.pop(kind)
        assert not pickle.loads(written)(PROMPT).logits.any()


def zeros(self, x):
    return 0 * x


@torch.no_grad()
def test_a_norm_gives_the_order_of_memory_that_stock_gives_and_its_errors():
    model = made("deepseek_v3")
    stock = copy.deepcopy(model)
    headwise.attach(model)
    width = model.config.hidden_size
    for x in (
        torch.randn(2, 5, 3, width).transpose(1, 2),
        torch.randn(3, 2, 2 * width)[..., :width].transpose(0, 1),
        torch.randn(width),
        torch.randn(4, 1, width),
    ):
        given, expected = (each.model.norm(x) for each in (model, stock))
        torch.testing.assert_close(given, expected)
        assert given.stride() == expected.stride()
    for each in (model, stock):
        each.model.norm.variance_epsilon = torch.full((width,), 0.5)
    torch.testing.assert_close(model.model.norm(x), stock.model.norm(x))
    model.model.norm.weight = None
    with pytest.raises(TypeError):
        model.model.norm(x)
