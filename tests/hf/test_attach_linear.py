"""The products of an attached model: which are ours, and that everything else sees stock's."""

import copy
import pickle
from contextlib import ExitStack
from unittest import mock

import pytest
import torch
import transformers as hf

import headwise
from families import VOCABULARY, make
from headwise.hf.step.linear import Conv1dForward, LinearForward
from headwise.hf.stock_names import Conv1D

PROMPT = torch.randint(3, VOCABULARY, (1, 7), generator=torch.Generator().manual_seed(4))


class Count:
    """Counts the weights that kernels multiply by: one a call, or three of a gated MLP."""

    def __enter__(self):
        self.stack, self.watched = ExitStack(), []
        for weights, operator in ((1, torch.ops.headwise.linear), (3, torch.ops.headwise.mlp)):
            patch = mock.patch.object(operator, "default", side_effect=operator.default)
            self.watched.append((weights, self.stack.enter_context(patch)))
        return self

    def __exit__(self, *error):
        return self.stack.__exit__(*error)

    def so_far(self):
        return sum(weights * operator.call_count for weights, operator in self.watched)

    def of(self, model, *args, **kwargs):
        before = self.so_far()
        model(*args, **kwargs)
        return self.so_far() - before


def weights(model):
    return [module for module in model.modules() if isinstance(module, (torch.nn.Linear, Conv1D))]


@pytest.mark.parametrize("family", ["gpt2", "deepseek_v3", "bloom"])
@torch.no_grad()
def test_every_weight_is_multiplied_by_the_kernel_at_few_rows_alone(family):
    model = make(family)
    stock = copy.deepcopy(model)
    report = headwise.attach(model)
    many = PROMPT.repeat(1, 3)[:, :17]
    with Count() as count:
        few, long = count.of(model, PROMPT), count.of(model, many)
    # experts have weights of their own, and Bloom's query_key_value is one of every layer
    assert few >= 4 * model.config.num_hidden_layers
    assert long <= 1  # the head, where the model takes it of the last rows
    torch.testing.assert_close(model(PROMPT).logits, stock(PROMPT).logits, atol=2e-4, rtol=2e-4)
    assert f"{len(weights(model))} of {len(weights(model))} weights on cpu" in str(report)
    kinds = {type(module.forward) for module in weights(model)}
    assert kinds <= {LinearForward, Conv1dForward}
    headwise.detach(model)
    assert torch.equal(model(PROMPT).logits, stock(PROMPT).logits)


@torch.no_grad()
def test_a_tied_head_follows_its_embedding():
    model = make("llama-gqa", tie_word_embeddings=True).eval()
    headwise.attach(model)
    before = model(PROMPT).logits
    model.get_input_embeddings().weight.mul_(2)
    after = model(PROMPT).logits
    headwise.detach(model)
    torch.testing.assert_close(after, model(PROMPT).logits, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(before, after)


@torch.no_grad()
def test_attention_alone():
    model = make("llama-gqa")
    report = headwise.attach(model, step="attention")
    with Count() as count:
        assert count.of(model, PROMPT) == 0
    assert "products" not in str(report)
    assert "products" in str(headwise.attach(model))
    assert "products" not in str(headwise.attach(model, step="attention"))
    with pytest.raises(headwise.OptionError, match="step is 'layers', expected one of 'all', 'att"):
        headwise.attach(model, step="layers")


def test_gradients_and_compilers_see_stock():
    model = make("llama-gqa")
    headwise.attach(model)
    with Count() as count:
        assert count.of(model, PROMPT) == 0
        model(PROMPT, labels=PROMPT).loss.backward()
        assert model.lm_head.weight.grad is not None
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert count.of(model, PROMPT) == 0
        torch._dynamo.reset()
        with torch.no_grad():
            compiled = torch.compile(model, backend="eager")
            assert count.of(compiled, PROMPT, use_cache=False) == 0
            assert count.of(model, PROMPT) > 0


@torch.no_grad()
def test_hooks_run_around_the_kernel():
    model = make("llama-gqa")
    headwise.attach(model)
    seen = []
    model.lm_head.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    model(PROMPT)
    assert seen == [(1, 7, VOCABULARY)]


@torch.no_grad()
def test_what_has_a_forward_of_its_own_keeps_it():
    class Doubled(torch.nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    def tripled(hidden):
        return 3 * torch.nn.Linear.forward(model.model.layers[1].mlp.up_proj, hidden)

    model = make("llama-gqa")
    old = model.model.layers[0].self_attn.q_proj
    new = Doubled(old.in_features, old.out_features, bias=False)
    new.load_state_dict(old.state_dict())
    model.model.layers[0].self_attn.q_proj = new
    model.model.layers[1].mlp.up_proj.forward = tripled
    expected = model(PROMPT).logits
    report = headwise.attach(model)
    torch.testing.assert_close(model(PROMPT).logits, expected, atol=2e-4, rtol=2e-4)
    assert (
        "model.layers.0.self_attn.q_proj stays with Transformers: Doubled has a forward of its own"
        in str(report)
    )
    assert "its forward is replaced already" in str(report)
    headwise.detach(model)
    assert model.model.layers[1].mlp.up_proj.forward is tripled


@torch.no_grad()
def test_a_weight_may_change_its_kind_after_attach():
    model = make("llama-gqa")
    headwise.attach(model)
    stock = copy.deepcopy(model)
    headwise.detach(stock)
    for each in (model, stock):
        projection = each.model.layers[0].self_attn.q_proj
        torch.nn.utils.parametrizations.weight_norm(projection)
    torch.testing.assert_close(model(PROMPT).logits, stock(PROMPT).logits, atol=2e-4, rtol=2e-4)
    model.to(torch.bfloat16)
    with Count() as count:
        assert count.of(model, PROMPT) > 0


def test_a_bias_alone_is_trained():
    for family, bias in (("qwen2", "model.layers.0.self_attn.v_proj.bias"), ("gpt2", None)):
        model = make(family).requires_grad_(False)
        stock = copy.deepcopy(model)
        headwise.attach(model)
        found = []
        for each in (model, stock):
            name = bias or "transformer.h.0.attn.c_attn.bias"
            each.get_parameter(name).requires_grad_()
            each(PROMPT, labels=PROMPT).loss.backward()
            found.append(each.get_parameter(name).grad)
        torch.testing.assert_close(*found, atol=1e-5, rtol=1e-3)


@torch.no_grad()
def test_a_module_of_another_class_and_odd_tensors_are_stocks():
    class Doubled(torch.nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    model = make("qwen2")
    headwise.attach(model)
    head, x = model.lm_head, torch.randn(2, 48)
    for bias in (torch.ones(1).expand(VOCABULARY), torch.ones(1), torch.ones(2, VOCABULARY)):
        head._parameters["bias"] = torch.nn.Parameter(bias)
        torch.testing.assert_close(head(x), torch.nn.functional.linear(x, head.weight, bias))
    head._parameters["bias"] = torch.nn.Parameter(torch.ones(VOCABULARY, device="meta"))
    with pytest.raises(RuntimeError):
        head(x)
    head._parameters["bias"] = None
    expected = head(x)
    torch.testing.assert_close(head(x.to_sparse()), expected)
    head.__class__ = Doubled
    torch.testing.assert_close(head(x), 2 * expected)


@torch.no_grad()
def test_detach_leaves_nothing_to_a_hook_that_is_removed_later():
    hooks = pytest.importorskip("accelerate.hooks")
    model = make("llama-gqa")
    headwise.attach(model)
    hooks.add_hook_to_module(model.lm_head, hooks.ModelHook())
    headwise.detach(model)
    hooks.remove_hook_from_module(model.lm_head)
    assert not isinstance(model.lm_head.forward, LinearForward)
    assert model(PROMPT).logits.isfinite().all()


@torch.no_grad()
def test_copies_and_pickles_multiply_by_their_own_weights():
    model = make("gpt2")
    headwise.attach(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(PROMPT).logits, model(PROMPT).logits)
        twin.transformer.h[0].attn.c_attn.weight.zero_()
        assert not torch.allclose(twin(PROMPT).logits, model(PROMPT).logits)
        headwise.detach(twin)
        assert all("forward" not in module.__dict__ for module in weights(twin))


@torch.no_grad()
def test_the_report_of_a_meta_model_and_of_a_whole_one_name_the_same():
    config = make("llama-gqa").config
    with torch.device("meta"):
        empty = hf.AutoModelForCausalLM.from_config(config)
    expected, given = (headwise.attach(each).step for each in (make("llama-gqa"), empty))
    # layers, MLPs and norms are tried, which needs weights
    assert [line for line in given if line.startswith("products")] == [expected[1]]
