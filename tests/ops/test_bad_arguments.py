"""What does not fit together gets one line that says what was given and what was expected."""

import copy
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headwise import HeadwiseError, ShapeError, UnsupportedError, attention, latent_attention
from ops.calls import Call, assert_agree, attention_calls

B, H, K, S, L, D, V = 2, 6, 3, 5, 11, 7, 13
N, P, R = 7, 2, 17


def attention_call(**changes):
    """`attention` of a good call but for `changes`."""
    good = {
        "query": torch.randn(B, H, S, D),
        "key": torch.randn(B, K, L, D),
        "value": torch.randn(B, K, L, V),
    }
    return attention(**(good | changes))


def latent_call(**changes):
    """`latent_attention` of a good call but for `changes`."""
    good = {
        "query_nope": torch.randn(B, H, S, N),
        "query_rope": torch.randn(B, H, S, P),
        "latent": torch.randn(B, L, R),
        "key_rope": torch.randn(B, L, P),
        "w_uk": torch.randn(H, N, R),
        "w_uv": torch.randn(H, V, R),
    }
    return latent_attention(**(good | changes))


def ones(*shape, dtype=torch.float32, device="cpu"):
    return torch.ones(*shape, dtype=dtype, device=device)


def chosen(*shape, fill=1):
    return torch.full(shape, fill, dtype=torch.int32)


whole = torch.int64
BAD_ATTENTION = {
    "query is not a tensor": ({"query": [1.0]}, "query is a list, expected a tensor"),
    "query is None": ({"query": None}, "query is a NoneType"),
    "key is not a tensor": ({"key": 3.0}, "key is a float"),
    "query has 3 dims": ({"query": ones(H, S, D)}, "query has shape [6, 5, 7], expected 4 dims"),
    "query has no dims": ({"query": torch.tensor(1.0)}, "query has shape [], expected 4 dims"),
    "value has 5 dims": ({"value": ones(B, K, L, V, 1)}, "value has shape [2, 3, 11, 13, 1]"),
    "query of integers": ({"query": ones(B, H, S, D, dtype=whole)}, "query has dtype torch.int64"),
    "key of another dtype": (
        {"key": ones(B, K, L, D, dtype=torch.bfloat16)},
        "key has dtype torch.bfloat16 and query torch.float32: convert one, as key.to(query.dtype)",
    ),
    "value of another dtype": ({"value": ones(B, K, L, V).double()}, "value has dtype"),
    "key elsewhere": ({"key": ones(B, K, L, D, device="meta")}, "key is on meta and query on cpu"),
    "key of another batch": (
        {"key": ones(3, K, L, D)},
        "key has shape [3, 3, 11, 7], expected [B, K, L, D] with B=2 and D=7",
    ),
    "key of another head dim": ({"key": ones(B, K, L, 5)}, "key has shape [2, 3, 11, 5], expected"),
    "value of another context": (
        {"value": ones(B, K, 10, V)},
        "value has shape [2, 3, 10, 13], expected [B, K, L, V] with the same B, K and L as key",
    ),
    "value of other kv heads": ({"value": ones(B, 2, L, V)}, "value has shape [2, 2, 11, 13]"),
    "value of another batch": ({"value": ones(1, K, L, V)}, "value has shape [1, 3, 11, 13]"),
    "heads no multiple of kv heads": (
        {"query": ones(B, 7, S, D)},
        "query has 7 heads and key has 3: the query heads must be a multiple of the kv heads",
    ),
    "fewer heads than kv heads": ({"query": ones(B, 2, S, D)}, "query has 2 heads and key has 3"),
    "no kv heads": (
        {"key": ones(B, 0, L, D), "value": ones(B, 0, L, V)},
        "query has 6 heads and key has 0",
    ),
    "head dim of 0": (
        {"query": ones(B, H, S, 0), "key": ones(B, K, L, 0)},
        "head dims of 0 are not attention",
    ),
    "value dim of 0": ({"value": ones(B, K, L, 0)}, "head dims of 0"),
    "window without causal": (
        {"window": 3},
        "window needs causal=True: give a symmetric window as a mask",
    ),
    "window of 0": ({"window": 0, "causal": True}, "window is 0, expected an int of at least 1"),
    "negative window": ({"window": -3, "causal": True}, "window is -3"),
    "half a window": ({"window": 2.5, "causal": True}, "window is 2.5"),
    "window of True": ({"window": True, "causal": True}, "window is True"),
    "window past int64": ({"window": 2**70, "causal": True}, "window is 1180591620717411303424"),
    "softcap of 0": ({"softcap": 0}, "softcap is 0, expected a finite number above 0"),
    "negative softcap": ({"softcap": -1.0}, "softcap is -1.0"),
    "infinite softcap": ({"softcap": math.inf}, "softcap is inf"),
    "softcap of NaN": ({"softcap": math.nan}, "softcap is nan"),
    "softcap of text": ({"softcap": "30"}, "softcap is '30'"),
    "scale of NaN": ({"scale": math.nan}, "scale is nan, expected a finite number"),
    "infinite scale": ({"scale": -math.inf}, "scale is -inf"),
    "scale of text": ({"scale": "auto"}, "scale is 'auto'"),
    "float mask as mask": (
        {"mask": ones(1, 1, S, L)},
        "mask has dtype torch.float32, expected torch.bool (True = attend): pass an additive float "
        "mask as bias=",
    ),
    "integer mask": ({"mask": ones(1, 1, S, L, dtype=whole)}, "mask has dtype torch.int64"),
    "mask of 2 dims that does not broadcast": (
        {"mask": ones(2, L, dtype=torch.bool)},
        "mask has shape [2, 11], expected one that broadcasts to [B, H, S, L] = [2, 6, 5, 11]",
    ),
    "mask of 3 dims, per sequence": (
        {"mask": ones(2, S, L, dtype=torch.bool)},
        "mask has shape [2, 5, 11], expected one that broadcasts",
    ),
    "mask of 5 dims": ({"mask": ones(1, 1, 1, S, L, dtype=torch.bool)}, "mask has shape [1, 1, 1,"),
    "mask of another context": (
        {"mask": ones(1, 1, S, 10, dtype=torch.bool)},
        "mask has shape [1, 1, 5, 10]",
    ),
    "mask per kv head": ({"mask": ones(1, K, S, L, dtype=torch.bool)}, "mask has shape [1, 3,"),
    "mask is a list": ({"mask": [[True]]}, "mask is a list, expected a tensor"),
    "mask elsewhere": (
        {"mask": ones(1, 1, S, L, dtype=torch.bool, device="meta")},
        "mask is on meta and query on cpu",
    ),
    "boolean bias": (
        {"bias": ones(1, 1, S, L, dtype=torch.bool)},
        "bias has dtype torch.bool, expected a floating dtype",
    ),
    "bias of another length": ({"bias": ones(1, 1, 4, L)}, "bias has shape [1, 1, 4, 11]"),
    "bias is a number": ({"bias": 0.5}, "bias is a float, expected a tensor"),
    "sinks per kv head": (
        {"sinks": ones(K)},
        "sinks has shape [3] on cpu, expected [6] (one per query head) on cpu",
    ),
    "sinks of 2 dims": ({"sinks": ones(1, H)}, "sinks has shape [1, 6], expected 1 dims"),
    "query is sparse": (
        {"query": ones(B, H, S, D).to_sparse()},
        "query has layout torch.sparse_coo, expected a dense tensor",
    ),
    "sinks is a list": ({"sinks": [0.0] * H}, "sinks is a list"),
    "sinks elsewhere": ({"sinks": ones(H, device="meta")}, "sinks has shape [6] on meta"),
    "ALiBi slopes per kv head": ({"alibi_slopes": ones(K)}, "alibi_slopes has shape [3]"),
    "ALiBi slopes is a number": ({"alibi_slopes": 0.5}, "alibi_slopes is a float"),
    "lengths of floats": (
        {"kv_lengths": ones(B)},
        "kv_lengths has shape [2] and dtype torch.float32, expected [2] (one per sequence) of "
        "int32 or int64",
    ),
    "lengths of another batch": ({"kv_lengths": ones(3, dtype=whole)}, "kv_lengths has shape [3]"),
    "lengths of 2 dims": ({"kv_lengths": ones(B, 1, dtype=whole)}, "kv_lengths has shape [2, 1]"),
    "a length past the keys": (
        {"kv_lengths": torch.tensor([3, 12])},
        "kv_lengths run from 3 to 12, expected 0 to L=11, the keys given",
    ),
    "a negative length": ({"kv_lengths": torch.tensor([-1, 5])}, "kv_lengths run from -1 to 5"),
    "chosen keys as int64": (
        {"indices": ones(B, 1, S, 4, dtype=whole)},
        "indices has shape [2, 1, 5, 4] and dtype torch.int64 on cpu, expected [2, 1 or 3, 5, any] "
        "of torch.int32 on cpu",
    ),
    "chosen keys of the query heads": ({"indices": chosen(B, H, S, 4)}, "indices has shape [2, 6,"),
    "chosen keys of 3 dims": (
        {"indices": chosen(B, S, 4)},
        "indices has shape [2, 5, 4], expected 4",
    ),
    "chosen keys of one query": ({"indices": chosen(B, 1, 1, 4)}, "indices has shape [2, 1, 1, 4]"),
    "chosen keys elsewhere": (
        {"indices": chosen(B, 1, S, 4).to("meta")},
        "indices has shape [2, 1, 5, 4] and dtype torch.int32 on meta",
    ),
    "a chosen key past the last": (
        {"indices": chosen(B, 1, S, 4, fill=11)},
        "indices run from 11 to 11, expected -1 (none) to 10, the keys given",
    ),
    "a chosen key below none": ({"indices": chosen(B, 1, S, 4, fill=-2)}, "indices run from -2 to"),
    "chosen keys is a list": ({"indices": [1]}, "indices is a list"),
    "chosen blocks without a size": (
        {"block_indices": chosen(B, 1, S, 4)},
        "block_size is None with block_indices: give both or neither",
    ),
    "a size without chosen blocks": (
        {"block_size": 4},
        "block_size is 4 without block_indices: give both or neither",
    ),
    "blocks of no size": (
        {"block_indices": chosen(B, 1, S, 4), "block_size": 0},
        "block_size is 0, expected an int of at least 1",
    ),
    "a chosen block past the last": (
        {"block_indices": chosen(B, K, S, 4, fill=3), "block_size": 4},
        "block_indices run from 3 to 3, expected -1 (none) to 2, the blocks of 4 keys given",
    ),
    "keys and blocks chosen": (
        {"indices": chosen(B, 1, S, 4), "block_indices": chosen(B, 1, S, 4), "block_size": 4},
        "indices and block_indices both choose keys: give one of them",
    ),
    "lengths is a list": ({"kv_lengths": [3, 5]}, "kv_lengths is a list"),
    "lengths elsewhere": (
        {"kv_lengths": ones(B, dtype=whole, device="meta")},
        "kv_lengths is on meta and query on cpu",
    ),
}

BAD_LATENT = {
    "query_nope is not a tensor": ({"query_nope": 1}, "query_nope is a int"),
    "w_uv is None": ({"w_uv": None}, "w_uv is a NoneType, expected a tensor"),
    "latent of 4 dims": (
        {"latent": ones(B, 1, L, R)},
        "latent has shape [2, 1, 11, 17], expected 3",
    ),
    "query_rope of 3 dims": ({"query_rope": ones(B, H, P)}, "query_rope has shape [2, 6, 2]"),
    "latent of another dtype": (
        {"latent": ones(B, L, R).double()},
        "latent has dtype torch.float64",
    ),
    "weights of another dtype": ({"w_uk": ones(H, N, R).half()}, "w_uk has dtype torch.float16"),
    "query_rope of other heads": (
        {"query_rope": ones(B, 5, S, P)},
        "query_rope has shape [2, 5, 5, 2], expected [2, 6, 5, 2] to fit query_nope",
    ),
    "latent of another batch": ({"latent": ones(3, L, R)}, "latent has shape [3, 11, 17]"),
    "key_rope of another context": ({"key_rope": ones(B, 10, P)}, "key_rope has shape [2, 10, 2]"),
    "key_rope of another dim": ({"key_rope": ones(B, L, 3)}, "key_rope has shape [2, 11, 3]"),
    "w_uk of another rank": ({"w_uk": ones(H, N, 19)}, "w_uk has shape [6, 7, 19]"),
    "w_uk transposed": ({"w_uk": ones(H, R, N)}, "w_uk has shape [6, 17, 7], expected [6, 7, 17]"),
    "w_uv of other heads": ({"w_uv": ones(5, V, R)}, "w_uv has shape [5, 13, 17]"),
    "keys of dim 0": (
        {
            "query_nope": ones(B, H, S, 0),
            "query_rope": ones(B, H, S, 0),
            "key_rope": ones(B, L, 0),
            "w_uk": ones(H, 0, R),
        },
        "w_uk has shape [6, 0, 17], w_uv [6, 13, 17] and key_rope [2, 11, 0], expected N + P",
    ),
    "value dim of 0": ({"w_uv": ones(H, 0, R)}, "expected N + P, V and R of at least 1"),
    "rank of 0": (
        {"latent": ones(B, L, 0), "w_uk": ones(H, N, 0), "w_uv": ones(H, V, 0)},
        "expected N + P, V and R of at least 1",
    ),
    "unknown paradigm": (
        {"paradigm": "fast"},
        "paradigm is 'fast', expected one of 'auto', 'expanded', 'absorbed'",
    ),
    "scale of NaN": ({"scale": math.nan}, "scale is nan"),
    "float mask": ({"mask": ones(1, 1, S, L)}, "mask has dtype torch.float32"),
    "chosen tokens of each head": (
        {"indices": chosen(B, H, S, 4)},
        "indices has shape [2, 6, 5, 4], expected [B, 1, S, T]: all heads attend to the same",
    ),
    "a chosen token past the last": (
        {"indices": chosen(B, 1, S, 4, fill=11)},
        "indices run from 11",
    ),
    "window without causal": ({"window": 3}, "window needs causal=True"),
    "sinks of other heads": ({"sinks": ones(5)}, "sinks has shape [5] on cpu, expected [6]"),
    "a length past the latents": ({"kv_lengths": torch.tensor([1, 12])}, "expected 0 to L=11"),
    "lengths of floats": ({"kv_lengths": ones(B)}, "kv_lengths has shape [2] and dtype"),
}


@pytest.mark.parametrize("name", BAD_ATTENTION)
def test_bad_argument_of_attention_is_refused_in_one_line(name):
    changes, message = BAD_ATTENTION[name]
    with pytest.raises(ShapeError, match=re.escape(message)) as caught:
        attention_call(**changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("paradigm", ["auto", "expanded", "absorbed"])
@pytest.mark.parametrize("name", BAD_LATENT)
def test_bad_argument_of_latent_attention_is_refused_in_one_line(name, paradigm):
    changes, message = BAD_LATENT[name]
    with pytest.raises(ShapeError, match=re.escape(message)) as caught:
        latent_call(**({"paradigm": paradigm} | changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("call", [attention_call, latent_call])
@pytest.mark.parametrize("backend", ["flash", "", "Torch", "cuda"])
def test_unknown_backend_is_refused_with_the_known_names(call, backend):
    message = f"no backend is called {backend!r}: choose one of cpu, torch, reference"
    with pytest.raises(UnsupportedError, match=re.escape(message)):
        call(backend=backend)


def other_tensor(tensor: Tensor, how: int) -> object:
    """Something else in a tensor's place; sometimes it happens to fit."""
    # poison past a length would be moved to where it may be read
    tensor = tensor.nan_to_num(0, 0, 0)
    if how == 0:
        return None
    if how == 1:
        return tensor.tolist()
    if how == 2:
        return tensor.squeeze(0)
    if how == 3:
        return tensor.to(torch.float16)
    if how == 4:
        return tensor.to(torch.int64)
    if how == 5:
        return tensor.to("meta")
    if how == 6:
        return torch.cat([tensor, tensor])
    if how == 7:
        return tensor[..., :1]
    return tensor.transpose(1, -2) if tensor.ndim > 2 else tensor.unsqueeze(0)


ODD_OPTIONS = {
    "window": [0, -1, 2.0, True, 2**63, 2**63 - 1, "2"],
    "softcap": [0, -2.0, math.nan, math.inf, "1", 1e-30, 1e30],
    "scale": [math.nan, math.inf, "1", None, -3.0, 0],
    "mask": [torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1, dtype=torch.bool), True],
    "bias": [torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1, dtype=torch.int64), torch.zeros(3)],
    "kv_lengths": [torch.tensor([0]), torch.tensor([-1]), torch.tensor([1.0]), [1], 2],
    "indices": [chosen(1, 1, 1, 2, fill=-1), chosen(1, 1, 1, 1, fill=5), torch.zeros(1), None],
    "block_size": [0, 1, 2.0, None, 7],
    "sinks": [torch.zeros(2), torch.zeros(0), 0.0],
    "alibi_slopes": [torch.zeros(2), torch.zeros(1, 1), None],
}


@settings(max_examples=400)
@given(call=attention_calls(), data=st.data())
def test_a_spoiled_call_agrees_with_the_reference_or_is_refused_alike(call, data):
    call = copy.copy(call)
    for _ in range(data.draw(st.integers(1, 2))):
        if data.draw(st.booleans()):
            name = data.draw(st.sampled_from(["query", "key", "value"]))
            tensor = call.tensors[name]
            if isinstance(tensor, Tensor) and not tensor.is_meta:
                call.tensors[name] = other_tensor(tensor, data.draw(st.integers(0, 8)))
        else:
            name = data.draw(st.sampled_from(sorted(ODD_OPTIONS)))
            call.options[name] = data.draw(st.sampled_from(ODD_OPTIONS[name]))
    expected = answer(call, "reference")
    # None: whichever is chosen, which is the C++ kernels where they serve the call
    for result in (answer(call, "torch"), answer(call, None)):
        if isinstance(expected, str):
            assert result == expected
            assert "\n" not in expected
        else:
            options = {name: value for name, value in call.options.items() if value is not None}
            assert_agree(result, expected, Call(call.tensors, options))


def answer(call: Call, backend: str | None):
    """What the call returns, or the message of our error; another error passes through."""
    try:
        return call.run(attention, backend=backend)
    except HeadwiseError as error:
        return str(error)


def test_chosen_keys_may_lie_anyhow_and_blocks_be_larger_than_the_context():
    query, key = torch.randn(2, 4, 9, 24), torch.randn(2, 2, 33, 24)
    indices = torch.randint(-1, 33, (2, 1, 9, 5), dtype=torch.int32)
    apart = indices.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert torch.equal(
        attention(query, key, key, indices=apart), attention(query, key, key, indices=indices)
    )
    blocks = torch.zeros(2, 1, 9, 1, dtype=torch.int32)
    for backend in ("cpu", "torch", "reference"):
        whole = attention(query, key, key, backend=backend)
        one = {"block_indices": blocks, "block_size": 2**31 - 1, "backend": backend}
        torch.testing.assert_close(attention(query, key, key, **one), whole)
