"""Which keys a query may see by its position: stated once for all that is not the definition."""

from torch import Tensor


def visible_keys(
    position: Tensor, key_position: Tensor, *, causal: bool, window: int | None = None
) -> Tensor | None:
    """True where a query may see a key, broadcast over both; None where each sees all.

    >>> import torch
    >>> query, key = torch.tensor([[1], [2]]), torch.arange(3)
    >>> visible_keys(query, key, causal=True, window=2).tolist()
    [[True, True, False], [False, True, True]]

    Args:
        position: of the queries, on the key that each sits on.
        key_position: of the keys.
        causal: whether a query sees no key after its own.
        window: w, where it sees its own and the w - 1 keys before.
    """
    visible = key_position <= position if causal else None
    if window is None:
        return visible
    recent = key_position > position - window
    return recent if visible is None else visible & recent
