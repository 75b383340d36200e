"""A mask or bias of fewer dims broadcasts from the last one on, as in PyTorch's own attention."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import headwise

B, H, S, L, D = 2, 6, 5, 11, 8
SHAPES = [(L,), (S, L), (1, L), (S, 1), (H, S, L), (1, S, L), (H, 1, L), (B, 1, S, L)]


def _inputs() -> tuple[torch.Tensor, ...]:
    return torch.randn(B, H, S, D), torch.randn(B, H, L, D), torch.randn(B, H, L, D)


@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_is_pytorchs(shape: tuple[int, ...], backend: str) -> None:
    query, key, value = _inputs()
    mask, bias = torch.rand(shape) > 0.3, torch.randn(shape)
    mask[..., -1:] = True  # no row is empty
    whole = [extra.expand(B, H, S, L) for extra in (mask, bias)]
    masked = scaled_dot_product_attention(query, key, value, attn_mask=whole[0])
    biased = scaled_dot_product_attention(query, key, value, attn_mask=whole[1])
    both = scaled_dot_product_attention(
        query, key, value, attn_mask=whole[1].masked_fill(~whole[0], -torch.inf)
    )
    given = [
        headwise.attention(query, key, value, **extras, backend=backend)
        for extras in ({"mask": mask}, {"bias": bias}, {"mask": mask, "bias": bias})
    ]
    for ours, expected in zip(given, (masked, biased, both), strict=True):
        torch.testing.assert_close(ours, expected)


def test_latent_attention_and_the_modules_take_it_too() -> None:
    mask = torch.rand(S, L) > 0.3
    mask[:, 0] = True
    tensors = (
        *(torch.randn(B, H, S, 8), torch.randn(B, H, S, 4)),
        *(torch.randn(B, L, 16), torch.randn(B, L, 4)),
        *(torch.randn(H, 8, 16), torch.randn(H, 6, 16)),
    )
    for paradigm in ("expanded", "absorbed"):
        given = headwise.latent_attention(*tensors, mask=mask, paradigm=paradigm)
        expected = headwise.latent_attention(*tensors, mask=mask[None, None], paradigm=paradigm)
        assert torch.equal(given, expected)
    spec = headwise.AttentionSpec(heads=4, kv_heads=2, head_dim=8, value_dim=8)
    layer, hidden = headwise.nn.Attention(spec), torch.randn(B, S, 32)
    square = torch.ones(S, S, dtype=torch.bool).tril()
    assert torch.equal(layer(hidden, mask=square), layer(hidden, mask=square[None, None]))


def test_explain_takes_what_attention_takes() -> None:
    query, key, value = _inputs()
    mask = torch.ones(S, L, dtype=torch.bool)
    assert headwise.explain(query, key, value, mask=mask) == headwise.explain(
        query, key, value, mask=mask[None, None]
    )
