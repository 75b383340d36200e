"""Packed matrices: to the bit what the gguf package reads, and products against float64."""

import copy

import numpy as np
import pytest
import torch

from headwise.errors import ShapeError
from headwise.ops import (
    BLOCK_FORMATS,
    faster,
    format_of,
    pack,
    packed_columns,
    round_blocks,
    unpack,
)
from headwise.ops.backend import cpu_step as cpu
from headwise.ops.packed import reference
from packed_blocks import numbers_of, random_blocks, rounded

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMATS = tuple(BLOCK_FORMATS)
# rows of the matrix: one group, parts of one, several
ROWS = (1, 15, 16, 33, 100)
# (rows of the matrix, rows of x, blocks)
SHAPES = ((1, 1, 1), (16, 1, 5), (33, 3, 2), (64, 4, 1), (15, 7, 3), (100, 21, 2))


BLOCKS = torch.zeros(2, 1, 18, dtype=torch.uint8)


def bits(numbers: torch.Tensor) -> torch.Tensor:
    return numbers.view({2: torch.int16, 4: torch.int32}[numbers.element_size()])


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", FORMATS)
def test_numbers_are_those_of_the_gguf_package(name, rows, level):
    blocks = random_blocks(name, rows, 3)
    packed, expected = pack(blocks), torch.from_numpy(numbers_of(blocks, name))
    assert (format_of(packed).name, packed_columns(packed)) == (name, expected.shape[1])
    for dtype in DTYPES:
        assert torch.equal(bits(unpack(packed, dtype)), bits(expected.to(dtype)))
    some = torch.tensor([rows - 1, 0, rows // 2])
    assert torch.equal(unpack(packed, torch.float32, some), expected[some])


@pytest.mark.parametrize("name", FORMATS)
def test_any_block_is_read_as_the_gguf_package_reads_it(name, level):
    """Scales that are no numbers included."""
    blocks = torch.from_numpy(
        np.random.default_rng(1).integers(0, 256, (64, 4, BLOCK_FORMATS[name].bytes), np.uint8)
    )
    with np.errstate(all="ignore"):
        expected = torch.from_numpy(numbers_of(blocks, name))
    given = unpack(pack(blocks), torch.float32)
    assert torch.equal(given.isnan(), expected.isnan())
    assert torch.equal(bits(given.nan_to_num(0)), bits(expected.nan_to_num(0)))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", FORMATS)
def test_the_kernels_pack_as_the_definition_says(name, rows):
    blocks, order = random_blocks(name, rows, 2), torch.randperm(rows)
    for which in (None, order, order[: rows // 2 + 1]):
        packed = pack(blocks, which)
        assert torch.equal(packed, reference.pack(blocks, which))
        exact = reference.unpack(packed, torch.float32)
        assert torch.equal(unpack(packed, torch.float32), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMATS)
def test_products_are_those_of_rounded_rows(name, dtype, level):
    for rows, of_x, blocks in [
        (1, 1, 1),
        (16, 1, 5),
        (33, 3, 2),
        (64, 4, 1),
        (15, 7, 3),
        (100, 21, 2),
    ]:
        matrix = random_blocks(name, rows, blocks)
        packed, exact = pack(matrix), numbers_of(matrix, name).astype(np.float64)
        x = torch.randn(of_x, exact.shape[1]).to(dtype)
        bias = torch.randn(rows).to(dtype)
        (given,) = cpu.linear(x, [packed], [bias])
        expected = torch.from_numpy(rounded(x) @ exact.T) + bias.double()
        assert given.dtype == dtype
        tol = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
        size = float(expected.square().mean().sqrt())
        torch.testing.assert_close(given.double(), expected, atol=tol * size, rtol=tol)


@pytest.mark.parametrize("name", FORMATS)
def test_many_rows_give_what_few_do(name, level, threads):
    """In one bit: a prompt and a step agree, whatever the number of threads."""
    packed = pack(random_blocks(name, 130, 2))
    x = torch.randn(300, packed_columns(packed))
    threads(1)
    (many,) = cpu.linear(x, [packed], [None])
    threads(3)
    assert torch.equal(cpu.linear(x, [packed], [None])[0], many)
    few = torch.cat([cpu.linear(part, [packed], [None])[0] for part in x.split(5)])
    torch.testing.assert_close(few, many, atol=1e-5, rtol=1e-5)


def test_formats_may_differ_and_lists_are_one_call(level):
    formats = [pack(random_blocks(name, 64, 1)) for name in ("Q4_K", "Q6_K", "Q5_K")]
    formats.append(pack(random_blocks("Q8_0", 17, 8)))
    x = torch.randn(2, 256)
    for packed, given in zip(formats, cpu.linear(x, formats, [None] * 4), strict=True):
        assert torch.equal(given, cpu.linear(x, [packed], [None])[0])


@pytest.mark.parametrize("name", FORMATS)
def test_no_number_stays_no_number(name, level):
    """In x: in all of its row; in a scale: in the weight's row."""
    matrix = random_blocks(name, 20, 2)
    x = torch.randn(3, 2 * BLOCK_FORMATS[name].columns)
    x[1, 5] = float("nan")
    x[2, 40 % x.shape[1]] = float("inf")
    (given,) = cpu.linear(x, [pack(matrix)], [None])
    assert not given[0].isnan().any()
    assert given[1:].isnan().all()
    offset = next(offset for offset, size in BLOCK_FORMATS[name].units() if size == 2)
    matrix[7, 1, offset : offset + 2] = torch.tensor([0, 0x7E], dtype=torch.uint8)
    (given,) = cpu.linear(x[:1], [pack(matrix)], [None])
    assert given[0].isnan().nonzero().flatten().tolist() == [7]


def test_rows_of_zeros_and_of_tiny_numbers_give_zeros(level):
    packed = pack(random_blocks("Q4_0", 16, 1))
    for x in (torch.zeros(1, 32), torch.full((1, 32), 1e-36)):
        assert not cpu.linear(x, [packed], [None])[0].any()


@pytest.mark.parametrize("bits_", [4, 8])
def test_weights_are_rounded_to_the_nearest_that_the_format_has(bits_):
    weight = torch.randn(70, 96)
    packed = round_blocks(weight, bits_)
    assert format_of(packed).name == {4: "Q4_1", 8: "Q8_0"}[bits_]
    error = (unpack(packed, torch.float32) - weight).unflatten(1, (-1, 32)).abs().amax(-1)
    groups = weight.unflatten(1, (-1, 32))
    # half a step of the whole range; in 4 bits ends may be cut off by a tenth of it
    reach = (groups.amax(-1) - groups.amin(-1)) if bits_ == 4 else 2 * groups.abs().amax(-1)
    assert (error <= reach * (0.11 if bits_ == 4 else 0.502 / 254)).all()
    assert not unpack(round_blocks(torch.zeros(2, 32), bits_), torch.float32).any()


def test_weights_in_4_bits_are_better_than_their_whole_range():
    weight = torch.randn(64, 256)
    groups = weight.unflatten(1, (-1, 32))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = (high - low) / 15
    whole = (((groups - low) / step).round() * step + low).flatten(1)
    error = (unpack(round_blocks(weight, 4), torch.float32) - weight).square().mean()
    assert error < (whole - weight).square().mean()


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: pack(torch.zeros(2, 3, 19, dtype=torch.uint8)), "expected uint8"),
        (lambda: pack(torch.zeros(2, 3, 18)), "float32"),
        (lambda: unpack(torch.zeros(2, 18, dtype=torch.uint8), torch.float32), r"\[2, 18\]"),
        (lambda: unpack(BLOCKS, torch.float32, torch.tensor([0.5])), "rows are float32"),
        (lambda: unpack(BLOCKS, torch.float32, torch.tensor([[1]])), r"int64 \[1, 1\]"),
        (lambda: pack(BLOCKS, torch.tensor([True])), "order is bool"),
        (lambda: round_blocks(torch.zeros(2, 32), 5), "expected 4 or 8"),
        (lambda: round_blocks(torch.zeros(2, 33), 8), "a multiple of 32"),
    ],
)
def test_what_is_no_packed_matrix_is_refused_in_one_line(call, said):
    with pytest.raises(ShapeError, match=said) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_rows_that_are_not_there_are_refused_without_kernels_too():
    for row in (-1, 2):
        with pytest.raises(IndexError, match="expected 0 to 1"):
            unpack(BLOCKS, torch.float64, torch.tensor([row]))


def test_the_native_operators_check_what_they_are_given():
    packed, x = pack(random_blocks("Q4_0", 16, 2)), torch.randn(1, 64)
    native = torch.ops.headwise
    for call in (
        lambda: native.linear(x[:, :32], [packed], [None], 0),
        lambda: native.linear(x, [packed, torch.randn(4, 64)], [None, None], 0),
        lambda: native.linear(x, [packed.transpose(0, 1)], [None], 0),
        lambda: native.linear(x, [packed[..., :17]], [None], 0),
        lambda: native.linear(x, [packed], [torch.randn(15)], 0),
        lambda: native.unpack(packed, x, torch.tensor([16]), 0),
        lambda: native.unpack(packed, x, torch.tensor([-1]), 0),
        lambda: native.unpack(packed, x.double(), None, 0),
        lambda: native.pack(packed, torch.tensor([99])),
    ):
        with pytest.raises(RuntimeError, match=r"headwise::\w+: "):
            call()
    assert faster("linear", x[:, :32], (packed,), (None,)) is None
    assert faster("linear", x, (packed, torch.randn(4, 64)), (None, None)) is None


def test_native_operators_pass_opcheck():
    blocks = random_blocks("Q5_K", 17, 1)
    packed = pack(blocks)
    checks = ("test_schema", "test_faketensor")
    native = torch.ops.headwise
    torch.library.opcheck(native.pack.default, (blocks, None), test_utils=checks)
    torch.library.opcheck(
        native.unpack.default, (packed, torch.empty(0), None, 0), test_utils=checks
    )
    x = torch.randn(2, 256)
    torch.library.opcheck(native.linear.default, (x, [packed], [None], 0), test_utils=checks)
    assert torch.equal(copy.deepcopy(packed), packed)
