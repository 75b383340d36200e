"""The short causal convolution: loops over numbers, any layout, and any cut of a prompt."""

import re

import pytest
import torch

from headwise import ShapeError, causal_conv1d
from headwise.ops import ConvolutionCall, convolve
from headwise.ops.backend import cpu

assert cpu.available()[0], cpu.available()[1]
BACKENDS = ("reference", "torch", "cpu")


def by_hand(x, weight, bias, activation, state):
    """Loops over single numbers of [B, C, S], in float64."""
    batch, channels, length = x.shape
    width = weight.shape[1]
    out = torch.zeros(batch, channels, length, dtype=torch.float64)
    for b in range(batch):
        for c in range(channels):
            before = [0.0] * (width - 1) if state is None else state[b, c].tolist()
            inputs = before + x[b, c].tolist()
            for t in range(length):
                seen = inputs[len(before) + t - width + 1 : len(before) + t + 1]
                out[b, c, t] = sum(a * w for a, w in zip(seen, weight[c].tolist()))
                out[b, c, t] += 0.0 if bias is None else bias[c].item()
    return out * out.sigmoid() if activation else out


LAYOUTS = {
    "channels side by side": lambda b, c, s: torch.randn(b, s, c).transpose(1, 2),
    "tokens side by side": lambda b, c, s: torch.randn(b, c, s),
    "every other token of some channels": lambda b, c, s: torch.randn(b, 2 * c, 2 * s)[
        :, 1::2, ::2
    ],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("length", [1, 3, 21])
def test_every_backend_is_the_loops(dtype, layout, length, level):
    torch.manual_seed(0)
    for channels, width, kept in ((5, 4, 3), (130, 3, 4), (1, 1, 0), (33, 6, 9)):
        x = LAYOUTS[layout](2, channels, length).to(dtype)
        weight, bias = torch.randn(channels, width).to(dtype), torch.randn(channels).to(dtype)
        state = torch.randn(2, channels, kept).to(dtype)
        for given in (
            {"activation": "silu", "state": state, "bias": bias},
            {"state": state} if kept else {},
            {"activation": "silu"},
        ):
            expected = by_hand(
                x, weight, given.get("bias"), given.get("activation"), given.get("state")
            )
            for backend in BACKENDS:
                out, after = causal_conv1d(x, weight, **given, backend=backend)
                assert (out.dtype, out.shape) == (dtype, x.shape)
                eps = 4 * torch.finfo(dtype).eps + 1e-5
                torch.testing.assert_close(out.double(), expected, rtol=eps, atol=eps)
                before = given.get("state")
                if before is None:
                    before = x.new_zeros(2, channels, width)
                inputs = torch.cat([before, x], dim=2)
                assert torch.equal(after, inputs[:, :, inputs.shape[2] - before.shape[2] :])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_prompt_may_be_cut_anywhere_and_padded_behind(backend, layout):
    torch.manual_seed(1)
    x, weight = LAYOUTS[layout](2, 9, 30), torch.randn(9, 4)
    whole, last = causal_conv1d(x, weight, activation="silu", backend=backend)
    outs, state, start = [], None, 0
    for stop in (1, 3, 20, 30):
        part = x[:, :, start:stop]
        out, state = causal_conv1d(part, weight, activation="silu", state=state, backend=backend)
        outs.append(out)
        start = stop
    torch.testing.assert_close(torch.cat(outs, dim=2), whole)
    assert torch.equal(state, last)
    lengths = torch.tensor([30, 2])
    out, short = causal_conv1d(x, weight, activation="silu", lengths=lengths, backend=backend)
    torch.testing.assert_close(out[0], whole[0])
    torch.testing.assert_close(out[1, :, :2], whole[1, :, :2])
    assert bool((out[1, :, 2:] == 0).all())
    _, alone = causal_conv1d(x[1:, :, :2], weight, backend=backend)
    assert torch.equal(short[1:], alone)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_state_is_changed_in_its_place_where_that_is_asked_for(backend):
    torch.manual_seed(2)
    x, weight, state = torch.randn(2, 7, 5), torch.randn(7, 4), torch.randn(2, 7, 4)
    before = state.clone()
    expected, last = causal_conv1d(x, weight, state=state, backend=backend)
    assert torch.equal(state, before)
    call = ConvolutionCall(x, weight, None, None, state, None, 4, in_place=True)
    out, after = convolve(call, backend)
    assert after is state
    assert torch.equal(out, expected)
    assert torch.equal(state, last)


def test_gradients_are_those_of_finite_differences():
    torch.manual_seed(3)
    sizes = ((2, 3, 6), (3, 4), (3,), (2, 3, 3))
    tensors = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]

    def run(x, weight, bias, state):
        return causal_conv1d(x, weight, bias, activation="silu", state=state)

    assert torch.autograd.gradcheck(run, tensors)


def test_large_numbers_overflow_nowhere():
    x = torch.tensor([-1e4, -90.0, -88.0, 0.0, 88.0, 1e4]).view(1, 1, 6)
    for backend in BACKENDS:
        out, _ = causal_conv1d(x, torch.ones(1, 1), activation="silu", backend=backend)
        torch.testing.assert_close(out, torch.nn.functional.silu(x), rtol=1e-5, atol=1e-30)


ODD = {
    "x": (torch.zeros(2, 9), "x has shape [2, 9]"),
    "weight": (torch.zeros(8, 4), "weight has shape [8, 4], expected [9, 4]"),
    "bias": (torch.zeros(8), "bias has shape [8], expected [9]"),
    "state": (torch.zeros(2, 9, 2), "state has shape [2, 9, 2], expected [2, 9, 3 or more]"),
    "activation": ("gelu", "activation is 'gelu', expected None or 'silu'"),
    "lengths": (torch.tensor([3, 12]), "lengths run from 3 to 12, expected 0 to S=11"),
}


@pytest.mark.parametrize("name", ODD)
def test_a_bad_argument_is_refused_in_one_line(name):
    odd, message = ODD[name]
    given = {"x": torch.zeros(2, 9, 11), "weight": torch.zeros(9, 4), "bias": torch.zeros(9)}
    with pytest.raises(ShapeError, match=re.escape(message)) as caught:
        causal_conv1d(**(given | {name: odd}))
    assert "\n" not in str(caught.value)
    with pytest.raises(
        ShapeError, match=r"weight is torch\.float16 on cpu, expected torch\.float32"
    ):
        causal_conv1d(**(given | {"weight": torch.zeros(9, 4).half()}))


def test_it_passes_opcheck_and_compiles():
    x, weight, state = torch.randn(2, 9, 5), torch.randn(9, 4), torch.randn(2, 9, 4)
    level = torch.ops.headwise.best_level()
    for rows in (x, torch.randn(2, 5, 9).transpose(1, 2)):
        operator = torch.ops.headwise.causal_conv1d.default
        torch.library.opcheck(operator, (rows, weight, None, state, None, 4, True, level))
        in_place = torch.ops.headwise.causal_conv1d_.default
        torch.library.opcheck(in_place, (rows, weight, None, state.clone(), None, True, level))
    compiled = torch.compile(causal_conv1d, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(compiled(x, weight, state=state), causal_conv1d(x, weight, state=state)):
        torch.testing.assert_close(ours, eager)


def test_autograd_sees_that_a_state_was_changed_and_reads_nothing_of_it():
    x, weight, state = torch.randn(2, 7, 1), torch.randn(7, 4), torch.randn(2, 7, 4)
    factor = torch.ones_like(state, requires_grad=True)
    loss = (factor * state).sum()
    with torch.no_grad():
        convolve(ConvolutionCall(x, weight, None, None, state, None, 4, in_place=True), "cpu")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    level = torch.ops.headwise.best_level()
    operator = torch.ops.headwise.causal_conv1d_.default
    with pytest.raises(RuntimeError, match="shares memory with x"):
        operator(state[:, :, :2], weight, None, state, None, False, level)


def test_numbers_of_8_bits_are_refused():
    with pytest.raises(ShapeError, match="expected float32, bfloat16, float16 or float64"):
        causal_conv1d(torch.zeros(1, 2, 3).to(torch.float8_e4m3fn), torch.zeros(2, 2))
