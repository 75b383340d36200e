"""Whether a model caches is what its cache does: PaliGemma and others whose flags say otherwise.

The right value is what Transformers' own cache grows by when a model has read one token more.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import headwise
from headwise.hf.cache import cache_nbytes
from headwise.hf.stock_names import CACHE
from headwise.planning import plan
from headwise.spec import ModelSpec
from older_stock import needs

CAPPED = needs("5.22", "SDPA leaves out the cap of Gemma 2's scores")

_TEXT: dict[str, Any] = {
    "vocab_size": 120,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_SLIDING = _TEXT | {"sliding_window": 64}
_BOTH_SIDES = {"use_bidirectional_attention": True}
_BERT: dict[str, Any] = {
    "vocab_size": 120,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
_GPT2 = {"n_embd": 48, "n_layer": 2, "n_head": 6, "n_positions": 256, "vocab_size": 120}
_VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
    "projection_dim": 48,
}
_IMAGE, _IMAGE_TOKENS = 110, 16


def _paligemma(inner: str, **changes: Any) -> Any:
    torch.manual_seed(3)
    text = (_TEXT if inner == "gemma" else _SLIDING) | changes | {"model_type": inner}
    return hf.PaliGemmaForConditionalGeneration(
        hf.PaliGemmaConfig(
            text_config=text,
            vision_config=dict(_VISION),
            image_token_index=_IMAGE,
            projection_dim=48,
            hidden_size=48,
        )
    ).eval()


def _gemma3_images(**changes: Any) -> Any:
    config = hf.Gemma3Config(
        text_config=_SLIDING | changes,
        vision_config=dict(_VISION),
        mm_tokens_per_image=4,
        image_token_index=_IMAGE,
    )
    return hf.Gemma3ForConditionalGeneration(config)


_COVERED: dict[str, Callable[[], Any]] = {
    "paligemma": lambda: _paligemma("gemma"),
    "paligemma 2": lambda: _paligemma("gemma2"),
    "paligemma's text model": lambda: _paligemma("gemma").model.language_model,
    "paligemma without a head": lambda: _paligemma("gemma2").model,
    "gemma": lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**_TEXT, **_BOTH_SIDES)),
    "gemma 2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**_SLIDING, **_BOTH_SIDES)),
    "gemma 3": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**_SLIDING, **_BOTH_SIDES)),
    "gemma 3 with images": _gemma3_images,
    "gemma 3 with images, to both sides": lambda: _gemma3_images(**_BOTH_SIDES),
    "bert": lambda: hf.BertModel(hf.BertConfig(**_BERT)),
    "bert with a head that could decode": lambda: hf.BertLMHeadModel(hf.BertConfig(**_BERT)),
    "bert as a decoder": lambda: hf.BertModel(hf.BertConfig(**_BERT, is_decoder=True)),
    "roberta as a decoder": lambda: hf.RobertaForCausalLM(
        hf.RobertaConfig(**_BERT, is_decoder=True)
    ),
    "t5's encoder": lambda: hf.T5EncoderModel(
        hf.T5Config(vocab_size=120, d_model=48, d_kv=8, d_ff=64, num_layers=2, num_heads=6)
    ),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**_GPT2)),
    "gpt2 that is asked for its cache": lambda: hf.GPT2Model(
        hf.GPT2Config(**_GPT2, use_cache=False)
    ),
    "llama without a head": lambda: hf.LlamaModel(hf.LlamaConfig(**_TEXT)),
    "llama that classifies": lambda: hf.LlamaForSequenceClassification(hf.LlamaConfig(**_TEXT)),
}
# Of no family with a reader: the report alone says what is cached.
_OTHERS: dict[str, Callable[[], Any]] = {
    "electra": lambda: hf.ElectraForCausalLM(hf.ElectraConfig(**_BERT, embedding_size=48)),
    "electra as a decoder": lambda: hf.ElectraForCausalLM(
        hf.ElectraConfig(**_BERT, embedding_size=48, is_decoder=True)
    ),
    "xlm-roberta": lambda: hf.XLMRobertaForCausalLM(hf.XLMRobertaConfig(**_BERT)),
    "clip's text": lambda: hf.CLIPTextModel(
        hf.CLIPTextConfig(**_BERT | {"max_position_embeddings": 64})
    ),
    "gpt-neox, which is_decoder calls none": lambda: hf.GPTNeoXForCausalLM(
        hf.GPTNeoXConfig(**_BERT, is_decoder=False)
    ),
    "bart's decoder": lambda: hf.BartForCausalLM(
        hf.BartConfig(
            vocab_size=120,
            d_model=48,
            decoder_layers=2,
            decoder_attention_heads=6,
            decoder_ffn_dim=64,
        )
    ),
}


@torch.no_grad()
def held(model: Any, tokens: int) -> int:
    """Bytes of the cache that the model makes itself of one sequence; 0 where it makes none."""
    asked = {} if getattr(model.config, "use_cache", True) else {"use_cache": True}
    if isinstance(model, hf.T5EncoderModel):
        asked = {}
    found = model(input_ids=torch.arange(1, tokens + 1)[None], **asked)
    cache = found.get(CACHE)
    return 0 if cache is None else cache_nbytes(cache)


def grown(model: Any) -> int:
    return held(model, 13) - held(model, 12)


@pytest.mark.parametrize("name", _COVERED)
def test_what_is_said_to_be_cached_is_what_stocks_cache_grows_by(name: str, tmp_path: Path) -> None:
    model = _COVERED[name]().eval()
    expected = grown(model)
    assert ModelSpec.from_config(model.config).cache_bytes_per_token("float32") == expected
    model.config.save_pretrained(tmp_path)
    planned = plan(tmp_path, context=20, dtype="float32", device="h100")
    assert planned.bytes_per_token == expected
    assert planned.cached.needed == planned.cached.stock == 20 * expected
    assert (planned.decode is None) == (expected == 0)
    report = headwise.attach(model)
    assert report.cache.startswith("contiguous" if expected else "none")
    assert grown(model) == expected
    if expected:
        headwise.attach(model, cache="int8")
    else:
        with pytest.raises(headwise.UnsupportedError, match="no cache that grows"):
            headwise.attach(model, cache="int8")


@pytest.mark.parametrize("name", _OTHERS)
def test_the_report_of_other_families_says_it_too(name: str) -> None:
    model = _OTHERS[name]().eval()
    expected = grown(model)
    assert headwise.attach(model).cache.startswith("contiguous" if expected else "none of ours")
    assert grown(model) == expected


def test_a_head_that_hands_no_cache_on_has_none_of_ours() -> None:
    model = hf.BertForMaskedLM(hf.BertConfig(**_BERT, is_decoder=True)).eval()
    assert held(model, 5) == 0
    assert headwise.attach(model).cache == "none of ours"
    colpali = hf.ColPaliForRetrieval(
        hf.ColPaliConfig(vlm_config=_paligemma("gemma").config.to_dict())
    ).eval()
    ids = torch.arange(1, 8)[None]
    with torch.no_grad():
        expected = colpali(input_ids=ids, attention_mask=torch.ones_like(ids)).embeddings
        assert headwise.attach(colpali).cache == "none of ours"
        found = colpali(input_ids=ids, attention_mask=torch.ones_like(ids)).embeddings
    torch.testing.assert_close(found, expected)


def test_an_embedding_model_is_an_encoder() -> None:
    config = hf.Gemma3TextConfig(**_SLIDING, **_BOTH_SIDES)
    config.architectures = ["Gemma3TextModel"]
    spec = ModelSpec.from_config(config)
    assert (len(spec.layers), len(spec.encoder_layers)) == (0, 2)
    config.architectures = ["Gemma3ForCausalLM"]
    assert ModelSpec.from_config(config).cache_bytes_per_token("float32") == 256


def test_a_file_that_leaves_the_flag_out_reads_as_the_config_class_fills_it_in() -> None:
    config = _paligemma("gemma2").config
    fields = config.to_dict()
    for given in ({}, {"use_bidirectional_attention": None}):
        text = dict(fields["text_config"])
        del text["use_bidirectional_attention"]
        read = ModelSpec.from_config(fields | {"text_config": text | given})
        assert read == ModelSpec.from_config(config)
    assert "bidirectional prefix" in str(read)


def _asked(suffix: int | None, padded: bool) -> dict[str, Any]:
    """Two prompts with an image; `suffix`: the last tokens that are causal, None: no types."""
    ids = torch.tensor([[_IMAGE] * _IMAGE_TOKENS + [1, 5, 6, 7], [_IMAGE] * 16 + [1, 9, 3, 8]])
    types = torch.zeros_like(ids)
    if suffix:
        types[:, -suffix:] = 1
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": types}
    if padded:
        padding = torch.zeros(2, 2, dtype=torch.int64)
        given = {name: torch.cat([padding, rows], 1) for name, rows in given.items()}
    if suffix is None:
        del given["token_type_ids"]
    return given | {"pixel_values": torch.randn(2, 3, 28, 28)}


@torch.no_grad()
def _runs(model: Any, given: dict[str, Any], padding: int) -> tuple[torch.Tensor, ...]:
    """Logits of the prompt and of a second turn on its cache; tokens; tokens by prompt lookup."""
    first = model(**given)
    turn = torch.tensor([[3, 4, 5], [6, 7, 8]])
    mask = torch.cat([given["attention_mask"], torch.ones_like(turn)], 1)
    second = model(input_ids=turn, attention_mask=mask, cache=first.cache)
    one = {name: rows[:1] for name, rows in given.items()}
    options = {"max_new_tokens": 6, "do_sample": False}
    return (
        # what padding itself gets is not read by anyone
        first.logits[:, padding:],
        second.logits,
        model.generate(**given, **options),
        model.generate(**one, **options, prompt_lookup_num_tokens=3),
    )


@pytest.mark.parametrize(("suffix", "padded"), [(None, False), (0, True), (3, False)])
@pytest.mark.parametrize("inner", ["gemma", pytest.param("gemma2", marks=CAPPED)])
def test_paligemma_gives_stocks_tokens_with_every_cache(
    inner: str, suffix: int | None, padded: bool
) -> None:
    model = _paligemma(inner, **({"sliding_window": 9} if inner == "gemma2" else {}))
    given, padding = _asked(suffix, padded), 2 * padded
    expected = _runs(model, given, padding)
    for cache, tolerance in (("contiguous", 5e-5), ("paged:16", 5e-5), ("int8", 0.2)):
        headwise.attach(model, cache=cache)
        found = _runs(model, given, padding)
        for at, stock in zip(found[:2], expected[:2]):
            torch.testing.assert_close(at, stock, rtol=0, atol=tolerance)
        for at, stock in zip(found[2:], expected[2:]):
            assert torch.equal(at, stock)


@pytest.mark.parametrize("name", ["gemma", pytest.param("gemma 2", marks=CAPPED), "gemma 3"])
def test_a_text_model_to_both_sides_sees_what_stocks_implementation_sees(name: str) -> None:
    """For SDPA no mask hides nothing, eager always has one: a prompt, and more on its cache."""
    torch.manual_seed(5)
    model = _COVERED[name]().eval()
    ids, more = torch.randint(1, 120, (2, 11)), torch.randint(1, 120, (2, 4))

    @torch.no_grad()
    def runs() -> list[torch.Tensor]:
        first = model(input_ids=ids)
        second = model(input_ids=more, cache=first.cache)
        return [
            first.logits,
            second.logits,
            model(input_ids=more[:, :1], cache=second.cache).logits,
        ]

    expected = runs()
    headwise.attach(model)
    for found, stock in zip(runs(), expected):
        torch.testing.assert_close(found, stock, rtol=0, atol=5e-5)
