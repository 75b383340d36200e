"""A product and an embedding whose weight is a packed matrix, in place of nn.Linear's."""

from typing import Any

import torch
from torch import Tensor, nn

from headwise.errors import UnsupportedError
from headwise.ops import faster, format_of, packed_columns, packed_linear, unpack
from headwise.ops.modes import FEW_ROWS

_FLOAT = 'load the model with weights="float" for weights that can be changed'


class PackedWeight(nn.Module):
    """What both have: a packed matrix as a buffer, which reads as a weight of numbers.

    `packed` is uint8 [F, blocks, bytes of a block], and two modules may share it, as an embedding
    and the head that is tied to it. `like` is empty; it has the dtype that the model is moved to.

    `weight` is made anew each time it is read, and cannot be written to. The state dict has it
    under that name, so that what is saved is an ordinary checkpoint. It is no parameter, and
    nothing trains it.
    """

    packed: Tensor
    like: Tensor

    def __init__(self, packed: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("packed", packed, persistent=False)
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)
        self.transposed = False  # of the weight that it stands for, as Conv1D has it

    def _numbers(self) -> Tensor:
        numbers = unpack(self.packed, self.like.dtype)
        return numbers.t().contiguous() if self.transposed else numbers

    @property
    def weight(self) -> Tensor:
        """The numbers [F,E] in the model's dtype."""
        # a write would be lost: PyTorch refuses one to what inference mode made
        with torch.inference_mode():
            return self._numbers()

    @weight.setter
    def weight(self, value: Any) -> None:
        raise UnsupportedError(f"a packed weight cannot be set: {_FLOAT}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":  # a Parameter would go past the property
            raise UnsupportedError(f"a packed weight cannot be set: {_FLOAT}")
        super().__setattr__(name, value)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self._numbers()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *arguments: Any) -> None:
        *_, unexpected, errors = arguments
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        name = f"{prefix}weight"
        if name in state_dict:
            unexpected[:] = [each for each in unexpected if each != name]
            errors.append(f"{name} is packed and cannot be loaded into: {_FLOAT}")

    def extra_repr(self) -> str:
        """What it prints beside its name."""
        rows, columns = self.packed.shape[0], packed_columns(self.packed)
        return f"{columns}, {rows}, format={format_of(self.packed).name}"


class PackedLinear(PackedWeight):
    """x [...,E] by the transpose of a packed matrix [F,E], plus a bias [F]: as nn.Linear computes.

    On the CPU x is rounded to integers of 8 bits, with a scale for each 32. Elsewhere, and where
    gradients to x are needed, the matrix is made numbers first.

        >>> import torch
        >>> from headwise.ops import round_blocks
        >>> module = PackedLinear(round_blocks(torch.eye(32), 8), None, torch.float32)
        >>> module(torch.ones(1, 32)).shape, module
        (torch.Size([1, 32]), PackedLinear(32, 32, format=Q8_0))
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        packed: Tensor,
        bias: nn.Parameter | None,
        dtype: torch.dtype,
        *,
        transposed: bool = False,
    ) -> None:
        super().__init__(packed, dtype)
        self.transposed = transposed
        self.out_features, self.in_features = packed.shape[0], packed_columns(packed)
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """[...,E] to [...,F]."""
        return packed_linear(x, self.packed, self.bias)


class PackedEmbedding(PackedWeight):
    """The rows of a packed matrix [F,E] that are asked for, as nn.Embedding gives them.

    `embed_scale` multiplies them, as in Gemma's embedding; None: nothing does.
    """

    embed_scale: Tensor | None

    def __init__(
        self,
        packed: Tensor,
        padding_idx: int | None,
        dtype: torch.dtype,
        embed_scale: Tensor | None = None,
    ) -> None:
        super().__init__(packed, dtype)
        self.register_buffer("embed_scale", embed_scale, persistent=False)
        self.num_embeddings, self.embedding_dim = packed.shape[0], packed_columns(packed)
        self.padding_idx = padding_idx

    def forward(self, input: Tensor) -> Tensor:
        """Indices [...] to rows [...,E].

        Raises:
            IndexError: an index below 0, or that of no row.
        """
        rows = unpack(self.packed, self.like.dtype, input.flatten())
        if self.embed_scale is not None:
            rows = rows * self.embed_scale.to(rows.dtype)
        return rows.view(*input.shape, self.embedding_dim)


def weight_of(module: Any) -> Tensor:
    """What a product multiplies by: a weight, or a packed matrix."""
    weight: Tensor = module.packed if type(module) is PackedLinear else module.weight
    return weight


def makes_numbers(model: nn.Module) -> bool:
    """Whether a prompt is multiplied by packed weights as numbers, which are made for each call."""
    packed = next((each for each in model.modules() if isinstance(each, PackedLinear)), None)
    if packed is None:
        return False
    many = packed.like.new_empty(FEW_ROWS + 1, packed.in_features)
    with torch.no_grad():
        return faster("linear", many, (packed.packed,), (None,)) is None
