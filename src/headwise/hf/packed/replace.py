"""Which modules of a model can hold a packed weight, and putting one there."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from headwise.hf.packed.modules import PackedEmbedding, PackedLinear
from headwise.hf.stock_names import Conv1D


def holders(model: nn.Module) -> dict[str, nn.Module]:
    """The products and embeddings that can, by the name of the weight.

    They are of PyTorch's own classes, or embeddings of Transformers that are scaled.
    """
    return {f"{name}.weight": module for name, module in model.named_modules() if is_holder(module)}


def is_holder(module: nn.Module) -> bool:
    """Whether a module multiplies by a weight, or looks rows of it up, as PyTorch's own do."""
    return type(module) in (nn.Linear, nn.Embedding) or _is_scaled(module)


def _is_scaled(module: nn.Module) -> bool:
    """Whether an embedding multiplies its rows by a number, and does nothing else."""
    kind = type(module)
    scaled = isinstance(module, nn.Embedding) and kind.__name__.endswith("ScaledWordEmbedding")
    own = kind.__module__.startswith("transformers.models.") and "embed_scale" in module._buffers
    return scaled and own


def put_packed(model: nn.Module, packed: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Put packed matrices, by the name of the weight, in place of the modules that hold those."""
    for name, matrix in packed.items():
        place = name.removesuffix(".weight")
        model.set_submodule(place, packed_module(model.get_submodule(place), matrix, dtype))


def packed_module(module: nn.Module, matrix: Tensor, dtype: torch.dtype) -> nn.Module:
    """What stands in for a product or an embedding."""
    new: nn.Module
    if isinstance(module, nn.Embedding):
        scale = module._buffers.get("embed_scale")
        new = PackedEmbedding(matrix, module.padding_idx, dtype, scale)
    else:
        bias = module._parameters["bias"]
        assert bias is None or isinstance(bias, nn.Parameter)
        new = PackedLinear(matrix, bias, dtype, transposed=type(module) is Conv1D)
    return new.train(module.training)
