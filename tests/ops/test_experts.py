"""Products of few rows with the experts that were chosen for them, against float64."""

import pytest
import torch

from headwise.ops import faster
from headwise.ops.backend import cpu_step as cpu

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def stacked(count, rows, columns, dtype, transposed):
    """Weights [count,rows,columns] as they are stored: by rows, or by columns."""
    if transposed:
        return torch.randn(count, columns, rows).to(dtype).transpose(1, 2)
    return torch.randn(count, rows, columns).to(dtype)


def by_definition(x, chosen, weight, bias):
    rows = x.double().expand(chosen.numel(), -1) if x.shape[0] == 1 else x.double()
    if rows.shape[0] != chosen.numel():
        rows = rows.repeat_interleave(chosen.shape[1], 0)
    out = torch.zeros(chosen.numel(), weight.shape[1], dtype=torch.float64)
    for index, expert in enumerate(chosen.flatten().tolist()):
        if expert < weight.shape[0]:
            out[index] = weight[expert].double() @ rows[index]
            out[index] += 0 if bias is None else bias[expert].double()
    return out.view(*chosen.shape, -1)


# (tokens, chosen, E, F, experts)
SHAPES = [(1, 8, 64, 130, 20), (1, 1, 7, 3, 1), (5, 2, 33, 64, 3), (16, 4, 129, 40, 6)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("each", [False, True])
def test_products_with_the_chosen_experts(shape, each, transposed, dtype, level):
    tokens, most, width, outputs, count = shape
    x = torch.randn(tokens * (most if each else 1), width).to(dtype)
    # some chosen twice, by one token as well, and some choices of none
    chosen = torch.randint(0, count + 1, (tokens, most))
    weight = stacked(count, outputs, width, dtype, transposed)
    tol = 4 * torch.finfo(dtype).eps + 2e-6
    for bias in (None, torch.randn(count, outputs).to(dtype)):
        given = cpu.experts(x, chosen, weight, bias)
        assert (given.dtype, given.shape) == (dtype, (tokens, most, outputs))
        expected = by_definition(x, chosen, weight, bias)
        torch.testing.assert_close(given.double(), expected, atol=tol * width**0.5, rtol=tol)


def test_any_number_of_threads_gives_the_same_bits(level, threads):
    x, chosen = torch.randn(3, 300), torch.randint(0, 5, (3, 4))
    weight = torch.randn(5, 1000, 300)
    threads(1)
    expected = cpu.experts(x, chosen, weight)
    for count in (2, 3, 7):
        threads(count)
        assert torch.equal(cpu.experts(x, chosen, weight), expected), count


def test_more_rows_of_one_expert_than_are_multiplied_at_once():
    x, weight = torch.randn(40, 24), torch.randn(2, 10, 24)
    chosen = torch.ones(40, 1, dtype=torch.int64)
    expected = by_definition(x, chosen, weight, None)
    given = torch.ops.headwise.experts.default(x, chosen, weight, None, 0)
    torch.testing.assert_close(given.double(), expected, atol=1e-5, rtol=1e-5)


def test_the_operator_passes_opcheck_and_checks_what_it_is_given():
    x, chosen = torch.randn(3, 16), torch.tensor([[0, 3], [1, 1], [4, 0]])
    weight, bias = torch.randn(4, 24, 16), torch.randn(4, 24)
    operator = torch.ops.headwise.experts.default
    torch.library.opcheck(operator, (x, chosen, weight, bias, 0))
    torch.library.opcheck(operator, (torch.randn(6, 16), chosen, weight, None, 0))
    bad = {
        "expert 5 was chosen of 4": (x, chosen + 1, weight, None),
        "expert -1 was chosen of 4": (x, chosen - 1, weight, None),
        "x has 4 rows, expected 3 or 6": (torch.randn(4, 16), chosen, weight, None),
        "chosen is not a contiguous tensor of int64": (x, chosen.int(), weight, None),
        "x is not a contiguous tensor of two": (x[None], chosen, weight, None),
        "a weight does not fit x: expected three dims, 16": (x, chosen, weight[0], None),
        "neither the rows nor": (x, chosen, torch.randn(4, 48, 32)[:, ::2, ::2], None),
        "of its dtype": (x, chosen, weight.half(), None),
        "a bias does not fit its weight: expected 24": (x, chosen, weight, bias[:3]),
        "x is float64": (x.double(), chosen, weight.double(), None),
        "choices, expected at most 4096": (
            torch.randn(1, 16),
            torch.zeros(1, 5000, dtype=torch.int64),
            weight,
            None,
        ),
    }
    for message, arguments in bad.items():
        with pytest.raises(RuntimeError, match=message):
            operator(*arguments, 0)
    for rows, none in ((x[:0], chosen[:0]), (x, chosen[:, :0])):
        assert operator(rows, none, weight, bias, 0).shape == (*none.shape, 24)


def test_what_the_kernel_does_not_serve_is_left_to_pytorch():
    x, chosen, weight = torch.randn(2, 16), torch.tensor([[0, 1], [1, 2]]), torch.randn(3, 8, 16)
    bias = torch.randn(3, 8)
    assert faster("experts", x, chosen, weight, bias) is not None
    assert faster("experts", x.repeat_interleave(2, 0), chosen, weight) is not None
    for given in [
        (torch.randn(17, 16), torch.zeros(17, 2, dtype=torch.int64), weight),  # many rows
        (x[:0], chosen[:0], weight),
        (x.double(), chosen, weight.double()),
        (x.half(), chosen, weight),
        (x, chosen.int(), weight),
        (x, chosen.repeat(2, 1)[:3], weight),
        (x, chosen, weight[..., :15]),
        (x, chosen, torch.nn.Parameter(weight)),  # gradients
        (x, chosen, weight, bias[:, :7]),
        (x, chosen, torch.randn(3, 8, 16, device="meta")),
    ]:
        assert faster("experts", *given) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert faster("experts", x, chosen, weight) is None
