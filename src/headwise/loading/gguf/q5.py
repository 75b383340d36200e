"""Q5_0 and Q5_1, two block formats of ggml that Transformers' reader of GGUF files does not have.

Their sizes and values are those of the gguf package.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor


def teach_q5() -> None:
    """Have Transformers' reader know both, where it does not yet; any number of times."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    from headwise.hf.stock_names import _DEQUANT, GGML_BLOCK, GGML_NAME

    for kind in (GGMLQuantizationType.Q5_0, GGMLQuantizationType.Q5_1):
        GGML_BLOCK.setdefault(kind, GGML_QUANT_SIZES[kind])
        GGML_NAME.setdefault(kind, kind.name)
        _DEQUANT.setdefault(kind, partial(_dequantize, kind))


def _dequantize(kind: Any, blocks: Tensor, dtype: torch.dtype) -> Tensor:
    """Blocks of bytes [n, 22 or 24] to weights [n, 32]."""
    from gguf import dequantize

    return torch.from_numpy(dequantize(blocks.numpy(), kind)).to(dtype)
