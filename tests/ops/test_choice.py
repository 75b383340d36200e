"""Backends as candidates: what `explain` says is what runs."""

from dataclasses import FrozenInstanceError, replace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from headwise import UnsupportedError, attention, explain, latent_attention
from headwise.ops import Accepted, Problem, Rejected, backends, explain_problem
from headwise.ops import backend as choice

B, H, K, S, L, D, V = 2, 6, 3, 5, 11, 7, 13


def inputs(dtype=torch.float32, value_dim=D):
    query, key = torch.randn(B, H, S, D), torch.randn(B, K, L, D)
    return tuple(t.to(dtype) for t in (query, key, torch.randn(B, K, L, value_dim)))


@pytest.fixture
def ran(monkeypatch):
    """The names of the backends that ran, in order."""
    names = []

    def watch(backend):
        def attend(call):
            names.append(backend.name)
            return backend.attend(call)

        return replace(backend, attend=attend)

    monkeypatch.setattr(choice, "BACKENDS", tuple(watch(b) for b in choice.BACKENDS))
    return names


def refusing(name):
    """The backends, but `name` rejects everything, and so does every faster one."""
    slower = [b.name for b in choice.BACKENDS]
    slower = slower[slower.index(name) + 1 :]

    def refuse(backend):
        why = "no kernel for heads of {}".format
        return lambda problem: Rejected(backend.name, why(problem.head_dim))

    return tuple(b if b.name in slower else replace(b, accepts=refuse(b)) for b in choice.BACKENDS)


def test_backends_in_order_of_speed():
    assert [backend.name for backend in backends()] == ["cpu", "torch", "reference"]
    pure = backends()[1:]
    assert all(backend.available() == (True, "needs PyTorch only") for backend in pure)


@pytest.mark.parametrize("options", [{}, {"causal": True, "window": 3}, {"softcap": 2.0}])
def test_the_chosen_backend_runs(options, ran):
    tensors = inputs()
    chosen = explain(*tensors, **options).chosen
    attention(*tensors, **options)
    assert ran == [chosen] == ["cpu"]


def test_what_the_kernels_reject_runs_on_the_next_backend(ran):
    tensors = inputs()
    with torch.enable_grad():
        attention(tensors[0].requires_grad_(), *tensors[1:])
    assert ran == ["torch"]


@pytest.mark.parametrize("name", ["torch", "reference"])
def test_a_forced_backend_runs(name, ran):
    attention(*inputs(), backend=name)
    latents = torch.randn(1, 5, 11), torch.randn(1, 5, 2), torch.randn(3, 7, 11)
    queries = torch.randn(1, 3, 1, 7), torch.randn(1, 3, 1, 2)
    latent_attention(*queries, *latents, torch.randn(3, 13, 11), backend=name)
    assert ran == [name, name]


def test_the_next_backend_runs_where_the_first_rejects(monkeypatch, ran):
    monkeypatch.setattr(choice, "BACKENDS", refusing("torch"))
    explanation = explain(*inputs())
    assert explanation.chosen == "reference"
    assert explanation.verdicts[1] == Rejected("torch", "no kernel for heads of 7")
    attention(*inputs())
    assert ran == ["reference"]


def test_a_forced_backend_that_rejects_says_why_and_who_can(monkeypatch):
    monkeypatch.setattr(choice, "BACKENDS", refusing("torch"))
    message = "^backend 'torch' cannot serve this call: no kernel for heads of 7; reference can$"
    with pytest.raises(UnsupportedError, match=message):
        attention(*inputs(), backend="torch")


def test_unknown_backend_is_an_error_that_lists_the_known():
    with pytest.raises(
        UnsupportedError,
        match=r"^no backend is called 'fast': choose one of cpu, torch, reference$",
    ):
        attention(*inputs(), backend="fast")


def test_explanation_prints_one_line_per_backend():
    assert str(explain(*inputs(), causal=True)).splitlines() == [
        "cpu        runs      C++, each key and value read once for all heads of a group",
        "torch      slower    scaled_dot_product_attention, 2 query heads packed per kv head",
        "reference  slower    the definition: every score in full, in float32 or float64",
    ]


def test_a_rejection_is_printed_with_its_reason(monkeypatch):
    monkeypatch.setattr(choice, "BACKENDS", refusing("torch"))
    assert str(explain(*inputs())).splitlines() == [
        "cpu        rejected  no kernel for heads of 7",
        "torch      rejected  no kernel for heads of 7",
        "reference  runs      the definition: every score in full, in float32 or float64",
    ]


def test_verdicts_are_values():
    verdicts = explain(*inputs()).verdicts
    assert [verdict.backend for verdict in verdicts] == ["cpu", "torch", "reference"]
    assert all(isinstance(verdict, Accepted) and verdict.accepted for verdict in verdicts)
    with pytest.raises(FrozenInstanceError):
        verdicts[0].reason = "another"
    assert verdicts == explain(*inputs()).verdicts


def test_explain_refuses_an_option_that_attention_does_not_have():
    with pytest.raises(TypeError, match="dropout"):
        explain(*inputs(), dropout=0.1)


HOW = {
    "nothing": ({}, torch.float32, D, None),
    "mask": ({"mask": torch.ones(1, 1, S, L, dtype=torch.bool)}, torch.bfloat16, D, None),
    "bias": ({"bias": torch.zeros(1, 1, S, L)}, torch.float32, D, None),
    "softcap": ({"softcap": 2.0}, torch.float32, D, "softcap"),
    "sinks": ({"sinks": torch.zeros(H)}, torch.float32, D, "sinks"),
    "lse": ({"return_lse": True}, torch.float32, D, "log-sum-exp asked for"),
    "value dim": ({}, torch.float32, V, "head dims 7 and 13 differ"),
    "ALiBi": ({"alibi_slopes": torch.zeros(H)}, torch.float32, D, None),
    "ALiBi in bfloat16": (
        {"alibi_slopes": torch.zeros(H)},
        torch.bfloat16,
        D,
        "ALiBi would be rounded to half precision",
    ),
    "float32 bias in float16": (
        {"bias": torch.zeros(1, 1, S, L)},
        torch.float16,
        D,
        "bias would be rounded to torch.float16",
    ),
}


@pytest.mark.parametrize("name", HOW)
def test_the_reason_says_which_way_runs(name):
    options, dtype, value_dim, obstacle = HOW[name]
    tensors = inputs(dtype, value_dim)
    reason = explain(*tensors, **options).verdicts[1].reason
    sdpa = F.scaled_dot_product_attention
    with mock.patch.object(F, "scaled_dot_product_attention", side_effect=sdpa) as watched:
        attention(*tensors, **options, backend="torch")
    assert watched.called == (obstacle is None)
    if obstacle is None:
        assert reason == "scaled_dot_product_attention, 2 query heads packed per kv head"
    else:
        assert reason == f"matrix products with a float32 softmax ({obstacle})"


def test_a_problem_holds_the_facts_and_no_tensor(monkeypatch):
    asked = []
    accepts = choice.BACKENDS[1].accepts
    watched = replace(choice.BACKENDS[1], accepts=lambda p: asked.append(p) or accepts(p))
    monkeypatch.setattr(choice, "BACKENDS", (watched,))
    query, key, value = inputs(torch.bfloat16, V)
    attention(
        query.requires_grad_(),
        key,
        value,
        causal=True,
        window=3,
        softcap=2.0,
        sinks=torch.zeros(H),
        alibi_slopes=torch.zeros(H),
        bias=torch.zeros(1, 1, 1, L),
        mask=torch.ones(1, 1, 1, L) > 0,
        kv_lengths=torch.tensor([3, 11]),
        return_lse=True,
    )
    assert asked[0] == Problem(
        batch=B,
        heads=H,
        kv_heads=K,
        query_length=S,
        context=L,
        head_dim=D,
        value_dim=V,
        dtype=torch.bfloat16,
        device="cpu",
        causal=True,
        window=3,
        sinks=True,
        softcap=True,
        alibi=True,
        bias=torch.float32,
        mask=True,
        ragged=True,
        lse=True,
        needs_grad=True,
    )
    with torch.no_grad():
        attention(query, key, value)
    assert not asked[1].needs_grad


def test_a_problem_can_be_explained_before_there_is_data():
    problem = Problem(
        batch=1,
        heads=32,
        kv_heads=8,
        query_length=1,
        context=16384,
        head_dim=128,
        value_dim=128,
        dtype=torch.bfloat16,
        device="cuda",
    )
    assert problem.group_size == 4
    assert explain_problem(problem).chosen == "torch"
