"""`LinearAttention` against Transformers' modules, the papers' forms, and itself in parts."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import headwise
import sweep_families
from headwise.caches import ContiguousCache, StateCache
from headwise.nn import LinearAttention, Rope
from headwise.spec import ModelSpec, StateSpec

DELTA = StateSpec(
    conv_channels=2 * 2 * 8 + 4 * 6, conv_width=4, heads=4, key_heads=2, key_dim=8, value_dim=6
)
KDA = StateSpec(conv_channels=88, conv_width=3, heads=4, key_dim=8, value_dim=6, decay="dim")
SSD = replace(DELTA, delta=False)
GLA = StateSpec(heads=4, key_dim=8, value_dim=6, delta=False, decay="dim")
RETENTION = replace(GLA, decay="fixed")
SPECS = {"gated delta": DELTA, "KDA": KDA, "SSD": SSD, "GLA": GLA, "retention": RETENTION}
E = 20


def build(spec: StateSpec, **options: Any) -> LinearAttention:
    torch.manual_seed(0)
    rope = Rope(spec.key_dim) if spec.decay == "fixed" else None
    layer = LinearAttention(spec, E, rope=rope, **options)
    with torch.no_grad():
        for name, at in layer.named_parameters():
            if "norm" in name or name in ("skip", "conv_bias"):
                at.normal_()
    return layer


def hidden(batch: int = 2, length: int = 23) -> torch.Tensor:
    return torch.randn(batch, length, E, generator=torch.Generator().manual_seed(1))


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, relative: float = 1e-5) -> None:
    bound = relative * float(theirs.detach().abs().max())
    torch.testing.assert_close(ours, theirs, atol=bound, rtol=0)


STOCK = ("qwen3_next", "kimi_linear", "mamba2")


def stock_module(family: str) -> tuple[Any, Any, int]:
    """A module of linear attention with weights that all matter, its model, and its layer."""
    model = sweep_families.make(family)
    index, module = next(
        (at.layer_idx, at)
        for at in model.modules()
        if hasattr(at, "conv1d") and hasattr(at, "activation")
    )
    with torch.no_grad():
        for name, at in module.named_parameters():
            if "norm" in name or name.endswith(("dt_bias", "D", "A_log", "conv1d.bias")):
                at.normal_()
    return module, model, index


@pytest.mark.parametrize("family", STOCK)
def test_a_pretrained_layer_gives_what_its_module_gives(family: str) -> None:
    from transformers import DynamicCache

    module, model, index = stock_module(family)
    layer = LinearAttention.from_pretrained_layer(module)
    assert layer.spec == ModelSpec.from_config(model.config).layers[index].mixer
    assert not layer.training
    x = torch.randn(2, 75, layer.hidden_size, generator=torch.Generator().manual_seed(3))
    stock, cache = DynamicCache(config=model.config), StateCache()
    with torch.no_grad():
        assert_close(layer(x), module(x), 2e-5)
        begin = 0
        for end in (70, 71, 72, 73):  # a prompt of more than a chunk, then steps
            expected = module(x[:, begin:end], cache=stock)
            assert_close(layer(x[:, begin:end], cache=cache), expected, 2e-5)
            begin = end
    assert cache.length == 73
    held = [
        *stock.layers[index].conv_states.values(),
        *stock.layers[index].recurrent_states.values(),
    ]
    assert cache.nbytes == sum(each.numel() * each.element_size() for each in held)
    assert cache.nbytes == layer.spec.nbytes(2, "float32")


@pytest.mark.parametrize("family", STOCK)
def test_a_pretrained_layer_has_its_modules_gradients(family: str) -> None:
    module = stock_module(family)[0]
    layer = LinearAttention.from_pretrained_layer(module)
    grads = []
    for each in (layer, module):
        x = torch.randn(1, 70, layer.hidden_size, generator=torch.Generator().manual_seed(4))
        each(x.requires_grad_()).square().sum().backward()
        grads.append(x.grad)
    assert_close(*grads, relative=1e-4)


def test_other_modules_are_not_copied() -> None:
    module = stock_module("mamba2")[0]
    module.time_step_limit = (0.0, 1.0)
    with pytest.raises(headwise.UnsupportedError, match=r"time_step_limit=\(0\.0, 1\.0\)"):
        LinearAttention.from_pretrained_layer(module)
    module.time_step_limit, module.activation = (0.0, float("inf")), "gelu"
    with pytest.raises(headwise.UnsupportedError, match="activation 'gelu': expected 'silu'"):
        LinearAttention.from_pretrained_layer(module)
    module.out_proj.bias = nn.Parameter(torch.zeros(module.hidden_size))
    with pytest.raises(headwise.UnsupportedError, match="out_proj has a bias"):
        LinearAttention.from_pretrained_layer(module)
    module.out_proj = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(headwise.UnsupportedError, match="out_proj is a Sequential"):
        LinearAttention.from_pretrained_layer(module)
    bamba = next(at for at in sweep_families.make("bamba").modules() if hasattr(at, "A_log"))
    for other in (bamba, nn.Linear(2, 2), None, type("Mamba2Mixer", (nn.Module,), {})()):
        with pytest.raises(headwise.UnsupportedError, match="is not copied: expected one of Qwen3"):
            LinearAttention.from_pretrained_layer(other)


def test_retention_is_the_papers_parallel_form() -> None:
    layer, x = build(RETENTION), hidden()
    query, key, value = layer.qkv_proj(x).split([32, 32, 24], dim=-1)
    query, key, value = (at.unflatten(-1, (4, -1)).transpose(1, 2) for at in (query, key, value))
    query, key = (layer.rope(at, torch.arange(23)) for at in (query, key))
    gamma = 1 - 2.0 ** (-5 - torch.arange(4.0))
    apart = torch.arange(23)[:, None] - torch.arange(23)
    decay = (gamma.view(4, 1, 1) ** apart.clamp(min=0)) * (apart >= 0)
    out = (query @ key.mT * 8**-0.5 * decay) @ value
    normed = F.rms_norm(out, (6,), layer.norm_weight, 1e-6).transpose(1, 2).flatten(2)
    assert_close(layer(x), layer.o_proj(F.silu(layer.gate_proj(x)) * normed))


def test_gated_linear_attention_is_the_papers_recurrence() -> None:
    layer, x = build(GLA), hidden(1, 9)
    query, key, value = (
        at.unflatten(-1, (4, -1)) for at in layer.qkv_proj(x).split([32, 32, 24], dim=-1)
    )
    # the paper's sigmoid to the power of 1/16, of the negative of what is projected here
    alpha = (-layer.decay_proj(x)).sigmoid().pow(1 / 16).unflatten(-1, (4, -1))
    state, outs = torch.zeros(1, 4, 8, 6), []
    for t in range(9):
        state = alpha[:, t, :, :, None] * state + key[:, t, :, :, None] * value[:, t, :, None]
        outs.append((8**-0.5 * query[:, t, :, None] @ state).squeeze(2))
    normed = F.rms_norm(torch.stack(outs, 1), (6,), layer.norm_weight, 1e-6).flatten(2)
    assert_close(layer(x), layer.o_proj(F.silu(layer.gate_proj(x)) * normed))


@pytest.mark.parametrize("name", SPECS)
@settings(max_examples=10, deadline=None)
@given(cuts=st.lists(st.integers(0, 23), max_size=5))
def test_a_prompt_in_any_parts_is_one_prompt(name: str, cuts: list[int]) -> None:
    layer, x, cache, begin, parts = build(SPECS[name]), hidden(), StateCache(), 0, []
    with torch.no_grad():
        for end in [*sorted(cuts), 23]:
            parts.append(layer(x[:, begin:end], cache=cache))
            begin = end
        assert_close(torch.cat(parts, 1), layer(x))
    assert cache.length == 23
    assert cache.nbytes == layer.spec.nbytes(2, "float32")


@pytest.mark.parametrize("name", SPECS)
def test_sequences_of_their_own_lengths_are_read_alone(name: str) -> None:
    layer, x, cache = build(SPECS[name]), hidden(3), StateCache()
    lengths = torch.tensor([9, 0, 20])
    with torch.no_grad():
        first = layer(x[:, :20], cache=cache, lengths=lengths)
        assert cache.starts == [9, 0, 20]
        step = layer(x[:, 20:21], cache=cache)
        for at, length in enumerate(lengths.tolist()):
            alone = torch.cat([x[at : at + 1, :length], x[at : at + 1, 20:21]], dim=1)
            expected = layer(alone)
            assert_close(step[at : at + 1], expected[:, -1:])
            if length:
                assert_close(first[at : at + 1, :length], expected[:, :-1])
            assert not first[at, length:].any()


@pytest.mark.parametrize("name", SPECS)
def test_sequences_are_selected_and_a_copy_goes_its_own_way(name: str) -> None:
    layer, x, cache = build(SPECS[name]), hidden(), StateCache()
    with torch.no_grad():
        layer(x[:, :9], cache=cache)
        twin = copy.copy(cache)
        layer(x[:, :5], cache=cache)
        twin.reorder(torch.tensor([1, 0]))
        assert_close(layer(x[[1, 0], 9:], cache=twin), layer(x)[[1, 0], 9:])


@pytest.mark.parametrize("name", SPECS)
def test_gradients_are_those_of_differences(name: str) -> None:
    layer = build(SPECS[name]).double()
    x = hidden(1, 5).double().requires_grad_()
    parameters = dict(layer.named_parameters())
    assert all(at.requires_grad for at in parameters.values())

    def run(x: torch.Tensor, *weights: torch.Tensor) -> Any:
        return torch.func.functional_call(layer, dict(zip(parameters, weights)), (x,))

    assert torch.autograd.gradcheck(run, (x, *parameters.values()), fast_mode=True)


@pytest.mark.parametrize("name", SPECS)
def test_runs_under_autocast_and_in_bfloat16(name: str) -> None:
    layer, x = build(SPECS[name]), hidden()
    exact = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = layer(x)
        mixed.float().sum().backward()
    assert mixed.dtype == torch.bfloat16
    assert all(at.grad is not None and at.grad.isfinite().all() for at in layer.parameters())
    narrow, cache = layer.bfloat16(), StateCache()
    with torch.inference_mode():
        first = narrow(x[:, :20].bfloat16(), cache=cache)
    with torch.no_grad():
        whole = torch.cat([first, narrow(x[:, 20:].bfloat16(), cache=cache)], dim=1)
    for out in (mixed, whole):
        assert (out - exact).norm() < 0.03 * exact.norm()
    assert cache.nbytes == layer.spec.nbytes(2, "bfloat16")


@pytest.mark.parametrize("name", SPECS)
def test_compiles_to_one_graph(name: str) -> None:
    layer, x = build(SPECS[name]), hidden()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), layer(x))


def test_decays_start_where_mamba_2s_do() -> None:
    for spec in (DELTA, KDA, SSD):
        layer = LinearAttention(replace(spec), E)
        rates, steps = layer.A_log.exp(), F.softplus(layer.dt_bias)
        assert rates.min() >= 1 and rates.max() <= 16.001
        assert steps.min() > 0.99e-3 and steps.max() < 0.101
        assert rates.unique().numel() == 4


def another() -> StateCache:
    cache = StateCache()
    with torch.no_grad():
        build(DELTA)(hidden(3), cache=cache)
    return cache


def without_gradients(layer: LinearAttention, **options: Any) -> Any:
    with torch.no_grad():
        return layer(hidden(), **options)


@pytest.mark.parametrize(
    ("run", "error", "message"),
    [
        (lambda: LinearAttention(None), headwise.OptionError, "expected a StateSpec"),
        (
            lambda: LinearAttention(StateSpec(conv_channels=8, conv_width=3)),
            headwise.UnsupportedError,
            "convolution 8 channels, width 3 has no state",
        ),
        (
            lambda: LinearAttention(replace(DELTA, conv_channels=9)),
            headwise.UnsupportedError,
            "a convolution of 9 channels, expected 56",
        ),
        (lambda: LinearAttention(DELTA, 0), headwise.SpecError, "hidden_size=0"),
        (lambda: LinearAttention(GLA, rope=Rope(10)), headwise.OptionError, "turns 10 .* most 8"),
        (lambda: build(DELTA)(hidden()[0]), headwise.ShapeError, "expected 3 dims"),
        (
            lambda: build(DELTA)(hidden(), lengths=torch.tensor([1])),
            headwise.ShapeError,
            r"lengths has shape \[1\]",
        ),
        (
            lambda: build(RETENTION)(hidden(), positions=torch.arange(4)),
            headwise.ShapeError,
            "positions have shape",
        ),
        (
            lambda: build(DELTA)(hidden(), cache=StateCache()),
            headwise.UnsupportedError,
            "needs gradients, and a cache is changed in place",
        ),
        (
            lambda: without_gradients(build(DELTA), cache=ContiguousCache()),
            headwise.ShapeError,
            "cache is a ContiguousCache, expected a headwise.caches.StateCache",
        ),
        (
            lambda: without_gradients(build(DELTA), cache=another()),
            headwise.ShapeError,
            r"holds inputs \[3, 56, 4\] .* expected \[2, 56, 4\]",
        ),
        (
            lambda: without_gradients(build(RETENTION), cache=another()),
            headwise.ShapeError,
            "the cache holds inputs",
        ),
    ],
)
def test_what_does_not_fit_is_refused(run: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        run()
    assert "\n" not in str(caught.value)


def test_a_refused_call_leaves_the_cache_as_it_was() -> None:
    layer, cache, x = build(RETENTION), StateCache(), hidden()
    with torch.no_grad():
        layer(x[:, :9], cache=cache)
        for options in ({"positions": torch.arange(3)}, {"lengths": torch.tensor([99, 0])}):
            with pytest.raises(headwise.ShapeError):
                layer(x[:, 9:], cache=cache, **options)
        assert_close(layer(x[:, 9:], cache=cache), layer(x)[:, 9:])


def test_a_cache_of_a_layer_without_a_convolution_is_refused_by_one_with() -> None:
    bare = build(replace(DELTA, conv_channels=0, conv_width=0))
    for first, second, words in (
        (bare, build(DELTA), "the cache holds no inputs of a convolution, and gated delta rule"),
        (build(DELTA), bare, "the cache holds inputs of a convolution, and gated delta rule"),
    ):
        cache = StateCache()
        with torch.no_grad():
            first(hidden(), cache=cache)
            with pytest.raises(headwise.ShapeError, match=words):
                second(hidden(), cache=cache)
        assert cache.length == 23


@pytest.mark.parametrize("name", SPECS)
def test_padding_gives_zeros_whatever_it_is(name: str) -> None:
    layer, rows = build(SPECS[name]), hidden()
    expected = layer(rows[:1, :10])
    rows[0, 10:] = float("nan")
    out = layer(rows, lengths=torch.tensor([10, 23]))
    assert torch.equal(out[0, 10:], torch.zeros(13, E))
    assert_close(out[:1, :10], expected)
    assert bool(out[1].isfinite().all())


class Ones(nn.Module):
    """In the place of a norm."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = norm.weight, norm.variance_epsilon

    def forward(self, x: torch.Tensor, *_: Any) -> torch.Tensor:
        return torch.ones_like(x)


@pytest.mark.parametrize("family", STOCK)
def test_a_module_with_a_part_of_somebody_else_is_not_copied(family: str) -> None:
    module, _, _ = stock_module(family)
    name = "o_norm" if family == "kimi_linear" else "norm"
    stock = getattr(module, name)
    setattr(module, name, Ones(stock))
    with pytest.raises(headwise.UnsupportedError, match="norm is not Transformers' own"):
        LinearAttention.from_pretrained_layer(module)
    setattr(module, name, stock)
    LinearAttention.from_pretrained_layer(module)
    module.conv1d = nn.Sequential(module.conv1d)
    with pytest.raises(headwise.UnsupportedError, match="conv1d is a Sequential: expected a torch"):
        LinearAttention.from_pretrained_layer(module)
