"""Linear attention: stored numbers of others, the loop over tokens, and any cut of a prompt."""

import itertools
import json
import math
import re
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headwise import ShapeError, UnsupportedError
from headwise.ops import LinearCall, change_state, linear_attention
from headwise.ops.backend import cpu, cpu_library

assert cpu.available()[0], cpu.available()[1]
LEVELS = list(range(torch.ops.headwise.best_level() + 1))

# Of flash-linear-attention's plain files, run in float64: what they were given, and gave.
NUMBERS = json.loads(Path(__file__).with_name("linear_numbers.json").read_text())


def tensor(numbers):
    return None if numbers is None else torch.tensor(numbers, dtype=torch.float64)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("name", NUMBERS)
def test_gives_the_numbers_of_others(name, backend):
    case = {key: tensor(numbers) for key, numbers in NUMBERS[name].items()}
    out, state = linear_attention(
        *(case[key] for key in ("query", "key", "value")),
        decay=case["decay"],
        beta=case["beta"],
        state=case["first"],
        backend=backend,
    )
    torch.testing.assert_close(out, case["out"], rtol=0, atol=1e-9)
    if case["state"] is not None:
        torch.testing.assert_close(state, case["state"], rtol=0, atol=1e-9)


def by_hand(query, key, value, decay, beta, scale, state):
    """Loops over single numbers, of one head: query, key [S,D], value [S,V], decay [S,D]."""
    tokens, dims, width = len(query), len(query[0]), len(value[0])
    outs = []
    for t in range(tokens):
        for d, v in itertools.product(range(dims), range(width)):
            state[d][v] *= torch.tensor(decay[t][d], dtype=torch.float64).exp().item()
        for v in range(width):
            kept = sum(state[d][v] * key[t][d] for d in range(dims))
            fresh = value[t][v] if beta is None else beta[t] * (value[t][v] - kept)
            for d in range(dims):
                state[d][v] += key[t][d] * fresh
        outs.append(
            [scale * sum(state[d][v] * query[t][d] for d in range(dims)) for v in range(width)]
        )
    return outs, state


def call(kind, *, beta=True, length=11, batch=2, dtype=torch.float64, strength=1.0, dim=6, value=5):
    """Random arguments: a decay of that kind, and a state from before."""
    shape = {"none": None, "head": (4,), "token": (batch, 4, length)}
    shape["dim"] = (batch, 4, length, dim)
    key = torch.randn(batch, 2, length, dim, dtype=dtype)
    arguments = {
        "query": torch.randn(batch, 2, length, dim, dtype=dtype),
        "key": torch.nn.functional.normalize(key, dim=-1),
        "value": torch.randn(batch, 4, length, value, dtype=dtype),
        "state": torch.randn(batch, 4, dim, value),
    }
    if shape[kind] is not None:
        arguments["decay"] = -strength * torch.rand(shape[kind], dtype=dtype)
    if beta:
        arguments["beta"] = torch.rand(batch, 4, length, dtype=dtype)
    return arguments


KINDS = ("none", "head", "token", "dim")


@pytest.mark.parametrize("beta", [True, False], ids=["delta rule", "no beta"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_is_loops_over_numbers(kind, beta):
    torch.manual_seed(0)
    given_ = call(kind, beta=beta, batch=1)
    out, state = linear_attention(**given_, scale=0.7, backend="reference")
    decay = given_.get("decay", torch.zeros(4, dtype=torch.float64))
    decay = decay.view(1, 4, 1, 1) if decay.ndim == 1 else decay.view(1, 4, 11, -1)
    decay = decay.expand(1, 4, 11, 6)
    for head in range(4):
        rows, first = by_hand(
            given_["query"][0, head // 2].tolist(),
            given_["key"][0, head // 2].tolist(),
            given_["value"][0, head].tolist(),
            decay[0, head].tolist(),
            given_["beta"][0, head].tolist() if beta else None,
            0.7,
            given_["state"][0, head].double().tolist(),
        )
        torch.testing.assert_close(out[0, head], torch.tensor(rows, dtype=torch.float64))
        torch.testing.assert_close(state[0, head], torch.tensor(first, dtype=torch.float64))


@given(data=st.data())
def test_chunks_are_the_loop_of_any_length_and_decay(data):
    torch.manual_seed(data.draw(st.integers(0, 2**32 - 1)))
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    length = data.draw(st.sampled_from([0, 1, 5, 16, 17, 64, 65, 130]))
    arguments = call(
        data.draw(st.sampled_from(KINDS)),
        beta=data.draw(st.booleans()),
        length=length,
        dtype=dtype,
        strength=data.draw(st.sampled_from([1e-3, 1.0, 20.0])),
        dim=data.draw(st.sampled_from([1, 6, 32])),
    )
    if data.draw(st.booleans()):
        arguments["lengths"] = torch.randint(0, length + 1, (2,))
    if data.draw(st.booleans()):
        del arguments["state"]
    backend = data.draw(st.sampled_from(["torch", "cpu"]))
    if backend == "cpu" and dtype == torch.float64:
        backend = None
    expected, last = linear_attention(**arguments, backend="reference")
    with mock.patch.object(cpu_library, "_level", data.draw(st.sampled_from(LEVELS))):
        out, state = linear_attention(**arguments, backend=backend)
    assert (out.dtype, state.dtype) == (dtype, last.dtype)
    # sums of so many terms, each of some size; and the output's own rounding
    unit = torch.finfo(last.dtype).eps * (length + 32)
    size = 1 + float(last.abs().max())
    torch.testing.assert_close(state, last, rtol=0, atol=unit * size)
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    atol = 8 * unit * size + 2 * torch.finfo(dtype).eps * (1 + largest)
    torch.testing.assert_close(out, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_may_be_cut_anywhere_and_padded_behind(kind):
    torch.manual_seed(1)
    arguments = call(kind, length=90)
    whole, last = linear_attention(**arguments)

    def cut(start, stop, state):
        part = {
            name: rows if name in ("decay", "state") and rows.ndim == 1 else rows[:, :, start:stop]
            for name, rows in arguments.items()
            if name != "state"
        }
        return linear_attention(**part, state=state)

    for stops in ((1, 2, 90), (64, 90), (33, 34, 89, 90)):
        outs, state, start = [], arguments["state"], 0
        for stop in stops:
            out, state = cut(start, stop, state)
            outs.append(out)
            start = stop
        torch.testing.assert_close(torch.cat(outs, dim=2), whole, rtol=0, atol=1e-9)
        torch.testing.assert_close(state, last, rtol=0, atol=1e-9)
    lengths = torch.tensor([90, 37])
    out, state = linear_attention(**arguments, lengths=lengths)
    torch.testing.assert_close(out[0], whole[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(out[1, :, :37], whole[1, :, :37], rtol=0, atol=1e-12)
    assert bool((out[1, :, 37:] == 0).all())
    _, short = cut(0, 37, arguments["state"])
    torch.testing.assert_close(state[1], short[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("beta", [True, False], ids=["delta rule", "no beta"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_finite_differences(kind, beta):
    torch.manual_seed(2)
    arguments = call(kind, beta=beta, length=19, batch=1, dim=3, value=2)
    names = list(arguments)
    tensors = [arguments[name].double().requires_grad_() for name in names]

    def run(*given_):
        return linear_attention(**dict(zip(names, given_)))

    assert torch.autograd.gradcheck(run, tensors)


@pytest.mark.parametrize("strong", [-1e3, -1e6, -1e9, -math.inf, 0.02])
@pytest.mark.parametrize("kind", ["head", "token", "dim"])
def test_a_decay_of_any_strength_rounds_nothing_behind_it(kind, strong):
    torch.manual_seed(4)
    arguments = call(kind, length=40, dtype=torch.float32)
    part = arguments["decay"][..., 1] if kind == "head" else arguments["decay"][:, :, 13]
    part.fill_(strong)
    expected, last = linear_attention(**arguments, backend="reference")
    out, state = linear_attention(**arguments, backend="torch")
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state, last, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length", [17, 40, 81])
def test_gradients_are_finite_where_sums_of_decays_are_large(length):
    torch.manual_seed(5)
    arguments = call("dim", length=length, dtype=torch.float32)
    arguments["decay"] = torch.full_like(arguments["decay"], -6.0)
    tensors = [at.requires_grad_() for at in arguments.values()]
    out, state = linear_attention(**arguments)
    for gradient in torch.autograd.grad(out.sum() + state.sum(), tensors):
        assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
def test_the_state_that_was_given_is_not_the_one_that_comes_back(backend):
    for length in (0, 2):
        given_ = call("token", length=length, dtype=torch.float32)
        before = given_["state"].clone()
        _, state = linear_attention(**given_, backend=backend)
        state.add_(1)
        assert torch.equal(given_["state"], before)


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
@pytest.mark.parametrize("transposed", [False, True], ids=["D by V", "V by D"])
@pytest.mark.parametrize("length", [1, 40])
def test_a_state_may_lie_otherwise_and_is_changed_in_its_place(backend, transposed, length, level):
    torch.manual_seed(6)
    given_ = call("token", length=length, dtype=torch.float32, dim=19, value=21)
    given_["state"] = given_["state"].float()
    normed = {
        name: torch.nn.functional.normalize(given_[name].double(), dim=-1)
        for name in ("query", "key")
    }
    others = {name: rows.double() for name, rows in given_.items() if name not in normed}
    expected, last = linear_attention(**normed, **others, scale=0.5, backend="reference")
    state = given_.pop("state")
    if transposed:
        state = state.transpose(2, 3).contiguous()
    before = state.clone()
    for in_place in (False, True):
        asked = LinearCall(
            **given_, scale=0.5, state=state, norm=1e-12, transposed=transposed, in_place=in_place
        )
        out, after = change_state(asked, backend)
        torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)
        kept = after.transpose(2, 3) if transposed else after
        torch.testing.assert_close(kept.double(), last, rtol=1e-4, atol=1e-4)
        assert (after is state) == in_place
        assert in_place or torch.equal(state, before)


def test_rows_are_read_as_they_lie():
    """[B, S, H, D] transposed, as models have them; parts of a wider row; one token's."""
    torch.manual_seed(7)
    for length in (1, 30):
        wide = torch.randn(2, length, 3 * 4 * 16)
        rows = [part.unflatten(2, (4, 16)).transpose(1, 2) for part in wide.split(4 * 16, dim=2)]
        decay = -torch.rand(2, length, 4).transpose(1, 2)
        out, state = linear_attention(*rows, decay=decay, backend="cpu")
        expected, last = linear_attention(*rows, decay=decay, backend="reference")
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(state, last, rtol=1e-4, atol=1e-4)
        # and a model's next step, [B, S, H V], is a view
        assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("strength", [1e-3, 20.0])
@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("kind", ["token", "dim"])
def test_a_long_prompt_is_the_loop(kind, backend, strength):
    torch.manual_seed(8)
    arguments = call(kind, length=4096, dtype=torch.float32, strength=strength, dim=8, batch=1)
    exact = {name: rows.double() for name, rows in arguments.items()}
    expected, last = linear_attention(**exact, backend="reference")
    out, state = linear_attention(**arguments, backend=backend)
    size = float(expected.abs().max())
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-4 * size)
    torch.testing.assert_close(state.double(), last, rtol=0, atol=1e-4 * (1 + size))


def test_autocast_changes_nothing():
    given_ = call("token", length=40, dtype=torch.float32)
    expected, _ = linear_attention(**given_)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _ = linear_attention(**given_)
    assert torch.equal(out, expected)


ODD = {
    "query": (None, "query is a NoneType, expected a tensor"),
    "scale": ("x", "scale is 'x', expected a finite number"),
    "key": (
        torch.zeros(2, 2, 11, 5),
        "key has shape [2, 2, 11, 5], expected [2, 2, 11, 6] as query",
    ),
    "value": (torch.zeros(2, 3, 11, 5), "value has 3 heads and key has 2: the heads of values"),
    "decay": (torch.zeros(2, 4), "decay has shape [2, 4] and dtype torch.float32"),
    "beta": (torch.zeros(2, 2, 11), "beta has shape [2, 2, 11] and dtype torch.float32"),
    "state": (torch.zeros(2, 4, 5, 6), "state has shape [2, 4, 5, 6] and dtype torch.float32"),
    "lengths": (torch.tensor([3, 12]), "lengths run from 3 to 12, expected 0 to S=11, the tokens"),
}


@pytest.mark.parametrize("name", ODD)
def test_a_bad_argument_is_refused_in_one_line(name):
    odd, message = ODD[name]
    arguments = call("token", dtype=torch.float32)
    with pytest.raises(ShapeError, match=re.escape(message)) as caught:
        linear_attention(**(arguments | {name: odd}))
    assert "\n" not in str(caught.value)


def test_one_backend_alone_can_be_asked_for():
    with pytest.raises(UnsupportedError, match="'cpu' cannot serve this call of linear_attention"):
        linear_attention(**call("token"), backend="cpu")  # in float64


@pytest.mark.parametrize("length", [1, 3, 40])
def test_tokens_give_the_same_bits_on_any_number_of_threads(length, level, threads):
    torch.manual_seed(3)
    given_ = call("dim", length=length, dtype=torch.float32, dim=64, value=80, batch=3)
    threads(1)
    one = linear_attention(**given_, backend="cpu")
    threads(2)
    two = linear_attention(**given_, backend="cpu")
    assert all(map(torch.equal, one, two))


def test_it_passes_opcheck_and_compiles():
    given_ = call("token", length=2, dtype=torch.float32)
    level = torch.ops.headwise.best_level()
    arguments = (
        *(given_[name] for name in ("query", "key", "value")),
        *(given_["decay"], given_["beta"], 0.5, given_["state"], None),
        *(1e-6, False, level),
    )
    torch.library.opcheck(torch.ops.headwise.linear_attention.default, arguments)
    torch.library.opcheck(torch.ops.headwise.linear_attention_.default, arguments)
    compiled = torch.compile(linear_attention, fullgraph=True, backend="aot_eager")
    for name in ("token", "dim"):
        given_ = call(name, length=2, dtype=torch.float32)
        for ours, eager in zip(compiled(**given_), linear_attention(**given_)):
            torch.testing.assert_close(ours, eager)


def test_an_unknown_backend_is_refused_with_the_known_names():
    with pytest.raises(UnsupportedError, match="no backend is called 'fla': choose one of cpu"):
        linear_attention(**call("token"), backend="fla")


def test_autograd_sees_that_a_state_was_changed():
    given_ = call("token", length=1, dtype=torch.float32)
    state = given_["state"] = given_["state"].float()
    weight = torch.ones_like(state, requires_grad=True)
    loss = (weight * state).sum()
    with torch.no_grad():
        change_state(LinearCall(**given_, scale=1.0, in_place=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_state_that_is_also_read_is_not_changed_in_its_place():
    state = torch.randn(1, 1, 40, 40)
    level = torch.ops.headwise.best_level()
    operator = torch.ops.headwise.linear_attention_.default
    before = state.clone()
    with pytest.raises(RuntimeError, match="shares memory with what is read"):
        operator(state, state, state, None, None, 1.0, state, None, -1.0, False, level)
    assert torch.equal(state, before)


@pytest.mark.parametrize("length", [3, 5, 70])
def test_tensors_without_memory_have_shapes(length):
    given_ = {name: rows.to("meta") for name, rows in call("token", length=length).items()}
    out, state = linear_attention(**given_)
    assert (out.shape, state.shape) == ((2, 4, length, 5), (2, 4, 6, 5))
