"""The C++ kernels give what the reference gives, at every level that this machine runs."""

import math
import os
import random
import subprocess
import sys
from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headwise import UnsupportedError, attention, explain, latent_attention
from headwise.errors import OptionError
from headwise.ops import backend as choice
from headwise.ops import explain_problem
from headwise.ops.backend import cpu, cpu_library
from ops.calls import Call, assert_agree, attention_calls

HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALF)
assert cpu.available()[0], cpu.available()[1]
LEVELS = range(torch.ops.headwise.best_level() + 1)


def assert_as_reference(call: Call) -> None:
    torch.use_deterministic_algorithms(True)  # fills new tensors with NaN
    try:
        given = call.run(attention, backend="cpu")
    finally:
        torch.use_deterministic_algorithms(False)
    assert_agree(given, call.run(attention, backend="reference"), call)


@settings(max_examples=1000)
@given(call=attention_calls(), level=st.sampled_from(list(LEVELS)))
def test_every_call_agrees_with_the_reference(call, level):
    with mock.patch.object(cpu_library, "_level", level):
        query = call.tensors["query"]
        if query.dtype == torch.float64:
            with pytest.raises(
                UnsupportedError, match=r"^backend 'cpu' cannot serve this call: no"
            ):
                call.run(attention, backend="cpu")
        else:
            assert_as_reference(call)


# Around the edges of a block of 64 keys, of a part of at least 256, and a context of many parts.
CONTEXTS = (1, 2, 3, 4, 63, 64, 65, 127, 128, 129, 255, 256, 257, 383, 511, 513, 1100, 2500)
# Whole vectors, whole pairs of them, and neither, at every width; the largest.
DIMS = (1, 3, 8, 15, 16, 17, 31, 32, 33, 64, 80, 96, 100, 128, 192, 256, 576)


def long_call(rng: random.Random) -> Call:
    """A call over blocks and parts: any group, dims, options, and NaN wherever none may look."""
    dtype = rng.choice(DTYPES)
    batch, kv_heads = rng.choice([1, 1, 2, 3]), rng.choice([1, 2, 3])
    heads = kv_heads * rng.choice([1, 2, 3, 4, 5, 7, 8, 13, 40])
    length, context = rng.choice([1, 1, 1, 2, 4, 5, 16, 70, 150]), rng.choice(CONTEXTS)
    dim = rng.choice(DIMS)
    value_dim = rng.choice([dim, dim, rng.choice(DIMS)])
    if batch * heads * length * context * (dim + value_dim) > 2**22:  # the reference is slow
        batch, length, context = 1, 1, min(context, 513)

    def rows(heads, count, dim):
        shape = (batch, heads, count, dim)
        kind = rng.choice(["plain", "buffer", "heads inside", "every other"])
        if kind == "plain":
            return torch.randn(shape).to(dtype)
        if kind == "buffer":  # NaN around what is held
            buffer = torch.full((batch, heads, count + 5, dim + 3), math.nan).to(dtype)
            view = buffer[:, :, 2 : 2 + count, 1 : 1 + dim]
        elif kind == "heads inside":
            view = torch.empty(batch, count, heads, dim, dtype=dtype).transpose(1, 2)
        else:
            buffer = torch.full((batch, heads, count, 2 * dim), math.nan).to(dtype)
            view = buffer[..., ::2]
        return view.copy_(torch.randn(shape))

    def partial(*shape):
        return [size if rng.random() < 0.6 else 1 for size in shape]

    query, key, value = (
        rows(heads, length, dim),
        rows(kv_heads, context, dim),
        rows(kv_heads, context, value_dim),
    )
    options = {"return_lse": rng.random() < 0.5, "causal": rng.random() < 0.6}
    full = (batch, heads, length, context)
    if options["causal"] and rng.random() < 0.4:
        options["window"] = rng.choice([1, 2, 5, 63, 64, 65, 300, 2**63 - 1])
    if rng.random() < 0.2:
        options["sinks"] = torch.randn(heads, dtype=rng.choice(DTYPES))
    if rng.random() < 0.2:
        options["softcap"] = rng.choice([0.1, 2.0, 30.0])
    if rng.random() < 0.2:
        options["alibi_slopes"] = torch.rand(heads)
    if rng.random() < 0.2:
        options["bias"] = torch.randn(partial(*full)).to(rng.choice([*DTYPES, torch.float64]))
    if rng.random() < 0.4:
        options["mask"] = torch.rand(partial(*full)) < rng.choice([0.6, 0.01])
    if rng.random() < 0.2:
        options["scale"] = rng.choice([1.0, -0.7, 0.0])
    if rng.random() < 0.4:
        options["kv_lengths"] = torch.randint(0, context + 1, (batch,)).to(
            rng.choice([torch.int32, torch.int64])
        )
        for index, held in enumerate(options["kv_lengths"].tolist()):
            key[index, :, held:] = rng.choice([math.nan, math.inf])
            value[index, :, held:] = math.nan
    return Call({"query": query, "key": key, "value": value}, options)


@pytest.mark.parametrize("seed", range(10))
def test_calls_of_many_blocks_and_parts_agree_with_the_reference(level, seed, threads):
    rng = random.Random(1000 * level + seed)
    torch.manual_seed(rng.randrange(2**32))
    for _ in range(125):
        threads(rng.choice([1, 2, 3]))
        call = long_call(rng)
        try:
            assert_as_reference(call)
        except AssertionError as error:
            raise AssertionError(repr(call)) from error


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("context", CONTEXTS)
def test_context_lengths_around_the_edges_of_blocks(context, dtype, level):
    query, key = torch.randn(1, 4, 1, 64, dtype=dtype), torch.randn(1, 2, context, 64, dtype=dtype)
    value = torch.randn(1, 2, context, 64, dtype=dtype)
    tensors = {"query": query, "key": key, "value": value}
    for options in ({}, {"causal": True, "window": 64}, {"mask": torch.rand(1, 1, 1, context) < 1}):
        assert_as_reference(Call(tensors, options | {"return_lse": True}))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "value_dim"), [(64, 32), (64, 64), (64, 96), (33, 17)])
@pytest.mark.parametrize("length", [1, 9])
def test_values_that_share_the_memory_of_keys(dim, value_dim, length, dtype, level):
    buffer = torch.randn(2, 1, 150, 96).to(dtype)
    tensors = {"query": torch.randn(2, 16, length, dim).to(dtype)}
    tensors |= {"key": buffer[..., :dim], "value": buffer[..., :value_dim]}
    assert_as_reference(Call(tensors, {"causal": True, "return_lse": True}))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("up", [True, False])
@pytest.mark.parametrize(
    "shape", [(1, 3, 1, 128, 512), (2, 2, 3, 65, 33), (1, 5, 16, 7, 80), (3, 1, 5, 64, 1)], ids=str
)
def test_products_with_a_matrix_a_head(shape, up, dtype, level):
    batch, heads, length, rows, width = shape
    inner = rows if up else width
    x = torch.randn(batch, length, heads, inner).to(dtype).transpose(1, 2)
    # rows between others, as w_uk and w_uv lie in one weight
    weight = torch.randn(heads, rows + 5, width).to(dtype)[:, 2 : 2 + rows]
    exact = x.double() @ (weight.double() if up else weight.double().mT)
    given = cpu.project(x, weight, up=up)
    assert given.dtype == dtype
    tol = 4 * torch.finfo(dtype).eps + 2e-6
    torch.testing.assert_close(given.double(), exact, atol=tol * inner**0.5, rtol=tol)


def test_absorbed_attention_of_few_queries_takes_the_kernels_products():
    tensors = [torch.randn(s) for s in ((1, 4, 1, 8), (1, 4, 1, 4), (1, 9, 16), (1, 9, 4))]
    tensors += [torch.randn(4, 8, 16), torch.randn(4, 6, 16)]
    with mock.patch.object(
        torch.ops.headwise.project, "default", side_effect=torch.ops.headwise.project.default
    ) as watched:
        given = latent_attention(*tensors, paradigm="absorbed")
        assert watched.call_count == 2
        expected = latent_attention(*tensors, paradigm="absorbed", backend="torch")
        tensors[4].requires_grad_()
        latent_attention(*tensors, paradigm="absorbed").sum().backward()
        assert watched.call_count == 2
    torch.testing.assert_close(given, expected)


@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, -math.inf, 3.0, -2.0])])
def test_rows_that_see_nothing_are_zero_or_the_sink(level, sinks):
    query, kv = torch.randn(2, 4, 3, 24), torch.randn(2, 2, 300, 24)
    hidden = torch.zeros(1, 1, 3, 300, dtype=torch.bool)
    out, lse = attention(query, kv, kv, mask=hidden, sinks=sinks, return_lse=True, backend="cpu")
    assert (out == 0).all()
    expected = torch.full((4,), -math.inf) if sinks is None else sinks
    assert torch.equal(lse, expected.view(1, 4, 1).expand(2, 4, 3))


def test_hidden_blocks_are_not_read(level):
    # with a static cache the cost must follow what is held; NaN would come out if it were touched
    query, kv = torch.randn(1, 4, 1, 32), torch.randn(1, 2, 640, 32)
    mask = torch.zeros(1, 1, 1, 640, dtype=torch.bool)
    mask[..., 128:192] = True
    poisoned = kv.masked_fill(~mask.view(1, 1, 640, 1), math.nan)
    out = attention(query, poisoned, poisoned, mask=mask, backend="cpu")
    expected = attention(query, kv[:, :, 128:192], kv[:, :, 128:192], backend="reference")
    torch.testing.assert_close(out, expected)


def test_the_operator_passes_opcheck():
    operator = torch.ops.headwise.attend.default
    query, kv = torch.randn(2, 4, 3, 16), torch.randn(2, 2, 70, 16)
    stored = (None, 0, None, None, None)
    rest = (*stored, torch.tensor([3, 70]), 0.25, True, 0)
    options = (True, 5, 2.0, torch.randn(4), torch.rand(4), torch.randn(1, 1, 1, 70))
    options += (torch.ones(2, 1, 3, 70, dtype=torch.bool),)
    torch.library.opcheck(operator, (query, kv, kv, None, None, *rest, *options))
    tails = (torch.randn(2, 4, 3, 8), torch.randn(2, 2, 70, 8))
    torch.library.opcheck(operator, (query, kv, kv, *tails, *rest, *options))
    plain = (*stored, None, 0.25, False, 0)
    torch.library.opcheck(operator, (query, kv, kv, None, None, *plain))


def test_the_products_pass_opcheck_and_check_what_they_are_given():
    x, weight = torch.randn(2, 4, 3, 16), torch.randn(4, 16, 24)
    product = torch.ops.headwise.project
    torch.library.opcheck(product.default, (x, weight, True, 0))
    torch.library.opcheck(product.default, (x, weight.mT.contiguous(), False, 0))
    bad = {
        "does not fit x": (x, torch.randn(4, 15, 24)),
        "expected 4 and 3": (x, torch.randn(16, 24)),
        "differ in dtype": (x, weight.half()),
        "a last dim is not contiguous": (x, torch.randn(4, 24, 16).mT),
        "99 rows per head": (torch.randn(1, 4, 99, 16), weight),
    }
    for message, arguments in bad.items():
        with pytest.raises(RuntimeError, match=message):
            product(*arguments, True, 0)


def test_compiles_as_one_graph_with_the_kernel_inside():
    torch._dynamo.reset()
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    query, kv = torch.randn(1, 4, 1, 16), torch.randn(1, 2, 70, 16)
    compiled = torch.compile(attention, fullgraph=True, backend=keep)
    torch.testing.assert_close(compiled(query, kv, kv), attention(query, kv, kv))
    assert len(graphs) == 1
    assert "headwise.attend" in graphs[0].code


FIRST_CALL_COMPILED = """
import torch, headwise
query, kv = torch.randn(1, 4, 1, 16), torch.randn(1, 2, 70, 16)
out = torch.compile(headwise.attention, fullgraph=True, backend="aot_eager")(query, kv, kv)
torch.testing.assert_close(out, headwise.attention(query, kv, kv, backend="reference"))
"""


def in_new_process(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_library_may_be_loaded_for_the_first_time_while_compiling():
    run = in_new_process(FIRST_CALL_COMPILED)
    assert run.returncode == 0, run.stderr


def test_importing_headwise_does_not_load_the_library():
    code = "import torch, headwise; assert not hasattr(torch.ops.headwise, 'attend')"
    run = in_new_process(code)
    assert run.returncode == 0, run.stderr


def test_the_environment_forces_a_lower_level():
    code = "from headwise.ops.backend import cpu; print(cpu.available())"
    run = in_new_process(code, HEADWISE_CPU_LEVEL="baseline")
    assert run.stdout == "(True, 'C++ kernels for baseline')\n", run.stderr


def test_an_unknown_level_in_the_environment_is_one_clear_error(monkeypatch):
    monkeypatch.setenv("HEADWISE_CPU_LEVEL", "sse9")
    monkeypatch.setattr(cpu_library, "_missing", None)
    query, kv = torch.randn(1, 4, 1, 16), torch.randn(1, 2, 70, 16)
    message = "^HEADWISE_CPU_LEVEL is 'sse9', expected one of baseline"
    for _ in range(2):
        with pytest.raises(OptionError, match=message):
            attention(query, kv, kv)
    able, reason = cpu.available()
    assert not able
    assert reason.startswith("HEADWISE_CPU_LEVEL is 'sse9'")


def test_without_the_library_the_torch_backend_runs_and_the_reason_is_said(monkeypatch):
    monkeypatch.setattr(cpu_library, "_missing", "the C++ library was not built")
    query, kv = torch.randn(1, 4, 1, 16), torch.randn(1, 2, 70, 16)
    explanation = explain(query, kv, kv)
    assert explanation.chosen == "torch"
    assert explanation.verdicts[0].reason == "the C++ library was not built"
    assert cpu.available() == (False, "the C++ library was not built")


REJECTED = {
    "runs on cpu, the tensors are on cuda": {"device": "cuda"},
    "has no gradients": {"needs_grad": True},
    "no kernel for torch.float64": {"dtype": torch.float64},
    "no kernel for head dims above 576": {"value_dim": 577},
    "no kernel for more than 2,147,483,647 keys": {"context": 2**31},
}


@pytest.mark.parametrize("reason", REJECTED)
def test_rejects_with_a_reason(reason):
    query, kv = torch.randn(1, 4, 16, 576), torch.randn(1, 2, 70, 576)
    asked = []
    watched = replace(choice.BACKENDS[1], accepts=asked.append)
    with mock.patch.object(choice, "BACKENDS", (choice.BACKENDS[0], watched)):
        assert explain(query, kv, kv).verdicts[0].accepted
    verdict = explain_problem(replace(asked[0], **REJECTED[reason])).verdicts[0]
    assert (verdict.accepted, verdict.reason) == (False, reason)


def test_gradients_go_to_a_backend_that_has_them():
    query = torch.randn(1, 4, 1, 16, requires_grad=True)
    kv = torch.randn(1, 2, 70, 16)
    attention(query, kv, kv).sum().backward()
    assert query.grad is not None
    with pytest.raises(UnsupportedError, match=r"has no gradients; torch, reference can$"):
        attention(query, kv, kv, backend="cpu")
    with torch.no_grad():
        assert not attention(query, kv, kv, backend="cpu").requires_grad


def raw(**changes):
    query, kv = torch.randn(2, 4, 3, 16), torch.randn(2, 2, 70, 16)
    arguments = {
        "query": query,
        "key": kv,
        "value": kv,
        "query_tail": None,
        "key_tail": None,
        "page_table": None,
        "context": 0,
        "key_scales": None,
        "value_scales": None,
        "key_tail_scales": None,
        "kv_lengths": None,
        "scale": 0.25,
        "return_lse": False,
        "level": 0,
        "causal": True,
    }
    return torch.ops.headwise.attend(**(arguments | changes))


# 2 pages of 64 tokens, which both sequences share
INTEGER_PAGES = {
    "key": torch.ones(2, 2, 64, 16).char(),
    "value": torch.ones(2, 2, 64, 16).char(),
    "key_scales": torch.ones(2, 2, 64, 1),
    "value_scales": torch.ones(2, 2, 64, 1),
    "page_table": torch.tensor([[0, 1], [0, 1]]).int(),
    "context": 70,
}
BAD = {
    "key has batch 3": {"key": torch.randn(3, 2, 70, 16)},
    "query has 3 dims": {"query": torch.randn(4, 3, 16)},
    "key has a last dim of 8": {"key": torch.randn(2, 2, 70, 8)},
    "last dim of key is not contiguous": {"key": torch.randn(2, 2, 70, 32)[..., ::2]},
    "value is not [B, K, L, V]": {"value": torch.randn(2, 2, 69, 16)},
    "not a multiple of 3 kv heads": {
        "key": torch.randn(2, 3, 70, 16),
        "value": torch.randn(2, 3, 70, 16),
    },
    "differ in dtype": {"value": torch.randn(2, 2, 70, 16).bfloat16()},
    "come together": {"query_tail": torch.randn(2, 4, 3, 8)},
    "query_tail is not [B, H, S, P]": {
        "query_tail": torch.randn(2, 4, 2, 8),
        "key_tail": torch.randn(2, 2, 70, 8),
    },
    "key_tail is not [B, K, L, P]": {
        "query_tail": torch.randn(2, 4, 3, 8),
        "key_tail": torch.randn(2, 2, 70, 9),
    },
    "the tails differ in dtype": {
        "query_tail": torch.randn(2, 4, 3, 8),
        "key_tail": torch.randn(2, 2, 70, 8).half(),
    },
    "kv_lengths[1] is 71": {"kv_lengths": torch.tensor([70, 71])},
    "kv_lengths[0] is -1": {"kv_lengths": torch.tensor([-1, 3], dtype=torch.int32)},
    "kv_lengths is neither": {"kv_lengths": torch.tensor([1.0, 3.0])},
    "kv_lengths is not a contiguous vector of 2": {"kv_lengths": torch.tensor([1])},
    "sinks is not a contiguous float32 vector of 4": {"sinks": torch.zeros(3)},
    "alibi_slopes is not": {"alibi_slopes": torch.zeros(4).double()},
    "dim 3 of mask has size 71": {"mask": torch.ones(1, 1, 1, 71) > 0},
    "mask is not bool": {"mask": torch.ones(1, 1, 1, 70)},
    "dim 1 of bias has size 2": {"bias": torch.zeros(1, 2, 1, 70)},
    "bias has no floating dtype": {"bias": torch.zeros(1, 1, 1, 70, dtype=torch.int32)},
    "context is 70, expected 0 without a page_table": {"context": 70},
    "the scales of value are not float32 [B, K, L, 1]": {
        **INTEGER_PAGES,
        "value_scales": torch.ones(2, 2, 32, 1),
    },
    "the scales of key are not float32 [B, K, L, 1]": {
        **INTEGER_PAGES,
        "key_scales": torch.ones(3, 2, 64, 1),
    },
    "page_table[0] names page 2, the pool has pages 0 to 1": {
        **INTEGER_PAGES,
        "page_table": torch.tensor([[2, 1], [0, 1]]).int(),
    },
    "page_table[1] names page -1, the pool": {
        **INTEGER_PAGES,
        "page_table": torch.tensor([[0, 1], [0, -1]]).int(),
    },
    "a context of 129 in 2 pages of 64": {**INTEGER_PAGES, "context": 129},
    "pages of 48 tokens, expected a power of two": {
        **INTEGER_PAGES,
        **dict.fromkeys(("key", "value"), torch.ones(2, 2, 48, 16).char()),
        **dict.fromkeys(("key_scales", "value_scales"), torch.ones(2, 2, 48, 1)),
    },
    "page_table[1] names page 9, the pool has pages 0 to 1": {
        "key": torch.randn(2, 2, 64, 16),
        "value": torch.randn(2, 2, 64, 16),
        "page_table": torch.tensor([[0, 1], [0, 9]]).int(),
        "context": 70,
    },
    "neither int8 nor uint8": {"key_scales": torch.ones(2, 2, 70, 1)},
    "the scales of value are missing": {
        "key": torch.ones(2, 2, 70, 16).char(),
        "value": torch.ones(2, 2, 70, 16).char(),
        "key_scales": torch.ones(2, 2, 70, 1),
    },
    "window is 3": {"window": 3, "causal": False},
    "level 9 does not run": {"level": 9},
}


@pytest.mark.parametrize("message", BAD)
def test_the_operator_checks_what_it_is_given_before_it_reads(message):
    with pytest.raises(RuntimeError) as caught:
        raw(**BAD[message])
    assert message in str(caught.value)
