"""Norms and MLPs alone, against the same steps in float64."""

import pytest
import torch
from torch.nn import functional

from headwise.ops import faster
from headwise.ops.backend import cpu_step as cpu

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NORMS = {"none": 0, "rms": 1, "rms plus one": 2, "layer": 3, "rms wide": 4}
ACTIVATIONS = [functional.silu, functional.gelu]
EPS = 1e-3


def normalised(norm, x, weight, bias):
    weight = 1.0 if weight is None else weight
    if norm == "none":
        return x
    if norm == "layer":
        off = x - x.mean(-1, keepdim=True)
        scaled = off / (off.square().mean(-1, keepdim=True) + EPS).sqrt() * weight
    else:
        weight = weight + 1 if norm == "rms plus one" else weight
        scaled = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight
    return scaled if bias is None else scaled + bias


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(1, 1, 33), (2, 3, 4, 64), (700, 130), (7,)], ids=str)
def test_norms(shape, norm, dtype, level):
    x = (torch.randn(shape) + 0.3).to(dtype)
    weight, bias = ((1 + 0.1 * torch.randn(shape[-1])).to(dtype) for _ in range(2))
    for given in ((weight, bias), (weight, None), (None, None)):
        wide = [None if part is None else part.double() for part in given]
        exact = normalised(norm, x.double(), *wide)
        # a weight of 0 where there is none: 1 + 0
        result = cpu.norm(x, NORMS[norm], *given, EPS)
        assert result.dtype == dtype
        if norm == "rms plus one" and given[0] is None:
            continue
        tol = 3 * torch.finfo(dtype).eps
        torch.testing.assert_close(result.double(), exact, atol=tol * 8, rtol=tol)


def test_where_a_norm_rounds_is_where_the_modules_round():
    x, weight = torch.randn(50, 64).bfloat16(), torch.randn(64).bfloat16()
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)
    before, behind = weight * wide.bfloat16(), (weight.float() * wide).bfloat16()
    assert not torch.equal(before, behind)
    # but for sums in another order
    assert (cpu.norm(x, NORMS["rms"], weight, None, EPS) != before).float().mean() < 0.01
    assert (cpu.norm(x, NORMS["rms wide"], weight, None, EPS) != behind).float().mean() < 0.01


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_threads_gives_the_same_bits(dtype, level, threads):
    x, weight = torch.randn(1500, 130).to(dtype), torch.randn(130).to(dtype)
    few = torch.randn(3, 130).to(dtype)
    weights = [torch.randn(*size).to(dtype) for size in ((900, 130), (900, 130), (130, 900))]

    def run():
        return cpu.norm(x, 1, weight, None, EPS), cpu.mlp(few, weights, [None] * 3, True, 0)

    threads(1)
    expected = run()
    for count in (2, 3, 7):
        threads(count)
        assert all(map(torch.equal, run(), expected)), count


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gate", ["none", "own", "fused"])
@pytest.mark.parametrize("activation", [0, 1])
@pytest.mark.parametrize(("shape", "middle"), [((1, 1, 48), 96), ((16, 33), 70), ((2, 3, 130), 34)])
def test_mlps(shape, middle, activation, gate, dtype, level):
    width = shape[-1]
    x = torch.randn(shape).to(dtype)

    def product(outputs, inputs):
        weight = torch.randn(outputs, inputs) / inputs**0.5
        return weight.to(dtype), torch.randn(outputs).to(dtype)

    gates, up, down = product(middle, width), product(middle, width), product(width, middle)
    named = {
        "none": [up, down],
        "own": [gates, up, down],
        "fused": [tuple(torch.cat(pair) for pair in zip(gates, up, strict=True)), down],
    }[gate]
    given = cpu.mlp(x, *map(list, zip(*named, strict=True)), gate != "none", activation)
    assert given.dtype == dtype

    def times(y, pair):
        return functional.linear(y, *(part.double() for part in pair))

    act, rows = ACTIVATIONS[activation], x.double()
    inside = act(times(rows, up))
    if gate != "none":
        inside = act(times(rows, gates)) * times(rows, up)
    exact = times(inside, down)
    tol = 8 * torch.finfo(dtype).eps + 3e-6 * middle**0.5
    torch.testing.assert_close(given.double(), exact, atol=tol * float(exact.abs().max()), rtol=0)


def test_the_operators_pass_opcheck_and_check_what_they_are_given():
    norm, mlp = torch.ops.headwise.norm.default, torch.ops.headwise.mlp.default
    x, weight = torch.randn(2, 3, 16), torch.randn(16)
    torch.library.opcheck(norm, (x, 1, weight, None, EPS, 0))
    assert norm(x[:0], 1, weight, None, EPS, 0).shape == (0, 3, 16)
    weights = [torch.randn(24, 16), torch.randn(24, 16), torch.randn(16, 24)]
    torch.library.opcheck(mlp, (x, weights, [None] * 3, True, 0, 0))
    for message, arguments in {
        "no norm is of kind 5": (x, 5, weight, None, EPS),
        "not a contiguous vector of 16": (x, 1, weight[:15], None, EPS),
        "of x's dtype": (x, 1, weight.half(), None, EPS),
        "x is not a contiguous": (x.transpose(0, 1), 1, weight, None, EPS),
        "x is float64": (x.double(), 1, weight.double(), None, EPS),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            norm(*arguments, 0)
    for message, arguments in {
        "99 rows, expected 1 to 64": (torch.randn(99, 16), weights, [None] * 3, True, 0),
        "1 weights and 1 biases, expected 2 or 3": (x, weights[:1], [None], False, 0),
        "3 weights without a gate": (x, weights, [None] * 3, False, 0),
        "no activation is 9": (x, weights, [None] * 3, True, 9),
        "do not fit: 8, expected 16": (x, [*weights[:2], weights[2][:8]], [None] * 3, True, 0),
        "a weight does not fit x": (x, [weights[0], *weights[:2]], [None] * 3, True, 0),
        "expected an even number": (x, [weights[0][:7], weights[2]], [None] * 2, True, 0),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            mlp(*arguments, 0)


def test_memory_beside_none_is_refused():
    x, weight = torch.randn(2, 16), torch.randn(16, device="meta")
    with pytest.raises(RuntimeError, match="headwise::norm: tensors on cpu and meta, expected one"):
        torch.ops.headwise.norm.default(x, 1, weight, None, EPS, 0)
    with pytest.raises(RuntimeError, match="headwise::linear: tensors on cpu and meta"):
        torch.ops.headwise.linear.default(x, [weight[None]], [None], 0)


def test_what_the_kernels_do_not_serve_is_left_to_pytorch():
    x, weight = torch.randn(2, 16), torch.randn(16)
    assert faster("norm", x, 1, weight, None, EPS) is cpu.norm
    assert faster("norm", torch.randn(99, 16), 1, weight, None, EPS) is cpu.norm
    apart = torch.randn(3, 2, 20)[..., :16].transpose(0, 1)
    assert faster("norm", apart, 1, weight, None, EPS) is cpu.norm
    given = cpu.norm(apart, 1, weight, None, EPS)
    assert torch.equal(given, cpu.norm(apart.contiguous(), 1, weight, None, EPS))
    for given in [
        (x.double(), 1, weight.double(), None, EPS),
        (x.half(), 1, weight, None, EPS),
        (x[:0], 1, weight, None, EPS),
        (x.t(), 1, torch.randn(2), None, EPS),
        (x, 1, weight[:15], None, EPS),
        (x, 1, torch.nn.Parameter(weight), None, EPS),
    ]:
        assert faster("norm", *given) is None
    weights = [torch.randn(24, 16), torch.randn(24, 16), torch.randn(16, 24)]
    rest = ([None] * 3, True, 0)
    assert faster("mlp", x, weights, *rest) is cpu.mlp
    for given in [
        (torch.randn(17, 16), weights),
        (x, [*weights[:2], weights[2][:, :23]]),
        (x, [*weights[:2], torch.randn(16, 48)[:, ::2]]),
        (x, [torch.randn(24, 15), *weights[1:]]),
        (x, [*weights[:2], weights[2].half()]),
    ]:
        assert faster("mlp", *given, *rest) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert faster("mlp", x, weights, *rest) is None
        assert faster("norm", x, 1, weight, None, EPS) is None
