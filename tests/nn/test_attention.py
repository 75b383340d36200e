"""The modules against PyTorch, against Transformers' own, and against one another."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import headwise
from families import make
from headwise import AttentionSpec
from headwise.caches import ContiguousCache, PagedCache, QuantizedCache, WindowCache
from headwise.measure.memory import kept_activations
from headwise.nn import Attention, LatentAttention, Rope
from headwise.nn.attention import alibi_slopes
from headwise.spec import FAMILIES

GQA = AttentionSpec(heads=6, kv_heads=2, head_dim=8, value_dim=8)
MLA = AttentionSpec(heads=3, kv_heads=3, head_dim=14, value_dim=10, latent_rank=20, rope_dim=6)
COMPRESSED = replace(MLA, query_rank=17)
SPECS = {
    "MHA": replace(GQA, kv_heads=6),
    "GQA": GQA,
    "MQA": replace(GQA, kv_heads=1),
    "windows and sinks": replace(GQA, window=5, sinks=True, qk_norm=True),
    "caps and ALiBi": replace(GQA, softcap=3.0, alibi=True),
    "MLA": MLA,
    "MLA, compressed queries": COMPRESSED,
}


def build(spec: AttentionSpec, **options: Any) -> Any:
    torch.manual_seed(0)
    if spec.latent_rank is not None:
        layer: Any = LatentAttention(spec, 48, rope=Rope(spec.rope_dim or 0), **options)
    else:
        rope = None if spec.alibi or spec.cross else Rope(spec.head_dim)
        layer = Attention(spec, 48, rope=rope, **options)
    if getattr(layer, "sinks", None) is not None:
        nn.init.normal_(layer.sinks)
    return layer


def hidden(batch: int = 2, length: int = 23) -> torch.Tensor:
    return torch.randn(batch, length, 48, generator=torch.Generator().manual_seed(1))


def gradients(layer: Any, run: Any) -> dict[str, torch.Tensor]:
    layer.zero_grad()
    x = hidden().requires_grad_()
    (run(x) * torch.linspace(-1, 1, 48)).sum().backward()
    found = {name: at.grad.clone() for name, at in layer.named_parameters()}
    return found | {"input": x.grad}


def assert_same_gradients(ours: Any, theirs: Any) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        size = float(theirs[name].abs().max())
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-5 * size, rtol=0)


def test_multi_head_attention_is_pytorchs() -> None:
    spec = replace(SPECS["MHA"], causal=False)
    layer = Attention(spec, qkv_bias=True, out_bias=True)
    theirs = nn.MultiheadAttention(48, 6, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_bias.normal_()
        for at, part in zip(("q_proj", "k_proj", "v_proj"), theirs.in_proj_weight.chunk(3)):
            getattr(layer, at).weight.copy_(part)
        for at, part in zip(("q_proj", "k_proj", "v_proj"), theirs.in_proj_bias.chunk(3)):
            getattr(layer, at).bias.copy_(part)
        layer.o_proj.load_state_dict(theirs.out_proj.state_dict())
    x = hidden()
    expected, _ = theirs(x, x, x, need_weights=False)
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


def _repeated(layer: Attention, groups: int) -> Attention:
    """The same layer with every kv head `groups` times."""
    spec = replace(layer.spec, kv_heads=layer.spec.kv_heads * groups)
    wide = build(spec)
    wide.load_state_dict(layer.state_dict() | {
        f"{name}.weight": getattr(layer, name)
        .weight.unflatten(0, (layer.spec.kv_heads, 1, -1))
        .expand(-1, groups, -1, -1)
        .flatten(0, 2)
        for name in ("k_proj", "v_proj")
    })  # fmt: skip
    return wide


@pytest.mark.parametrize("kv_heads", [1, 2, 3])
def test_shared_heads_are_multi_head_attention_with_copies(kv_heads: int) -> None:
    few = build(replace(GQA, kv_heads=kv_heads))
    groups = 6 // kv_heads
    all_heads = _repeated(few, groups)
    torch.testing.assert_close(few(hidden()), all_heads(hidden()), atol=1e-5, rtol=1e-5)
    ours, theirs = gradients(few, few), gradients(all_heads, all_heads)
    for name in ("k_proj.weight", "v_proj.weight"):  # a shared head collects what its copies do
        theirs[name] = theirs[name].view(kv_heads, groups, 8, 48).sum(1).flatten(0, 1)
    assert_same_gradients(ours, theirs)
    caches = ContiguousCache(), ContiguousCache()
    with torch.no_grad():
        for layer, cache in zip((few, all_heads), caches, strict=True):
            layer(hidden(), cache=cache)
    assert caches[0].nbytes * groups == caches[1].nbytes
    assert caches[0].nbytes == few.spec.cache_bytes(23, 2, "float32")


@pytest.mark.parametrize("spec", [MLA, COMPRESSED], ids=["queries direct", "queries compressed"])
def test_both_paradigms_give_equal_outputs_and_gradients(spec: AttentionSpec) -> None:
    layer = build(spec)
    x, mask = hidden(), torch.rand(2, 1, 23, 23) < 0.8
    for options in ({}, {"mask": mask}):
        outputs = [layer(x, paradigm=p, **options) for p in ("expanded", "absorbed")]
        torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)
        assert_same_gradients(
            gradients(layer, partial(layer, paradigm="expanded", **options)),
            gradients(layer, partial(layer, paradigm="absorbed", **options)),
        )


def test_mla_is_multi_head_attention_over_what_it_expands() -> None:
    layer, x = build(COMPRESSED), hidden()
    positions = torch.arange(23)
    query = layer.q_up(F.rms_norm(layer.q_down(x), (17,), layer.q_norm.weight, 1e-6))
    query = query.view(2, 23, 3, 14).transpose(1, 2)
    latent, rotary = layer.kv_down(x).split([20, 6], dim=-1)
    latent = F.rms_norm(latent, (20,), layer.kv_norm.weight, 1e-6)
    rotary = layer.rope(rotary[:, None], positions).expand(2, 3, 23, 6)
    key = torch.cat([torch.einsum("blr,hnr->bhln", latent, layer.w_uk), rotary], -1)
    value = torch.einsum("blr,hvr->bhlv", latent, layer.w_uv)
    query = torch.cat([query[..., :8], layer.rope(query[..., 8:], positions)], -1)
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    expected = layer.o_proj(out.transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


def test_a_window_of_the_whole_context_is_none() -> None:
    full, windowed = build(GQA), build(replace(GQA, window=23))
    assert torch.equal(full(hidden()), windowed(hidden()))
    assert not torch.allclose(full(hidden()), build(replace(GQA, window=22))(hidden()))


def test_a_large_softcap_is_none() -> None:
    capped = build(replace(GQA, softcap=1e6))
    torch.testing.assert_close(capped(hidden()), build(GQA)(hidden()), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(build(GQA)(hidden()), build(replace(GQA, softcap=0.01))(hidden()))


@pytest.mark.parametrize("name", SPECS)
@settings(max_examples=15, deadline=None)
@given(cuts=st.lists(st.integers(0, 23), max_size=5))
def test_a_prefill_in_any_chunks_is_one_prefill(name: str, cuts: list[int]) -> None:
    layer, x = build(SPECS[name]), hidden()
    ends = [*sorted(cuts), 23]
    cache, begin, parts = ContiguousCache(), 0, []
    with torch.no_grad():
        for end in ends:
            parts.append(layer(x[:, begin:end], cache=cache))
            begin = end
        expected = layer(x)
    assert cache.length == 23
    torch.testing.assert_close(torch.cat(parts, 1), expected, atol=1e-5, rtol=1e-5)
    assert cache.nbytes == layer.spec.cache_elements_per_token * 23 * 2 * 4


@pytest.mark.parametrize("name", SPECS)
def test_left_padding_changes_nothing(name: str) -> None:
    layer, x = build(SPECS[name]), hidden(1)
    padded = torch.cat([torch.randn(1, 4, 48), x], 1)
    mask = (torch.arange(27) >= 4).view(1, 1, 1, 27)
    positions = (torch.arange(27) - 4).clamp(min=0)
    given = layer(padded, positions=positions, mask=mask)[:, 4:]
    torch.testing.assert_close(given, layer(x), atol=1e-5, rtol=1e-5)


def test_cross_attention_reads_its_source_once() -> None:
    spec = replace(GQA, causal=False, cross=True)
    layer, cache = build(spec, source_size=30), ContiguousCache()
    source = torch.randn(2, 11, 30)
    with torch.no_grad():
        whole = layer(hidden(), source)
        first = layer(hidden()[:, :20], source, cache=cache)
        last = layer(hidden()[:, 20:], torch.full_like(source, torch.nan), cache=cache)
    assert cache.length == 11
    torch.testing.assert_close(torch.cat([first, last], 1), whole, atol=1e-5, rtol=1e-5)


def test_a_symmetric_window_sees_both_sides() -> None:
    layer = build(replace(GQA, causal=False, window=4))
    near = (torch.arange(23)[:, None] - torch.arange(23)).abs() < 4
    full = build(replace(GQA, causal=False))
    torch.testing.assert_close(layer(hidden()), full(hidden(), mask=near[None, None]))


@pytest.mark.parametrize("heads", [1, 2, 6, 8, 12])
def test_alibi_slopes_are_those_of_transformers(heads: int) -> None:
    from transformers.models.bloom.modeling_bloom import _get_alibi_slopes

    torch.testing.assert_close(alibi_slopes(heads), _get_alibi_slopes(heads, torch.device("cpu")))


COPIED = (
    *("llama-gqa", "llama-mha", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma2"),
    *("gemma3", "gpt_oss"),
    *("deepseek_v2", "deepseek_v3", "deepseek_v3-yarn", "glm4_moe_lite", "minicpm3"),
    *("axk1", "youtu"),
)


def test_only_families_whose_layers_are_compared_here_are_copied() -> None:
    compared = {make(name).config.model_type for name in COPIED}
    assert compared == {name for name, family in FAMILIES.items() if family.copies}
    with pytest.raises(headwise.UnsupportedError, match=r"model_type 'glm' may do more .* llama"):
        Attention.from_pretrained_layer(make("glm").model.layers[0].self_attn)


@pytest.mark.parametrize("family", COPIED)
def test_a_pretrained_layer_attends_as_in_its_model(family: str) -> None:
    model = make(family, attn_implementation="eager")
    kind: Any = LatentAttention if "kv_lora_rank" in model.config.to_dict() else Attention
    ids, seen = torch.randint(3, 97, (2, 23)), {}
    modules = [layer.self_attn for layer in model.model.layers]
    for index, module in enumerate(modules):
        with torch.no_grad():
            for name, at in module.named_parameters():
                if "norm" in name or name == "sinks":
                    at.normal_()

        def keep(_: Any, args: Any, kwargs: Any, output: Any, index: int = index) -> None:
            seen[index] = (kwargs.get("hidden_states", args[0] if args else None), output[0])

        module.register_forward_hook(keep, with_kwargs=True)
    with torch.no_grad():
        model(ids, use_cache=False)
        for index, module in enumerate(modules):
            layer = kind.from_pretrained_layer(module)
            x, expected = seen[index]
            size = float(expected.abs().max())
            torch.testing.assert_close(layer(x), expected, atol=2e-5 * size, rtol=0)
            assert not layer.training


@pytest.mark.parametrize("family", ["mistral4", "longcat_flash", "kimi_linear", "bailing_hybrid"])
def test_latent_attention_that_does_more_is_refused(family: str) -> None:
    attention = next(at for at in make(family).modules() if hasattr(at, "expand_kv"))
    with pytest.raises(headwise.UnsupportedError, match="may do more than is copied"):
        LatentAttention.from_pretrained_layer(attention)


@pytest.mark.parametrize("name", SPECS)
def test_compiles_to_one_graph(name: str) -> None:
    layer, x = build(SPECS[name]), hidden()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x), atol=1e-5, rtol=1e-5)
    assert_same_gradients(gradients(layer, compiled), gradients(layer, layer))


@pytest.mark.parametrize("name", SPECS)
def test_runs_under_autocast_and_in_bfloat16(name: str) -> None:
    layer, x = build(SPECS[name]), hidden()
    exact = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = layer(x)
        mixed.float().sum().backward()
    assert mixed.dtype == torch.bfloat16
    assert all(at.grad is not None and at.grad.isfinite().all() for at in layer.parameters())
    narrow = layer.bfloat16()(x.bfloat16())
    for out in (mixed, narrow):
        assert (out - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize("name", SPECS)
def test_gradients_survive_checkpointing(name: str) -> None:
    layer = build(SPECS[name])

    def again(x: torch.Tensor) -> Any:
        return torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)

    assert_same_gradients(gradients(layer, again), gradients(layer, layer))


@pytest.mark.parametrize(
    ("run", "error", "message"),
    [
        (lambda: Attention(MLA), headwise.UnsupportedError, "build it with LatentAttention"),
        (lambda: LatentAttention(GQA), headwise.UnsupportedError, "build it with Attention"),
        (
            lambda: LatentAttention(replace(MLA, head_dim=6)),
            headwise.UnsupportedError,
            "rotates all 6 dims of a key",
        ),
        (
            lambda: LatentAttention(replace(MLA, window=4, sinks=True)),
            headwise.UnsupportedError,
            "not served with window, sinks",
        ),
        (
            lambda: Attention(replace(GQA, relative_bias=True)),
            headwise.UnsupportedError,
            "give bias= to forward",
        ),
        (
            lambda: Attention(replace(GQA, window=4, chunked=True)),
            headwise.UnsupportedError,
            "leave window and chunked out, and give mask= to forward",
        ),
        (
            lambda: build(GQA)(hidden(), hidden()),
            headwise.ShapeError,
            "layer of GQA 6/2 heads, D 8: expected no source",
        ),
        (
            lambda: build(replace(GQA, causal=False, cross=True))(hidden()),
            headwise.ShapeError,
            "expected source=",
        ),
        (
            lambda: build(GQA)(hidden(), cache=ContiguousCache()),
            headwise.UnsupportedError,
            "gradient",
        ),
        (
            lambda: Attention.from_pretrained_layer(make("gpt2").transformer.h[0].attn),
            headwise.UnsupportedError,
            "GPT2Attention has not a torch.nn.Linear called q_proj",
        ),
        (lambda: Attention(None), headwise.OptionError, "spec is a NoneType"),
        (lambda: LatentAttention({}), headwise.OptionError, "spec is a dict"),
        (lambda: Attention(GQA, 0), headwise.SpecError, "hidden_size=0"),
        (lambda: Attention(GQA, 4.5), headwise.SpecError, "hidden_size=4.5"),
        (lambda: Attention(GQA, source_size=9), headwise.OptionError, "has no source"),
        (lambda: Attention(GQA, rope=8), headwise.OptionError, "rope is a int"),
        (lambda: Attention(GQA, rope=Rope(10)), headwise.OptionError, "turns 10 .* at most 8"),
        (lambda: LatentAttention(MLA, rope=Rope(4)), headwise.OptionError, "turns 4 .* expected 6"),
        (
            lambda: Attention(replace(GQA, alibi=True, causal=False)),
            headwise.UnsupportedError,
            "ALiBi is defined for causal attention",
        ),
        (lambda: build(GQA)(None), headwise.ShapeError, "hidden is a NoneType"),
        (lambda: build(GQA)(torch.ones(2, 3, 9)), headwise.ShapeError, r"\[B, S, E\] with E=48"),
        (lambda: build(MLA)(torch.ones(3, 48)), headwise.ShapeError, "expected 3 dims"),
        (
            lambda: build(GQA)(hidden(), positions=torch.zeros(2, 23)),
            headwise.ShapeError,
            "positions are torch.float32",
        ),
        (lambda: build(GQA)(hidden(), positions=[1]), headwise.ShapeError, "positions are a list"),
        (
            lambda: build(MLA)(hidden(), positions=torch.zeros(3, 23).long()),
            headwise.ShapeError,
            "B=2 and S=23",
        ),
        (lambda: build(GQA)(hidden(), cache=[]), headwise.ShapeError, "cache is a list"),
        (
            lambda: build(GQA)(hidden(), cache=WindowCache(4)),
            headwise.ShapeError,
            "the cache has a window of 4, this layer no window",
        ),
        (
            lambda: Attention.from_pretrained_layer(nn.Linear(2, 2)),
            headwise.UnsupportedError,
            "Linear has not a torch.nn.Linear called q_proj",
        ),
    ],
)
def test_what_does_not_fit_is_refused(run: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        run()


@pytest.mark.parametrize("name", ["MHA", "GQA", "MQA", "MLA", "MLA, compressed queries"])
def test_no_matrix_of_scores_is_kept_for_the_backward_pass(name: str) -> None:
    layer = build(SPECS[name])
    once, twice, four = (
        kept_activations(layer, partial(layer, hidden(1, length))) for length in (256, 512, 1024)
    )
    # linear in the tokens
    assert four - twice == pytest.approx(2 * (twice - once), rel=0.01)


@pytest.mark.parametrize("name", ["GQA", "MLA"])
def test_a_refused_call_leaves_the_cache_as_it_was(name: str) -> None:
    layer, cache = build(SPECS[name]), ContiguousCache()
    with torch.no_grad():
        layer(hidden()[:, :5], cache=cache)
        for mask in (
            torch.ones(4, 4).bool(),
            torch.ones(1, 1, 18, 18).bool(),
            torch.ones(1, 1, 1, 1),
        ):
            with pytest.raises(headwise.ShapeError, match="mask has"):
                layer(hidden()[:, 5:], cache=cache, mask=mask)
        rest = layer(hidden()[:, 5:], cache=cache)
        torch.testing.assert_close(rest, layer(hidden())[:, 5:], atol=1e-5, rtol=1e-5)


def test_a_window_cache_serves_a_layer_of_its_window() -> None:
    layer, cache = build(replace(GQA, window=5)), WindowCache(5)
    with torch.no_grad():
        parts = [layer(part, cache=cache) for part in hidden().split([9, 1, 1, 12], dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), layer(hidden()), atol=1e-5, rtol=1e-5)
    assert cache.held == 4


@pytest.mark.parametrize("name", ["MHA", "GQA", "MQA", "MLA", "MLA, compressed queries"])
def test_a_layer_goes_on_from_any_cache(name: str) -> None:
    layer = build(SPECS[name])
    with torch.no_grad():
        whole = layer(hidden())
        for cache, error in (
            (PagedCache(4), 1e-5),
            (QuantizedCache(8), 0.02),
            (QuantizedCache(4), 0.3),
        ):
            parts = [layer(part, cache=cache) for part in hidden().split([9, 1, 1, 12], dim=1)]
            difference = (torch.cat(parts, 1) - whole).norm() / whole.norm()
            assert difference < error, cache


@pytest.mark.parametrize("name", ["GQA", "MLA"])
def test_positions_follow_each_sequence_of_its_own_length(name: str) -> None:
    layer, cache = build(SPECS[name]), PagedCache(4)
    both = hidden(2)
    with torch.no_grad():
        layer(both[:, :10], cache=cache)
        cache.share(0, 6, [1])
        given = layer(both[:, 10:11], cache=cache)
        for index, length in enumerate((10, 6)):
            alone = torch.cat([both[:1, :length], both[index : index + 1, 10:11]], dim=1)
            expected = layer(alone)[:, -1:]
            torch.testing.assert_close(given[index : index + 1], expected, atol=1e-5, rtol=1e-5)


def test_a_cache_that_the_layer_cannot_use_is_refused() -> None:
    layer = build(replace(GQA, window=5))
    with torch.no_grad(), pytest.raises(headwise.ShapeError, match="keeps 2 first tokens"):
        layer(hidden(), cache=WindowCache(5, sinks=2))
    cross = build(replace(GQA, causal=False, cross=True))
    with torch.no_grad(), pytest.raises(headwise.ShapeError, match="expected a contiguous one"):
        cross(hidden(), hidden(), cache=PagedCache())


def test_a_filled_cross_cache_has_no_gradients_to_give() -> None:
    layer, cache = build(replace(GQA, causal=False, cross=True)), ContiguousCache()
    with torch.no_grad():
        first = layer(hidden(), hidden(), cache=cache)
        assert torch.equal(layer(hidden(), cache=cache), first)
    with pytest.raises(headwise.UnsupportedError, match="without gradients"):
        layer(hidden(), cache=cache)


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("name", ["GQA", "windows and sinks", "MLA"])
def test_tangents_are_not_dropped(name: str) -> None:
    layer, x = build(SPECS[name]).requires_grad_(False).double(), hidden().double()
    _, tangent = torch.func.jvp(layer, (x,), (x,))
    step = 1e-5
    expected = (layer(x * (1 + step)) - layer(x * (1 - step))) / (2 * step)
    torch.testing.assert_close(tangent, expected, atol=1e-5, rtol=1e-4)


def test_double_precision_is_double() -> None:
    layer = build(GQA).double()
    x = torch.randn(1, 3, 48, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))


def test_a_layer_made_on_another_device_takes_its_rope_along() -> None:
    layer = build(GQA, device="meta")
    assert layer(torch.empty(1, 3, 48, device="meta")).device.type == "meta"
    with torch.device("meta"):
        empty = build(GQA)
    state = build(GQA).state_dict()
    empty.load_state_dict(state, assign=True)
    assert torch.equal(empty(hidden()), build(GQA)(hidden()))


def test_a_rotation_of_a_part_of_each_head_is_not_guessed() -> None:
    for kind, served in (("default", True), ("linear", False)):
        rope = {"rope_type": kind, "rope_theta": 1e4, "partial_rotary_factor": 0.5, "factor": 2.0}
        module = make("llama-gqa").model.layers[0].self_attn
        module.config.rope_parameters = rope
        if served:  # Llama's own rotary embedding does not read it
            assert Attention.from_pretrained_layer(module).rope.dim == 8
        else:
            with pytest.raises(headwise.UnsupportedError, match=r"partial_rotary_factor=0\.5"):
                Attention.from_pretrained_layer(module)
