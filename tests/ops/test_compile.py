"""The operators inside torch.compile: one graph, equal to eager, compiled once."""

import pytest
import torch

from headwise import attention, latent_attention

B, H, K, L, D = 2, 6, 3, 11, 7

OPTIONS = {
    "nothing": lambda s: {},
    "causal": lambda s: {"causal": True},
    "window": lambda s: {"causal": True, "window": 4},
    "mask": lambda s: {"mask": torch.rand(B, 1, s, L) < 0.7},
    "bias and sinks": lambda s: {"bias": torch.randn(1, H, s, L), "sinks": torch.randn(H)},
    "lengths": lambda s: {"causal": True, "kv_lengths": torch.randint(0, L + 1, (B,))},
    "lengths and everything": lambda s: {
        "causal": True,
        "window": 5,
        "kv_lengths": torch.randint(0, L + 1, (B,)),
        "softcap": 2.0,
        "alibi_slopes": torch.rand(H),
        "mask": torch.rand(1, H, 1, L) < 0.8,
        "return_lse": True,
        "bias": torch.randn(1, 1, s, L),
    },
}


def once_compiled(function):
    """`function` compiled whole; a second compilation, or a break of the graph, is an error."""
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=False)


@pytest.mark.parametrize("length", [1, 5, L])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_compiled_attention_equals_eager_and_compiles_once(name, length, backend):
    compiled = once_compiled(attention)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            query, options = torch.randn(B, H, length, D), OPTIONS[name](length)
            key, value = torch.randn(2, B, K, L, D)
            given = compiled(query, key, value, **options, backend=backend)
            expected = attention(query, key, value, **options, backend=backend)
            # the same float32 sums, perhaps in another order
            torch.testing.assert_close(given, expected)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_bytes_past_a_length_do_not_matter_to_compiled_code(backend):
    compiled = once_compiled(attention)
    query, key, value = torch.randn(B, H, 1, D), torch.randn(B, K, L, D), torch.randn(B, K, L, D)
    kv_lengths = torch.tensor([4, 0])
    options = {"causal": True, "kv_lengths": kv_lengths, "backend": backend}
    expected = attention(query, key, value, **options)
    for index, length in enumerate(kv_lengths.tolist()):
        key[index, :, length:] = float("nan")
        value[index, :, length:] = float("inf")
    torch.testing.assert_close(compiled(query, key, value, **options), expected)


@pytest.mark.parametrize("kind", ["cpu", "torch"])
def test_growing_contexts_compile_twice_at_most(kind):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attention, fullgraph=True, backend=counter)
    for context in range(5, 15):
        query, (key, value) = torch.randn(B, H, 1, D), torch.randn(2, B, K, context, D)
        given = compiled(query, key, value, causal=True, backend=kind)
        torch.testing.assert_close(given, attention(query, key, value, causal=True))
    # once for the first shape, once for any context
    assert counter.frame_count <= 2


def test_compiled_attention_has_the_gradients_of_eager():
    compiled = once_compiled(attention)
    leaves = [torch.randn(B, H, 5, D), torch.randn(B, K, L, D), torch.randn(B, K, L, D)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    for options in ({"causal": True}, {"causal": True, "softcap": 2.0, "window": 3}):
        given = torch.autograd.grad(compiled(*leaves, **options).square().sum(), leaves)
        expected = torch.autograd.grad(attention(*leaves, **options).square().sum(), leaves)
        torch.testing.assert_close(given, expected)


@pytest.mark.parametrize("paradigm", ["expanded", "absorbed", "auto"])
@pytest.mark.parametrize("ragged", [False, True])
def test_compiled_latent_attention_equals_eager_and_compiles_once(paradigm, ragged):
    compiled = once_compiled(latent_attention)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            tensors = [
                *(torch.randn(B, 3, 5, D), torch.randn(B, 3, 5, 2)),
                *(torch.randn(B, L, 17), torch.randn(B, L, 2)),
                *(torch.randn(3, D, 17), torch.randn(3, 13, 17)),
            ]
            options = {"causal": True, "paradigm": paradigm}
            if ragged:
                options["kv_lengths"] = torch.randint(0, L + 1, (B,))
            given = compiled(*tensors, **options)
            expected = latent_attention(*tensors, **options)
            # float32, up to 17 products of products
            torch.testing.assert_close(given, expected, atol=1e-4, rtol=1e-4)
