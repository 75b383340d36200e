"""Random blocks of GGUF's formats, products with them in float64, and a model to pack."""

import gguf
import numpy as np
import torch
from torch import Tensor

from headwise.ops import BLOCK_FORMATS

# Of a small Llama whose rows are whole blocks, and what it is given.
SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "eos_token_id": None,
}
IDS = torch.arange(1, 22)[None] % 96


def random_blocks(name: str, rows: int, blocks: int, seed: int = 0) -> Tensor:
    """uint8 [rows, blocks, bytes]: any integers, and scales that are small numbers."""
    random, known = np.random.default_rng(seed), BLOCK_FORMATS[name]
    made = random.integers(0, 256, (rows, blocks, known.bytes), dtype=np.uint8)
    for offset, size in known.units():
        if size == 2:
            scales = (0.01 * random.standard_normal((rows, blocks, 1))).astype(np.float16)
            made[..., offset : offset + 2] = scales.view(np.uint8)
    return torch.from_numpy(made)


def numbers_of(blocks: Tensor, name: str) -> np.ndarray:
    """float32 [rows, E], as the gguf package reads rows of blocks."""
    return gguf.dequantize(blocks.flatten(1).numpy(), gguf.GGMLQuantizationType[name])


def rounded(x: Tensor) -> np.ndarray:
    """x [n, E] rounded to integers of 8 bits with a scale for each 32, in float64."""
    groups = x.float().numpy().reshape(len(x), -1, 32)
    top = np.abs(groups).max(-1, keepdims=True)
    counts = top > 1e-30
    factor = np.where(counts, np.float32(127) / np.where(counts, top, 1), 0).astype(np.float32)
    unit = np.where(counts, top / np.float32(127), 0).astype(np.float32)
    levels = np.rint((groups * factor).astype(np.float32)).astype(np.float64)
    return (levels * unit).reshape(len(x), -1)
