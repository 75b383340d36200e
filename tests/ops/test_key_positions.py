"""Keys with positions of their own, and parts of a context put together: against whole contexts."""

from typing import Any

import pytest
import torch
from torch import Tensor

import headwise
from headwise.caches import ContiguousCache, PagedCache, QuantizedCache, Share, SplitCache
from headwise.ops.attend import by_position

CONTEXT, BATCH, HEADS, KV_HEADS, DIM, VALUE_DIM = 41, 2, 6, 2, 16, 24
BACKENDS = ("cpu", "torch", "reference")
# queries, and options beside
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "a step": (1, {}),
    "a step with a window": (1, {"window": 9}),
    "few queries": (5, {}),
    "few queries with a window": (5, {"window": 3}),
    "a prompt": (CONTEXT, {}),
    "a prompt with a window": (CONTEXT, {"window": 7}),
    "more queries than keys": (CONTEXT + 4, {}),
    "cap, bias and mask": (6, {"softcap": 3.0, "bias": True, "mask": True}),
    "sinks": (6, {"sinks": True, "window": 11}),
}


def _tensors(queries: int, asked: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    query = torch.randn(BATCH, HEADS, queries, DIM)
    key = torch.randn(BATCH, KV_HEADS, CONTEXT, DIM)
    value = torch.randn(BATCH, KV_HEADS, CONTEXT, VALUE_DIM)
    options = dict(asked)
    if "bias" in asked:
        options["bias"] = torch.randn(1, HEADS, queries, CONTEXT)
    if "mask" in asked:
        options["mask"] = torch.rand(BATCH, 1, queries, CONTEXT) < 0.7
    if "sinks" in asked:
        options["sinks"] = torch.randn(HEADS)
    return query, key, value, options


def _own(options: dict[str, Any], at: Tensor) -> dict[str, Any]:
    """The options over some keys alone."""
    cut = {name: options[name][..., at] for name in ("bias", "mask") if name in options}
    return options | cut


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_keys_at_their_positions_are_as_the_others_hidden(
    case: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(by_position, "_ROWS", 16)
    query, key, value, options = _tensors(*CASES[case])
    for rank in range(3):
        at = Share(rank, 3, 4).positions(CONTEXT)
        given = _own(options, at) | {"key_positions": at - (CONTEXT - 1)}
        out, lse = headwise.attention(
            *(query, key[:, :, at], value[:, :, at]),
            causal=True,
            return_lse=True,
            backend=backend,
            **given,
        )
        hidden = torch.zeros(CONTEXT, dtype=torch.bool)
        hidden[at] = True
        mask = hidden if "mask" not in options else options["mask"] & hidden
        expected, its_lse = headwise.attention(
            *(query, key, value),
            causal=True,
            return_lse=True,
            backend="reference",
            **(options | {"mask": mask}),
        )
        torch.testing.assert_close(out, expected, atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(lse, its_lse, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("case", CASES)
def test_the_parts_of_all_ranks_are_the_whole(case: str) -> None:
    query, key, value, options = _tensors(*CASES[case])
    sinks = options.pop("sinks", None)
    outs, lses = [], []
    for rank in range(3):  # blocks so long that the last rank has none
        at = Share(rank, 3, 25).positions(CONTEXT)
        given = _own(options, at) | {"key_positions": at - (CONTEXT - 1)}
        out, lse = headwise.attention(
            query, key[:, :, at], value[:, :, at], causal=True, return_lse=True, **given
        )
        outs.append(out)
        lses.append(lse)
    assert not outs[2].any()
    assert torch.isneginf(lses[2]).all()
    merged, lse = headwise.merge_attention(torch.stack(outs), torch.stack(lses), sinks=sinks)
    expected, its_lse = headwise.attention(
        query, key, value, causal=True, return_lse=True, sinks=sinks, **options
    )
    torch.testing.assert_close(merged, expected, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(lse, its_lse, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_parts_of_other_dtypes_are_summed_in_that_of_the_lse(dtype: torch.dtype) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    out = torch.randn(4, 1, 2, 3, 8).to(dtype)
    lse = torch.randn(4, 1, 2, 3, dtype=wide)
    merged, total = headwise.merge_attention(out, lse)
    share = lse.double().softmax(dim=0)
    expected = (share.unsqueeze(-1) * out.double()).sum(dim=0)
    torch.testing.assert_close(merged, expected.to(dtype))
    assert total.dtype == wide


@pytest.mark.parametrize(
    "make", [lambda: QuantizedCache(8), lambda: QuantizedCache(4), lambda: PagedCache(16)]
)
@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("window", [None, 12])
def test_views_take_positions(make: Any, queries: int, window: int | None) -> None:
    query = torch.randn(BATCH, HEADS, queries, DIM)
    key, value = (torch.randn(BATCH, KV_HEADS, CONTEXT, DIM) for _ in range(2))
    cache, share = make(), Share(1, 2, 8)
    at = share.positions(CONTEXT)
    kv = cache.append(key[:, :, at], value[:, :, at])
    rows = kv.dense(torch.float32)
    options: Any = {"causal": True, "window": window, "key_positions": at - (CONTEXT - 1)}
    expected = headwise.attention(query, *rows, backend="reference", **options)
    out = headwise.attention(query, kv=kv, **options)
    torch.testing.assert_close(out, expected, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("paradigm", ["absorbed", "expanded"])
@pytest.mark.parametrize("queries", [1, 5, CONTEXT])
def test_latents_take_positions(
    paradigm: Any, queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from headwise.ops.latent import parts

    monkeypatch.setattr(parts, "_MOST", 2**12)  # a prompt in parts
    heads, nope, rope, rank, dim = 4, 8, 4, 16, 12
    given = (torch.randn(1, heads, queries, nope), torch.randn(1, heads, queries, rope))
    latent, key_rope = torch.randn(1, CONTEXT, rank), torch.randn(1, CONTEXT, rope)
    weights = (torch.randn(heads, nope, rank), torch.randn(heads, dim, rank))
    options: Any = {"causal": True, "window": 20, "return_lse": True, "paradigm": paradigm}
    parted = []
    for one in range(2):
        at = Share(one, 2, 4).positions(CONTEXT)
        positions = at - (CONTEXT - 1)
        rows = latent[:, at], key_rope[:, at]
        parted.append(
            headwise.latent_attention(*given, *rows, *weights, key_positions=positions, **options)
        )
    outs, lses = (torch.stack(each) for each in zip(*parted))
    merged, lse = headwise.merge_attention(outs, lses)
    expected, its_lse = headwise.latent_attention(*given, latent, key_rope, *weights, **options)
    torch.testing.assert_close(merged, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(lse, its_lse, atol=1e-4, rtol=1e-4)


def test_gradients_reach_keys_at_their_positions() -> None:
    query = torch.randn(1, 2, 3, 8, requires_grad=True)
    key, value = (torch.randn(1, 2, 5, 8, requires_grad=True) for _ in range(2))
    positions = torch.tensor([-9, -4, -2, -1, 0])
    options: Any = {"causal": True, "key_positions": positions}
    headwise.attention(query, key, value, **options).square().sum().backward()
    own = [tensor.grad for tensor in (query, key, value)]
    for tensor in (query, key, value):
        tensor.grad = None
    headwise.attention(query, key, value, backend="reference", **options).square().sum().backward()
    for grad, tensor in zip(own, (query, key, value), strict=True):
        torch.testing.assert_close(grad, tensor.grad)


_GOOD = torch.tensor([-3, -2, 0])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"key_positions": [0, 1, 2]}, "key_positions is a list"),
        ({"key_positions": _GOOD[:2]}, r"shape \[2\] .* expected \[3\]"),
        ({"key_positions": _GOOD.int()}, "int64"),
        ({"key_positions": torch.tensor([-3, -3, 0])}, "do not increase"),
        ({"key_positions": _GOOD, "causal": False}, "needs causal=True"),
        ({"key_positions": _GOOD, "alibi_slopes": torch.ones(2)}, "beside alibi_slopes"),
        ({"key_positions": _GOOD, "kv_lengths": torch.tensor([3])}, "beside kv_lengths"),
        (
            {"key_positions": _GOOD, "indices": torch.zeros(1, 1, 1, 1, dtype=torch.int32)},
            "beside chosen keys",
        ),
    ],
)
def test_positions_that_do_not_fit_are_refused(options: dict[str, Any], words: str) -> None:
    query, key = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 3, 8)
    with pytest.raises(headwise.ShapeError, match=words):
        headwise.attention(query, key, key, **({"causal": True} | options))


@pytest.mark.parametrize(
    ("out", "lse", "words"),
    [
        (torch.zeros(2, 1, 2, 3), torch.zeros(2, 1, 2), "expected 5 dims"),
        (torch.zeros(2, 1, 2, 3, 8), torch.zeros(3, 1, 2, 3), "lse has shape"),
        (torch.zeros(0, 1, 2, 3, 8), torch.zeros(0, 1, 2, 3), "N of at least 1"),
        (torch.zeros(2, 1, 2, 3, 8), torch.zeros(2, 1, 2, 3, dtype=torch.float64), "lse torch"),
        (torch.zeros(2, 1, 2, 3, 8).int(), torch.zeros(2, 1, 2, 3), "out has dtype"),
    ],
)
def test_parts_that_do_not_fit_are_refused(out: Tensor, lse: Tensor, words: str) -> None:
    with pytest.raises(headwise.ShapeError, match=words):
        headwise.merge_attention(out, lse)


@pytest.mark.parametrize("make", [ContiguousCache, lambda: QuantizedCache(8), PagedCache])
def test_ranks_hold_every_token_once_through_all_changes(make: Any) -> None:
    torch.manual_seed(1)
    ranks, block = 3, 4
    caches = [SplitCache(make(), Share(rank, ranks, block)) for rank in range(ranks)]
    whole: Any = make()
    for step in range(40):
        change = torch.randint(0, 6, ()).item()
        if change == 0 and whole.length:
            length = int(torch.randint(0, whole.length + 1, ()))
            for cache in (*caches, whole):
                cache.crop(length)
        elif change == 1 and whole.length:
            index = torch.randint(0, 2, (2,))
            for cache in (*caches, whole):
                cache.reorder(index)
        else:
            tokens = torch.randn(2, 2, int(torch.randint(1, 9, ())), 8)
            for cache in (*caches, whole):
                cache.append(tokens, -tokens)
        rows = _rows(whole)
        if make is not PagedCache:  # whose sequences share pages where they were equal
            assert sum(cache.nbytes for cache in caches) == whole.nbytes
        for cache in caches:
            assert cache.length == whole.length
            assert cache.own.length <= whole.length / ranks + block
            if cache.own.length:
                for own, every in zip(_rows(cache.own), rows, strict=True):
                    assert torch.equal(own, every[:, :, cache.positions]), step
    for cache in caches:
        cache.reset()
        assert cache.nbytes == cache.length == 0


def _rows(cache: Any) -> tuple[Tensor, Tensor]:
    if cache.gives == "rows":
        return cache.first, cache.second
    rows: tuple[Tensor, Tensor] = cache.view.dense(torch.float32)
    return rows


def test_a_split_cache_is_refused_where_all_tokens_are_needed() -> None:
    from headwise.caches import WindowCache

    with pytest.raises(headwise.ShapeError, match="expected an empty one"):
        SplitCache(WindowCache(4), Share(0, 2))
    with pytest.raises(headwise.OptionError, match="rank 2 of 2"):
        Share(2, 2)
    spec = headwise.AttentionSpec(heads=2, kv_heads=1, head_dim=8, value_dim=8)
    layer = headwise.nn.Attention(spec, 16)
    with pytest.raises(headwise.ShapeError, match="gives a part of the tokens"):
        layer(torch.randn(1, 3, 16), cache=SplitCache(ContiguousCache(), Share(0, 2)))
