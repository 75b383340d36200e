"""Head counts and sizes that families derive from other fields in the same way."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from headwise.errors import SpecError
from headwise.spec.attention import AttentionSpec
from headwise.spec.config.fields import ConfigFields


def split_hidden(
    fields: ConfigFields, hidden: str = "hidden_size", heads: str = "num_attention_heads"
) -> int:
    """D where the heads share the hidden size equally.

    >>> split_hidden(ConfigFields({"hidden_size": 768, "num_attention_heads": 12}))
    64

    Raises:
        SpecError: when the hidden size is not a multiple of the heads.
    """
    size, count = fields.positive(hidden), fields.positive(heads)
    if size % count:
        raise SpecError(
            f"{hidden}={size} is not a multiple of {heads}={count}: expected heads of equal size"
        )
    return size // count


def key_value_heads(fields: ConfigFields, heads: int, name: str = "num_key_value_heads") -> int:
    """K; a config whose value is null has one kv head per query head.

    >>> key_value_heads(ConfigFields({"num_key_value_heads": None}), 12)
    12

    Raises:
        SpecError: when it does not divide the query heads.
    """
    count = fields.optional_positive(name)
    if count is None:
        return heads
    if heads % count:
        raise SpecError(
            f"{name}={count} does not divide num_attention_heads={heads}: "
            "expected each kv head to serve equally many query heads"
        )
    return count


def grouped_heads(
    fields: ConfigFields, head_dim: int | None = None, **options: Any
) -> AttentionSpec:
    """Attention with the fields of Llama's kin; `options` are those of `AttentionSpec`.

    `head_dim` is given where the field does not count.

    >>> config = {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64}
    >>> print(grouped_heads(ConfigFields(config), window=128))
    GQA 9/3 heads, D 64, window 128
    """
    heads = fields.positive("num_attention_heads")
    if head_dim is None:
        head_dim = fields.optional_positive("head_dim") or split_hidden(fields)
    return AttentionSpec(
        heads=heads,
        kv_heads=key_value_heads(fields, heads),
        head_dim=head_dim,
        value_dim=head_dim,
        **options,
    )


def equal_heads(heads: int, head_dim: int, **options: Any) -> AttentionSpec:
    """MHA: a kv head per query head, keys and values of one size."""
    return AttentionSpec(
        heads=heads, kv_heads=heads, head_dim=head_dim, value_dim=head_dim, **options
    )


def with_windows(attention: AttentionSpec, windows: Sequence[int | None]) -> list[AttentionSpec]:
    """One layer of this attention per window."""
    return [replace(attention, window=window) for window in windows]
