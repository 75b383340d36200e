"""Head counts and sizes that families derive from other fields in the same way."""

from headwise.errors import SpecError
from headwise.spec.readers.fields import ConfigFields


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
