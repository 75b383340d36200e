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


def part_of(tensor: Tensor, dim: int, part: slice) -> Tensor:
    """A part of a tensor that broadcasts to [B,H,S,L]: of 4 dims, whole where it is of size 1.

    >>> import torch
    >>> part_of(torch.zeros(1, 6, 9), 2, slice(2, 5)).shape
    torch.Size([1, 1, 3, 9])
    """
    tensor = tensor[(None,) * (4 - tensor.ndim)]
    return tensor if tensor.shape[dim] == 1 else tensor[(slice(None),) * dim + (part,)]
