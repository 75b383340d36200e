"""Mixtures of experts of an attached model: a step reads the chosen weights in place."""

import copy
import pickle
from unittest import mock

import pytest
import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import headwise
import sweep_families
from families import VOCABULARY
from headwise.hf.step.experts import ExpertsForward, replaced_experts

PROMPT = torch.randint(3, VOCABULARY, (1, 9), generator=torch.Generator().manual_seed(4))
# by rows and by columns, with biases, with gates of their own, without one, with a norm after
TYPES = ("qwen3_moe", "gpt_oss", "aria_text", "beam", "nemotron_h", "granitemoe", "deepseek_v3")


def products(run):
    """How often `run` calls the kernel."""
    operator = torch.ops.headwise.experts
    with mock.patch.object(operator, "default", side_effect=operator.default) as watched:
        run()
    return watched.call_count


def first(model):
    return model.get_submodule(next(iter(replaced_experts(model).reasons)))


@pytest.mark.parametrize("name", [name for name in TYPES if name in sweep_families.TYPES])
@torch.no_grad()
def test_a_step_reads_the_chosen_experts_in_place_and_says_the_same(name):
    stock = sweep_families.make(name)
    model = copy.deepcopy(stock)
    count = len(replaced_experts(model).reasons)
    if count == 0:
        pytest.skip("its experts are not on the interface in this release of Transformers")
    report = headwise.attach(model)
    assert f"experts of up to 16 rows: {count} of {count} modules on cpu" in report.step
    assert products(lambda: model(PROMPT)) == 2 * count
    assert products(lambda: model(PROMPT.repeat(2, 1))) == 0  # 18 rows
    torch.testing.assert_close(model(PROMPT).logits, stock(PROMPT).logits, atol=2e-4, rtol=2e-4)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(PROMPT, **options), stock.generate(PROMPT, **options))
    again = pickle.loads(pickle.dumps(model))
    assert products(lambda: again(PROMPT)) == 2 * count
    headwise.detach(model)
    assert products(lambda: model(PROMPT)) == 0
    assert torch.equal(model(PROMPT).logits, stock(PROMPT).logits)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@torch.no_grad()
def test_whichever_of_its_own_ways_stock_takes(implementation):
    model = sweep_families.make("qwen3_moe")
    stock = copy.deepcopy(model)
    headwise.attach(model)
    for each in (model, stock):
        each.set_experts_implementation(implementation)
    assert products(lambda: model(PROMPT)) > 0
    torch.testing.assert_close(model(PROMPT).logits, stock(PROMPT).logits, atol=2e-4, rtol=2e-4)
    assert model.config._experts_implementation == implementation


@torch.no_grad()
def test_a_users_own_way_and_experts_on_several_processes_stay():
    def doubled(self, x, chosen, shares):
        return 2 * type(self).forward.__wrapped__(self, x, chosen, shares)

    ALL_EXPERTS_FUNCTIONS.register("doubled", doubled)
    try:
        model = sweep_families.make("qwen3_moe")
        headwise.attach(model)
        model.set_experts_implementation("doubled")
        assert products(lambda: model(PROMPT)) == 0
        headwise.detach(model)
        assert "in a way of somebody's own" in str(headwise.attach(model))
    finally:
        ALL_EXPERTS_FUNCTIONS._global_mapping.pop("doubled", None)
    model = sweep_families.make("qwen3_moe")
    headwise.attach(model)
    whole = products(lambda: model(PROMPT))
    first(model)._is_expert_parallel = True
    assert products(lambda: model(PROMPT)) == whole - 2


@pytest.mark.parametrize("change", ["class", "patch", "registered"])
@torch.no_grad()
def test_what_a_class_would_do_after_a_change_is_what_happens(change):
    model = sweep_families.make("qwen3_moe")
    stock = copy.deepcopy(model)
    headwise.attach(model)
    kind = type(first(model))
    own, kept = ALL_EXPERTS_FUNCTIONS["grouped_mm"], kind.forward

    def doubled(self, *args):
        return 2 * (own if change == "registered" else kept)(self, *args)

    for each in (model, stock):
        each.set_experts_implementation("grouped_mm")
    before = stock(PROMPT).logits
    with mock.patch.dict(ALL_EXPERTS_FUNCTIONS._global_mapping):
        if change == "class":
            for each in (model, stock):
                first(each).__class__ = type("Doubled", (kind,), {"forward": doubled})
        elif change == "registered":
            ALL_EXPERTS_FUNCTIONS.register("grouped_mm", doubled)
        patch = doubled if change == "patch" else kept
        with mock.patch.object(kind, "forward", patch):
            expected = stock(PROMPT).logits
            torch.testing.assert_close(model(PROMPT).logits, expected, atol=2e-4, rtol=2e-4)
    assert not torch.allclose(before, expected, atol=1e-3)


def test_an_activation_runs_once_where_the_second_product_is_trained():
    model = sweep_families.make("qwen3_moe").requires_grad_(False)
    headwise.attach(model)
    first(model).down_proj.requires_grad_()
    seen = []
    first(model).act_fn.register_forward_hook(lambda module, args, out: seen.append(out))
    model(PROMPT, labels=PROMPT).loss.backward()
    once = len(seen)
    assert first(model).down_proj.grad is not None
    headwise.detach(model)
    seen.clear()
    model(PROMPT, labels=PROMPT)
    assert len(seen) == once


def test_gradients_and_compilers_see_stock():
    model = sweep_families.make("qwen3_moe")
    headwise.attach(model)
    assert products(lambda: model(PROMPT, labels=PROMPT).loss.backward()) == 0
    assert first(model).down_proj.grad is not None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert products(lambda: model(PROMPT)) == 0


def test_what_computes_something_else_is_found_and_reported():
    class Other(nn.Module):
        def forward(self, x):
            return nn.functional.silu(x)

    model = sweep_families.make("qwen3_moe")
    kind = type(first(model))
    changed = type(
        "Changed", (kind,), {"forward": lambda self, *args: 2 * kind.forward(self, *args)}
    )
    first(model).__class__ = changed
    said = str(headwise.attach(model))
    assert "stays with Transformers: what it gives differs by 5e-01 of the largest" in said
    headwise.detach(model)
    # another activation is the module's own, and runs
    model = sweep_families.make("qwen3_moe")
    stock = copy.deepcopy(model)
    headwise.attach(model)
    for each in (model, stock):
        first(each).act_fn = Other()
        first(each).down_proj = nn.Parameter(2 * first(each).down_proj)
    with torch.no_grad():
        assert products(lambda: model(PROMPT)) > 0
        torch.testing.assert_close(model(PROMPT).logits, stock(PROMPT).logits, atol=2e-4, rtol=2e-4)


def test_a_model_without_weights_and_attention_alone():
    model = sweep_families.make("qwen3_moe")
    assert "experts" not in str(headwise.attach(model, step="attention"))
    with torch.device("meta"):
        empty = type(model)(model.config)
    assert "its weights are on meta" in str(headwise.attach(empty))
    assert not isinstance(first(empty).__dict__.get("forward"), ExpertsForward)


@torch.no_grad()
def test_the_trial_leaves_pytorchs_generator_and_hooks_alone():
    model, seen = sweep_families.make("qwen3_moe"), []
    state = torch.random.get_rng_state()
    assert set(replaced_experts(model).reasons.values()) == {None}
    first(model).register_forward_hook(lambda module, args, out: seen.append(out))
    assert set(replaced_experts(model).reasons.values()) == {None}
    first(model).act_fn.register_forward_hook(lambda module, args, out: seen.append(out))
    assert "its act_fn has hooks" in replaced_experts(model).reasons.values()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not seen
    with torch.no_grad():
        model(PROMPT)
    assert seen
