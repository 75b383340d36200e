"""Q5_0 and Q5_1, which Transformers' reader lacks: the values that the gguf package reads."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, Qwen2Config

from headwise.loading import load
from headwise.loading.gguf.q5 import teach_q5
from loading.gguf_files import SIZES, make_stock, write_gguf

KINDS = ("Q5_0", "Q5_1")


@pytest.mark.parametrize("name", KINDS)
def test_any_block_is_read_as_the_gguf_package_reads_it(name: str) -> None:
    from transformers.integrations.gguf.dequant import GGML_BLOCK, dequantize

    teach_q5()
    kind = gguf.GGMLQuantizationType[name]
    assert GGML_BLOCK[kind] == gguf.GGML_QUANT_SIZES[kind]
    rows = np.random.default_rng(1).integers(0, 256, (999, GGML_BLOCK[kind][1]), dtype=np.uint8)
    # scales of which no value of the block is infinite or NaN
    rows[:, 1] = rows[:, 1] & 0x3B
    rows[:, 3] = rows[:, 3] & 0x3B
    expected = gguf.dequantize(rows, kind)
    given = dequantize(torch.from_numpy(rows), int(kind))
    assert np.array_equal(given.reshape(expected.shape).numpy(), expected)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    ("architecture", "config_class"), [("llama", LlamaConfig), ("qwen2", Qwen2Config)]
)
def test_a_model_of_such_blocks_is_loaded(
    name: str, architecture: str, config_class: type, tmp_path: Path
) -> None:
    sizes = SIZES | {"hidden_size": 96, "intermediate_size": 160}
    stock = make_stock(config_class(**sizes))
    model, _ = load(
        write_gguf(tmp_path / "m.gguf", stock, architecture, quantized=name), dtype="float32"
    )
    kind = gguf.GGMLQuantizationType[name]
    ours, rounded = model.state_dict(), 0
    for key, weight in stock.state_dict().items():
        exact = weight.numpy()
        if weight.ndim > 1:
            exact, rounded = gguf.dequantize(gguf.quantize(exact, kind), kind), rounded + 1
        assert np.array_equal(ours[key].numpy(), exact), key
    assert rounded > 10
