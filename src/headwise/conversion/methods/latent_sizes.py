"""The sizes of latents: R and P of every layer, under one budget of cached elements."""

from headwise.conversion.target import Target
from headwise.errors import ConversionError
from headwise.spec import AttentionSpec

# Of the elements of a layer, how many are rotary: what measured best on SmolLM2 at half its cache.
_ROPE_SHARE = 1 / 3


def even_sizes(spec: AttentionSpec, target: Target, layers: int) -> list[tuple[int, int]] | None:
    """(R, P) alike in all layers; None where everything is kept.

    >>> spec = AttentionSpec(heads=9, kv_heads=3, head_dim=64, value_dim=64)
    >>> even_sizes(spec, Target.parse("mla:50%"), layers=2)
    [(128, 64), (128, 64)]

    Raises:
        ConversionError: a share that leaves nothing, or everything.
    """
    if target.exact:
        return None
    if target.rank is not None and target.rope_dim is not None:
        return [(target.rank, target.rope_dim)] * layers
    assert target.share is not None
    wanted = target.share * spec.cache_elements_per_token
    step = 8 if wanted >= 64 else 2  # of a vector, where that is a fine step
    budget = round(wanted / step) * step
    if not 2 * step <= budget < spec.cache_elements_per_token:
        raise ConversionError(
            f"to is {str(target)!r}: expected a share that leaves between {2 * step} and "
            f"{spec.cache_elements_per_token - step} of the {spec.cache_elements_per_token} "
            "elements that a token takes in a layer; mla alone keeps all"
        )
    rope = max(step, round(_ROPE_SHARE * budget / step) * step)
    return [(budget - rope, rope)] * layers
