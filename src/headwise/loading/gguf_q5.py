"""Q5_0 and Q5_1, two block formats of ggml that Transformers' reader of GGUF files does not have.

A block holds 32 weights of 5 bits: four in the nibbles of 16 bytes, the low nibbles first, and the
fifth in a 32-bit word. A weight is d (q - 16) in Q5_0 and d q + m in Q5_1; d and m are float16.
Source: ggml, `block_q5_0` and `block_q5_1` of ggml-common.h.
"""

import torch
from torch import Tensor

_Q5_0, _Q5_1 = 6, 7  # as `enum ggml_type` numbers them
_WEIGHTS = 32


def teach_q5() -> None:
    """Have Transformers' reader know both, where it does not yet; any number of times."""
    from transformers.integrations.gguf import dequant

    for number, name, size, values in (
        (_Q5_0, "Q5_0", 22, _q5_0),
        (_Q5_1, "Q5_1", 24, _q5_1),
    ):
        dequant.GGML_BLOCK.setdefault(number, (_WEIGHTS, size))
        dequant.GGML_NAME.setdefault(number, name)
        dequant._DEQUANT.setdefault(number, values)


def _q5_0(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    """Blocks [n, 22], bytes, to weights [n, 32]."""
    return _half(blocks, 0, dtype) * (_five_bits(blocks[:, 2:6], blocks[:, 6:]).to(dtype) - 16)


def _q5_1(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    """Blocks [n, 24], bytes, to weights [n, 32]."""
    scaled = _half(blocks, 0, dtype) * _five_bits(blocks[:, 4:8], blocks[:, 8:]).to(dtype)
    return scaled + _half(blocks, 2, dtype)


def _half(blocks: Tensor, start: int, dtype: torch.dtype) -> Tensor:
    return blocks[:, start : start + 2].contiguous().view(torch.float16).to(dtype)


def _five_bits(high: Tensor, low: Tensor) -> Tensor:
    """The fifth bits [n, 4] and the nibbles [n, 16], bytes, to numbers [n, 32] of 0 to 31."""
    bit = torch.arange(8, dtype=torch.uint8)
    fifth = ((high.unsqueeze(-1) >> bit) & 1).flatten(1)
    return torch.cat([low & 0xF, low >> 4], dim=1) | (fifth << 4)
