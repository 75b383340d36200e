"""The four projections of an attention layer; a bias is a column for an input that is always 1."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Projections:
    """W_q [H*D, E+1], W_k [K*D, E+1], W_v [K*V, E+1] with the bias last, and W_o [E, H*V].

    Args:
        biased: whether query, key and value have a bias at all.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    heads: int
    kv_heads: int
    biased: bool

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], heads: int, kv_heads: int) -> "Projections":
        """From a layer's tensors, by Llama's names within its `self_attn`."""
        return cls(
            augmented(tensors, "q_proj"),
            augmented(tensors, "k_proj"),
            augmented(tensors, "v_proj"),
            tensors["o_proj.weight"],
            heads,
            kv_heads,
            biased="k_proj.bias" in tensors,
        )

    @property
    def group_size(self) -> int:
        """G, query heads of a kv head."""
        return self.heads // self.kv_heads

    @property
    def head_dim(self) -> int:
        """D."""
        return len(self.key) // self.kv_heads

    @property
    def value_dim(self) -> int:
        """V."""
        return len(self.value) // self.kv_heads

    def permuted(self, order: list[int]) -> "Projections":
        """The kv heads, each with its query heads, in another order: the same function."""
        kv = torch.tensor(order)

        def reordered(matrix: Tensor, dim: int) -> Tensor:
            heads = matrix.unflatten(dim, (self.kv_heads, -1)).index_select(dim, kv)
            return heads.flatten(dim, dim + 1)

        return replace(
            self,
            query=reordered(self.query, 0),
            key=reordered(self.key, 0),
            value=reordered(self.value, 0),
            output=reordered(self.output, 1),
        )

    def split(self, name: str, augmented: Tensor) -> dict[str, Tensor]:
        """An augmented matrix as the tensors of a Linear called `name`."""
        tensors = {f"{name}.weight": augmented[:, :-1].contiguous()}
        if self.biased:
            tensors[f"{name}.bias"] = augmented[:, -1].contiguous()
        return tensors

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All four, by Llama's names within its `self_attn`."""
        return {
            **self.split("q_proj", self.query),
            **self.split("k_proj", self.key),
            **self.split("v_proj", self.value),
            "o_proj.weight": self.output,
        }


def augmented(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """The matrix [out, E+1] of a Linear called `name`, its bias (or zeros) last."""
    weight, bias = tensors[f"{name}.weight"], tensors.get(f"{name}.bias")
    last = weight.new_zeros(len(weight)) if bias is None else bias
    return torch.cat([weight, last[:, None]], dim=1)
