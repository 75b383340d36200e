"""Models that see and hear, and encoder-decoders: what stock generates, and what is attached."""

from typing import Any

import pytest
import torch

import headwise
from headwise.hf.module_hook import NAME
from headwise.spec import ModelSpec
from hf.multimodal import MODELS

# these run at every change
_OFTEN = ("llava", "qwen2_5_vl", "gemma4", "llama4", "whisper")
# of what stays with Transformers, the beginning of the note
_LEFT = {
    "qwen3_5": "a recurrent or linear",
    "lfm2_vl": "a short convolution",
    "got_ocr2": "does not take its attention",
}
# without a reader in this release: what calls need is read from their arguments
_UNREAD = ("mllama", "bart", "marian", "m2m_100", "pegasus")


def _made(name: str) -> tuple[Any, dict[str, torch.Tensor]]:
    torch.manual_seed(11)
    model, inputs = MODELS[name]()
    return model.eval(), inputs


def _generated(model: Any, inputs: dict[str, torch.Tensor]) -> Any:
    return model.generate(
        **inputs,
        max_new_tokens=12,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )


def _assert_same(given: Any, expected: Any) -> None:
    assert torch.equal(given.sequences, expected.sequences)
    for ours, stock in zip(given.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, stock, atol=1e-4 * float(stock.abs().max()), rtol=0)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in _OFTEN else [pytest.mark.sweep], id=name)
        for name in MODELS
    ],
)
def test_the_decoder_is_attached_and_generates_the_tokens_of_stock(name: str) -> None:
    model, inputs = _made(name)
    expected = _generated(model, inputs)
    report = headwise.attach(model)
    _assert_same(_generated(model, inputs), expected)
    assert model.config.get_text_config()._attn_implementation == NAME
    attached = [layer for layer in report.layers if not layer.stock]
    assert attached
    assert all((layer.spec is None) == (name in _UNREAD) for layer in attached)
    left = {layer.note for layer in report.layers if layer.stock}
    assert len(left) == (1 if name in _LEFT else 0)
    assert all(note.startswith(_LEFT[name]) for note in left)
    headwise.detach(model)
    assert torch.equal(_generated(model, inputs).sequences, expected.sequences)


@pytest.mark.parametrize("name", ["llava", "gemma4"])
def test_the_cache_of_an_attached_decoder_is_ours_and_takes_what_the_spec_says(name: str) -> None:
    model, inputs = _made(name)
    report = headwise.attach(model)
    cache = _generated(model, inputs).cache
    tokens = inputs["input_ids"].shape[1] + 11
    spec = ModelSpec.from_config(model.config)
    assert headwise.hf.cache_nbytes(cache) == spec.cache_bytes(tokens, 2, "float32")
    # layers that share keys have none, or before Transformers 5.23 are not there
    held = {layer.cache.partition(":")[0] for layer in report.layers} - {"none"}
    assert held == ({"contiguous", "window"} if name == "gemma4" else {"contiguous"})
