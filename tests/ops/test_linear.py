"""Products of few rows with weights as they are stored, against float64."""

from unittest import mock

import pytest
import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from headwise.ops import faster, modes
from headwise.ops.backend import cpu_step as cpu
from headwise.ops.backend import torch as by_torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# (rows, E, F of each weight)
SHAPES = [
    (1, 64, (64,)),
    (1, 1, (1, 3)),
    (3, 7, (5, 130)),
    (16, 33, (577,)),
    (2, 576, (192, 64, 64)),
    (1, 3001, (70,)),
    # whole lines of tile registers: few outputs, a last tile that is cut, more than a block
    (5, 320, (15, 16, 17, 40, 1000)),
    (16, 64, (77,)),
]


def stored(rows, columns, dtype, transposed):
    """A weight between others, as in one that was fused; by rows or by columns."""
    if transposed:
        return torch.randn(columns, rows + 6).to(dtype)[:, 3 : 3 + rows].t()
    return torch.randn(rows, columns + 6).to(dtype)[:, 3 : 3 + columns]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_with_weights_as_they_are_stored(shape, transposed, dtype, level):
    rows, width, outputs = shape
    x = torch.randn(rows, width).to(dtype)
    weights = [stored(each, width, dtype, transposed) for each in outputs]
    biases = [None, *(torch.randn(each).to(dtype) for each in outputs[1:])]
    tol = 4 * torch.finfo(dtype).eps + 2e-6
    for weight, bias, given in zip(weights, biases, cpu.linear(x, weights, biases), strict=True):
        assert given.dtype == dtype
        wide = None if bias is None else bias.double()
        exact = functional.linear(x.double(), weight.double(), wide)
        torch.testing.assert_close(given.double(), exact, atol=tol * width**0.5, rtol=tol)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("width", [300, 320])
def test_any_number_of_threads_gives_the_same_bits(width, transposed, dtype, level, threads):
    x = torch.randn(5, width).to(dtype)
    weights = [stored(each, width, dtype, transposed) for each in (1000, 70)]
    threads(1)
    expected = cpu.linear(x, weights, [None, None])
    for count in (2, 3, 7):
        threads(count)
        for given, one in zip(cpu.linear(x, weights, [None, None]), expected, strict=True):
            assert torch.equal(given, one), count


def test_leading_dims_are_kept_and_rows_need_not_lie_side_by_side():
    x, weight = torch.randn(4, 2, 1, 24).transpose(0, 1), torch.randn(10, 24)
    given = cpu.linear(x, [weight], [None])[0]
    torch.testing.assert_close(given, functional.linear(x, weight))
    assert given.shape == (2, 4, 1, 10)


def test_numbers_that_are_not_finite_stay_so():
    x, weight = torch.ones(2, 40), torch.ones(3, 40)
    weight[0, 39], weight[1, 0], x[1, 7] = torch.nan, torch.inf, -torch.inf
    given = cpu.linear(x, [weight], [None])[0]
    torch.testing.assert_close(given, functional.linear(x, weight), equal_nan=True)


def test_the_operator_passes_opcheck_and_checks_what_it_is_given():
    x, weight, bias = torch.randn(2, 3, 16), torch.randn(24, 16), torch.randn(24)
    operator = torch.ops.headwise.linear.default
    torch.library.opcheck(operator, (x, [weight, weight[:7]], [bias, None], 0))
    torch.library.opcheck(operator, (x, [weight.t().contiguous().t()], [None], 0))
    bad = {
        "a weight does not fit x: expected two dims, 16": ([torch.randn(24, 15)], [None]),
        "of its dtype": ([weight.half()], [None]),
        "neither the rows nor the columns": ([torch.randn(48, 32)[::2, ::2]], [None]),
        "a bias does not fit its weight: expected 24": ([weight], [bias[:5]]),
        "2 weights and 1 biases": ([weight, weight], [None]),
    }
    for message, arguments in bad.items():
        with pytest.raises(RuntimeError, match=message):
            operator(x, *arguments, 0)
    with pytest.raises(RuntimeError, match="99 rows, expected at most"):
        operator(torch.randn(99, 16), [weight], [None], 0)
    with pytest.raises(RuntimeError, match="x is not a contiguous tensor"):
        operator(x.transpose(0, 1), [weight], [None], 0)


class Wrapped(torch.Tensor):
    """Another class, whose operators are its own."""


class Functions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Dispatches(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "mode",
    [
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: FlopCounterMode(display=False),
        Functions,
        Dispatches,
        torch.autograd.forward_ad.dual_level,
    ],
)
def test_what_watches_a_call_sees_pytorchs_own(mode):
    x, weight = torch.randn(2, 16), torch.randn(24, 16)
    assert faster("linear", x, [weight], [None]) is not None
    with mode():
        assert faster("linear", x, [weight], [None]) is None


@pytest.mark.filterwarnings("ignore:.*jit.trace.* is deprecated")
def test_what_the_kernels_do_not_serve_is_left_to_pytorch():
    x, weight = torch.randn(2, 16), torch.randn(24, 16)
    for given, by in [
        (torch.randn(17, 16), weight),  # many rows, of a fast dtype
        (torch.randn(0, 16), weight),
        (x.double(), weight.double()),
        (x.half(), weight),
        (torch.randn(2, 15), weight),  # PyTorch's error
        (torch.randn(2, 16, device="meta"), weight),
        (x, torch.randn(24, 16, device="meta")),
        (x, torch.randn(48, 32)[::2, ::2]),
        (Wrapped(x), weight),
        (x, Wrapped(weight)),
        (x, torch.nn.Parameter(weight)),  # gradients
        (x.clone().requires_grad_(), weight),
    ]:
        assert faster("linear", given, [by], [None]) is None
    with torch.no_grad():
        assert faster("linear", x, [torch.nn.Parameter(weight)], [None]) is not None
    seen = []

    def ask(row):
        seen.append(faster("linear", row, [weight], [None]))
        return row

    torch.vmap(ask)(x)
    torch.jit.trace(ask, x, check_trace=False)
    assert set(seen) == {None}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [False, True])
def test_many_rows_are_multiplied_in_float32_where_the_dtype_is_slow(transposed, dtype):
    # more rows and outputs than are widened at once
    x = torch.randn(2, 700, 40).to(dtype)
    weights = [stored(each, 40, dtype, transposed) for each in (1100, 30)]
    biases = [torch.randn(1100).to(dtype), None]
    with mock.patch.object(by_torch, "_slow", lambda dtype: dtype != torch.float32):
        run = faster("linear", x, weights, biases)
        assert faster("linear", x[:, :8], weights, biases) is cpu.linear
        assert (
            faster("linear", x.float(), [weight.float() for weight in weights], [None] * 2) is None
        )
        with torch.autocast("cpu", torch.bfloat16):
            assert faster("linear", x, weights, biases) is None
        x.requires_grad_()
        assert faster("linear", x, weights, biases) is None
    with mock.patch.object(by_torch, "_slow", return_value=False):
        assert faster("linear", x.detach(), weights, biases) is None
    with mock.patch.object(by_torch, "_BYTES_AT_ONCE", 4 * 40 * 600):
        products = run(x.detach(), weights, biases)
    for weight, bias, given in zip(weights, biases, products, strict=True):
        wide = None if bias is None else bias.double()
        exact = functional.linear(x.double(), weight.double(), wide)
        assert given.dtype == dtype
        tol = torch.finfo(dtype).eps
        torch.testing.assert_close(given.double(), exact.detach(), atol=1e-4, rtol=tol)


def test_which_dtypes_are_slow_is_pytorchs_own_word():
    for dtype in DTYPES:
        assert by_torch._slow(dtype) in (False, dtype != torch.float32)
    assert not by_torch._slow(torch.float64)


@pytest.mark.parametrize(
    "name", ["_tracing", "_functions", "_dispatches", "_transforms", "in_backward"]
)
def test_private_names_of_pytorch_are_there(name):
    assert not getattr(modes, name)()
