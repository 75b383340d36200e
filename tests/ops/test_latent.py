"""MLA: both paradigms equal attention over keys and values that are built explicitly."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headwise import attention, latent_attention
from headwise.ops import choose_paradigm
from headwise.ops.attend import operator as attend_operator
from headwise.ops.latent import parts as latent_parts
from ops.calls import Call, assert_agree
from ops.test_views import as_integers, in_integer_pages, in_pages

BATCH, HEADS, CONTEXT, NOPE, ROPE, RANK, VALUE = 2, 3, 19, 7, 5, 17, 11
DEEPSEEK_V2_LITE = {"heads": 16, "nope_dim": 128, "rope_dim": 64, "value_dim": 128, "rank": 512}


def inputs(length, dtype=torch.float64, batch=BATCH, context=CONTEXT, rope=ROPE, nope=NOPE):
    """query_nope, query_rope, latent, key_rope, w_uk, w_uv."""
    return [
        torch.randn(batch, HEADS, length, nope, dtype=dtype),
        torch.randn(batch, HEADS, length, rope, dtype=dtype),
        torch.randn(batch, context, RANK, dtype=dtype),
        torch.randn(batch, context, rope, dtype=dtype),
        torch.randn(HEADS, nope, RANK, dtype=dtype) / math.sqrt(RANK),
        torch.randn(HEADS, VALUE, RANK, dtype=dtype) / math.sqrt(RANK),
    ]


def built(query_nope, query_rope, latent, key_rope, w_uk, w_uv):
    """The multi-head attention that MLA stands for: query, key, value with a head each."""
    key_nope = torch.einsum("hnr,blr->bhln", w_uk, latent)
    value = torch.einsum("hvr,blr->bhlv", w_uv, latent)
    shared = key_rope[:, None].expand(-1, w_uk.shape[0], -1, -1)
    query = torch.cat([query_nope, query_rope], dim=3)
    return query, torch.cat([key_nope, shared], dim=3), value


OPTIONS = {
    "nothing": {},
    "causal": {"causal": True},
    "lengths": {"causal": True, "kv_lengths": torch.tensor([8, 19])},
    "a length of 0": {"kv_lengths": torch.tensor([0, 13])},
    "mask": {"mask": torch.randn(BATCH, HEADS, 1, CONTEXT) > -0.5},
    "mask and causal": {"mask": torch.randn(1, 1, 1, CONTEXT) > -0.5, "causal": True},
    "lse": {"return_lse": True, "causal": True},
    "scale": {"scale": 0.11},
    "scale and lse": {"scale": -0.3, "return_lse": True, "causal": True},
    "window": {"window": 4, "causal": True},
    "sinks and lse": {"sinks": torch.randn(HEADS), "return_lse": True},
    "chosen": {"indices": 7, "causal": True, "return_lse": True},
    "chosen, window, sinks, mask and lengths": {
        "indices": 30,
        "causal": True,
        "window": 9,
        "sinks": torch.randn(HEADS),
        "mask": torch.randn(BATCH, 1, 1, CONTEXT) > -0.5,
        "kv_lengths": torch.tensor([8, 19]),
    },
}


def options_of(name, length):
    """With so many tokens chosen for each query, some of them twice, in place of their number."""
    options = dict(OPTIONS[name])
    if "indices" in options:
        shape = (BATCH, 1, length, options["indices"])
        options["indices"] = torch.randint(-1, CONTEXT, shape, dtype=torch.int32)
    return options


@pytest.mark.parametrize("backend", [None, "torch", "reference"])
@pytest.mark.parametrize("paradigm", ["expanded", "absorbed", "auto"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("name", OPTIONS)
def test_equals_attention_over_built_keys_and_values(name, length, dtype, paradigm, backend):
    tensors, options = inputs(length, dtype), options_of(name, length)
    expected = attention(*built(*tensors), **options, backend="reference")
    given = latent_attention(*tensors, **options, paradigm=paradigm, backend=backend)
    call = Call(dict(zip(("query", "key", "value"), built(*tensors))), options)
    assert_agree(given, expected, call)


@pytest.mark.parametrize("backend", [None, "torch", "reference"])
@pytest.mark.parametrize("paradigm", ["expanded", "absorbed", "auto"])
@pytest.mark.parametrize("dims", [{"nope": 0}, {"rope": 0}], ids=["all rotated", "none rotated"])
@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("name", OPTIONS)
def test_keys_may_be_rotated_whole_or_not_at_all(name, length, dims, paradigm, backend):
    tensors, options = inputs(length, torch.float32, **dims), options_of(name, length)
    expected = attention(*built(*tensors), **options, backend="reference")
    given = latent_attention(*tensors, **options, paradigm=paradigm, backend=backend)
    call = Call(dict(zip(("query", "key", "value"), built(*tensors))), options)
    assert_agree(given, expected, call)


@settings(max_examples=150)
@given(data=st.data())
def test_every_call_agrees_in_both_paradigms(data):
    torch.manual_seed(data.draw(st.integers(0, 2**32 - 1)))
    batch, context = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 7))
    length = data.draw(st.sampled_from([0, 1, 2, context, context + 2]))
    rope, nope = data.draw(st.sampled_from([(0, NOPE), (2, NOPE), (2, 0)]))
    tensors = inputs(length, torch.float64, batch, context, rope, nope)
    options = {"causal": data.draw(st.booleans()), "return_lse": data.draw(st.booleans())}
    if data.draw(st.booleans()):
        options["scale"] = data.draw(st.sampled_from([0.2, -0.4, 1, 0.0]))
    if data.draw(st.booleans()):
        heads, rows = (
            data.draw(st.sampled_from([1, HEADS])),
            data.draw(st.sampled_from([1, length])),
        )
        options["mask"] = torch.rand(batch, heads, rows, context) < 0.6
    if data.draw(st.booleans()):
        options["kv_lengths"] = torch.randint(0, context + 1, (batch,))
    expected = attention(*built(*tensors), **options, backend="reference")
    call = Call(dict(zip(("query", "key", "value"), built(*tensors))), options)
    for index, held in enumerate(options.get("kv_lengths", torch.empty(0)).tolist()):
        tensors[2][index, held:] = math.nan
        tensors[3][index, held:] = math.inf
    for paradigm in ("expanded", "absorbed"):
        for backend in ("torch", "reference"):
            out = latent_attention(*tensors, **options, paradigm=paradigm, backend=backend)
            assert_agree(out, expected, call)


@pytest.mark.parametrize("paradigm", ["expanded", "absorbed"])
def test_bfloat16_is_right_to_its_precision(paradigm):
    tensors = inputs(5, torch.bfloat16)
    exact = [tensor.double() for tensor in tensors]
    expected = attention(*built(*exact), causal=True, backend="reference")
    out = latent_attention(*tensors, causal=True, paradigm=paradigm)
    assert out.dtype == torch.bfloat16
    # keys, values, folded queries and the output are each rounded once; scores are of order 1
    error = (out.double() - expected).square().mean().sqrt()
    assert error < 4 * torch.finfo(torch.bfloat16).eps * expected.square().mean().sqrt()


def test_scale_is_of_the_whole_head_dim_by_default():
    tensors = inputs(5)
    given = latent_attention(*tensors, scale=(NOPE + ROPE) ** -0.5)
    torch.testing.assert_close(latent_attention(*tensors), given)


def test_latents_seen_through_a_cache_give_the_same():
    tensors = inputs(1)
    views = list(tensors)
    for index in (2, 3):
        buffer = torch.full((BATCH, CONTEXT + 7, tensors[index].shape[2]), math.nan).double()
        buffer[:, :CONTEXT] = tensors[index]
        views[index] = buffer[:, :CONTEXT]
    for paradigm in ("expanded", "absorbed"):
        given = latent_attention(*views, causal=True, paradigm=paradigm)
        torch.testing.assert_close(given, latent_attention(*tensors, causal=True))


def gradients(tensors, **options):
    tensors = [tensor.clone().requires_grad_() for tensor in tensors]
    out = latent_attention(*tensors, **options)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return torch.autograd.grad((out * weight).sum(), tensors)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("name", ["nothing", "causal", "lengths", "a length of 0", "mask", "scale"])
def test_gradients_of_all_six_inputs_are_equal_in_both_paradigms(name, backend):
    tensors, options = inputs(5), OPTIONS[name] | {"backend": backend}
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    out = attention(*built(*leaves), **options)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    expected = torch.autograd.grad((out * weight).sum(), leaves)
    for paradigm in ("expanded", "absorbed"):
        for one, other in zip(gradients(tensors, **options, paradigm=paradigm), expected):
            torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("nope", [NOPE, 0])
@pytest.mark.parametrize("paradigm", ["expanded", "absorbed"])
def test_gradients_are_those_of_finite_differences(paradigm, nope):
    tensors = [tensor.requires_grad_() for tensor in inputs(2, context=3, batch=1, nope=nope)]

    def run(*tensors):
        return latent_attention(*tensors, causal=True, paradigm=paradigm)

    assert torch.autograd.gradcheck(run, tensors, fast_mode=True)


@pytest.mark.parametrize("paradigm", ["expanded", "absorbed"])
def test_latent_bytes_past_a_length_do_not_reach_the_gradients(paradigm):
    tensors, options = inputs(5), {"kv_lengths": torch.tensor([4, 19]), "paradigm": paradigm}
    expected = gradients(tensors, **options)
    for index in (2, 3):
        tensors[index][0, 4:] = math.nan
    for one, other in zip(gradients(tensors, **options), expected):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("context", [1, 64, 4096, 16384, 131072])
def test_auto_absorbs_one_step_of_decode(context, itemsize):
    choice = choose_paradigm(
        batch=1, query_length=1, context=context, itemsize=itemsize, **DEEPSEEK_V2_LITE
    )
    assert choice == "absorbed"


@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("length", [1024, 4096, 16384])
def test_auto_expands_a_long_prefill(length, batch):
    choice = choose_paradigm(
        batch=batch, query_length=length, context=length, itemsize=2, **DEEPSEEK_V2_LITE
    )
    assert choice == "expanded"


def test_without_content_a_score_costs_the_rope_key_alone():
    # per query and key: expanded P + V, absorbed P + R with content R + P + R
    dims = {"heads": 1, "rope_dim": 5, "value_dim": 11, "rank": 9, "itemsize": 1}
    many = {"batch": 1, "query_length": 10**6, "context": 10**6}
    assert choose_paradigm(nope_dim=0, **dims, **many) == "absorbed"
    assert choose_paradigm(nope_dim=3, **dims, **many) == "expanded"


def test_auto_runs_the_paradigm_that_it_chose(monkeypatch):
    from headwise.ops.latent import operator, reference

    expansions = []
    real = reference.expand

    def watched(*args):
        expansions.append(args)
        return real(*args)

    monkeypatch.setattr(reference, "expand", watched)
    for choice in ("absorbed", "expanded"):
        asked = []
        monkeypatch.setattr(
            operator, "choose_paradigm", lambda *, c=choice, a=asked, **dims: a.append(dims) or c
        )
        expansions.clear()
        latent_attention(*inputs(5))
        assert len(expansions) == (choice == "expanded")
        # every dim reaches the count under its own name
        assert asked == [
            {
                "batch": BATCH,
                "heads": HEADS,
                "query_length": 5,
                "context": CONTEXT,
                "nope_dim": NOPE,
                "rope_dim": ROPE,
                "value_dim": VALUE,
                "rank": RANK,
                "itemsize": 8,
                "chosen": None,
            }
        ]


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_decode_never_expands_the_context(backend):
    # DeepSeek-V2-Lite's dims: one step, by the shapes of all matrix products' results
    heads, nope, rope, dim, rank = 16, 128, 64, 128, 512
    context = 257
    tensors = [
        torch.randn(1, heads, 1, nope),
        torch.randn(1, heads, 1, rope),
        torch.randn(1, context, rank),
        torch.randn(1, context, rope),
        torch.randn(heads, nope, rank),
        torch.randn(heads, dim, rank),
    ]
    largest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            results = result if isinstance(result, tuple) else (result,)
            if func.overloadpacket.__name__ in ("mm", "bmm", "attend", "project"):
                largest.extend(tensor.numel() for tensor in results)
            return result

    with Watch():
        latent_attention(*tensors, causal=True, backend=backend)
    assert largest
    assert max(largest) <= heads * max(context, rank)


@pytest.mark.parametrize("kind", ["tensors", "paged", "int8", "paged int8"])
@pytest.mark.parametrize("paradigm", ["expanded", "absorbed"])
@pytest.mark.parametrize("name", OPTIONS)
def test_in_parts_it_is_what_it_is_at_once(name, paradigm, kind, monkeypatch):
    tensors, options = inputs(9, torch.float32), options_of(name, 9)
    query, held, weights = tensors[:2], tensors[2:4], dict(zip(("w_uk", "w_uv"), tensors[4:]))
    held = [rows.unsqueeze(1) for rows in held]
    if kind == "tensors":
        rows = {"latent": tensors[2], "key_rope": tensors[3]}
    elif kind == "paged":
        rows = {"kv": in_pages(*held, 4, options.pop("kv_lengths", None))}
    elif kind == "int8":
        rows = {"kv": as_integers(*held, 8)}
    else:
        integers = as_integers(*held, 8)
        rows = {"kv": in_integer_pages(integers, 4, options.pop("kv_lengths", None))}
    call = {**rows, **weights, **options, "paradigm": paradigm}
    whole = latent_attention(*query, **call)
    sizes = []
    attend = attend_operator.choose

    def seen(problem, backend):
        sizes.append((problem.heads, problem.query_length))
        return attend(problem, backend)

    monkeypatch.setattr(attend_operator, "choose", seen)
    # of 3 heads and 9 queries: two heads, or four queries, at a time
    at_once = 4 * 2 * 2 * (19 * (7 + 5 + 11) if paradigm == "expanded" else 4 * 3 * 17)
    monkeypatch.setattr(latent_parts, "_MOST", at_once)
    parts = latent_attention(*query, **call)
    expected = [(2, 9), (1, 9)] if paradigm == "expanded" else [(3, 4), (3, 4), (3, 1)]
    assert sizes == expected
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)
