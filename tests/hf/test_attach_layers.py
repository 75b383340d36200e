"""Decoder layers as two operators: which calls they run, and that everything else sees stock."""

import copy
import gc
import pickle
import sys
import threading
import weakref
from contextlib import ExitStack
from dataclasses import replace
from unittest import mock

import pytest
import torch
import transformers as hf
from torch import nn

import headwise
import sweep_families
from families import VOCABULARY, make
from headwise.hf import use_own_layers
from headwise.hf.observer import observing
from headwise.hf.step.layers import LayerForward, layers_of, trial
from headwise.hf.stock_names import CACHE, DynamicCache
from headwise.spec.families import FAMILIES

PROMPT = torch.randint(3, VOCABULARY, (1, 9), generator=torch.Generator().manual_seed(4))
DESCRIBED = [name for name in sweep_families.TYPES if name in FAMILIES and FAMILIES[name].layer]


def fused(run):
    """How many layers `run` runs as operators."""
    with ExitStack() as stack:
        counts = [
            stack.enter_context(
                mock.patch.object(operator, "default", side_effect=operator.default)
            )
            for operator in (
                torch.ops.headwise.layer_outputs,
                torch.ops.headwise.attention_outputs,  # of layers whose MLP is a module
            )
        ]
        run()
    return sum(count.call_count for count in counts)


def attached(**changes):
    model = make("llama-gqa", **changes)
    headwise.attach(model)
    return model


def described(name):
    """A small model of a type that is described, whose norms and multipliers are not 1."""
    model = sweep_families.make(name)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    for module in model.modules():
        if hasattr(module, "residual_multiplier"):
            module.residual_multiplier = 0.4
    return model


@pytest.mark.parametrize("name", DESCRIBED)
@torch.no_grad()
def test_every_family_that_describes_its_layer_runs_it_and_says_the_same(name):
    stock = described(name)
    model = copy.deepcopy(stock)
    report = headwise.attach(model)
    layers = model.config.num_hidden_layers
    assert report.step[0] == f"decoder layers of up to 16 rows: {layers} of {layers} layers on cpu"
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    assert fused(lambda: model.generate(PROMPT, **options)) == 20 * layers
    padded = torch.cat([PROMPT, PROMPT.flip(1)])
    mask = torch.ones_like(padded)
    mask[0, :3] = 0
    padded[0, :3] = 0
    for given in ({}, {"num_beams": 2}, {"cache_implementation": "static"}):
        arguments = {"input_ids": padded, "attention_mask": mask, **options, **given}
        assert torch.equal(model.generate(**arguments), stock.generate(**arguments))
    headwise.detach(model)
    assert torch.equal(model(PROMPT).logits, stock(PROMPT).logits)


CHANGES = {
    "llama": [
        {"norm": "rms plus one"},
        {"norm": "layer"},
        {"rotation": "neighbours"},
        {"parallel": True},
        {"before_mlp": "input_layernorm"},
        {"after_mlp": "post_attention_layernorm"},
        {"gate": "up_proj", "up": "gate_proj"},
        {"gate": None},
        {"qkv": ("q_proj", "v_proj", "k_proj")},
    ],
    "glm": [{"rotation": "halves"}],
    "cohere": [{"rotation": "neighbours"}, {"before_mlp": None}, {"parallel": False}],
    "gpt_oss": [{"sinks": None}, {"before_mlp": "input_layernorm"}],
    "granitemoe": [{"scale": None}],
    "olmo2": [{"norm": "rms plus one"}, {"after_mlp": None}, {"head_norms": None}],
    "qwen2_moe": [{"window": True}],
    "gemma2": [{"softcap": None}, {"after_attention": None}, {"norm": "rms"}],
    "granite": [{"scale": None}],
    "smollm3": [{"rotates": None}],
    "qwen3": [{"head_norms": None}, {"head_norms": ("k_norm", "q_norm")}],
    "starcoder2": [{"norm": "rms"}],
}


@pytest.mark.parametrize(
    ("name", "change"),
    [(name, change) for name, changes in CHANGES.items() for change in changes],
    ids=str,
)
def test_a_description_that_is_wrong_is_found_by_the_trial(name, change):
    model, form = described(name), FAMILIES[name].layer
    layers = layers_of(model, form)
    assert set(trial(layers, form).values()) == {None}
    reasons = trial(layers, replace(form, **change)).values()
    assert any(reason is not None and "differs by" in reason for reason in reasons), reasons


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_trial_changes_nothing(dtype):
    model = make("gemma2").to(dtype)
    form = FAMILIES["gemma2"].layer
    seen, before = [], copy.deepcopy(model.state_dict())
    state = torch.random.get_rng_state()
    layers = layers_of(model, form)
    next(iter(layers.values())).register_forward_hook(lambda *args: seen.append(args))
    assert set(trial(layers, form).values()) == {None}
    assert not seen
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_the_trial_refuses_is_reported_and_stays_stock():
    class Slow(nn.Module):
        def forward(self, x):
            return nn.functional.silu(x)

    model = make("llama-gqa", num_hidden_layers=6)
    layers = model.model.layers
    stock = copy.deepcopy(model)
    layers[0].mlp.act_fn = Slow()
    layers[1].mlp.up_proj.forward = lambda x: nn.Linear.forward(layers[1].mlp.up_proj, x)
    layers[2].self_attn.register_forward_hook(lambda module, args, out: None)
    layers[3].forward = lambda *args, **kwargs: type(layers[3]).forward(layers[3], *args, **kwargs)
    layers[4].mlp.to(torch.bfloat16)
    said = headwise.attach(model).step[0]
    for reason in (
        "1 of 6 layers on cpu",
        "model.layers.0 stays with Transformers: no kernel has the activation Slow",
        "model.layers.1 stays with Transformers: its mlp.up_proj has hooks, or a forward that is",
        "model.layers.2 stays with Transformers: its self_attn has hooks, or a forward that is",
        "model.layers.3 stays with Transformers: its forward is replaced already",
        "model.layers.4 stays with Transformers: its weights are not plain parameters of one dtype",
    ):
        assert reason in said
    layers[4].mlp.float()
    stock.model.layers[4].mlp.to(torch.bfloat16).float()
    with torch.no_grad():
        assert fused(lambda: model(PROMPT)) == 1
        torch.testing.assert_close(model(PROMPT).logits, stock(PROMPT).logits, atol=2e-4, rtol=2e-4)


def test_a_model_without_weights_and_one_layer_of_a_users_class_stay_stock():
    with torch.device("meta"):
        empty = hf.AutoModelForCausalLM.from_config(make("llama-gqa").config)
    assert "its weights are on meta" in headwise.attach(empty).step[0]

    class Mine(type(make("llama-gqa").model.layers[0])):
        pass

    model = make("llama-gqa")
    model.model.layers[1].__class__ = Mine
    assert "2 of 2 layers on cpu" in headwise.attach(model).step[0]
    with torch.no_grad():
        assert fused(lambda: model(PROMPT)) == 2


class Watched(nn.Module):
    """Another module where a norm was."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return self.norm(x)


def hooked(model):
    model.model.layers[1].mlp.register_forward_hook(lambda module, args, out: None)


def replaced(model):
    layer = model.model.layers[1]
    layer.input_layernorm = Watched(layer.input_layernorm)


def wrapped(model):
    norm = model.model.layers[1].post_attention_layernorm
    norm.forward = lambda x: type(norm).forward(norm, x)


def parametrized(model):
    torch.nn.utils.parametrizations.weight_norm(model.model.layers[1].self_attn.k_proj)


def quantized(model):
    model.model.layers[1].mlp.down_proj.weight.data = (
        model.model.layers[1].mlp.down_proj.weight.data.half().float()
    )


def frozen_in_training(model):
    model.model.layers[1].train()


@pytest.mark.parametrize(
    ("change", "left"),
    [
        (hooked, 1),
        (replaced, 1),
        (wrapped, 1),
        (parametrized, 1),
        (quantized, 0),  # other numbers in the same parameter
        (frozen_in_training, 1),
    ],
)
@torch.no_grad()
def test_a_layer_that_somebody_changes_after_attach_is_its_own_again(change, left):
    model = attached()
    stock = copy.deepcopy(model)
    headwise.detach(stock)
    for each in (model, stock):
        change(each)
    assert fused(lambda: model(PROMPT)) == 3 - left
    torch.testing.assert_close(model(PROMPT).logits, stock(PROMPT).logits, atol=2e-4, rtol=2e-4)


@torch.no_grad()
def test_what_the_operators_were_given_once_is_looked_at_again():
    model = attached(attention_bias=True)
    stock = copy.deepcopy(model)
    headwise.detach(stock)
    model(PROMPT)
    for each in (model, stock):
        layer = each.model.layers[0]
        layer.input_layernorm.variance_epsilon = 0.5
        layer.self_attn.scaling = 0.01
        layer.self_attn.q_proj.weight = nn.Parameter(2 * layer.self_attn.q_proj.weight)
        each.model.layers[1].self_attn.k_proj.weight.data = each.model.layers[
            1
        ].self_attn.k_proj.weight.data.flip(0)
    assert fused(lambda: model(PROMPT)) == 3
    torch.testing.assert_close(model(PROMPT).logits, stock(PROMPT).logits, atol=2e-4, rtol=2e-4)
    for each in (model, stock):
        each.to(torch.bfloat16)
    assert fused(lambda: model(PROMPT)) == 3
    torch.testing.assert_close(model(PROMPT).logits, stock(PROMPT).logits, atol=0.3, rtol=0.1)


@torch.no_grad()
def test_a_contiguous_cache_is_appended_to_inside_the_operator():
    model = attached()
    stock = copy.deepcopy(model)
    headwise.detach(stock)
    operator = torch.ops.headwise.layer_attention
    ids = PROMPT.repeat(2, 8)  # past the room of a first prompt

    def run(each):
        cache = use_own_layers(DynamicCache()) if each is model else DynamicCache()
        logits = [each(ids[:, :20], **{CACHE: cache}).logits[:, -1:]]
        for at in range(20, 60):
            if at == 30:  # rows that are written over
                held = cache.layers[0].keys
                kept = held.clone()
                cache.crop(-5)
            if at == 33:
                assert torch.equal(held, kept)
                cache.reorder_cache(torch.tensor([1, 0]))
            logits.append(each(ids[:, at : at + 1], **{CACHE: cache}).logits)
        return torch.cat(logits)

    with mock.patch.object(operator, "default", side_effect=operator.default) as watched:
        given = run(model)
    torch.testing.assert_close(given, run(stock), atol=2e-4, rtol=2e-4)
    # all steps but those at which a buffer is made, is full, or moves
    assert 3 * 34 <= watched.call_count < 3 * 40


class OwnCache(DynamicCache):
    """A user's class."""


@pytest.mark.parametrize(
    ("given", "layers"),
    [
        ({}, 3),
        ({"input_ids": PROMPT.repeat(1, 2)[:, :17]}, 0),
        ({"input_ids": PROMPT.repeat(2, 1)}, 0),
        ({"output_hidden_states": True}, 0),
        ({"output_attentions": True}, 0),
        ({"use_cache": False}, 3),
        ({CACHE: "own"}, 0),
        ({CACHE: "stock"}, 3),
        ({CACHE: "ours"}, 3),
        ({"attention_mask": torch.ones(1, 9, dtype=torch.long)}, 3),
        ({"cu_seq_lens_q": torch.tensor([0, 9], dtype=torch.int32)}, 0),
    ],
    ids=str,
)
@torch.no_grad()
def test_calls_that_are_plain_and_of_few_rows_run_as_operators(given, layers):
    model = attached()
    caches = {
        "own": OwnCache,
        "stock": DynamicCache,
        "ours": lambda: use_own_layers(DynamicCache()),
    }
    given = {"input_ids": PROMPT} | given
    if CACHE in given:
        given[CACHE] = caches[given[CACHE]]()
    assert fused(lambda: model(**given)) == layers
    # what Transformers hooked in to capture is idle again
    assert fused(lambda: model(PROMPT)) == 3


def test_gradients_modes_observers_and_global_hooks_see_stock():
    model = attached()
    assert fused(lambda: model(PROMPT)) == 0  # parameters that need gradients
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert fused(lambda: model(PROMPT)) == 0
        seen = []
        with observing(lambda call: seen.append(call) or call.out):
            assert fused(lambda: model(PROMPT)) == 0
        assert len(seen) == 3
        hook = nn.modules.module.register_module_forward_hook(lambda *args: None)
        assert fused(lambda: model(PROMPT)) == 0
        hook.remove()
        model.config._attn_implementation_internal = "sdpa"
        assert fused(lambda: model(PROMPT)) == 0
        model.config._attn_implementation_internal = "headwise"
        assert fused(lambda: model(PROMPT)) == 3
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager")
        assert fused(lambda: compiled(PROMPT, use_cache=False)) == 0
    with torch.inference_mode():
        assert fused(lambda: model(PROMPT)) == 3


def as_buffer(model):
    norm = model.model.layers[1].input_layernorm
    weight = 2 * norm.weight.detach()
    del norm.weight
    norm.register_buffer("weight", weight)


def bias_as_buffer(model):
    projection = model.model.layers[1].self_attn.q_proj
    del projection.bias
    projection.register_buffer("bias", torch.ones(projection.out_features))


def bias_of_a_norm(model):
    norm = model.model.layers[1].input_layernorm
    norm.bias = nn.Parameter(torch.ones_like(norm.weight))


def trained_inside(model):
    model.model.layers[1].self_attn.train()


def another_function(model):
    model.model.layers[1].mlp.act_fn.act = torch.tanh
    model.model.layers[1].mlp.act_fn.forward = torch.tanh


def of_a_users_class(model):
    layer = model.model.layers[1]

    class Doubled(type(layer)):
        def forward(self, *args, **kwargs):
            return 2 * super().forward(*args, **kwargs)

    layer.__class__ = Doubled


def pruned(model):
    attention = model.model.layers[1].self_attn
    for name in ("q_proj", "k_proj", "v_proj"):
        rows = attention.get_submodule(name).weight.shape[0] // 2
        attention.get_submodule(name).weight.data = attention.get_submodule(name).weight[:rows]
    out = attention.o_proj
    out.weight.data = out.weight[:, : out.in_features // 2].contiguous()


def strided(model):
    down = model.model.layers[1].mlp.down_proj
    wide = torch.randn(down.out_features, 2 * down.in_features)
    down.weight.data = wide[:, ::2]


@pytest.mark.parametrize(
    ("change", "left"),
    [
        *((as_buffer, 1), (bias_as_buffer, 1), (bias_of_a_norm, 1), (trained_inside, 1)),
        *((another_function, 1), (of_a_users_class, 1), (pruned, 0), (strided, 1)),
    ],
)
@torch.no_grad()
def test_what_a_class_would_do_with_a_change_is_what_happens(change, left):
    model = attached()
    model(PROMPT)
    stock = copy.deepcopy(model)
    headwise.detach(stock)
    for each in (model, stock):
        torch.manual_seed(0)
        change(each)
    assert fused(lambda: model(PROMPT)) == 3 - left
    torch.testing.assert_close(model(PROMPT).logits, stock(PROMPT).logits, atol=3e-4, rtol=3e-4)


@torch.no_grad()
def test_code_that_another_library_puts_in_place_of_a_class_is_run():
    model = attached()
    mlp = type(model.model.layers[0].mlp)
    expected = model(PROMPT).logits
    with mock.patch.object(mlp, "forward", lambda self, x: self.down_proj(self.up_proj(x))):
        assert fused(lambda: model(PROMPT)) == 0
        assert not torch.allclose(model(PROMPT).logits, expected)
    double = mock.Mock(side_effect=lambda self, x: 2 * nn.functional.linear(x, self.weight))
    with mock.patch.object(nn.Linear, "forward", lambda self, x: double(self, x)):
        assert fused(lambda: model(PROMPT)) == 0
        assert double.call_count == 22
    assert fused(lambda: model(PROMPT)) == 3
    assert torch.equal(model(PROMPT).logits, expected)


def test_gradients_may_enter_by_the_cache_or_the_mask():
    model = attached().requires_grad_(False)
    stock = copy.deepcopy(model)
    headwise.detach(stock)
    found = []
    for each in (model, stock):
        cache, generator = DynamicCache(), torch.Generator().manual_seed(0)
        rows = [torch.randn(1, 2, 4, 8, generator=generator).requires_grad_() for _ in range(6)]
        for index in range(3):
            cache.update(*rows[2 * index : 2 * index + 2], index)
        mask = torch.zeros(1, 1, 9, 13, requires_grad=True)
        each(PROMPT, attention_mask=mask, **{CACHE: cache}).logits.square().mean().backward()
        found.append([mask.grad, *(row.grad for row in rows)])
    for given, expected in zip(*found, strict=True):
        torch.testing.assert_close(given, expected, atol=1e-5, rtol=1e-3)


@torch.no_grad()
def test_settings_that_change_after_attach_are_read_again():
    model, stock = (make("mistral") for _ in range(2))
    headwise.attach(model)
    model(PROMPT)
    for each in (model, stock):
        for config in {
            id(m.config): m.config for m in each.modules() if hasattr(m, "config")
        }.values():
            config.sliding_window = 3
    torch.testing.assert_close(model(PROMPT).logits, stock(PROMPT).logits, atol=2e-4, rtol=2e-4)
    model, stock = (described("qwen3") for _ in range(2))
    headwise.attach(model)
    model(PROMPT)
    for each in (model, stock):
        each.model.layers[0].self_attn.k_norm.variance_epsilon = 1.0
    torch.testing.assert_close(model(PROMPT).logits, stock(PROMPT).logits, atol=2e-4, rtol=2e-4)
    model, stock = (described("granite") for _ in range(2))
    headwise.attach(model)
    model(PROMPT)
    for each in (model, stock):
        each.model.layers[0].residual_multiplier = torch.tensor(0.1)
        each.model.layers[1].residual_multiplier = 0.9
    torch.testing.assert_close(model(PROMPT).logits, stock(PROMPT).logits, atol=2e-4, rtol=2e-4)


@torch.no_grad()
def test_keywords_and_positions_are_what_they_are_in_stock():
    model = attached()
    stock = copy.deepcopy(model)
    headwise.detach(stock)
    x = torch.randn(1, 3, 48, generator=torch.Generator().manual_seed(0))
    rotation = stock.model.rotary_emb(x, torch.arange(3)[None])
    for given in (
        {"position_embeddings": rotation, "is_causal": False},
        {"position_embeddings": tuple(part[:, :1] for part in rotation)},
    ):
        ours, expected = (each.model.layers[0](x, **given) for each in (model, stock))
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)
    one = torch.tensor([[5]])
    torch.testing.assert_close(
        model(PROMPT[:, :3], position_ids=one).logits,
        stock(PROMPT[:, :3], position_ids=one).logits,
        atol=2e-4,
        rtol=2e-4,
    )


@pytest.mark.parametrize("odd", ["no eps", "adapter", "copy", "traced"])
@pytest.mark.filterwarnings("ignore:.*jit.trace.* is deprecated")
@torch.no_grad()
def test_attach_leaves_odd_layers_alone(odd):
    class Adapter(nn.Linear):
        """Adds nothing before it is trained."""

        def __init__(self, base):
            super().__init__(base.in_features, base.out_features, bias=False)
            self.weight = base.weight
            self.low = nn.Parameter(torch.zeros(base.out_features, base.in_features))

        def forward(self, x):
            return super().forward(x) + nn.functional.linear(x, self.low)

    class NotCopied:
        def __deepcopy__(self, memo):
            raise copy.Error("not to be copied")

    model = make("llama-gqa")
    layer = model.model.layers[0]
    if odd == "no eps":
        layer.input_layernorm = nn.RMSNorm(48)
    elif odd == "adapter":
        layer.self_attn.q_proj = Adapter(layer.self_attn.q_proj)
    elif odd == "copy":
        layer.own = NotCopied()
    else:
        layer.mlp = torch.jit.trace(layer.mlp, torch.randn(1, 3, 48), check_trace=False)
    expected = model(PROMPT).logits
    assert "2 of 3 layers on cpu; model.layers.0 stays with" in headwise.attach(model).step[0]
    torch.testing.assert_close(model(PROMPT).logits, expected, atol=2e-4, rtol=2e-4)
    if odd == "adapter":
        layer.self_attn.q_proj.low.fill_(1.0)
        assert not torch.allclose(model(PROMPT).logits, expected, atol=1e-2)


@torch.no_grad()
def test_hooks_on_what_only_training_needs_are_run():
    model = make("phi3")
    headwise.attach(model)
    seen = []
    model.model.layers[1].resid_attn_dropout.register_forward_hook(
        lambda module, args, out: seen.append(out) or 2 * out
    )
    assert fused(lambda: model(PROMPT)) == model.config.num_hidden_layers - 1
    assert len(seen) == 1


@torch.no_grad()
def test_what_is_replaced_or_dropped_is_let_go_and_a_model_is_freed_at_once():
    model = described("granite")
    headwise.attach(model)
    model(PROMPT)
    layers = model.model.layers
    replaced = weakref.ref(layers[0].mlp.down_proj)
    dropped = weakref.ref(layers[3].mlp.down_proj)
    layers[0].mlp.down_proj = copy.deepcopy(layers[0].mlp.down_proj)
    del layers[3]
    model.config.num_hidden_layers = 3
    model(PROMPT, use_cache=False)
    assert replaced() is None and dropped() is None
    headwise.detach(model)
    headwise.attach(model)
    model(PROMPT)
    gc.collect()
    gc.disable()
    try:
        whole = weakref.ref(model)
        del model, layers
        assert whole() is None
    finally:
        gc.enable()


@torch.no_grad()
def test_threads_that_share_a_model_see_whole_arguments():
    model = attached()
    expected = model(PROMPT).logits
    faults = []

    def call(twin):
        try:
            with torch.no_grad():
                logits = twin(PROMPT).logits
            faults.extend([] if torch.equal(logits, expected) else ["other logits"])
        except Exception as error:  # noqa: BLE001
            faults.append(repr(error))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(20):
            twin = copy.deepcopy(model)
            running = [threading.Thread(target=call, args=(twin,)) for _ in range(4)]
            for thread in running:
                thread.start()
            for thread in running:
                thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not faults


@torch.no_grad()
def test_copies_and_pickles_run_their_own_modules():
    model = attached()
    model(PROMPT)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert fused(lambda twin=twin: twin(PROMPT)) == 3
        assert torch.equal(twin(PROMPT).logits, model(PROMPT).logits)
        twin.model.layers[0].mlp.down_proj.weight.zero_()
        assert not torch.equal(twin(PROMPT).logits, model(PROMPT).logits)
        headwise.detach(twin)
        assert not any(isinstance(m.__dict__.get("forward"), LayerForward) for m in twin.modules())


@torch.no_grad()
def test_attention_alone_leaves_layers_to_stock():
    model = make("llama-gqa")
    headwise.attach(model, step="attention")
    assert fused(lambda: model(PROMPT)) == 0
