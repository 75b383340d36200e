"""Random calls of `attention` for hypothesis, ways to spoil them, and how close two answers are."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Call:
    """The arguments of one call, by name."""

    tensors: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)

    def run(self, operator, **more):
        return operator(*self.tensors.values(), **self.options, **more)

    def __repr__(self) -> str:
        def short(value):
            return f"{list(value.shape)} {value.dtype}" if isinstance(value, Tensor) else value

        return repr({name: short(value) for name, value in (self.tensors | self.options).items()})


def tolerance(call: Call) -> tuple[float, float]:
    """How far two right answers may be apart: of the output, of the lse.

    A score is a sum of D products of at most M = |q||k||scale| in all, plus bias and ALiBi; it is
    off by less than (D + 4) eps M, computed twice. A weight is off by that, relatively, and the
    output is L of them times the values. In half precision the weights and the output may be
    rounded to the dtype as well: 2 eps of it.
    """
    query, key, value = (tensor.detach().double() for tensor in call.tensors.values())
    key, value = key.nan_to_num(0, 0, 0), value.nan_to_num(0, 0, 0)
    dim, context, dtype = query.shape[3], key.shape[2], call.tensors["query"].dtype
    scale = call.options.get("scale")
    largest = abs(dim**-0.5 if scale is None else scale) * top(query.norm(dim=-1))
    largest *= top(key.norm(dim=-1))
    if "bias" in call.options:
        bias = call.options["bias"].double()
        largest += top(bias[bias.isfinite()].abs())
    if "alibi_slopes" in call.options:
        slopes = call.options["alibi_slopes"].double()
        largest += top(slopes.abs()) * (context + query.shape[2])
    exact = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    score = exact * (2 * (dim + 4) * (1 + largest) + context + 4)
    return (score + 2 * torch.finfo(dtype).eps) * (1 + top(value.abs())), score


def top(tensor: Tensor) -> float:
    return float(tensor.max()) if tensor.numel() else 0.0


def assert_agree(given, expected, call: Call) -> None:
    """Equal within `tolerance`, in the same dtypes, and without a NaN."""
    out_tolerance, lse_tolerance = tolerance(call)
    if not isinstance(given, tuple):
        given, expected = (given,), (expected,)
    for one, other, tol in zip(given, expected, (out_tolerance, lse_tolerance)):
        assert not one.isnan().any()
        torch.testing.assert_close(one, other, atol=tol, rtol=tol)


def lay_out(tensor: Tensor, layout: str) -> Tensor:
    """The same numbers elsewhere in memory."""
    if layout == "heads inside":  # [B, S, H, D] seen as [B, H, S, D]
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "part of a buffer":
        buffer = tensor.new_full(
            (*tensor.shape[:2], tensor.shape[2] + 3, tensor.shape[3]), math.nan
        )
        buffer[:, :, 1:-2] = tensor
        return buffer[:, :, 1:-2]
    if layout == "every other element":
        buffer = tensor.new_full((*tensor.shape[:3], 2 * tensor.shape[3]), math.nan)
        buffer[..., ::2] = tensor
        return buffer[..., ::2]
    return tensor.contiguous()


layouts = st.sampled_from(["contiguous", "heads inside", "part of a buffer", "every other element"])


@st.composite
def attention_calls(draw) -> Call:
    """A valid call: any shape, dtype, layout and mix of options."""
    torch.manual_seed(draw(st.integers(0, 2**32 - 1)))
    batch = draw(st.sampled_from([1, 2, 3, 1, 2, 3, 0]))
    kv_heads, group = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 1, 2, 5]))
    context = draw(st.integers(0, 13))
    length = draw(st.sampled_from([1, 1, 2, 5, context, context + 2, 0]))
    dim = draw(st.sampled_from([1, 4, 7]))
    value_dim = draw(st.sampled_from([dim, dim, 3]))
    dtype, heads = draw(st.sampled_from(DTYPES)), kv_heads * group

    def some(chance=0.3):
        return draw(st.integers(0, 9)) < 10 * chance

    def partial(*shape):
        return [size if some(0.6) else 1 for size in shape]

    query = torch.randn(batch, heads, length, dim).to(dtype)
    key = torch.randn(batch, kv_heads, context, dim).to(dtype)
    value = torch.randn(batch, kv_heads, context, value_dim).to(dtype)
    full, options = (batch, heads, length, context), {}
    if some(0.6):
        options["causal"] = True
        if some(0.4):
            options["window"] = draw(st.sampled_from([1, 2, 4, 100, 2**62]))
    if some():
        options["scale"] = draw(st.sampled_from([0.3, 1, 0.0, -0.7]))
    if some(0.2):
        options["sinks"] = torch.randn(heads, dtype=draw(st.sampled_from(DTYPES)))
    if some(0.2):
        options["softcap"] = draw(st.sampled_from([2.0, 0.1, 30]))
    if some(0.2):
        options["alibi_slopes"] = torch.randn(heads)
    if some():
        options["bias"] = torch.randn(partial(*full)).to(draw(st.sampled_from(DTYPES)))
        if some():
            options["bias"] = options["bias"].masked_fill(options["bias"] < -0.5, -math.inf)
    if some():
        options["mask"] = torch.rand(partial(*full)) < 0.6
    if some(0.25):
        size = draw(st.sampled_from([None, None, 1, 3, 8]))
        last = context if size is None else -(-context // size)
        shape = (batch, draw(st.sampled_from([1, kv_heads])), length, draw(st.integers(0, 9)))
        chosen = torch.randint(-1, last, shape, dtype=torch.int32)  # with repeats
        options |= (
            {"indices": chosen} if size is None else {"block_indices": chosen, "block_size": size}
        )
    if some():
        integers = draw(st.sampled_from([torch.int32, torch.int64]))
        options["kv_lengths"] = torch.randint(0, context + 1, (batch,)).to(integers)
        for index, held in enumerate(options["kv_lengths"].tolist()):
            key[index, :, held:] = draw(st.sampled_from([math.nan, math.inf]))
            value[index, :, held:] = math.nan
    if some(0.4):
        options["return_lse"] = True
    tensors = {"query": query, "key": key, "value": value}
    return Call({name: lay_out(tensor, draw(layouts)) for name, tensor in tensors.items()}, options)
