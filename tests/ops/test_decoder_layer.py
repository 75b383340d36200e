"""The two operators of a decoder layer, against the same steps in float64."""

import math

import pytest
import torch
from torch.nn import functional

from headwise import attention
from headwise.ops import Budget, add_rest, choose_keys, keys_alone, means_of, quantize
from headwise.ops.backend import cpu_step as cpu

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NORMS = ("none", "rms", "rms plus one", "layer", "rms wide")
ACTIVATIONS = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
    "relu2": lambda x: functional.relu(x).square(),
}
EPS = 1e-3
# No sketch of the keys, and no choice by one.
DENSE = (None, None, None, 0, 0, 0, 0, -1.0, None, 0)


def normalised(kind, x, weight, bias=None):
    if kind == "none":
        return x
    if kind == "layer":
        return functional.layer_norm(x, x.shape[-1:], weight, bias, EPS)
    weight = weight + 1 if kind == "rms plus one" else weight
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


# As csrc/kernels.h numbers them.
ROTATIONS = ("halves", "neighbours", "neighbours twice", "halves once")


def as_given(angles, rotation):
    """A row of angles as a rotation takes it, of those of the pairs [...,P]."""
    if rotation == "halves once":
        return angles
    if rotation == "neighbours twice":
        return angles.repeat_interleave(2, dim=-1)
    return torch.cat([angles, angles], dim=-1)


def rotated(x, angles, rotation):
    """The first dims of x [B,S,H,D] by angles [B,S,P] of pairs of dims."""
    dim, neighbours = 2 * angles.shape[-1], rotation.startswith("neighbours")
    pairs = x[..., :dim].unflatten(-1, (-1, 2) if neighbours else (2, -1))
    axis = -1 if neighbours else -2
    a, b = pairs.unbind(axis)
    c, s = angles.cos()[..., None, :], angles.sin()[..., None, :]
    turned = torch.stack([a * c - b * s, b * c + a * s], dim=axis).flatten(-2)
    return torch.cat([turned, x[..., dim:]], dim=-1)


def assert_near(given, exact, dtype, inner):
    assert given.dtype == dtype
    tol = 8 * torch.finfo(dtype).eps + 3e-6 * inner**0.5
    torch.testing.assert_close(
        given.double(), exact, atol=tol * float(exact.abs().max().clamp(min=1)), rtol=0
    )


def near(size, dtype):
    """Weights around 1 of a norm."""
    return (1 + 0.1 * torch.randn(size)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("batch", "length", "width", "heads", "kv_heads", "dim", "rope", "rotation", "fused"),
    [
        (1, 1, 48, 6, 2, 8, 8, "halves", False),
        (2, 3, 33, 3, 3, 10, 6, "neighbours", True),
        (1, 16, 64, 4, 1, 16, 16, "neighbours twice", False),
        (2, 2, 64, 4, 2, 12, 8, "halves once", False),
        (3, 1, 130, 2, 1, 64, 0, "halves", True),
    ],
)
@pytest.mark.parametrize("whole", [False, True])
def test_queries_keys_and_values(
    whole, batch, length, width, heads, kv_heads, dim, rope, rotation, fused, norm, dtype, level
):
    x = torch.randn(batch, length, width).to(dtype)
    weight, bias = near(width, dtype), torch.randn(width).to(dtype)
    norm_bias = bias if norm == "layer" else None
    sizes = [heads * dim, kv_heads * dim, kv_heads * dim]
    sizes = [sum(sizes)] if fused else sizes
    weights = [(torch.randn(size, width) / width**0.5).to(dtype) for size in sizes]
    biases = [torch.randn(size).to(dtype) if fused else None for size in sizes]
    lengths = (heads * dim, kv_heads * dim) if whole else (dim, dim)
    head_norms = tuple(near(size, dtype) for size in lengths)
    angles = torch.randn(batch, length, rope // 2)
    row = as_given(angles, rotation)
    cos, sin = (None, None) if rope == 0 else (row.cos(), row.sin())
    kind = NORMS.index(norm)
    head_kind = 0 if norm == "layer" else kind
    given = cpu.attention_inputs(
        *(x, kind, weight, norm_bias, EPS, weights, biases, heads, kv_heads, dim, head_kind),
        *(*head_norms, EPS),
        *(cos, sin, ROTATIONS.index(rotation)),
    )
    wide = normalised(norm, x.double(), weight.double(), bias.double())
    out = torch.cat(
        [
            functional.linear(wide, w.double(), None if b is None else b.double())
            for w, b in zip(weights, biases, strict=True)
        ],
        dim=-1,
    ).unflatten(-1, (-1, dim))
    parts = list(out.split([heads, kv_heads, kv_heads], dim=2))
    for index in (0, 1):
        if head_kind:
            wide = parts[index].flatten(2) if whole else parts[index]
            wide = normalised(norm, wide, head_norms[index].double())
            parts[index] = wide.view(parts[index].shape)
        if rope:
            parts[index] = rotated(parts[index], angles.double(), rotation)
    for one, exact in zip(given, parts, strict=True):
        assert_near(one, exact.transpose(1, 2), dtype, width)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gate", ["none", "own", "fused"])
@pytest.mark.parametrize(
    ("rows", "width", "inner", "middle", "norms", "parallel", "scale"),
    [
        ((1, 1), 48, 40, 96, ("none", "rms", "none"), False, 1.0),
        ((2, 2), 33, 64, 70, ("rms", "rms", "rms"), False, 0.25),
        ((1, 3), 130, 32, 34, ("none", "layer", "none"), True, 1.0),
        ((4, 4), 64, 64, 128, ("rms plus one", "none", "rms plus one"), False, 1.0),
    ],
)
def test_what_a_layer_returns(
    rows, width, inner, middle, norms, parallel, scale, gate, activation, dtype, level
):
    x = torch.randn(*rows, width).to(dtype)
    attended = torch.randn(*rows, inner).to(dtype)

    def product(outputs, inputs):
        return (
            (torch.randn(outputs, inputs) / inputs**0.5).to(dtype),
            torch.randn(outputs).to(dtype),
        )

    out, up, down = product(width, inner), product(middle, width), product(width, middle)
    gates = product(middle, width)
    named = {
        "none": [out, up, down],
        "own": [out, gates, up, down],
        "fused": [out, tuple(torch.cat(pair) for pair in zip(gates, up, strict=True)), down],
    }[gate]
    parameters = [(near(width, dtype), 0.1 * torch.randn(width).to(dtype)) for _ in norms]
    given = cpu.layer_outputs(
        x,
        attended,
        *([weight for weight, _ in named], [bias for _, bias in named], gate != "none"),
        *map(NORMS.index, norms),
        [
            part if index == 0 or norm == "layer" else None
            for pair, norm in zip(parameters, norms, strict=True)
            for index, part in enumerate(pair)
        ],
        *(EPS, EPS, EPS, list(ACTIVATIONS).index(activation), parallel, scale),
    )
    steps = [
        lambda y, norm=norm, pair=pair: normalised(norm, y, *(part.double() for part in pair))
        for norm, pair in zip(norms, parameters, strict=True)
    ]

    def times(y, weight, bias):
        return functional.linear(y, weight.double(), bias.double())

    stream = x.double() + scale * steps[0](times(attended.double(), *out))
    read = steps[1](x.double() if parallel else stream)
    act = ACTIVATIONS[activation]
    inside = (
        act(times(read, *up)) if gate == "none" else act(times(read, *gates)) * times(read, *up)
    )
    assert_near(given, stream + scale * steps[2](times(inside, *down)), dtype, middle + inner)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "norms", "scale", "bias"),
    [((1, 1), ("none", "rms"), 1.0, None), ((2, 3), ("rms plus one", "layer"), 0.25, "one")],
)
def test_what_an_mlp_of_its_own_is_given(rows, norms, scale, bias, dtype, level, threads):
    x, attended = torch.randn(*rows, 70).to(dtype), torch.randn(*rows, 64).to(dtype)
    weight = (torch.randn(70, 64) / 8).to(dtype)
    bias = None if bias is None else torch.randn(70).to(dtype)
    parameters = [(near(70, dtype), 0.1 * torch.randn(70).to(dtype)) for _ in norms]
    asked = (
        (NORMS.index(norm), part[0], part[1] if norm == "layer" else None, EPS)
        for norm, part in zip(norms, parameters, strict=True)
    )
    given = [x, attended, weight, bias, *(each for norm in asked for each in norm), scale]
    total, normed = cpu.attention_outputs(*given)
    exact = functional.linear(
        attended.double(), weight.double(), None if bias is None else bias.double()
    )
    after, before = (
        lambda y, norm=norm, pair=pair: normalised(norm, y, *(part.double() for part in pair))
        for norm, pair in zip(norms, parameters, strict=True)
    )
    exact = x.double() + scale * after(exact)
    assert_near(total, exact, dtype, 64)
    assert_near(normed, before(exact), dtype, 64)
    threads(3)
    assert all(map(torch.equal, cpu.attention_outputs(*given), (total, normed)))


def arguments(dtype=torch.float32, width=64, dim=16, whole=False):
    x = torch.randn(1, 3, width).to(dtype)
    w = [torch.randn(size, width).to(dtype) for size in (64, 32, 32)]
    angles = torch.randn(1, 3, dim)
    before = [x, 1, near(width, dtype), None, EPS, w, [None] * 3, 4, 2, dim, 0, None, None, EPS]
    before += [angles.cos(), angles.sin(), 0]
    if whole:
        before[10:13] = 4, near(4 * dim, dtype), near(2 * dim, dtype)
    mlp = [torch.randn(width, 64), torch.randn(96, width), torch.randn(96, width)]
    mlp = [weight.to(dtype) for weight in (*mlp, torch.randn(width, 96))]
    norms = [None, None, near(width, dtype), None, None, None]
    after = [x, torch.randn(1, 3, 64).to(dtype), mlp, [None] * 4, True, 0, 1, 0, norms]
    return before, [*after, 0.0, EPS, 0.0, 0, False, 1.0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("whole", [False, True])
def test_any_number_of_threads_gives_the_same_bits(whole, dtype, level, threads):
    before, after = arguments(dtype, width=320, dim=16, whole=whole)
    threads(1)
    expected = (*cpu.attention_inputs(*before), cpu.layer_outputs(*after))
    for count in (2, 3, 7):
        threads(count)
        given = (*cpu.attention_inputs(*before), cpu.layer_outputs(*after))
        assert all(map(torch.equal, given, expected)), count


def alone(x, activation, *, cancelled):
    """What an activation makes of x [R], where the residual stream is cancelled; else both."""
    rows, one = x[None, :, None], torch.ones(1, 1)
    return cpu.layer_outputs(
        rows,
        -rows if cancelled else torch.zeros_like(rows),
        *([one, one, one], [None] * 3, False, 0, 0, 0, [None] * 6),
        *(0.0, 0.0, 0.0, list(ACTIVATIONS).index(activation), cancelled, 1.0),
    ).flatten()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_of_any_size_are_right(activation, level):
    x = torch.tensor([-1e18, -1e4, -88.5, -4.2, -1e-4, 0.0, 1e-4, 3.9, 90.0, 1e18])
    exact = ACTIVATIONS[activation](x.double())
    given = alone(x, activation, cancelled=True).double()
    # 1 + erf(x) and 1 + tanh(x) of a negative x are differences
    torch.testing.assert_close(given, exact, atol=4 * 2**-24 * 5, rtol=3e-6)
    x = torch.tensor([-math.inf, math.inf, math.nan])
    given = alone(x, activation, cancelled=False)
    # GELU of -inf is 0 times -inf in PyTorch too
    assert given[1] == math.inf and given[2].isnan() and not given[0].isfinite()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("limits", [(0, 0.0), (5, 2.0)], ids=str)
@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, -1.0, 2.0, 0.0])], ids=str)
def test_attention_with_the_cache_inside(sinks, limits, length, dtype, level):
    # the buffers' heads and sequences lie apart, and room is left behind
    keys, values = (torch.randn(2, 3, 2, 40, 16).to(dtype)[:, 1:] for _ in range(2))
    keys, values = keys.transpose(0, 1)[:, 0], values.transpose(0, 1)[:, 0]
    before, _ = arguments(dtype)
    before[0] = torch.randn(2, length, 64).to(dtype)
    angles = torch.randn(1, length, 16)
    before[14:16] = angles.cos(), angles.sin()
    query, key, value = cpu.attention_inputs(*before)
    all_keys = torch.cat([keys[:, :, :21], key], dim=2)
    all_values = torch.cat([values[:, :, :21], value], dim=2)
    window, softcap = limits
    expected = attention(
        *(query, all_keys, all_values),
        causal=True,
        scale=0.3,
        backend="cpu",
        window=window or None,
        softcap=softcap or None,
        sinks=sinks,
    )
    rest = [buffer[:, :, 21 + length :].clone() for buffer in (keys, values)]
    pools, table = paged(keys, values)
    given = cpu.layer_attention(*before, keys, values, None, 21, 0.3, *limits, sinks, *DENSE)
    assert torch.equal(given, expected.transpose(1, 2))
    assert torch.equal(keys[:, :, : 21 + length], all_keys)
    assert torch.equal(values[:, :, : 21 + length], all_values)
    for buffer, untouched in zip((keys, values), rest, strict=True):
        assert torch.equal(buffer[:, :, 21 + length :], untouched)
    # one sequence in pages of 8, the third of which has room for three tokens more
    one = [x[:1] if isinstance(x, torch.Tensor) and x.shape[:1] == (2,) else x for x in before]
    in_pages = cpu.layer_attention(*one, *pools, table, 21, 0.3, *limits, sinks, *DENSE)
    assert torch.equal(in_pages, given[:1])
    for pool, rows in zip(pools, (all_keys, all_values), strict=True):
        held = pool[table[0].long()].transpose(0, 1).flatten(1, 2)
        assert torch.equal(held[:, : 21 + length], rows[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("mass", [None, 0.6])
def test_attention_to_what_a_sketch_chooses_with_the_cache_inside(mass, length, dtype, level):
    torch.manual_seed(0)
    keys, values = (torch.randn(2, 2, 40, 16).to(dtype) for _ in range(2))
    before, _ = arguments(dtype)
    before[0] = torch.randn(2, length, 64).to(dtype)
    angles = torch.randn(1, length, 16)
    before[14:16] = angles.cos(), angles.sin()
    query, key, value = cpu.attention_inputs(*before)
    all_keys = torch.cat([keys[:, :, :21], key], dim=2)
    all_values = torch.cat([values[:, :, :21], value], dim=2)
    sinks, budget = torch.tensor([0.5, -1.0, 2.0, 0.0]), Budget(9, 3, mass, 1, 2)
    whole = quantize(all_keys, 4)
    options = {"causal": True, "scale": 0.3, "softcap": 2.0, "sinks": sinks}
    chosen, rest = choose_keys(query, keys_alone(*whole), budget, **options)
    expected = attention(query, all_keys, all_values, indices=chosen, backend="cpu", **options)
    expected = add_rest(expected, rest, means_of(all_values, length))
    held = [
        torch.full((2, 2, 40, each.shape[3]), 7, dtype=each.dtype).index_copy_(
            2, torch.arange(21), each[:, :, :21]
        )
        for each in whole
    ]
    sums = values[:, :, :13].float().sum(dim=2)
    own = (1, 2, 3, 9, -1.0 if mass is None else mass)
    pools, table = paged(keys, values)
    rounded, _ = paged(*held)
    given = cpu.layer_attention(
        *before, keys, values, None, 21, 0.3, 0, 2.0, sinks, *held, None, *own, sums, 13
    )
    torch.testing.assert_close(given, expected.transpose(1, 2), rtol=0.02, atol=0.01)
    if dtype == torch.float32:
        torch.testing.assert_close(given, expected.transpose(1, 2))
    for buffer, rows in zip(held, whole, strict=True):
        assert torch.equal(buffer[:, :, : 21 + length], rows)
        assert (buffer[:, :, 21 + length :] == 7).all()
    one = [x[:1] if isinstance(x, torch.Tensor) and x.shape[:1] == (2,) else x for x in before]
    in_pages = cpu.layer_attention(
        *one, *pools, table, 21, 0.3, 0, 2.0, sinks, *rounded, table, *own, sums[:1], 13
    )
    assert torch.equal(in_pages, given[:1])


def paged(*buffers):
    """The first sequence of buffers [B,K,L,D] in pages of 8, which lie in another order."""
    table = torch.tensor([[3, 0, 4, 1, 2]], dtype=torch.int32)
    pools = []
    for buffer in buffers:
        pool = torch.zeros(2, 5, 8, buffer.shape[3], dtype=buffer.dtype).transpose(0, 1)
        pool[table[0].long()] = buffer[0].unflatten(1, (5, 8)).transpose(0, 1)
        pools.append(pool)
    return pools, table


def test_the_operators_pass_opcheck_and_check_what_they_are_given():
    before, after = arguments()
    inputs, outputs = (
        torch.ops.headwise.attention_inputs.default,
        torch.ops.headwise.layer_outputs.default,
    )
    torch.library.opcheck(inputs, (*before, 0))
    torch.library.opcheck(outputs, (*after, 0))
    sums = torch.ops.headwise.attention_outputs.default
    sizes = [near(64, torch.float32), None]
    own = [after[0], after[1], after[2][0], None, 0, None, None, 0.0, 1, *sizes, EPS, 1.0]
    torch.library.opcheck(sums, (*own, 0))
    for message, index, value in [
        ("attended does not fit x", 1, torch.randn(1, 2, 64)),
        ("the weight has 63 outputs, expected 64", 2, torch.randn(63, 64)),
        ("no norm is of kind 5", 4, 5),
        ("of a norm is not a contiguous vector of 64", 9, torch.randn(63)),
    ]:
        with pytest.raises(RuntimeError, match=message):
            sums(*own[:index], value, *own[index + 1 :], 0)
    both = torch.ops.headwise.layer_attention.default
    buffers = torch.randn(2, 1, 2, 9, 16)
    torch.library.opcheck(
        both, (*before, *buffers, None, 6, 0.3, 0, 0.0, torch.randn(4), *DENSE, 0)
    )
    for keys, values, at in [
        (*buffers, 7),
        (*buffers, -1),
        (*buffers, 2**63 - 1),
        (*buffers, 2**63 - 3),
        (buffers[0], buffers[1, :, :1], 0),
        (buffers[0].half(), buffers[1], 0),
        (buffers[0], buffers[1, ..., :15], 0),
    ]:
        with pytest.raises(RuntimeError, match="a buffer does not fit: expected"):
            both(*before, keys, values, None, at, 0.3, 0, 0.0, None, *DENSE, 0)
    one = [x[:1] if isinstance(x, torch.Tensor) and x.shape[:1] == (2,) else x for x in before]
    pools = [torch.randn(3, 2, 8, 16) for _ in range(2)]
    for table, at, message in [
        ([[0, 1]], 7, "a buffer does not fit"),  # into the next page
        ([[0, 3]], 9, r"page_table\[0\] names page 3, the pool has pages 0 to 2"),
        ([[0, -1]], 9, "names page -1"),
        ([[0]], 9, "a context of 12 in 1 pages of 8"),
    ]:
        pages = torch.tensor(table, dtype=torch.int32)
        with pytest.raises(RuntimeError, match=message):
            both(*one, *pools, pages, at, 0.3, 0, 0.0, None, *DENSE, 0)
    two = [before[0].repeat(2, 1, 1), *before[1:]]
    with pytest.raises(RuntimeError, match="3 tokens of 1 sequences behind 1"):
        both(*two, *pools, torch.zeros(2, 1, dtype=torch.int32), 1, 0.3, 0, 0.0, None, *DENSE, 0)
    with pytest.raises(RuntimeError, match="page_table is not int32"):
        both(*one, *pools, torch.zeros(1, 2), 1, 0.3, 0, 0.0, None, *DENSE, 0)
    sketch = torch.zeros(1, 2, 9, 8, dtype=torch.uint8), torch.zeros(1, 2, 9, 1)
    own, sums = (1, 2, 3, 9, -1.0), (torch.zeros(1, 2, 16), 4)
    torch.library.opcheck(
        both, (*before, *buffers, None, 6, 0.3, 0, 0.0, None, *sketch, None, *own, *sums, 0)
    )
    for rows, scales, window, budget, message in [
        (sketch[0], None, 0, own, "a sketch without scales"),
        (sketch[0], sketch[1].half(), 0, own, "a sketch is not uint8"),
        (sketch[0][:, :1], sketch[1][:, :1], 0, own, "a sketch is not uint8"),
        (sketch[0][:, :, :8], sketch[1][:, :, :8], 0, own, "a sketch is not uint8"),
        (*sketch, 4, own, "a sketch does not fit: .*, and no window"),
        (*sketch, 0, (5, 5, 3, 9, -1.0), "first 5, recent 5, least 3, most 9"),
    ]:
        kept = [buffer.clone() for buffer in buffers]
        given = (*buffers, None, 6, 0.3, window, 0.0, None, rows, scales, None, *budget)
        with pytest.raises(RuntimeError, match=message):
            both(*before, *given, *sums, 0)
        assert all(map(torch.equal, buffers, kept))
    for wrong in [(None, 0), (sums[0].half(), 4), (sums[0], 7), (sums[0], -1), (sums[0][:, :1], 4)]:
        with pytest.raises(RuntimeError, match="sums of the values of"):
            both(*before, *buffers, None, 6, 0.3, 0, 0.0, None, *sketch, None, *own, *wrong, 0)
    for sinks in (torch.randn(3), torch.randn(4).double(), torch.randn(1, 4)):
        with pytest.raises(RuntimeError, match="sinks is not a contiguous float32 vector of 4"):
            both(*before, *buffers, None, 6, 0.3, 0, 0.0, sinks, *DENSE, 0)

    def changed(arguments, **changes):
        return [changes.get(f"_{index}", value) for index, value in enumerate(arguments)]

    bad_inputs = {
        "x is not a contiguous tensor of three dims": {"_0": torch.randn(3, 64)},
        "99 rows, expected 1 to 64": {"_0": torch.randn(1, 99, 64)},
        "no norm is of kind 9": {"_1": 9},
        "of a norm is not a contiguous vector of 64": {"_2": torch.randn(63)},
        "the weights have 128 outputs, expected 96": {"_7": 2},
        "are no multiple of 24": {"_9": 24},
        "cos without sin": {"_15": None},
        "no rotation is 4": {"_16": 4},
        "not a contiguous vector of 32": {"_11": torch.randn(64), "_12": torch.randn(33)},
        "not a contiguous vector of 16": {"_11": torch.randn(48)},
        "cos does not fit x": {"_14": torch.randn(1, 2, 16), "_15": torch.randn(1, 2, 16)},
    }
    for message, change in bad_inputs.items():
        with pytest.raises(RuntimeError, match=message):
            inputs(*changed(before, **change), 0)
    bad_outputs = {
        "attended does not fit x": {"_1": torch.randn(1, 2, 64)},
        "2 weights, 4 biases and 6 parts": {"_2": after[2][:2]},
        "4 weights without a gate": {"_4": False},
        "a weight does not fit x": {"_2": [after[2][0], *after[2][:3]]},
        "no activation is 7": {"_12": 7},
    }
    for message, change in bad_outputs.items():
        with pytest.raises(RuntimeError, match=message):
            outputs(*changed(after, **change), 0)
